"""The rows that picks are made from, and the vector whose inner product with a row is the row's gain."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.bins.graph_cut.exact import Array
from dq_lightning.bins.graph_cut.group import ROUNDING, Group
from dq_lightning.bins.rows import Rows, StoredRows


class Doubt(NamedTuple):
    """The rows whose scores lie within the error bound of the greatest, and their samples, before pick number `step`."""

    step: int
    rows: NDArray[np.int64]
    samples: NDArray[np.int64]


class Pool:
    """n rows that picks are made from. Samples with equal features share one row, which stands for the lowest one left.

    The gain of a row x is `x . w` for one vector `w = lam * sum(left) - 2 * sum(picked)`, so a pick only changes w.
    Picks are proposed one by one by `take` and enter w together, by `confirm` or `apply`.

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
        return longest * (self.error + ROUNDING * ((self.group.rows.depth + 6 + picks) * reach))

    def gains(self) -> Tensor:
        """Return the gains of all rows, float64 [n] on the device of the rows; minus infinity where no sample is left."""
        gains = self.table.against(self.vector)[:, 0]
        self.slack = max(self.slack, self.bound())
        return gains.masked_fill_(torch.from_numpy(~self.alive).to(gains.device), -torch.inf)

    def take(self, row: int) -> bool:
        """Propose a pick; return whether the row has another sample that is equal."""
        group = self.group
        group.trail[group.length] = self.samples[row]
        group.length += 1
        return self.advance(row)

    def advance(self, row: int) -> bool:
        """Let a row stand for the next sample that is equal; return whether there is one."""
        twins = self.group.twins
        following = -1 if twins is None else twins[self.samples[row]]
        if following >= 0:
            self.samples[row] = following
        else:
            self.alive[row] = False
        return bool(following >= 0)

    def confirm(self, rows: list[int], doubts: list[Doubt]) -> NDArray[np.int64]:
        """Let the picks that were proposed since the last call become picks, up to the first one that is wrong.

        The greedy pick takes the place of that one, and those after it are undone. Float64 decides about the doubtful
        ones, all at once, and where it does not, exact arithmetic does.

        Args:
            rows: the rows proposed.
            doubts: the doubtful ones, in order.

        Returns:
            The rows of the picks made, int64.
        """
        start, made = self.group.length - len(rows), np.array(rows)
        near = np.concatenate([made, *(doubt.rows for doubt in doubts)])
        lengths = [len(doubt.rows) for doubt in doubts]
        which = np.repeat(np.arange(len(doubts)), lengths)
        steps = np.append(np.arange(len(made)), np.repeat([doubt.step for doubt in doubts], lengths)).astype(np.int64)
        compared = self.table.take(torch.from_numpy(near))
        picked = compared.span(0, len(made))
        gains = compared.gains_after(self.vector, picked, torch.from_numpy(steps).to(self.vector.device)).cpu().numpy()
        values, gains, near, steps = gains[: len(made)], gains[len(made) :], near[len(made) :], steps[len(made) :]
        slack = self.bound(len(made))
        if doubts:
            unclear = (gains >= values[steps] - 2.0 * slack) & (near != made[steps])
            for number in np.unique(which[unclear]).tolist():
                doubt, mine = doubts[number], gains[which == number]
                best = np.flatnonzero(mine >= mine.max() - 2.0 * slack)
                if len(best) > 1:
                    winner = self.group.settle(doubt.samples[best], start + doubt.step)
                    best = np.flatnonzero(doubt.samples == winner)
                if (row := int(doubt.rows[best[0]])) != rows[doubt.step]:
                    self._undo(rows[doubt.step :], start + doubt.step)
                    self.take(row)
                    made = np.append(made[: doubt.step], row)
                    values = np.append(values[: doubt.step], mine[best[0]])
                    picked = self.table.take(torch.from_numpy(made))
                    break
        self.apply(made, values, picked, slack)
        return made

    def apply(self, rows: NDArray[np.int64], values: Array, picked: Rows, slack: float) -> None:
        """Let proposed picks, of which the vectors and the gains to within `slack` are given, enter the vector w."""
        self.slack = max(self.slack, slack)
        self._rows.append(rows)
        self._values.append(values)
        count, longest = len(picked), self.group.longest
        self.vector = self.vector - 2.0 * picked.sum().to(self.vector.device)
        self.error += ROUNDING * (2.0 * count * count * longest + self._norm + 2.0 * count * longest)
        self._norm = float(self.vector.norm())

    def _undo(self, rows: list[int], length: int) -> None:
        """Undo the picks after the first `length`, which were made of `rows`."""
        for row, sample in zip(reversed(rows), reversed(self.group.trail[length : length + len(rows)]), strict=True):
            self.samples[row], self.alive[row] = sample, True
        self.group.rewind(length)
