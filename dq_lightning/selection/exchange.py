"""Exchanges drawn samples for others until every label of multi-hot targets is within one of its share. Pure."""

import numpy as np
from numpy.typing import NDArray

# When a pair to exchange is looked for, this many samples of either side, the most promising ones, are compared.
_CANDIDATES = 96
_NEVER = np.iinfo(np.int64).max


class Exchange:
    """A draw of m of n samples whose samples are exchanged for others, one pair at a time.

    A label that c of the n samples have has the share c * m / n of the draw. Every exchange makes the sum of the squared
    distances from these shares smaller, or else the sum of what distances exceed one by. Exchanges inside a bin come
    first; those between bins keep every group within one of its share, and every bin within one of its share of its
    group. All arithmetic is in whole numbers (distances in units of 1/n of a sample), so the result does not depend on
    the machine.

    Args:
        members: bool [n, C], the labels of each sample; samples are sorted by group and bin, and inside a bin by the
            order of the draw: the first ones are drawn.
        sizes: int64 [G, K], number of samples in each bin of each group.
        counts: int64 [G, K], number of samples that are drawn from each.
    """

    def __init__(self, members: NDArray[np.bool_], sizes: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        self._sizes, self._counts = sizes, counts.copy()
        self._total, self._drawn = len(members), int(counts.sum())
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes.reshape(-1)
        self._cell = np.repeat(np.arange(sizes.size), sizes.reshape(-1))
        self._members = members
        self.kept = np.arange(len(members)) - self._starts[self._cell] < counts.reshape(-1)[self._cell]
        self._gap = self._total * members[self.kept].sum(axis=0, dtype=np.int64)
        self._gap -= self._drawn * members.sum(axis=0, dtype=np.int64)

    @property
    def near(self) -> bool:
        """Whether every label is within one of its share."""
        return bool((np.abs(self._gap) <= self._total).all())

    def describe(self) -> str:
        """Tell in one line which label is farthest from its share."""
        far = np.abs(self._gap)
        return (
            f"{int((far > self._total).sum())} of {len(far)} labels are more than one sample from their shares; the farthest, "
            f"label {int(far.argmax())}, is {float(far.max()) / self._total:.1f} samples off"
        )

    def run(self, *, between: bool) -> NDArray[np.bool_]:
        """Exchange samples until every label is within one of its share, or no exchange of one pair helps.

        With `between`, samples of different bins and groups are exchanged too, where those inside bins are not enough.

        Returns:
            bool [n], which samples are kept.

        Complexity: O(n C) for each pass over the bins, of which a few are made, and for each exchange between bins.
        """
        changed = True
        while changed and not self.near:
            changed = False
            for start, end in zip(self._starts, self._ends, strict=True):
                while self._exchange(np.arange(start, end)):
                    changed = True
        everything = np.arange(self._total)
        before: int | None = None
        # Exchanges that make one sum smaller may make the other larger, so they would not end in turns, one by one.
        while between and not self.near and (before is None or self._far_by() < before):
            before = self._far_by()
            for excess in (False, True):
                helps = True
                while helps and not self.near:
                    helps = self._exchange(everything, excess=excess)
        return self.kept

    def _far_by(self) -> int:
        """What the distances of all labels exceed one by, summed, in units of 1/n of a sample."""
        return int(self._excess(self._gap))

    def _exchange(self, places: NDArray[np.int64], *, excess: bool = False) -> bool:
        """Make the best exchange among the samples at `places`; False if none is found that helps.

        What falls is the sum of squares, or with `excess` the sum of what distances exceed one by.
        """
        drawn, left = places[self.kept[places]], places[~self.kept[places]]
        goal = np.sign(self._gap) * (np.abs(self._gap) > self._total) if excess else self._gap
        drawn, left = self._promising(drawn, goal, excess), self._promising(left, -goal, excess)
        if not len(drawn) or not len(left):
            return False
        away, new = self._members[drawn].astype(np.int64), self._members[left].astype(np.int64)
        if excess:
            gaps = self._gap + self._total * (new[None] - away[:, None])
            change = self._excess(gaps) - self._excess(self._gap)
        else:
            # (|gap + n d|^2 - |gap|^2) / n with d = new - away
            of_new, of_away = (2 * rows @ self._gap for rows in (new, away))
            squares = new.sum(1) + away.sum(1)[:, None] - 2 * away @ new.T
            change = of_new - of_away[:, None] + self._total * squares
        change = np.where(self._allowed(self._cell[drawn][:, None], self._cell[left]), change, _NEVER)
        best = int(change.argmin())
        if change.reshape(-1)[best] >= 0:
            return False
        given, taken = drawn[best // len(left)], left[best % len(left)]
        self.kept[given], self.kept[taken] = False, True
        self._gap += self._total * (self._members[taken].astype(np.int64) - self._members[given])
        np.add.at(self._counts.reshape(-1), self._cell[[given, taken]], [-1, 1])
        return True

    def _excess(self, gaps: NDArray[np.int64]) -> NDArray[np.int64]:
        excess: NDArray[np.int64] = np.maximum(np.abs(gaps) - self._total, 0).sum(axis=-1)
        return excess

    def _promising(self, places: NDArray[np.int64], goal: NDArray[np.int64], excess: bool) -> NDArray[np.int64]:
        """The samples whose labels agree most with the goal; where the goal is the gap, fewer labels agree better."""
        if len(places) <= _CANDIDATES:
            return places
        rows = self._members[places]
        # Whole numbers below 2**53 are exact in float64, whose products are faster.
        gain = 2 * (rows.astype(np.float64) @ goal.astype(np.float64)) - (0 if excess else self._total) * rows.sum(1)
        return places[np.argsort(-gain, kind="stable")[:_CANDIDATES]]

    def _allowed(self, given: NDArray[np.int64], taken: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether a sample of the cell `given` may be exchanged for one of the cell `taken`."""
        same = given == taken
        if same.all():
            return np.asarray(same)
        bins = self._sizes.shape[1]
        inside = given // bins == taken // bins
        one = self._stays_near(0, -1)[given] & self._stays_near(0, 1)[taken]
        two = self._stays_near(-1, -1)[given] & self._stays_near(1, 1)[taken]
        return np.asarray(same | np.where(inside, one, two))

    def _stays_near(self, group: int, cell: int) -> NDArray[np.bool_]:
        """For every cell, whether all shares hold when its group has `group` more samples and it has `cell` more."""
        sizes, counts = self._sizes, self._counts
        whole, quota = sizes.sum(1, keepdims=True), counts.sum(1, keepdims=True) + group
        far = np.abs(counts * whole - sizes * quota) > whole
        far_itself = np.abs((counts + cell) * whole - sizes * quota) > whole
        others = far.sum(1, keepdims=True) - far
        group_stays = np.abs(quota * self._total - whole * self._drawn) <= self._total
        return np.asarray((others == 0) & ~far_itself & group_stays).reshape(-1)
