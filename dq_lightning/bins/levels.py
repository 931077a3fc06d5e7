"""Exact greedy graph cut for groups of any size without a similarity matrix.

One pick hardly changes the order of the gains. The rows of greatest gain are therefore taken as candidates, then
candidates among these, and so on, until a few hundred rows are left whose inner products fit a small matrix. A set of
rows that picks are made from is called a level, and the smallest one, which has the matrix, is called the leaf. The
leaf runs the plain greedy algorithm. Its picks are then checked against all other rows of the level above, hundreds of
picks in one pass. If another row should have been picked first, that pick and all later ones are undone, so the result
is that of the greedy algorithm on all rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.bins.exact import Array
from dq_lightning.bins.plan import Room
from dq_lightning.bins.referee import ROUNDING, Referee
from dq_lightning.bins.rows import Rows, StoredRows

# A leaf has at least this many rows, unless its level has fewer.
LEAF_ROWS = 256
# At least this many rows of the leaf's matrix are computed at a time.
_MATRIX_BLOCK = 128
# Sizes of nested candidate sets grow by this factor.
_GROWTH = 8
# Reading a row in a pass over a level costs about as much as this many multiplications with a row.
_READING = 4.0
# Give up on a candidate set after it has cost as much as 8 passes over its level, and check what was picked so far:
# where the order of the gains changes quickly, most of the later picks would be rejected.
_PATIENCE = 8.0


def _leaf_rows(rows: int) -> int:
    """Return the size of the leaf whose matrix costs about as much as one pass over a level of `rows` rows."""
    small = LEAF_ROWS
    while 4 * small * small <= 8 * rows:
        small *= 2
    return small


@dataclass(eq=False)
class Level:
    """Set of rows that picks are made from.

    Samples with equal features share one row.

    Attributes:
        table: the n rows; a row stays in the table when all of its samples have been picked.
        samples: int64 [n], lowest remaining sample of each row.
        gains: float64 [n], gain of each row; minus infinity where no sample is left.
        error: bound on the absolute rounding error of each gain.
    """

    table: Rows | StoredRows
    samples: NDArray[np.int64]
    gains: Tensor
    error: float


@dataclass(eq=False)
class Run:
    """Picks from a level, in order.

    Attributes:
        rows: int64 [T], index in the level of each picked row.
        gains: float64 [T], gain of each row at the time it was picked.
        error: bound on the absolute rounding error of these gains.
    """

    rows: NDArray[np.int64]
    gains: Array
    error: float


class Levels:
    """Makes the greedy picks of one group.

    Args:
        referee: exact state of the group, which decides between gains that float64 cannot distinguish.
        longest: bound on the Euclidean length of a row.
        twins: int64 [n], next sample with an equal row, or -1 if there is none; None if no two rows are equal.
        tick: progress callback, called with the number of picks made, or a negative number of picks undone.
        room: limits on the size of matrices of inner products and of copies of rows.

    Attributes:
        reach: bound on the absolute value of a gain in the current bin.
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
        """Make `count` picks from a level and update the level's gains and samples.

        Args:
            level: level to pick from; it is changed in place.
            count: number of picks wanted.
            leaf: whether to compute the matrix of inner products of all rows of the level and pick directly.
            patience: cost, in multiplications with a row, after which to stop with fewer picks, but at least one.
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
        """Pick among the rows of greatest gain and keep the picks that are proved to be greedy on the whole level.

        Returns:
            The proved picks, the rows that should have been picked instead of the first rejected pick, and the cost in
            multiplications with a row.
        """
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
        # A row with duplicates can be picked more than once, so the share counts picks, not rows.
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
        """Return whether the candidates of the next round form a leaf, and how many candidates to take."""
        small = _leaf_rows(rows)
        large = LEAF_ROWS
        while 2 * large * _GROWTH < rows and large < 4 * count and large * _GROWTH <= self._largest_copy:
            large *= _GROWTH

        # The cost of one pick, in multiplications with a row, is that of the passes and matrices of a round divided by
        # the number of picks that the round is expected to make.
        inner = _leaf_rows(large)
        more_picks = self._share(False, large) * large
        direct = (_READING * rows + small * small) / (self._share(True, small) * small)
        nested = _READING * rows / more_picks + (_READING * large + inner * inner) / (self._share(True, inner) * inner)
        if rows <= self._largest_leaf and rows * rows < min(direct, nested) * count:
            return True, rows
        return (False, large) if large > LEAF_ROWS and nested < direct else (True, small)

    def _share(self, leaf: bool, size: int) -> float:
        """Return the number of picks to try in one round as a share of `size` candidates; `_round` adapts it."""
        return self._shares.setdefault((leaf, size), 0.4)

    def forget(self) -> None:
        """Reset the shares that `_share` returns, because a new bin begins."""
        self._shares.clear()

    def _candidates(self, level: Level, size: int, wanted: NDArray[np.int64]) -> NDArray[np.int64]:
        top = torch.topk(level.gains, min(size, len(level.gains)), sorted=False).indices.cpu().numpy()
        # If more than `size` rows were better than the rejected pick, the best of them are among the top rows already.
        top = np.union1d(top, wanted[:0] if len(wanted) > size else wanted)
        held: NDArray[np.bool_] = (level.gains[torch.from_numpy(top)] > -torch.inf).cpu().numpy()
        return np.asarray(top[held])

    def _remove(self, level: Level, chosen: NDArray[np.int64]) -> None:
        """Remove picked rows from a level; a row that has another equal sample left stays and represents it."""
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
        """Return twice the inner products of all rows, float64 [n, n]; the upper triangle is copied from the lower."""
        total = len(rows)
        step = max(_MATRIX_BLOCK, -(-total // 8))
        whole = torch.empty(total, total, dtype=torch.float64, device=rows.factors[0].device)

        def fill(first: int) -> None:
            last = min(first + step, total)
            part = rows.span(first, last).inner(rows.span(0, last)).mul_(2.0)
            whole[first:last, :last] = part
            whole[:first, first:last] = part[:, :first].T

        # The largest blocks are computed first, so that the threads finish at about the same time.
        self.workers.run(fill, range(0, total, step)[::-1])
        doubled: Array = whole.cpu().numpy()
        return doubled

    def _settle(self, level: Level, gains: Array, least: float) -> int:
        near = np.flatnonzero(gains >= least)
        winner = self.referee.settle(level.samples[near])
        return int(near[np.flatnonzero(level.samples[near] == winner)[0]])


# Picks are checked in at most this many chunks, each of at least this many picks.
_MAX_CHECKPOINTS = 12
_PICKS_A_CHECKPOINT = 48
# A table of gains with one row for each outside row and one column for each pick has about this many entries.
_TABLE_ENTRIES = 1 << 20
# Up to this many picks, the gains of all rows are computed after every pick instead of after every chunk.
_FEW_PICKS = 64


@dataclass(eq=False)
class Fault:
    """Result of checking picks: how many of them are proved to be greedy.

    Attributes:
        step: number of picks that are proved.
        gains: float64 [n], gains of all rows of the level after these picks.
        error: bound on the absolute rounding error of these gains.
        rows: int64, rows that should have been picked instead of pick number `step`; empty if all picks are proved.
    """

    step: int
    gains: Tensor
    error: float
    rows: NDArray[np.int64]


@dataclass(eq=False)
class _Chunk:
    """Consecutive picks, and bounds that prove them without computing gains between the two ends.

    Attributes:
        first: number of the first pick.
        last: number of the pick after the last one.
        deviation: greatest distance of the sum of the chunk's first t rows from the straight line to the sum of all.
        limits: values that the gain of an outside row must stay below at the start and at the end of the chunk.
    """

    first: int
    last: int
    deviation: float
    limits: tuple[float, float]


def first_fault(levels: "Levels", level: "Level", outside: Tensor, picked: Rows, run: "Run", start: int) -> Fault:
    """Check T picks, made among the candidates of a level, against the rows that were not candidates.

    Args:
        levels: greedy engine of the group, which holds the bounds and the referee.
        level: the n rows, with their gains before the first of the picks.
        outside: bool [n], True for rows that were not candidates and still have a sample.
        picked: the T picked rows, in order.
        run: the picks and their gains.
        start: number of picks made in the bin before these.

    Returns:
        The number of picks that are proved, and the gains after them.
    """
    total = len(picked)
    error = level.error + _drift_error(levels, total)
    slack = run.error + error
    if total <= _FEW_PICKS:
        return _every_step(levels, level, outside, picked, run, slack, error, start)
    count = max(1, min(_MAX_CHECKPOINTS, total // _PICKS_A_CHECKPOINT))
    marks = np.linspace(0, total, count + 1).astype(int)
    parts = [picked.take(torch.arange(a, b)) for a, b in pairwise(marks)]
    sums = torch.cat([part.sum() for part in parts]).cumsum(dim=0).to(level.gains.device)
    chunks = [
        _chunk(part, run.gains, int(a), int(b), slack) for part, (a, b) in zip(parts, pairwise(marks), strict=True)
    ]
    after, suspects = _pass(levels, level, outside, sums, chunks)
    for number, chunk in enumerate(chunks):
        rows = torch.nonzero(suspects[:, number]).flatten().cpu().numpy()
        if len(rows):
            before = sums[number - 1 : number] if number else torch.zeros_like(sums[:1])
            step, spoilers = _walk(levels, level, rows, before, parts[number], chunk, run, slack, start)
            if step < chunk.last:
                vector = before + picked.take(torch.arange(chunk.first, step)).sum().to(before.device)
                gains = level.gains - 2.0 * level.table.against(vector)[:, 0]
                return Fault(step, gains, error, spoilers)
    return Fault(total, after, error, np.empty(0, dtype=np.int64))


def _every_step(
    levels: "Levels",
    level: "Level",
    outside: Tensor,
    picked: Rows,
    run: "Run",
    slack: float,
    error: float,
    start: int,
) -> Fault:
    """Check the picks as `first_fault` does, by computing the gains of all rows after every pick, block by block."""
    total, device = len(picked), level.gains.device
    limits = torch.from_numpy(run.gains).to(device)

    def look(ends: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Compare the gains of a block of rows with the gain of the pick at each step.

        Returns:
            The greatest lead of a row over the pick at each step, [T]; the step and row, [2, k], and the lead, [k], of
            each place where a row is better than the pick or equal up to rounding.
        """
        part = slice(*ends)
        drift = picked.inner(level.table.span(*ends)).mul_(2.0).cumsum(dim=0)
        leads = level.gains[part] - limits[:, None]
        leads[1:] -= drift[:-1]
        leads.masked_fill_(~outside[part], -torch.inf)
        greatest = leads.amax(dim=1)
        # Picks after the first one that is certainly wrong are rejected anyway, so they are not compared.
        sure = torch.nonzero(greatest > slack).flatten()
        near = torch.nonzero(leads[: int(sure[0]) + 1 if len(sure) else total] >= -slack)
        found = torch.stack([near[:, 0], near[:, 1] + ends[0]])
        return greatest, found.cpu(), leads[near[:, 0], near[:, 1]].cpu()

    blocks = list(levels.workers.map(look, level.table.ranges()))
    greatest = torch.stack([block[0] for block in blocks]).amax(dim=0)
    places, leads = torch.cat([block[1] for block in blocks], dim=1), torch.cat([block[2] for block in blocks]).numpy()
    steps, rows = places.numpy()
    step, spoilers = total, np.empty(0, dtype=np.int64)
    for at in torch.nonzero(greatest >= -slack).flatten().tolist():
        here = steps == at
        close = rows[here]
        if float(greatest[at]) > slack:
            step, spoilers = at, close[leads[here] > slack]
            break
        pick = levels.referee.trail[start + at]
        winner = levels.referee.settle(np.append(level.samples[close], pick), start + at)
        if winner != pick:
            step, spoilers = at, close[level.samples[close] == winner]
            break
    gains = level.gains
    if step:
        vector = picked.span(0, step).sum().to(device)
        gains = gains - 2.0 * level.table.against(vector)[:, 0]
    return Fault(step, gains.clone(), error, spoilers)


def _drift_error(levels: "Levels", picks: int) -> float:
    """Bound the error of computing 2 x . P, where P is the sum of `picks` rows, and of subtracting it from a gain."""
    return 2.0 * ROUNDING * (levels.depth + 6 + picks) * picks * levels.longest**2 + ROUNDING * levels.reach


def _chunk(part: Rows, gains: Array, first: int, last: int, slack: float) -> _Chunk:
    fractions = np.arange(last - first) / (last - first)
    ends = gains[first], gains[last] if last < len(gains) else gains[last - 1]
    line = ends[0] + fractions * (ends[1] - ends[0])
    drop = float((line - gains[first:last]).max()) + slack
    return _Chunk(first, last, _deviation(part), (ends[0] - drop, ends[1] - drop))


def _deviation(part: Rows) -> float:
    """Return the greatest Euclidean length of (sum of the first t rows) - t/n (sum of all rows), t = 0 ... n - 1."""
    total = len(part)
    fractions = torch.arange(total, dtype=torch.float64) / total
    fractions = fractions.to(part.factors[0].device)
    if len(part.factors) == 1:
        partial = part.factors[0].cumsum(dim=0)
        walk = torch.cat([torch.zeros_like(partial[:1]), partial[:-1]]) - fractions[:, None] * partial[-1:]
        squares = (walk * walk).sum(dim=1)
    else:
        grid = part.inner(part).cumsum(dim=0).cumsum(dim=1)
        grid = torch.nn.functional.pad(grid, (1, 0, 1, 0))
        squares = grid.diagonal()[:-1] - 2.0 * fractions * grid[:-1, -1] + fractions**2 * grid[-1, -1]
        squares = squares + ROUNDING * total * 64.0 * grid.abs().max()
    return float(squares.clamp(min=0.0).max().sqrt()) * (1.0 + 2.0**-20)


def _pass(
    levels: "Levels", level: "Level", outside: Tensor, sums: Tensor, chunks: list[_Chunk]
) -> tuple[Tensor, Tensor]:
    """Compute the gains of all rows at the ends of all chunks in one pass over the level.

    Returns:
        The gains after the last pick, float64 [n], and a bool tensor [n, chunks] that is True where an outside row
        might have been better than some pick of a chunk, judging by its gains at the two ends of the chunk.
    """
    device = level.gains.device
    limits = torch.tensor([chunk.limits for chunk in chunks], dtype=torch.float64, device=device)
    margins = torch.tensor([2.0 * chunk.deviation for chunk in chunks], dtype=torch.float64, device=device)
    after = torch.empty_like(level.gains)
    suspects = torch.empty(len(after), len(chunks), dtype=torch.bool, device=device)

    def look(ends: tuple[int, int]) -> None:
        part = slice(*ends)
        block = level.table.span(*ends)
        gains = level.gains[part, None]
        states = torch.cat([gains, gains - 2.0 * block.against(sums)], dim=1)
        reach = margins[None] * (levels.longest if levels.unit else block.lengths()[:, None])
        unclear = (states[:, :-1] + reach >= limits[:, 0]) | (states[:, 1:] + reach >= limits[:, 1])
        suspects[part] = unclear & outside[part, None]
        after[part] = states[:, -1]

    levels.workers.run(look, level.table.ranges())
    return after, suspects


def _walk(
    levels: "Levels",
    level: "Level",
    rows: NDArray[np.int64],
    before: Tensor,
    part: Rows,
    chunk: _Chunk,
    run: "Run",
    slack: float,
    start: int,
) -> tuple[int, NDArray[np.int64]]:
    """Compute the gains of the given outside rows at every step of a chunk.

    Returns:
        The number of the first pick that is wrong, or the end of the chunk if all are right, and the rows that should
        have been picked instead.
    """
    step = chunk.last
    spoilers: NDArray[np.int64] = np.empty(0, dtype=np.int64)
    close: dict[int, list[int]] = {}
    begin = 0
    while begin < len(rows) and step > chunk.first:
        # Only steps before the first wrong pick found so far can change the result.
        span = step - chunk.first
        some = rows[begin : begin + max(1, _TABLE_ENTRIES // span)]
        begin += len(some)
        block = level.table.take(torch.from_numpy(some))
        gains = level.gains[torch.from_numpy(some).to(level.gains.device)] - 2.0 * block.against(before)[:, 0]
        drift = block.inner(part.span(0, span)).mul_(2.0).cumsum(dim=1)
        states = gains[:, None] - torch.nn.functional.pad(drift, (1, 0))[:, :-1]
        over = states.cpu().numpy() - run.gains[None, chunk.first : step]
        sure = np.flatnonzero((over > slack).any(axis=0))
        if len(sure):
            step = chunk.first + int(sure[0])
            spoilers = some[over[:, sure[0]] > slack]
            over = over[:, : sure[0]]
        for row, at in zip(*np.nonzero(over >= -slack), strict=True):
            close.setdefault(chunk.first + int(at), []).append(int(some[row]))
    # At these steps the gains of the pick and of an outside row differ by less than the rounding bound, so the exact
    # arithmetic of the referee decides, step by step.
    picks = levels.referee.trail[start : start + len(run.rows)]
    for at in sorted(close):
        if at >= step:
            break
        others = level.samples[close[at]]
        winner = levels.referee.settle(np.append(others, picks[at]), start + at)
        if winner != picks[at]:
            step, spoilers = at, np.array(close[at], dtype=np.int64)[others == winner]
    return step, spoilers
