"""Exact greedy graph cut of any size without a matrix: pick among candidates, then prove the others were no better. PURE.

One pick hardly changes the order of gains, so the rows of greatest gain are taken as candidates, and candidates of these in
turn, until a few hundred are left, whose inner products fit a small matrix. There the greedy runs as it is. Its picks are
then proved against all other rows of the level above, in one pass for hundreds of picks, and taken back from the first one
that some other row should have preceded.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.bins.exact import Array
from dq_lightning.bins.plan import Room
from dq_lightning.bins.proof import first_fault
from dq_lightning.bins.referee import ROUNDING, Referee
from dq_lightning.bins.rows import Rows, StoredRows

# rows whose inner products are kept as a matrix
LEAF_ROWS = 256
# rows of such a matrix that are computed at a time, at least
_MATRIX_BLOCK = 128
# a level has this many times the rows of the candidates drawn from it
_GROWTH = 8
# what reading a row in a pass costs, in multiplications with a row
_READING = 4.0
# candidates may cost so many passes over their level before what was picked among them is proved: where the order of
# gains turns quickly, most of it will be taken back
_PATIENCE = 8.0


def _leaf_rows(rows: int) -> int:
    """Candidates of a level whose matrix costs about as much as a pass over it."""
    small = LEAF_ROWS
    while 4 * small * small <= 8 * rows:
        small *= 2
    return small


@dataclass(eq=False)
class Level:
    """Rows that picks are made from.

    Attributes:
        table: n rows; those that hold no sample any more stay in it.
        samples: int64 [n], the lowest sample that each row stands for; equal rows are one row.
        gains: float64 [n]; minus infinity where no sample is left.
        error: bound on the error of a gain.
    """

    table: Rows | StoredRows
    samples: NDArray[np.int64]
    gains: Tensor
    error: float


@dataclass(eq=False)
class Run:
    """Picks in order: their rows in the level, and their gains when picked, with a bound on these gains' error."""

    rows: NDArray[np.int64]
    gains: Array
    error: float


class Levels:
    """Greedy picks of one group.

    Args:
        referee: of the group.
        longest: bound on the length of a row.
        twins: int64 [n], the next sample with an equal row, or -1; or None.
        tick: told how many picks were made, or taken back (negative).
        room: for matrices of inner products and copies of rows.

    Attributes:
        reach: bound on the absolute value of a gain in this bin.
    """

    def __init__(
        self,
        referee: Referee,
        longest: float,
        twins: NDArray[np.int64] | None,
        tick: Callable[[int], object],
        room: Room,
    ) -> None:
        self.referee = referee
        self.longest = longest
        self.twins = twins
        self.tick = tick
        self.depth = referee.rows.depth
        self.workers = referee.rows.workers
        self.unit = referee.rows.scales is not None
        self.reach = 0.0
        self._largest_leaf = max(LEAF_ROWS, int(room.matrix**0.5))
        self._largest_copy = max(LEAF_ROWS, room.rows // sum(referee.rows.widths))
        self._shares: dict[tuple[bool, int], float] = {}

    def pick(self, level: Level, count: int, *, leaf: bool = False, patience: float = float("inf")) -> Run:
        """Make `count` picks from a level; the level's gains and samples are brought up to date.

        Fewer, but at least one, when they cost more than `patience`, in multiplications with a row.
        """
        if leaf or len(level.samples) <= LEAF_ROWS:
            return self._pick_in_leaf(level, count)
        rows, gains, error = [np.empty(0, dtype=np.int64)], [np.empty(0)], 0.0
        wanted: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        made = 0
        while made < count and (patience > 0 or made == 0):
            run, wanted, cost = self._round(level, count - made, wanted)
            patience -= cost
            rows.append(run.rows)
            gains.append(run.gains)
            error = max(error, run.error)
            made += len(run.rows)
        return Run(np.concatenate(rows), np.concatenate(gains), error)

    def _round(self, level: Level, count: int, wanted: NDArray[np.int64]) -> tuple[Run, NDArray[np.int64], float]:
        """Pick among the rows of greatest gain, keep what is proved; name the rows that spoilt the rest, and the cost."""
        leaf, size = self._plan(len(level.samples), count)
        start = self.referee.length
        top = self._candidates(level, size, wanted)
        share = self._share(leaf, size)
        outside = level.gains > -torch.inf
        outside[torch.from_numpy(top).to(outside.device)] = False
        target = min(count, max(1, int(share * len(top)))) if bool(outside.any()) else count
        child = Level(level.table.take(torch.from_numpy(top)), level.samples[top], level.gains[top], level.error)
        own_pass = _READING * len(level.samples)
        run = self.pick(child, target, leaf=leaf, patience=_PATIENCE * own_pass)
        made = len(run.rows)
        picked = child.table.take(torch.from_numpy(run.rows))
        fault = first_fault(self, level, outside, picked, run, start)
        kept = fault.step
        # with duplicates a row can be picked more than once, so this is a share of picks, not of rows
        if kept < made:
            self._shares[leaf, size] = max(4 / size, 0.9 * kept / len(top))
            self.referee.rewind(start + kept)
            self.tick(kept - made)
        elif made == target:
            self._shares[leaf, size] = min(0.8, share * 1.1)
        level.gains = fault.gains
        level.error = fault.error
        chosen = top[run.rows[:kept]]
        self._remove(level, chosen)
        cost = own_pass + (len(top) ** 2 if leaf else _PATIENCE * _READING * len(top))
        return Run(chosen, run.gains[:kept], run.error), fault.rows, cost

    def _plan(self, rows: int, count: int) -> tuple[bool, int]:
        """Choose how many candidates to draw from a level, and whether they are few enough for a matrix."""
        small = _leaf_rows(rows)
        large = LEAF_ROWS
        while 2 * large * _GROWTH < rows and large < 4 * count and large * _GROWTH <= self._largest_copy:
            large *= _GROWTH

        # cost of a pick, in multiplications with a row: passes over the level and matrices, shared by the picks of a round
        inner = _leaf_rows(large)
        more_picks = self._share(False, large) * large
        direct = (_READING * rows + small * small) / (self._share(True, small) * small)
        nested = _READING * rows / more_picks + (_READING * large + inner * inner) / (self._share(True, inner) * inner)
        if rows <= self._largest_leaf and rows * rows < min(direct, nested) * count:
            return True, rows
        return (False, large) if large > LEAF_ROWS and nested < direct else (True, small)

    def _share(self, leaf: bool, size: int) -> float:
        """Share of so many candidates that is picked in one go; learnt from round to round."""
        return self._shares.setdefault((leaf, size), 0.4)

    def forget(self) -> None:
        """Begin a bin with fresh hopes."""
        self._shares.clear()

    def _candidates(self, level: Level, size: int, wanted: NDArray[np.int64]) -> NDArray[np.int64]:
        top = torch.topk(level.gains, min(size, len(level.gains)), sorted=False).indices.cpu().numpy()
        # where more rows than that were better, the best of them are among the top already
        top = np.union1d(top, wanted[:0] if len(wanted) > size else wanted)
        held: NDArray[np.bool_] = (level.gains[torch.from_numpy(top)] > -torch.inf).cpu().numpy()
        return np.asarray(top[held])

    def _remove(self, level: Level, chosen: NDArray[np.int64]) -> None:
        """Take picked rows out of a level, unless an equal sample is left to stand in for them."""
        if self.twins is None:
            level.gains[torch.from_numpy(chosen).to(level.gains.device)] = -torch.inf
            return
        for row in chosen:
            level.samples[row] = self.twins[level.samples[row]]
        gone = chosen[level.samples[chosen] < 0]
        level.gains[torch.from_numpy(gone).to(level.gains.device)] = -torch.inf

    def _pick_in_leaf(self, level: Level, count: int) -> Run:
        rows = level.table if isinstance(level.table, Rows) else level.table.take(torch.arange(len(level.table)))
        doubled = self._doubled(rows)
        gains: Array = level.gains.cpu().numpy()
        size = float(np.abs(gains[gains > -np.inf]).max(initial=0.0)) + 2.0 * count * self.longest**2
        step_error = ROUNDING * (2.0 * (self.depth + 4) * self.longest**2 + size)
        picks = np.empty(count, dtype=np.int64)
        values = np.empty(count)
        slack = 2.0 * level.error
        for step in range(count):
            best = int(gains.argmax())
            top = values[step] = gains[best]
            gains[best] = -np.inf
            if gains.max() >= top - slack:
                gains[best] = top
                best = self._settle(level, gains, top - slack)
                values[step] = gains[best]
                top = gains[best]
            picks[step] = best
            sample = level.samples[best]
            self.referee.push(sample)
            if self.twins is not None and self.twins[sample] >= 0:
                level.samples[best] = self.twins[sample]
                gains[best] = top
            else:
                gains[best] = -np.inf
            gains -= doubled[best]
            slack += 2.0 * step_error
        level.error += count * step_error
        level.gains = torch.from_numpy(gains)
        self.tick(count)
        return Run(picks, values, level.error)

    def _doubled(self, rows: Rows) -> Array:
        """Twice the inner products of all rows, [n, n]; blocks above the diagonal are copied from below."""
        total = len(rows)
        step = max(_MATRIX_BLOCK, -(-total // 8))
        whole = torch.empty(total, total, dtype=torch.float64, device=rows.factors[0].device)

        def fill(first: int) -> None:
            last = min(first + step, total)
            part = rows.span(first, last).inner(rows.span(0, last)).mul_(2.0)
            whole[first:last, :last] = part
            whole[:first, first:last] = part[:, :first].T

        # the largest blocks first, so that no thread is left alone with one
        self.workers.run(fill, range(0, total, step)[::-1])
        doubled: Array = whole.cpu().numpy()
        return doubled

    def _settle(self, level: Level, gains: Array, least: float) -> int:
        near = np.flatnonzero(gains >= least)
        winner = self.referee.settle(level.samples[near])
        return int(near[np.flatnonzero(level.samples[near] == winner)[0]])
