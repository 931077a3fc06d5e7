"""The samples of a group, their picks, and exact comparison of gains that float64 arithmetic cannot distinguish."""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.bins.graph_cut.exact import ExactSum, exact_dot, two_product
from dq_lightning.bins.prepare import Prepared, next_twins
from dq_lightning.bins.rows import block_ranges

# This is twice the unit roundoff u of float64, so that bounds on products of (1 + u) need no second-order terms.
ROUNDING = 2.0**-52


class Group:
    """n samples that bins are made of, and the picks of the current bin.

    The gain of x is `x . v` with `v = lam * sum(left) - 2 * sum(picked)` in exact sums, where `left` are the samples that
    were left when the bin was begun. Products are split without error and added with one rounding (Shewchuk 1997), so
    a gain does not depend on the order of samples or picks, the number of threads, or the device. Gains that are then
    equal are ties, and the lowest sample wins.

    Args:
        prepared: features of all samples.
        members: int64 [n], the samples of the group, ascending.
        lam: weight of representativeness against diversity.
        halved: whether S is 1/2 + (a . b)/2, so that the numbers of samples left and picked are added to the gain
            before it is rounded.

    Attributes:
        rows: rows of the samples, divided by `step`.
        longest: bound on the Euclidean length of a row.
        twins: int64 [n], next sample with an equal row, or -1 if there is none; None if no two rows are equal.
        unit: number that all gains are whole multiples of, small enough that float64 computes them without rounding,
            because the rows are whole numbers; 0.0 if there is none.
        trail: int64 [n], of which the first `length` are the picks of the current bin.
    """

    def __init__(self, prepared: Prepared, members: NDArray[np.int64], *, lam: float, halved: bool) -> None:
        self.lam, self.halved = lam, halved
        # Rows whose entries are whole multiples of one number are divided by it if float64 then adds all gains exactly.
        self.step, self.unit = prepared.step or 1.0, 0.0
        if prepared.step:
            unit = next((2.0**-power for power in range(11) if (lam * 2.0**power).is_integer()), 0.0)
            exact = len(members) * (lam + 2) * (prepared.longest / self.step) ** 2 <= 2.0**50 * unit
            self.step, self.unit = (self.step, unit) if exact else (1.0, 0.0)
        self.longest, self._largest = prepared.longest / self.step, prepared.largest / self.step
        self.rows = replace(prepared.rows.only(torch.from_numpy(members)), step=self.step)
        self.twins = next_twins(prepared, members)
        self.trail = np.empty(len(members), dtype=np.int64)
        self.length = self._added = 0
        self._open = np.ones(len(members), dtype=bool)
        self._left: ExactSum | None = None
        # Picks of finished bins that are still in the sum of what is left.
        self._closed: list[NDArray[np.int64]] = []
        self._picked = ExactSum(self.rows.width, self._largest)

    @property
    def num_left(self) -> int:
        """Number of samples that were left when the current bin was begun."""
        return int(np.count_nonzero(self._open))

    def sum(self) -> tuple[Tensor, float]:
        """Return the sum of all rows, [1, D] or [1, C, D + 1], and a bound on the length of its error.

        Rows with one factor are added exactly, because near ties need the exact sum. Rows with two factors are not
        multiplied out unless there are near ties, so their sum is computed as a product of matrices.
        """
        rows = self.rows
        if len(rows.shape) == 1:
            exact = self._exact_left()
            total = torch.from_numpy(exact.high + exact.low).reshape(1, *rows.shape).to(rows.device)
            return total, ROUNDING * len(rows) * self.longest
        ranges = rows.ranges()
        sums = list(rows.workers.map(lambda ends: rows.span(*ends).sum(), ranges))
        terms = max((last - first for first, last in ranges), default=0) + len(ranges) + 2
        return torch.stack(sums).sum(dim=0), ROUNDING * terms * len(rows) * self.longest

    def rewind(self, length: int) -> None:
        """Undo all picks of the current bin but the first `length`."""
        if self._added > length:
            self._add(self._picked, self.trail[length : self._added], -1.0)
            self._added = length
        self.length = length

    def close_bin(self) -> NDArray[np.int64]:
        """Return the picks of the current bin and begin the next bin with the samples that are left."""
        picks = self.trail[: self.length].copy()
        self._open[picks] = False
        self._closed.append(picks)
        self._picked = ExactSum(self.rows.width, self._largest)
        self.length = self._added = 0
        return picks

    def settle(self, near: NDArray[np.int64], length: int | None = None) -> int:
        """Return the sample with the greatest exact gain, and the lowest such sample if there are ties.

        Args:
            near: int64, samples whose gains lie within the rounding error of float64 of each other.
            length: number of picks of the current bin that the gains are computed after; None takes all picks.
        """
        if self.unit:
            return int(near.min())
        near = np.sort(near)
        length = self.length if length is None else length
        self._add(self._picked, self.trail[self._added : length], 1.0)
        self._add(self._picked, self.trail[length : self._added], -1.0)
        self._added = length
        left, picked = self._exact_left(), self._picked
        vector = (*two_product(left.high, self.lam), -2.0 * picked.high, self.lam * left.low, -2.0 * picked.low)
        constant = self.lam * self.num_left - 2.0 * length if self.halved else 0.0
        gains: list[float] = []
        for vectors in self.rows.take(torch.from_numpy(near)).written_out():
            gains += exact_dot(vectors.cpu().numpy(), vector, constant)
        return int(near[gains.index(max(gains))])

    def _exact_left(self) -> ExactSum:
        """Return the sum of the samples left when the current bin was begun."""
        if self._left is None:
            self._left, self._closed = ExactSum(self.rows.width, self._largest), []
            self._add(self._left, np.flatnonzero(self._open), 1.0)
        while self._closed:
            self._add(self._left, self._closed.pop(), -1.0)
        return self._left

    def _add(self, total: ExactSum, samples: NDArray[np.int64], sign: float) -> None:
        for first, last in block_ranges(len(samples), sum(self.rows.widths)):
            for vectors in self.rows.take(torch.from_numpy(samples[first:last])).written_out():
                total.add(vectors, sign)
