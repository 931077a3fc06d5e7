"""Two ways to keep the gains of all rows up to date from pick to pick, each with a proved error bound.

`MatrixScores` holds all inner products as whole numbers, so a pick subtracts one row of the matrix.
`PassScores` holds single-precision rows, so a pick is one product of the rows with a vector.

Both have `values`, the scores of all rows [n], which `start` computes from float64 gains. `picked` tells them of a pick,
and whether its row has no sample left; `undo` takes the last picks back, after which `values` are right again once another
pick was told. A row whose score is below `least(top)` has a smaller gain than the row of the greatest score `top`; if it is
None, the scores have to start again. Rows that cannot be picked have a score near `dead`.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.bins.graph_cut.costs import CACHED
from dq_lightning.bins.graph_cut.exact import Array
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
# Scores start at 0 or below, but at least at the lowest one, and those of rows that cannot be picked at the dead one. They
# start again before picks have changed any by more than `_REACH`. So scores above the floor, and no others, are right
# within their bound.
_DEAD, _LOWEST, _FLOOR, _REACH = -3 << 29, -2 << 29, -1 << 29, 1 << 29
# What it costs to decide between rows, for each of them, and to start again from float64 gains, in the time that float64
# takes for one entry of a row, as measured.
_DECIDING, _EACH, _STARTING = 20_000, 4, 1_000_000
# The first block of proposals has this many, and all others at least the second number.
_FIRST, _SHORT = 256, 16
# Inner products are computed in squares of this many rows.
_TILE = {"cpu": 512, "cuda": 4096}


class MatrixScores:
    """Scores in whole numbers that are updated by a row of the matrix of inner products.

    Additions of whole numbers make no error, so after t picks a score is off by at most the rounding of its start plus
    t times the error of an entry: half a unit for the rounding, and that of the product. Scores are exact if the gains
    are whole multiples of a unit that entries can be stored in.

    Args:
        pool: n rows; memory is 4 n^2 bytes up to 8,192 rows, and 2 n^2 with more.
    """

    dead = _DEAD

    def __init__(self, pool: Pool) -> None:
        size = entry_bytes(pool)
        error = FULL[size] * (pool.group.rows.depth + 8) * SINGLE
        single = error < _COARSE
        exact = holds_exactly(pool)
        factors, scale = scaled_rows(pool, torch.float32 if single or exact else torch.float64, as_they_are=exact)
        # Products too small for float64 are all 0 in this unit.
        self._unit = pool.group.unit if exact else 2.0 * max(scale, 2.0**-1000) / FULL[size]
        self._start_error = 0.0 if exact else 1.0
        self._step_error = 0.0 if exact else 0.5 + (error if single else error * 2.0**-28)
        left = Rows((factors[0] * (2.0 * scale / self._unit), *factors[1:]))
        self.matrix = _products(left, Rows(factors), pool, size)
        self.values: NDArray[np.int32] = np.empty(0, dtype=np.int32)
        self._most_picks = _REACH // FULL[size]
        self._error = 0.0
        # Scores of the rows picked since the start, each before its pick.
        self._before: list[int] = []

    def start(self, pool: Pool) -> None:
        gains = pool.gains().cpu().numpy()
        whole = np.rint(np.maximum((gains - gains.max()) / self._unit, _LOWEST))
        self.values = np.where(pool.alive, whole, _DEAD).astype(np.int32)
        self._error = self._start_error + pool.bound() / self._unit
        self._before.clear()

    def picked(self, row: int, gone: bool) -> None:
        self._before.append(self.values.item(row))
        self.values -= self.matrix[row]
        if gone:
            self.values[row] = _DEAD

    def undo(self, rows: list[int]) -> None:
        for row in reversed(rows):
            self.values += self.matrix[row]
            self.values[row] = self._before.pop()

    def least(self, top: float) -> float | None:
        picks = len(self._before)
        least = top - 2.0 * (self._error + picks * self._step_error)
        return least if not picks or (picks < self._most_picks and least > _FLOOR) else None


class PassScores:
    """Scores that are computed again after every pick: the exact gains of some moment, minus a pass over float32 rows.

    Scores are float32 numbers, in units of the longest row's inner product with itself, and 0 is the greatest gain of that
    moment. With p twice the sum of the picks since then, a score is off by three roundings and by the error of a float32
    product of a row with p, however many picks p is the sum of.

    Args:
        pool: n rows of width W; memory is 4 n W bytes.
    """

    dead = -float("inf")

    def __init__(self, pool: Pool) -> None:
        # The product of a matrix that is stored by columns and one vector takes half the time.
        self._factors, scale = scaled_rows(pool, by_columns=True)
        # Products too small for float64 are all 0 in this unit.
        self._unit = max(scale, 2.0**-1000)
        self._twice = 2.0 * scale / self._unit
        rows = pool.group.rows
        # One thread passes over rows that its cache holds sooner than several do.
        cached = len(pool) * sum(rows.widths) <= CACHED
        step = len(pool) if cached else -(-len(pool) // max(1, rows.workers.count))
        slices = [slice(first, first + step) for first in range(0, len(pool), step)]
        self._parts = [(part, Rows(tuple(factor[part] for factor in self._factors))) for part in slices]
        self._workers = rows.workers
        self._relative = (rows.depth + 9) * SINGLE
        self.values: NDArray[np.float32] = np.empty(0, dtype=np.float32)
        self._start: NDArray[np.float32] = self.values
        self._drift: Array = np.zeros(pool.vector.shape[1:])
        self._error = 0.0
        # Scores that the rows picked since the start had then.
        self._before: list[float] = []

    def start(self, pool: Pool) -> None:
        gains = pool.gains().cpu().numpy()
        self._start = ((gains - gains.max()) / self._unit).astype(np.float32)
        self.values = self._start.copy()
        self._drift[:] = 0.0
        self._error = pool.bound() / self._unit
        self._before.clear()

    def picked(self, row: int, gone: bool) -> None:
        self._before.append(self._start.item(row))
        if gone:
            self._start[row] = self.dead
        self._drift += self._vector(row)
        vector = torch.from_numpy(self._drift.astype(np.float32)[None]).to(self._factors[0].device)

        def update(numbered: tuple[slice, Rows]) -> None:
            part, rows = numbered
            np.subtract(self._start[part], rows.against(vector)[:, 0].cpu().numpy(), out=self.values[part])

        list(self._workers.map(update, self._parts))

    def undo(self, rows: list[int]) -> None:
        for row in reversed(rows):
            self._drift -= self._vector(row)
            self._start[row] = self._before.pop()

    def least(self, top: float) -> float | None:
        # The sum of float32 rows is off by the rounding of their entries. Rounded are a row's score at the start, which is
        # at most its score now and the length of the drift together, and its score now.
        drift = math.sqrt(float(np.vdot(self._drift, self._drift))) + len(self._before)
        return top - 2.0 * (self._error + self._relative * drift + 2.0 * SINGLE * abs(top))

    def _vector(self, row: int) -> Array:
        """Return twice a row, float64 [D] or [C, D + 1]."""
        rows = [np.array(factor[row].tolist()) for factor in self._factors]
        return self._twice * (rows[0] if len(rows) == 1 else np.outer(*rows))


def pick_in_turn(
    pool: Pool, scores: MatrixScores | PassScores, count: int, tick: Callable[[int], object] = lambda count: None
) -> None:
    """Make `count` picks from all rows of a pool.

    The row of greatest score is proposed. Where other scores lie within the error bound of it, the proposal is doubtful,
    and all of them are noted. `Pool.confirm` decides about the doubtful ones of a block of proposals, and the scores go
    back to the first wrong one. Blocks are longer the fewer are wrong. Once the decisions, which become more as the
    bound grows, have cost as much as exact gains of all rows, scores start again from those.
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
            wrong = [] if made == rows else rows[len(made) - 1 :]
            if wrong:
                scores.undo(wrong)
                scores.picked(made[-1], not pool.alive[made[-1]])
            length = max(_SHORT, length // 4) if wrong else 2 * length
            budget -= sum(_DECIDING + _EACH * len(doubt.rows) * depth for doubt in doubts) + 2 * len(wrong) * len(pool)
            count -= len(made)
            tick(len(made))


def _propose(pool: Pool, scores: MatrixScores | PassScores, count: int) -> tuple[list[int], list[Doubt]]:
    """Return the rows of up to `count` proposed picks, none if the scores have to start again, and the doubtful ones."""
    rows: list[int] = []
    doubts: list[Doubt] = []
    values, samples = scores.values, pool.samples
    greatest, item = values.argmax, values.item
    for step in range(count):
        best = int(greatest())
        top = item(best)
        if (least := scores.least(top)) is None:
            break
        values[best] = scores.dead
        doubtful = item(greatest()) >= least
        values[best] = top
        if doubtful:
            (near,) = (values >= least).nonzero()
            equal = near[values[near] == top]
            if len(equal) > 1:
                best = int(equal[samples[equal].argmin()])
            if least < top:
                doubts.append(Doubt(step, near, samples[near]))
        rows.append(best)
        scores.picked(best, not pool.take(best))
    return rows, doubts


def entry_bytes(pool: Pool) -> int:
    """Return the number of bytes of an entry of the matrix."""
    return 4 if len(pool) <= WIDE else 2


def holds_exactly(pool: Pool) -> bool:
    """Return whether the matrix holds twice the inner products exactly; float32 then computes them exactly, too."""
    most = FULL[entry_bytes(pool)] * pool.group.unit
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
            codes = whole[down : down + tile, across : across + tile]
            np.rint(product.cpu().numpy(), out=codes, casting="unsafe")
            if down != across:
                matrix[across : across + tile, down : down + tile] = torch.from_numpy(codes).T

    # The last squares of rows take longest, so they come first.
    list(pool.group.rows.workers.map(fill, range(0, total, tile)[::-1]))
    return whole


def scaled_rows(
    pool: Pool, dtype: torch.dtype = torch.float32, *, as_they_are: bool = False, by_columns: bool = False
) -> tuple[tuple[Tensor, ...], float]:
    """Return the factors of all rows, divided by their greatest lengths and rounded to a type, and what that divides.

    Args:
        pool: the rows.
        dtype: floating type of the result.
        as_they_are: whether to leave rows of one factor as long as they are.
        by_columns: whether the entries of a column are next to each other in memory, instead of those of a row.

    Returns:
        Factors [n, width] of length at most 1, to within a rounding, and the number that inner products of these rows
        have to be multiplied by.
    """
    table, rows = pool.table, pool.group.rows
    ranges, total = table.ranges(), len(pool)

    def lengths(ends: tuple[int, int]) -> Tensor:
        return torch.stack([torch.linalg.vector_norm(factor, dim=1).amax() for factor in table.span(*ends).factors])

    longest = [1.0]
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
    return factors, math.prod(longest) ** 2
