"""Check picks that were made among candidates against the rows that were not candidates, many picks in one pass."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.bins.graph_cut.exact import Array
from dq_lightning.bins.graph_cut.group import ROUNDING
from dq_lightning.bins.graph_cut.pool import Pool
from dq_lightning.bins.rows import Rows

# Picks are checked in at most this many chunks, each of at least this many picks.
_MAX_CHECKPOINTS = 12
_PICKS_A_CHECKPOINT = 48
# A table of gains with one row for each outside row and one column for each pick has about this many entries.
_TABLE_ENTRIES = 1 << 20


@dataclass(eq=False)
class _Chunk:
    """Consecutive picks, and bounds that prove them without computing gains between the two ends.

    Between the ends, the gain of a row x differs from the straight line between its gains at the ends by at most twice
    the length of x times `deviation`.

    Attributes:
        rows: the picked rows.
        first: number of the first pick.
        deviation: greatest distance of the sum of the first t rows from the straight line to the sum of all.
        limits: values that the gain of an outside row must stay below at the start and at the end of the chunk.
    """

    rows: Rows
    first: int
    deviation: float
    limits: tuple[float, float]


class Proof:
    """Picks among candidates, and all that is needed to check them.

    Args:
        pool: the rows, before the picks.
        gains: float64 [n], their gains before the picks.
        outside: bool [n], True for rows that were not candidates and still have a sample.
        picked: the T picked rows, in order.
        values: float64 [T], gain of each picked row when it was picked.
        error: bound on the error of `values`.
        start: number of picks made in the bin before these.

    Attributes:
        after: float64 [n], gains of all rows after the picks, once `first_fault` has found none.
        walked: number of inner products of an outside row and a pick that were computed.
    """

    def __init__(
        self, pool: Pool, gains: Tensor, outside: Tensor, picked: Rows, values: Array, error: float, start: int
    ) -> None:
        self.pool, self.gains, self.outside, self.picked, self.values = pool, gains, outside, picked, values
        self.slack, self.start = error + pool.bound(len(picked)), start
        self.after, self.walked = gains, 0

    def first_fault(self) -> tuple[int, NDArray[np.int64]]:
        """Return how many picks are proved to be greedy, and the rows, int64, that should have come in place of the next."""
        total = len(self.picked)
        count = max(1, min(_MAX_CHECKPOINTS, total // _PICKS_A_CHECKPOINT))
        ends = list(pairwise(np.linspace(0, total, count + 1).astype(int).tolist()))
        chunks = [self._chunk(first, last) for first, last in ends]
        sums = torch.cat([chunk.rows.sum() for chunk in chunks]).cumsum(dim=0).to(self.gains.device)
        suspects = self._pass(sums, chunks)
        before = torch.zeros_like(sums[:1])
        for number, chunk in enumerate(chunks):
            rows = torch.nonzero(suspects[:, number]).flatten().cpu().numpy()
            if len(rows):
                step, spoilers = self._walk(rows, before, chunk)
                if step < ends[number][1]:
                    return step, spoilers
            before = sums[number : number + 1]
        return total, np.empty(0, dtype=np.int64)

    def _chunk(self, first: int, last: int) -> _Chunk:
        rows, values = self.picked.span(first, last), self.values
        ends = values[first], values[last] if last < len(values) else values[last - 1]
        line = ends[0] + np.arange(last - first) / (last - first) * (ends[1] - ends[0])
        drop = float((line - values[first:last]).max()) + self.slack + 8.0 * ROUNDING * float(np.abs(ends).max())
        return _Chunk(rows, first, _deviation(rows), (ends[0] - drop, ends[1] - drop))

    def _pass(self, sums: Tensor, chunks: list[_Chunk]) -> Tensor:
        """Compute the gains of all rows at the ends of all chunks in one pass.

        Returns:
            Whether an outside row might have been better than some pick of a chunk, judging by its gains at the two
            ends of the chunk, bool [n, chunks].
        """
        device, table, longest = self.gains.device, self.pool.table, self.pool.group.longest
        unit = self.pool.group.rows.scales is not None
        limits = torch.tensor([chunk.limits for chunk in chunks], dtype=torch.float64, device=device)
        margins = torch.tensor([2.0 * chunk.deviation for chunk in chunks], dtype=torch.float64, device=device)
        self.after = torch.empty_like(self.gains)
        suspects = torch.empty(len(self.gains), len(chunks), dtype=torch.bool, device=device)

        def look(ends: tuple[int, int]) -> None:
            part, block = slice(*ends), table.span(*ends)
            gains = self.gains[part, None]
            states = torch.cat([gains, gains - 2.0 * block.against(sums)], dim=1)
            reach = margins * (longest if unit else block.lengths()[:, None])
            unclear = (states[:, :-1] + reach >= limits[:, 0]) | (states[:, 1:] + reach >= limits[:, 1])
            suspects[part] = unclear & self.outside[part, None]
            self.after[part] = states[:, -1]

        list(self.pool.group.rows.workers.map(look, table.ranges()))
        return suspects

    def _walk(self, rows: NDArray[np.int64], before: Tensor, chunk: _Chunk) -> tuple[int, NDArray[np.int64]]:
        """Compute the gains of the given outside rows at every step of a chunk.

        Returns:
            The number of the first pick that is wrong, or the end of the chunk if all are right, and the rows that
            should have been picked instead.
        """
        step = chunk.first + len(chunk.rows)
        spoilers: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        close: dict[int, list[int]] = {}
        begin = 0
        while begin < len(rows) and step > chunk.first:
            # Only steps before the first wrong pick found so far can change the result.
            span = step - chunk.first
            some = rows[begin : begin + max(1, _TABLE_ENTRIES // span)]
            begin += len(some)
            self.walked += len(some) * span
            block = self.pool.table.take(torch.from_numpy(some))
            gains = self.gains[torch.from_numpy(some).to(self.gains.device)] - 2.0 * block.against(before)[:, 0]
            drift = block.inner(chunk.rows.span(0, span)).mul_(2.0).cumsum(dim=1)
            states = gains[:, None] - torch.nn.functional.pad(drift, (1, 0))[:, :-1]
            over = states.cpu().numpy() - self.values[None, chunk.first : step]
            sure = np.flatnonzero((over > self.slack).any(axis=0))
            if len(sure):
                step = chunk.first + int(sure[0])
                spoilers = some[over[:, sure[0]] > self.slack]
                over = over[:, : sure[0]]
            for row, at in zip(*np.nonzero(over >= -self.slack), strict=True):
                close.setdefault(chunk.first + int(at), []).append(int(some[row]))
        # At these steps the gains of the pick and of an outside row differ by less than the rounding bound, or by
        # nothing, so it is decided step by step.
        samples, group = self.pool.samples, self.pool.group
        for at in sorted(close):
            if at >= step:
                break
            others, pick = samples[close[at]], group.trail[self.start + at]
            winner = group.settle(np.append(others, pick), self.start + at)
            if winner != pick:
                step, spoilers = at, np.array(close[at], dtype=np.int64)[others == winner]
        return step, spoilers


def _deviation(part: Rows) -> float:
    """Return the greatest Euclidean length of (sum of the first t rows) - t/n (sum of all rows), t = 0 ... n - 1."""
    total = len(part)
    grid = torch.nn.functional.pad(part.inner(part).cumsum(dim=0).cumsum(dim=1), (1, 0, 1, 0))
    fractions = torch.arange(total, dtype=torch.float64, device=grid.device) / total
    squares = grid.diagonal()[:-1] - 2.0 * fractions * grid[:-1, -1] + fractions**2 * grid[-1, -1]
    squares = squares + ROUNDING * total * 64.0 * grid.abs().max()
    return float(squares.clamp(min=0.0).max().sqrt()) * (1.0 + 2.0**-20)
