"""Prove that no row outside the candidates should have been picked, or find the first pick where one should. PURE.

After t of T picks an outside row x has the gain g(x) - 2 x . P_t, P_t being the sum of the first t picks. Between two
checkpoints a < b write P_t as the straight line from P_a to P_b plus a deviation e_t. Then x's gain is at most the line from
its gain at a to its gain at b, plus 2 |x| |e_t|. So two gains of x, exact at the checkpoints, bound all those between, and
the deviations stay short: they are those of a random walk that is tied at both ends. Rows that this does not clear are
computed at every step.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.bins.exact import Array
from dq_lightning.bins.referee import ROUNDING
from dq_lightning.bins.rows import Rows

if TYPE_CHECKING:
    from dq_lightning.bins.levels import Level, Levels, Run

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
