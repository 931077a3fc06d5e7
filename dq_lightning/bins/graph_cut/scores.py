"""Scores of all rows, in whole numbers that are brought up to date from pick to pick, within a proved error bound."""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.bins.graph_cut.costs import CACHED
from dq_lightning.bins.graph_cut.pool import Doubt, Pool
from dq_lightning.bins.rows import Rows

# The unit roundoff of float32, with room for the second-order terms of error bounds.
SINGLE = 2.0**-24 * 1.01
# Up to this many rows an entry of the matrix has 4 bytes. With more rows the memory costs more than the decisions that
# the finer numbers save, so that it has 2.
WIDE = 1 << 13
# Twice an inner product of the longest rows is stored as at most this whole number, by the number of bytes of an entry.
FULL = {4: 1 << 19, 2: 32700}
# The product of matrices is made in float32 if its error is below this many units, and else in float64.
_COARSE = 20.0
# Scores start at 0 or below, but at least at the lowest one. They start again before picks have changed any by more than
# `_REACH`, so those above the floor are right within their bound, and the others are below it. `_GONE` takes the score
# of a row that is above the floor below it for good. No score that is looked at leaves the range of an int32.
_LOWEST, _FLOOR, _REACH, _GONE = -2 << 29, -1 << 29, 1 << 29, 2 << 29
# What it costs to decide between rows, for each of them, and to start again from float64 gains, in the time that float64
# takes for one entry of a row, as measured.
_DECIDING, _EACH, _STARTING = 20_000, 4, 1_000_000
# The first block of proposals has this many, and all others at least the second number.
_FIRST, _SHORT = 256, 16
# Inner products are computed in squares of this many rows.
_TILE = {"cpu": 512, "cuda": 4096}


class Scores:
    """Scores of all rows of a pool: their gains as whole numbers of some unit, relative to the greatest at the start.

    A pick subtracts the inner products of its row with all rows, as whole numbers. Additions of whole numbers make no error,
    so after t picks a score is off by at most the rounding of its start plus t times the error of an inner product: that
    of the product itself, and half a unit for its rounding, or one unit without a matrix. Scores are exact if the
    gains are whole multiples of a unit that inner products can be stored in.

    Args:
        pool: n rows of width W.
        matrix: whether all inner products are computed at once, which takes 4 n^2 bytes up to 8,192 rows, and 2 n^2 with
            more. Otherwise those of a pick are computed when it is made, from float32 rows that take 4 n W bytes.

    Attributes:
        matrix: inner products [n, n], or None.
        values: int32 [n]; those of rows that cannot be picked are below all others.
        margin: a row whose score is further than this below the greatest one has a smaller gain.
        picks_left: number of picks after which scores have to start again.
    """

    def __init__(self, pool: Pool, *, matrix: bool) -> None:
        depth, size = pool.group.rows.depth, entry_bytes(pool)
        if not matrix:
            size = 4 if FULL[4] * (depth + 8) * SINGLE < _COARSE else 2
        error = FULL[size] * (depth + 8) * SINGLE
        single = error < _COARSE or not matrix
        exact = holds_exactly(pool, size)
        dtype = torch.float32 if single or exact else torch.float64
        factors, lengths = scaled_rows(pool, dtype, as_they_are=exact, by_columns=not matrix)
        scale = math.prod(lengths) ** 2
        # Products too small for float64 are all 0 in this unit.
        self._unit = pool.group.unit if exact else 2.0 * max(scale, 2.0**-1000) / FULL[size]
        self._start_error = 0.0 if exact else 1.0
        # Entries of the matrix are rounded to the nearest whole number, other products towards 0.
        self._step_error = 0.0 if exact else (0.5 if matrix else 1.0) + (error if single else error * 2.0**-28)
        self._most_picks = self.picks_left = max(1, int(_REACH / (FULL[size] + self._step_error + 1.0)))
        self.values: NDArray[np.int32] = np.zeros(len(pool), dtype=np.int32)
        self.margin = 0.0
        # Whether each of the latest picks took the last sample of its row.
        self._gone: list[bool] = []
        self.matrix: NDArray[np.signedinteger] | None = None
        if matrix:
            left = Rows((factors[0] * (2.0 * scale / self._unit), *factors[1:]))
            self.matrix = _products(left, Rows(factors), pool, size)
            return
        self._table, self._workers, rows = pool.table, pool.group.rows.workers, Rows(factors)
        self._weights = [1.0 / length for length in lengths]
        self._weights[0] *= 2.0 * scale / self._unit
        # One thread passes over rows that its cache holds sooner than several do.
        threads = 1 if len(pool) * sum(pool.group.rows.widths) <= CACHED else max(1, self._workers.count)
        products = torch.empty(len(pool), 1, device=factors[0].device)
        whole, step = torch.empty(len(pool), 1, dtype=torch.int32), -(-len(pool) // threads)
        self._parts = [
            (rows.span(*part), products[slice(*part)], whole[slice(*part)], self.values[slice(*part)])
            for part in ((first, first + step) for first in range(0, len(pool), step))
        ]

    def start(self, pool: Pool) -> None:
        """Compute the scores from the float64 gains of a pool."""
        gains = pool.gains().cpu().numpy()
        whole = np.rint(np.maximum((gains - gains.max()) / self._unit, _LOWEST))
        self.values[:] = np.where(pool.alive, whole, _LOWEST)
        self.margin = 2.0 * (self._start_error + pool.bound() / self._unit)
        # Where float64 itself cannot tell the rows apart, each pick is made from exact gains.
        self.picks_left = self._most_picks if self.margin < -_FLOOR // 2 else 1
        self._gone.clear()

    def hide(self, row: int) -> None:
        """Take the score of a row below all others."""
        self.values[row] -= _GONE

    def show(self, row: int) -> None:
        """Take back that a row was hidden."""
        self.values[row] += _GONE

    def pick(self, row: int, gone: bool) -> None:
        """Subtract what a pick costs; `gone` is whether its row, which is hidden, has no sample left."""
        if not gone:
            self.show(row)
        self._gone.append(gone)
        self.margin += 2.0 * self._step_error
        self.picks_left -= 1
        if self.matrix is not None:
            self.values -= self.matrix[row]
            return
        factors = self._table.span(row, row + 1).factors
        picked = Rows(tuple((part * weight).float() for part, weight in zip(factors, self._weights, strict=True)))
        list(self._workers.map(lambda part: _subtract(picked, *part), self._parts))

    def undo(self, rows: list[int]) -> None:
        """Take back the last picks, made of these rows, by the matrix."""
        assert self.matrix is not None
        for row in reversed(rows):
            self.values += self.matrix[row]
            self.margin -= 2.0 * self._step_error
            self.picks_left += 1
            if self._gone.pop():
                self.show(row)


def _subtract(picked: Rows, rows: Rows, products: Tensor, whole: Tensor, values: NDArray[np.int32]) -> None:
    """Subtract from values [n] the inner products of n rows with the picked one, in memory given for them, [n, 1]."""
    values -= whole.copy_(rows.inner(picked, out=products))[:, 0].numpy()


def pick_in_turn(pool: Pool, scores: Scores, count: int, tick: Callable[[int], object] = lambda count: None) -> None:
    """Make `count` picks from all rows of a pool.

    The row of greatest score is proposed. Where other scores lie within the error bound of it, the proposal is doubtful,
    and all of them are noted. `Pool.confirm` decides about the doubtful ones of a block of proposals, and the scores go
    back to the first wrong one; without a matrix they start again, which takes as long as a few picks. Blocks are longer
    the fewer are wrong. Once the decisions, which become more as the bound grows, have cost as much as exact gains of
    all rows, scores start again from those.
    """
    length, depth = _FIRST, pool.group.rows.depth
    while count > 0:
        scores.start(pool)
        budget = _STARTING + len(pool) * depth
        while count > 0 and budget > 0:
            rows, doubts = _propose(pool, scores, min(count, length))
            if not rows:
                break
            made = pool.confirm(rows, doubts).tolist()
            count -= len(made)
            tick(len(made))
            wrong = [] if made == rows else rows[len(made) - 1 :]
            length = max(_SHORT, length // 4) if wrong else 2 * length
            if wrong and scores.matrix is None:
                break
            if wrong:
                scores.undo(wrong)
                scores.hide(made[-1])
                scores.pick(made[-1], not pool.alive[made[-1]])
            budget -= sum(_DECIDING + _EACH * len(doubt.rows) * depth for doubt in doubts) + 2 * len(wrong) * len(pool)


def _propose(pool: Pool, scores: Scores, count: int) -> tuple[list[int], list[Doubt]]:
    """Return the rows of up to `count` proposed picks, none if the scores have to start again, and the doubtful ones."""
    rows: list[int] = []
    doubts: list[Doubt] = []
    values, samples, alive = scores.values, pool.samples, pool.alive
    greatest, item = values.argmax, values.item
    for step in range(min(count, scores.picks_left)):
        best = int(greatest())
        top = item(best)
        least = math.floor(max(top - scores.margin, 2 * _LOWEST))
        # Scores below the floor may be wrong, so they have to start again; the greatest is then 0.
        if top < 0 and least <= _FLOOR:
            break
        scores.hide(best)
        if item(greatest()) >= least:
            scores.show(best)
            (near,) = (values >= least).nonzero()
            if least <= _FLOOR:
                near = near[alive[near]]
            equal = near[values[near] == top]
            best = int(equal[samples[equal].argmin()])
            scores.hide(best)
            if least < top:
                doubts.append(Doubt(step, near, samples[near]))
        rows.append(best)
        scores.pick(best, not pool.take(best))
    return rows, doubts


def entry_bytes(pool: Pool) -> int:
    """Return the number of bytes of an entry of the matrix."""
    return 4 if len(pool) <= WIDE else 2


def holds_exactly(pool: Pool, size: int) -> bool:
    """Return whether entries of so many bytes hold twice the inner products exactly; float32 computes them exactly, too."""
    most = FULL[size] * pool.group.unit
    return 0.0 < 2.0 * pool.group.longest**2 <= min(most, 2.0**24)


def _products(left: Rows, right: Rows, pool: Pool, size: int) -> NDArray[np.signedinteger]:
    """Return the inner products of rows, of which `left` are multiples, as whole numbers of `size` bytes, [n, n]."""
    total, tile = len(left), _TILE[pool.vector.device.type]
    # NumPy asks for huge pages, which the system provides much faster than many small ones.
    whole = np.empty((total, total), dtype=f"i{size}")
    matrix = torch.from_numpy(whole)

    def fill(down: int) -> None:
        mine = left.span(down, down + tile)
        space = torch.empty(len(mine), tile, dtype=mine.factors[0].dtype, device=mine.factors[0].device)
        for across in range(0, down + 1, tile):
            others = right.span(across, across + tile)
            product = mine.inner(others, out=space[:, : len(others)])
            codes = matrix[down : down + tile, across : across + tile].copy_(product.round_())
            if down != across:
                matrix[across : across + tile, down : down + tile] = codes.T

    # The last squares of rows take longest, so they come first.
    list(pool.group.rows.workers.map(fill, range(0, total, tile)[::-1]))
    return whole


def scaled_rows(
    pool: Pool, dtype: torch.dtype = torch.float32, *, as_they_are: bool = False, by_columns: bool = False
) -> tuple[tuple[Tensor, ...], list[float]]:
    """Return the factors of all rows, divided by their greatest lengths and rounded to a type, and these lengths.

    Args:
        pool: the rows.
        dtype: floating type of the result.
        as_they_are: whether to leave rows of one factor as long as they are.
        by_columns: whether the entries of a column are next to each other in memory, instead of those of a row.

    Returns:
        Factors [n, width] of length at most 1, to within a rounding, and the numbers that they were divided by.
    """
    table, rows = pool.table, pool.group.rows
    ranges, total = table.ranges(), len(pool)

    def lengths(ends: tuple[int, int]) -> Tensor:
        return torch.stack([torch.linalg.vector_norm(factor, dim=1).amax() for factor in table.span(*ends).factors])

    longest = [1.0] * len(rows.widths)
    if not as_they_are:
        longest = [
            length or 1.0 for length in torch.stack(list(rows.workers.map(lengths, ranges))).amax(dim=0).tolist()
        ]
    shapes = [(width, total) if by_columns else (total, width) for width in rows.widths]
    stored = [torch.empty(shape, dtype=dtype, device=pool.vector.device) for shape in shapes]
    factors = tuple(factor.T if by_columns else factor for factor in stored)

    def convert(ends: tuple[int, int]) -> None:
        for factor, values, length in zip(factors, table.span(*ends).factors, longest, strict=True):
            factor[slice(*ends)] = values / length

    list(rows.workers.map(convert, ranges))
    return factors, longest
