"""Exact greedy graph cut over a linear kernel, bin after bin. PURE."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dq_lightning.bins.exact import Array, ExactSum, exact_dot, two_product
from dq_lightning.bins.rows import Rows

# twice the unit roundoff of float64, so that products of (1 + u) need no second-order terms
_ROUNDING = 2.0**-52


class GraphCut:
    """The picks of one group: `gain(x) = lam * sum_j S[j, x] - 2 * sum_{s picked} S[s, x]` (Zhou et al. 2023, eq. 3).

    j runs over what remained when the bin was begun, s over the bin's picks so far, and S is a . b or 1/2 + (a . b)/2. So
    `sum_j S[j, x]` is x times one vector, and no matrix is needed.

    Args:
        rows: n samples in ascending position; of length one or zero when `halved`.
        lam: weight of representativeness against diversity.
        halved: S = 1/2 + (a . b)/2 instead of a . b.
    """

    def __init__(self, rows: Rows, *, lam: float, halved: bool) -> None:
        self.rows = rows
        self.lam = lam
        self.halved = halved
        self._longest = float(rows.norms().max(initial=0.0))
        self._scale = float(np.prod([np.abs(factor).max(initial=0.0) for factor in rows.factors]))
        self._twins: NDArray[np.int64] | None = None

    def run(self, sizes: Sequence[int]) -> tuple[NDArray[np.int64], Array]:
        """Return the n samples in the order of picking, bin after bin, and their gains."""
        left = np.arange(len(self.rows))
        total = self._sum(self.rows)
        order, gains = [left[:0]], [np.empty(0)]
        for size in sizes:
            if size == 0:
                continue
            picks, values = _OneBin(self, left, total).run(size)
            order.append(left[picks])
            gains.append(values)
            for block in self.rows[left[picks]].blocks():
                total.add(block.written_out(), sign=-1.0)
            left = np.delete(left, picks)
        return np.concatenate(order), np.concatenate(gains)

    def _sum(self, rows: Rows) -> ExactSum:
        total = ExactSum(rows.width, self._scale)
        for block in rows.blocks():
            total.add(block.written_out())
        return total

    def twins(self) -> NDArray[np.int64]:
        """Return a number for each row, shared by equal rows; found at the first near tie."""
        if self._twins is None:
            seen: dict[bytes, int] = {}
            joined = np.concatenate(self.rows.factors, axis=1) + 0.0  # -0.0 becomes 0.0
            self._twins = np.array([seen.setdefault(row.tobytes(), len(seen)) for row in joined], dtype=np.int64)
        return self._twins


class _OneBin:
    """Running gains of what is left, and the exact ones where two are too close to call."""

    def __init__(self, group: GraphCut, left: NDArray[np.int64], total: ExactSum) -> None:
        self._group = group
        self._left = left
        self._rows = group.rows[left]
        self._total = total
        self._picked = ExactSum(self._rows.width, group._scale)
        self._num_added = 0

    def run(self, size: int) -> tuple[NDArray[np.int64], Array]:
        """Return `size` picks (indices into what is left) and their gains."""
        rows, group = self._rows, self._group
        reach = group.lam * float(np.linalg.norm(self._total.high))
        gains = group.lam * rows.against(self._total.high + self._total.low)
        picks = np.empty(size, dtype=np.int64)
        values = np.empty(size)
        for step in range(size):
            best = int(gains.argmax())
            slack = self._slack(step, reach)
            if np.count_nonzero(gains >= gains[best] - slack) > 1:
                best = self._settle(np.flatnonzero(gains >= gains[best] - slack), picks[:step])
            picks[step], values[step] = best, gains[best]
            gains -= 2.0 * rows.inner(best)
            gains[best] = -np.inf
        if group.halved:
            values = 0.5 * (group.lam * len(rows) - 2.0 * np.arange(size)) + 0.5 * values
        return picks, values

    def _slack(self, step: int, reach: float) -> float:
        """Bound on the error of a difference of two gains.

        A gain is an inner product of `depth` terms with a vector of length `reach` and one more for each pick, each added to
        a number of at most that size.
        """
        longest = self._group._longest
        size = longest * (reach + 2.0 * step * longest)
        return 2.0 * _ROUNDING * (self._rows.depth + 6 + step) * size

    def _settle(self, near: NDArray[np.int64], picks: NDArray[np.int64]) -> int:
        """Return the one of greatest gain, each rounded once to float64; the lowest position where they are equal."""
        twins = self._group.twins()[self._left[near]]
        near = near[np.sort(np.unique(twins, return_index=True)[1])]
        if len(near) == 1:
            return int(near[0])
        for block in self._rows[picks[self._num_added :]].blocks():
            self._picked.add(block.written_out())
        self._num_added = len(picks)
        lam = self._group.lam
        vector = (
            *two_product(self._total.high, lam),
            -2.0 * self._picked.high,
            lam * self._total.low,
            -2.0 * self._picked.low,
        )
        constant = lam * len(self._rows) - 2.0 * len(picks) if self._group.halved else 0.0
        exact = [
            value for block in self._rows[near].blocks() for value in exact_dot(block.written_out(), vector, constant)
        ]
        return int(near[int(np.argmax(exact))])
