"""The rows that picks are made from, and the vector whose inner product with a row is the row's gain."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.bins.graph_cut.exact import Array
from dq_lightning.bins.graph_cut.referee import ROUNDING, Referee
from dq_lightning.bins.graph_cut.workers import Workers
from dq_lightning.bins.rows import Rows, StoredRows


@dataclass(frozen=True, eq=False)
class Group:
    """What does not change while the bins of one group are made.

    Attributes:
        referee: exact state of the group, which decides between gains that float64 cannot distinguish.
        longest: bound on the Euclidean length of a row.
        twins: int64 [n], next sample with an equal row, or -1 if there is none; None if no two rows are equal.
        unit: number that all gains are whole multiples of, small enough that float64 computes them without rounding,
            because the rows are whole numbers; 0.0 if there is none.
    """

    referee: Referee
    longest: float
    twins: NDArray[np.int64] | None
    unit: float = 0.0

    @property
    def depth(self) -> int:
        """Number of terms that the rounding error bound of an inner product is proportional to."""
        return self.referee.rows.depth

    @property
    def workers(self) -> Workers:
        """Threads that compute blocks of rows."""
        return self.referee.rows.workers

    def decide(self, near: NDArray[np.int64], length: int | None = None) -> int:
        """Return which of the samples `near`, whose gains lie within the bounds of each other, is the greedy pick.

        Args:
            near: int64, the samples.
            length: number of picks of the current bin that the gains are computed after; None takes all picks.
        """
        return int(near.min()) if self.unit else self.referee.settle(near, length)


class Pool:
    """n rows that picks are made from. Samples with equal features share one row.

    The gain of a row x is `x . w` for one vector `w = lam * sum(left) - 2 * sum(picked)`, so a pick only changes w.
    Picks are recorded by `take` and enter w together, by `settle`, `gains` or `finish`.

    Args:
        group: the group that the rows belong to.
        table: the n rows; a row stays in the table when all of its samples have been picked.
        samples: int64 [n], lowest remaining sample of each row; changed in place.
        vector: the vector w, float64 [1, D] or [1, C, D + 1].
        error: bound on the Euclidean length of the error of `vector`.

    Attributes:
        alive: bool [n], whether a row still has a sample that was not picked.
        rows: int64, rows of all picks made from this pool, in order.
        values: float64, gain of each pick at the time it was made.
        slack: bound on the absolute error of `values` and of the gains that `gains` returned.
    """

    def __init__(
        self, group: Group, table: Rows | StoredRows, samples: NDArray[np.int64], vector: Tensor, error: float
    ) -> None:
        self.group, self.table, self.samples = group, table, samples
        self.alive = np.ones(len(samples), dtype=bool)
        self.begin(vector, error)

    def begin(self, vector: Tensor, error: float) -> None:
        """Begin a bin, or another set of picks, with a new vector w and a bound on the length of its error."""
        self.vector, self.error, self.slack = vector, error, 0.0
        self._norm = float(vector.norm())
        # Recorded picks, how many of them have entered w, and what w was before them.
        self._pending: list[int] = []
        self._entered, self._before = 0, vector
        self._rows: list[NDArray[np.int64]] = []
        self._values: list[Array] = []

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def rows(self) -> NDArray[np.int64]:
        return np.concatenate([np.empty(0, dtype=np.int64), *self._rows])

    @property
    def values(self) -> Array:
        return np.concatenate([np.empty(0), *self._values])

    def bound(self, picks: int = 0) -> float:
        """Return a bound on the error of a gain computed in float64 before any of the next `picks` picks."""
        if self.group.unit:
            return 0.0
        longest = self.group.longest
        reach = self._norm + 2.0 * picks * longest
        return longest * (self.error + ROUNDING * ((self.group.depth + 6 + picks) * reach))

    def gains(self) -> Tensor:
        """Return the gains of all rows, float64 [n] on the device of the rows; minus infinity where no sample is left."""
        self.finish()
        gains = self.table.against(self.vector)[:, 0]
        self.slack = max(self.slack, self.bound())
        return gains.masked_fill_(torch.from_numpy(~self.alive).to(gains.device), -torch.inf)

    def take(self, row: int) -> bool:
        """Record a pick; return whether the row has another sample that is equal."""
        self.group.referee.push(int(self.samples[row]))
        self._pending.append(row)
        return self._next_sample(row)

    def apply(
        self, rows: NDArray[np.int64], values: Array, picked: Rows, slack: float = 0.0, *, push: bool = False
    ) -> None:
        """Record picks whose vectors are given, and their gains to within `slack`; `push` tells the referee of them."""
        self.finish()
        self.slack = max(self.slack, slack)
        for row in rows.tolist():
            if push:
                self.group.referee.push(int(self.samples[row]))
            self._next_sample(row)
        self._rows.append(rows)
        self._values.append(values)
        self._move(picked)
        self._before, self._norm = self.vector, float(self.vector.norm())

    def settle(self, near: NDArray[np.int64]) -> int:
        """Return which of the rows `near` has the greatest gain; of equal gains the one with the lowest sample."""
        self._catch_up()
        gains = self.table.take(torch.from_numpy(near)).against(self.vector)[:, 0].cpu().numpy()
        bound = self.bound()
        near = near[gains >= gains.max() - 2.0 * bound]
        if len(near) == 1:
            return int(near[0])
        winner = self.group.decide(self.samples[near])
        return int(near[np.flatnonzero(self.samples[near] == winner)[0]])

    def finish(self) -> None:
        """Let the recorded picks enter the vector, and compute their gains."""
        if not self._pending:
            return
        self._catch_up()
        rows = np.array(self._pending)
        self._pending, self._entered = [], 0
        self.slack = max(self.slack, self.bound(len(rows)))
        self._rows.append(rows)
        self._values.append(self.table.take(torch.from_numpy(rows)).gains_in_turn(self._before).cpu().numpy())
        self._before, self._norm = self.vector, float(self.vector.norm())

    def _catch_up(self) -> None:
        """Let the recorded picks enter the vector."""
        rows = self._pending[self._entered :]
        if rows:
            self._entered = len(self._pending)
            self._move(self.table.take(torch.from_numpy(np.array(rows))))

    def _next_sample(self, row: int) -> bool:
        twins = self.group.twins
        following = -1 if twins is None else int(twins[self.samples[row]])
        if following >= 0:
            self.samples[row] = following
        else:
            self.alive[row] = False
        return following >= 0

    def _move(self, picked: Rows) -> None:
        count, longest = len(picked), self.group.longest
        if not count:
            return
        self.vector = self.vector - 2.0 * picked.sum().to(self.vector.device)
        self.error += ROUNDING * (2.0 * count * count * longest + self._norm + 2.0 * count * longest)
        self._norm += 2.0 * count * longest
