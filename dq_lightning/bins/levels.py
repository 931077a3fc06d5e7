"""Exact greedy graph cut of any size without a matrix: pick among candidates, then prove the others were no better. PURE.

One pick hardly changes the order of gains, so the rows of greatest gain are taken as candidates, and candidates of these in
turn, until a few hundred are left, whose inner products fit a small matrix. There the greedy runs as it is. Its picks are
then proved against all other rows of the level above, in one pass for hundreds of picks, and taken back from the first one
that some other row should have preceded.
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


_MAX_CHECKPOINTS = 12
_PICKS_A_CHECKPOINT = 48
# numbers in a table of outside rows times steps
_TABLE_ENTRIES = 1 << 20
# so few picks are checked at every step
_FEW_PICKS = 64


@dataclass(eq=False)
class Fault:
    """How far the picks are right.

    Attributes:
        step: number of picks that are proved.
        gains: float64 [n], of all rows after these picks.
        error: bound on the error of these gains.
        rows: int64, the rows that should have been picked instead of pick number `step`.
    """

    step: int
    gains: Tensor
    error: float
    rows: NDArray[np.int64]


@dataclass(eq=False)
class _Chunk:
    """Picks `first` to `last` (exclusive), and what an outside row's gains must stay below at its two ends."""

    first: int
    last: int
    deviation: float
    limits: tuple[float, float]


def first_fault(levels: "Levels", level: "Level", outside: Tensor, picked: Rows, run: "Run", start: int) -> Fault:
    """Check T picks of a child level against the rows outside it.

    Args:
        levels: the engine, for its bounds and its referee.
        level: n rows, with the gains before the first of the picks.
        outside: bool [n], rows that were no candidates and still hold a sample.
        picked: the T rows picked, in order.
        run: the picks.
        start: number of picks of the bin before these.
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
    """Compute the gains of all rows at every step, block by block, and keep what comes near a pick."""
    total, device = len(picked), level.gains.device
    limits = torch.from_numpy(run.gains).to(device)

    def look(ends: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Greatest lead over the pick at each step, [T]; steps, rows and leads of those that come near it."""
        part = slice(*ends)
        drift = picked.inner(level.table.span(*ends)).mul_(2.0).cumsum(dim=0)
        leads = level.gains[part] - limits[:, None]
        leads[1:] -= drift[:-1]
        leads.masked_fill_(~outside[part], -torch.inf)
        greatest = leads.amax(dim=1)
        # nothing after the first sure fault is of interest
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
    """Bound on the error of 2 x . P for a sum P of so many picks, and of subtracting it."""
    return 2.0 * ROUNDING * (levels.depth + 6 + picks) * picks * levels.longest**2 + ROUNDING * levels.reach


def _chunk(part: Rows, gains: Array, first: int, last: int, slack: float) -> _Chunk:
    fractions = np.arange(last - first) / (last - first)
    ends = gains[first], gains[last] if last < len(gains) else gains[last - 1]
    line = ends[0] + fractions * (ends[1] - ends[0])
    drop = float((line - gains[first:last]).max()) + slack
    return _Chunk(first, last, _deviation(part), (ends[0] - drop, ends[1] - drop))


def _deviation(part: Rows) -> float:
    """Greatest length of (sum of the first t rows) - t/n (sum of all), t = 0 ... n - 1."""
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
    """Return all gains after the last pick, and bool [n, chunks]: the outside rows that a chunk's two ends don't clear."""
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
    """Compute the gains of some outside rows at every step of a chunk; return the first fault, or the chunk's end."""
    step = chunk.last
    spoilers: NDArray[np.int64] = np.empty(0, dtype=np.int64)
    close: dict[int, list[int]] = {}
    begin = 0
    while begin < len(rows) and step > chunk.first:
        # only what comes before the first fault found so far is of interest
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
    # the gain of a pick and that of an outside row are too close to call: ask the referee, step by step
    picks = levels.referee.trail[start : start + len(run.rows)]
    for at in sorted(close):
        if at >= step:
            break
        others = level.samples[close[at]]
        winner = levels.referee.settle(np.append(others, picks[at]), start + at)
        if winner != picks[at]:
            step, spoilers = at, np.array(close[at], dtype=np.int64)[others == winner]
    return step, spoilers
