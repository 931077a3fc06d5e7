"""Decide between gains that float64 arithmetic can't tell apart. PURE."""

import numpy as np
import torch
from numpy.typing import NDArray

from dq_lightning.bins.exact import ExactSum, exact_dot, two_product
from dq_lightning.bins.rows import StoredRows

# twice the unit roundoff of float64, so that products of (1 + u) need no second-order terms
ROUNDING = 2.0**-52


class Referee:
    """The exact state of one group: the sum of what a bin started from, and the picks made in it so far.

    The gain of x is `x . v`, with `v = lam * sum(left) - 2 * sum(picked)` in exact sums. Products are split without error and
    added with one rounding (Shewchuk 1997), so a gain does not depend on the order of samples or picks, the number of
    threads, or the device. Gains that are equal then are ties, and the lowest sample wins.

    Args:
        rows: the n samples of the group.
        lam: weight of representativeness.
        halved: S = 1/2 + (a . b)/2, so the number of samples left and picked enters the gain before it is rounded.
        largest: bound on the absolute value of an entry of a row, written out.
    """

    def __init__(self, rows: StoredRows, *, lam: float, halved: bool, largest: float) -> None:
        self.rows = rows
        self.lam = lam
        self.halved = halved
        self.num_left = len(rows)
        self.trail = np.empty(len(rows), dtype=np.int64)
        self.length = 0
        self.bins_closed = 0
        self._added = 0
        self._largest = largest
        self._left = ExactSum(rows.width, largest)
        self._picked = ExactSum(rows.width, largest)
        # sums on a grid are exact, so it does not matter which thread adds which block
        for part in rows.workers.map(self._sum_of, rows.ranges()):
            self._left.high += part.high
            self._left.low += part.low

    def left_vector(self) -> torch.Tensor:
        """The sum of what is left, [1, D] or [1, C, D + 1], on the device of the rows."""
        return self._left.rounded().reshape(1, *self.rows.shape).to(self.rows.device)

    def push(self, sample: int) -> None:
        """Note a pick."""
        self.trail[self.length] = sample
        self.length += 1

    def extend(self, samples: NDArray[np.int64]) -> None:
        """Note the picks of the bin beyond those noted before."""
        self.trail[self.length : len(samples)] = samples[self.length :]
        self.length = len(samples)

    def rewind(self, length: int) -> None:
        """Take back all picks but the first `length` of this bin."""
        if self._added > length:
            self._add(self._picked, self.trail[length : self._added], -1.0)
            self._added = length
        self.length = length

    def close_bin(self) -> NDArray[np.int64]:
        """Return the picks of the bin, and begin the next one with what is left."""
        picks = self.trail[: self.length].copy()
        self._add(self._left, picks, -1.0)
        self.num_left -= len(picks)
        self.bins_closed += 1
        self._picked = ExactSum(self.rows.width, self._largest)
        self.length = self._added = 0
        return picks

    def settle(self, near: NDArray[np.int64], length: int | None = None) -> int:
        """Return which of the samples has the greatest gain after `length` picks (all by default); the lowest of equals."""
        near = np.sort(near)
        length = self.length if length is None else length
        self._add(self._picked, self.trail[self._added : length], 1.0)
        self._add(self._picked, self.trail[length : self._added], -1.0)
        self._added = length
        vector = (
            *two_product(self._left.high, self.lam),
            -2.0 * self._picked.high,
            self.lam * self._left.low,
            -2.0 * self._picked.low,
        )
        constant = self.lam * self.num_left - 2.0 * length if self.halved else 0.0
        best, winner = -np.inf, int(near[0])
        seen: set[bytes] = set()
        start = 0
        for vectors in self.rows.take(torch.from_numpy(near)).written_out():
            values = vectors.cpu().numpy() + 0.0  # -0.0 becomes 0.0
            fresh = []
            for i, row in enumerate(values):
                if (key := row.tobytes()) not in seen:
                    seen.add(key)
                    fresh.append(i)
            for i, gain in zip(fresh, exact_dot(values[fresh], vector, constant), strict=True):
                if gain > best:
                    best, winner = gain, int(near[start + i])
            start += len(values)
        return winner

    def _sum_of(self, ends: tuple[int, int]) -> ExactSum:
        total = ExactSum(self.rows.width, self._largest)
        for vectors in self.rows.span(*ends).written_out():
            total.add(vectors)
        return total

    def _add(self, total: ExactSum, samples: NDArray[np.int64], sign: float) -> None:
        for start in range(0, len(samples), 4096):
            for vectors in self.rows.take(torch.from_numpy(samples[start : start + 4096])).written_out():
                total.add(vectors, sign)
