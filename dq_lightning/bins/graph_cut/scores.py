"""Two ways to keep the gains of all rows up to date from pick to pick, each with a proved error bound.

`MatrixScores` holds all inner products as 16-bit whole numbers, so a pick subtracts one row of the matrix.
`PassScores` holds single-precision rows, so a pick is one product of the rows with a vector.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.bins.graph_cut.exact import Array
from dq_lightning.bins.graph_cut.pool import Pool
from dq_lightning.bins.rows import Rows

Tick = Callable[[int], object]

# The unit roundoff of float32, with room for the second-order terms of error bounds.
SINGLE = 2.0**-24 * 1.01
# Twice an inner product of the longest rows is stored as this whole number.
_FULL = 32700
# Scores of rows that cannot be picked, and a lower limit on all others. A pick changes a score by at most 2**15, so
# that neither limit is passed within `_MOST_PICKS` picks.
_DEAD, _LOWEST = -(2**30), -(2**29)
_MOST_PICKS = 4096
# To decide between rows costs about as much as to compute the gains of this many rows of 64 numbers, as measured, and one
# for each of them.
_SETTLING = 1000
# Inner products are computed in squares of this many rows, whose single-precision form fits a processor's cache.
_TILE = {"cpu": 512, "cuda": 8192}


class MatrixScores:
    """Scores in whole numbers that are updated by a row of the matrix of inner products.

    Additions of whole numbers make no error, so after t picks a score is off by at most the rounding of its start plus
    t times the error of an entry: half a unit for the rounding to 16 bits, and that of the float32 product.

    Args:
        pool: n rows; memory is 2 n^2 bytes.
    """

    dead = float(_DEAD)

    def __init__(self, pool: Pool) -> None:
        self.values: NDArray[np.int32] = np.empty(0, dtype=np.int32)
        self.matrix, scale = _products(pool)
        self._unit = 2.0 * scale / _FULL
        self._step_error = 0.5 + _FULL * (pool.group.depth + 8) * SINGLE
        self._error, self._picks = 0.0, 0

    def start(self, pool: Pool) -> None:
        gains = pool.gains().cpu().numpy()
        top = gains.max()
        whole = np.rint(np.maximum((gains - top) / self._unit, _LOWEST))
        self.values = np.where(pool.alive, whole, _DEAD).astype(np.int32)
        self._error, self._picks = 1.0 + pool.bound() / self._unit, 0

    def picked(self, row: int, gone: bool) -> None:
        self.values -= self.matrix[row]
        if gone:
            self.values[row] = _DEAD
        self._picks += 1

    def window(self) -> float:
        return 2.0 * (self._error + self._picks * self._step_error)


class PassScores:
    """Scores that are computed again after every pick: the exact gains of some moment, minus a pass over float32 rows.

    With p twice the sum of the picks since that moment, a score is off by the rounding of its start plus the error of a
    float32 product of a row with p, however many picks p is the sum of.

    Args:
        pool: n rows of width W; memory is 4 n W bytes.
    """

    dead = -float("inf")

    def __init__(self, pool: Pool) -> None:
        self._rows, self._scale = single_rows(pool)
        self._workers = pool.group.workers
        self._relative = (pool.group.depth + 8) * SINGLE * self._scale
        self.values: Array = np.empty(0)
        self._start: Array = np.empty(0)
        self._drift = torch.zeros(pool.vector.shape, dtype=torch.float64, device=pool.vector.device)
        self._error, self._picks = 0.0, 0

    def start(self, pool: Pool) -> None:
        self._start = pool.gains().cpu().numpy()
        self.values = self._start.copy()
        self._drift.zero_()
        self._error, self._picks = pool.bound(), 0

    def picked(self, row: int, gone: bool) -> None:
        if gone:
            self._start[row] = -np.inf
        one = Rows(tuple(factor[row : row + 1].double() for factor in self._rows))
        self._drift += 2.0 * one.sum()
        self._picks += 1
        vector = self._drift.float()
        step = -(-len(self._start) // max(1, self._workers.count))

        def update(first: int) -> None:
            part = slice(first, first + step)
            product = Rows(tuple(factor[part] for factor in self._rows)).against(vector)
            self.values[part] = self._start[part] - self._scale * product[:, 0].double().cpu().numpy()

        self._workers.run(update, range(0, len(self._start), step))

    def window(self) -> float:
        # The sum of float32 rows is off by the rounding of their entries.
        drift = float(self._drift.norm()) + self._picks
        return 2.0 * (self._error + self._relative * drift)


def pick_in_turn(
    pool: Pool, scores: MatrixScores | PassScores, count: int, tick: Callable[[int], object] = lambda count: None
) -> None:
    """Make `count` picks from all rows of a pool.

    Where other scores lie within the error bound of the greatest one, float64 decides between them, and where that does
    not, exact arithmetic does. The scores start again from exact gains once such decisions have cost as much as that.
    """
    while count > 0:
        scores.start(pool)
        made = _until_stale(pool, scores, min(count, _MOST_PICKS))
        count -= made
        tick(made)
    pool.finish()


def _until_stale(pool: Pool, scores: MatrixScores | PassScores, count: int) -> int:
    spent = 0
    for step in range(count):
        values = scores.values
        best = int(values.argmax())
        top = values[best]
        values[best] = scores.dead
        least = top - scores.window()
        if values.max() >= least:
            values[best] = top
            near = np.flatnonzero(values >= least)
            near = near[pool.alive[near]]
            best = pool.settle(near)
            spent += _SETTLING + len(near)
        else:
            values[best] = top
        scores.picked(best, not pool.take(best))
        if spent > len(values):
            return step + 1
    return count


def _products(pool: Pool) -> tuple[NDArray[np.int16], float]:
    """Return twice the inner products of all rows of a pool, int16 [n, n], and what the number 32700 / 2 stands for."""
    factors, scale = single_rows(pool)
    total, device = len(pool), factors[0].device
    tile = _TILE.get(device.type, 8192)
    matrix = torch.empty(total, total, dtype=torch.int16)

    def fill(corner: tuple[int, int]) -> None:
        down, across = (slice(start, start + tile) for start in corner)
        part = (factors[0][down] * float(_FULL)) @ factors[0][across].T
        for factor in factors[1:]:
            part *= factor[down] @ factor[across].T
        codes = part.round_().to(torch.int16).cpu()
        matrix[down, across] = codes
        if down != across:
            matrix[across, down] = codes.T

    starts = range(0, total, tile)
    corners = [(down, across) for down in starts for across in starts if across <= down]
    if device.type == "cpu":
        pool.group.workers.run(fill, corners)
    else:
        for corner in corners:
            fill(corner)
    return matrix.numpy(), scale


def single_rows(pool: Pool) -> tuple[tuple[Tensor, ...], float]:
    """Return the factors of all rows in float32, and the scale of their inner products.

    The factors are divided by powers of two so that no row is longer than 1.

    Returns:
        Factors float32 [n, width], and the number that inner products of these rows have to be multiplied by.
    """
    table, workers = pool.table, pool.group.workers
    ranges = table.ranges()

    def lengths(ends: tuple[int, int]) -> Tensor:
        return torch.stack([torch.linalg.vector_norm(factor, dim=1).amax() for factor in table.span(*ends).factors])

    longest = torch.stack(list(workers.map(lengths, ranges))).amax(dim=0).cpu()
    # The allowance is for the rounding of the lengths.
    exponents = torch.frexp(longest * (1.0 + 2.0**-20))[1].tolist()

    def convert(ends: tuple[int, int]) -> list[Tensor]:
        factors = table.span(*ends).factors
        return [(factor * 2.0**-exponent).float() for factor, exponent in zip(factors, exponents, strict=True)]

    parts = zip(*workers.map(convert, ranges), strict=True)
    return tuple(torch.cat(part) for part in parts), 4.0 ** sum(exponents)
