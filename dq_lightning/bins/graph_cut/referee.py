"""Exact comparison of gains that differ by less than the rounding errors of float64 arithmetic."""

import numpy as np
import torch
from numpy.typing import NDArray

from dq_lightning.bins.graph_cut.exact import ExactSum, exact_dot, two_product
from dq_lightning.bins.rows import StoredRows

# This is twice the unit roundoff u of float64, so that bounds on products of (1 + u) need no second-order terms.
ROUNDING = 2.0**-52


class Referee:
    """Exact state of the greedy selection in one group; it decides between gains that are nearly equal.

    The state consists of the sum of the samples that were left when the current bin was begun and of the picks made in
    the bin so far. The gain of x is `x . v` with `v = lam * sum(left) - 2 * sum(picked)` in exact sums. Products are
    split without error and added with one rounding (Shewchuk 1997), so a gain does not depend on the order of samples
    or picks, the number of threads, or the device. Gains that are then equal are ties, and the lowest sample wins.

    Args:
        rows: rows of the n samples of the group.
        lam: weight of representativeness against diversity.
        halved: whether S is 1/2 + (a . b)/2, so that the numbers of samples left and picked are added to the gain
            before it is rounded.
        largest: bound on the absolute value of an entry of a row, after factors are multiplied out.
    """

    def __init__(self, rows: StoredRows, *, lam: float, halved: bool, largest: float) -> None:
        self.rows = rows
        self.lam = lam
        self.halved = halved
        self.trail = np.empty(len(rows), dtype=np.int64)
        self.length = 0
        self._added = 0
        self._largest = largest
        self._closed: list[NDArray[np.int64]] = []
        self._left: ExactSum | None = None
        self._picked = ExactSum(rows.width, largest)

    @property
    def num_left(self) -> int:
        """Number of samples that were left when the current bin was begun."""
        return len(self.rows) - sum(map(len, self._closed))

    @property
    def bins_closed(self) -> int:
        """Number of finished bins."""
        return len(self._closed)

    def left(self) -> ExactSum:
        """Return the sum of the samples left when the current bin was begun; the first call computes it."""
        if self._left is None:
            alive = np.ones(len(self.rows), dtype=bool)
            alive[np.concatenate([np.empty(0, dtype=np.int64), *self._closed])] = False
            rows = self.rows.only(torch.from_numpy(np.flatnonzero(alive)))
            self._left = ExactSum(rows.width, self._largest)

            def sum_of(ends: tuple[int, int]) -> ExactSum:
                total = ExactSum(rows.width, self._largest)
                for vectors in rows.span(*ends).written_out():
                    total.add(vectors)
                return total

            # Sums on a grid are exact, so it does not matter which thread adds which block.
            for part in rows.workers.map(sum_of, rows.ranges()):
                self._left.high += part.high
                self._left.low += part.low
        return self._left

    def push(self, sample: int) -> None:
        """Record a pick of the current bin."""
        self.trail[self.length] = sample
        self.length += 1

    def rewind(self, length: int) -> None:
        """Undo all picks of the current bin but the first `length`."""
        if self._added > length:
            self._add(self._picked, self.trail[length : self._added], -1.0)
            self._added = length
        self.length = length

    def close_bin(self) -> NDArray[np.int64]:
        """Return the picks of the current bin and begin the next bin with the samples that are left."""
        picks = self.trail[: self.length].copy()
        self._closed.append(picks)
        if self._left is not None:
            self._add(self._left, picks, -1.0)
        self._picked = ExactSum(self.rows.width, self._largest)
        self.length = self._added = 0
        return picks

    def settle(self, near: NDArray[np.int64], length: int | None = None) -> int:
        """Return the sample with the greatest exact gain, and the lowest such sample if there are ties.

        Args:
            near: int64, samples to compare.
            length: number of picks of the current bin that the gains are computed after; None takes all picks.
        """
        near = np.sort(near)
        length = self.length if length is None else length
        self._add(self._picked, self.trail[self._added : length], 1.0)
        self._add(self._picked, self.trail[length : self._added], -1.0)
        self._added = length
        left = self.left()
        vector = (
            *two_product(left.high, self.lam),
            -2.0 * self._picked.high,
            self.lam * left.low,
            -2.0 * self._picked.low,
        )
        constant = self.lam * self.num_left - 2.0 * length if self.halved else 0.0
        gains: list[float] = []
        for vectors in self.rows.take(torch.from_numpy(near)).written_out():
            gains += exact_dot(vectors.cpu().numpy(), vector, constant)
        return int(near[gains.index(max(gains))])

    def _add(self, total: ExactSum, samples: NDArray[np.int64], sign: float) -> None:
        for start in range(0, len(samples), 4096):
            for vectors in self.rows.take(torch.from_numpy(samples[start : start + 4096])).written_out():
                total.add(vectors, sign)
