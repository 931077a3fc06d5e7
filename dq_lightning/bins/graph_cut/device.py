"""One pass over the rows for each pick, in blocks of picks that a GPU makes without waiting for the processor.

At the start of a block all gains are computed in float64. Then, for each pick, a product of the float32 rows with twice
the sum of the block's picks gives the gains of all rows to within a bound, float64 gains of the 16 best rows decide
between these, and the greatest gain that was not looked at is noted. After the block the processor reads the picks and
the notes, and checks every pick with the bounds. A pick that the bounds do not decide is made by exact arithmetic, and
those after it are made again.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from dq_lightning.bins.graph_cut.pool import Pool
from dq_lightning.bins.graph_cut.scores import SINGLE, single_rows
from dq_lightning.bins.rows import Rows

# Picks in a block, and rows whose gains are computed in float64 for each pick.
_PICKS, _LOOKED_AT = 64, 16
# The best rows are searched for in the chunks of this many rows that have the greatest scores, so many chunks.
_CHUNK, _CHUNKS = 1024, 4
# Scores are at least this, in the unit in which the longest row's inner product with itself is at most 1: a pick changes
# a score by at most 2, so no row this far below the greatest one can become the greatest within a block.
_REACH = 8.0 * _PICKS


class DevicePasses:
    """Makes picks from all rows of a pool whose float64 rows are on the device.

    Args:
        pool: n rows of width W; memory is 4 n W bytes and a few numbers for each row.
        graph: whether to record the kernels of a block once and replay them, which only a GPU can do.
    """

    def __init__(self, pool: Pool, *, graph: bool) -> None:
        assert isinstance(pool.table, Rows)
        self._pool, self._exact = pool, pool.table
        rows, self._scale = single_rows(pool)
        total, device = len(pool), pool.vector.device
        padding = -total % _CHUNK
        self._single = tuple(torch.nn.functional.pad(factor, (0, 0, 0, padding)) for factor in rows)
        self._start = torch.full((total + padding,), -torch.inf, device=device)
        self._left = torch.from_numpy(_samples_left(pool)).to(device)
        self._begun, self._vector = torch.zeros_like(pool.vector), torch.zeros_like(pool.vector)
        self._picks = torch.zeros(_PICKS, dtype=torch.int64, device=device)
        # The greatest and second greatest float64 gain of each step, and the greatest score that was not looked at.
        self._notes = torch.zeros(_PICKS, 3, dtype=torch.float64, device=device)
        self._replay: Callable[[], object] = self._block
        if graph:
            self._replay = self._recorded()

    def pick(self, count: int, tick: Callable[[int], object]) -> None:
        """Make `count` picks."""
        while count > 0:
            made = self._one_block(count)
            if made < min(count, _PICKS):
                self._one_exactly()
                made += 1
            count -= made
            tick(made)
        self._pool.finish()

    def _one_block(self, count: int) -> int:
        """Make up to `count` picks, as long as the bounds decide; return how many."""
        pool, depth = self._pool, self._pool.group.depth
        gains = pool.gains()
        top = float(gains.max())
        # Rows whose gains cannot become the greatest within a block are raised to a limit, which keeps the rounding
        # errors of float32 small.
        self._start[: len(gains)] = ((gains - top) / self._scale).clamp_(min=-_REACH)
        self._start[: len(gains)].masked_fill_(gains == -torch.inf, -torch.inf)
        self._begun.copy_(pool.vector)
        self._vector.copy_(pool.vector)
        left = self._left.clone()
        self._replay()
        self._left.copy_(left)
        picks = self._picks.to("cpu", copy=True).numpy()[:count]
        notes = self._notes.to("cpu", copy=True).numpy()[:count]
        first, second, rest = notes.T
        exact_error = pool.bound(_PICKS)
        # Twice the sum of the block's picks is at most 2 * _PICKS long in the unit of the scores.
        error = (depth + 10) * SINGLE * (_REACH + 2.0 * _PICKS) + 2.0 * exact_error / self._scale
        certain = (first - second > 2.0 * exact_error) & ((first - top) / self._scale - rest > error)
        made = int(np.argmin(np.append(certain, False)))
        done = torch.from_numpy(picks[:made])
        pool.apply(picks[:made], first[:made], self._exact.take(done), exact_error, push=True)
        done = done.to(self._left.device)
        self._left.index_add_(0, done, -torch.ones_like(done))
        return made

    def _one_exactly(self) -> None:
        gains = self._pool.gains()
        near = torch.nonzero(gains >= gains.max() - 2.0 * self._pool.bound()).flatten().cpu().numpy()
        row = self._pool.settle(near)
        self._pool.take(row)
        self._left[row] -= 1

    def _block(self) -> None:
        for step in range(_PICKS):
            self._step(step)

    def _step(self, step: int) -> None:
        drift = ((self._begun - self._vector) / self._scale**0.5).float()
        if len(self._single) == 1:
            scores = torch.addmv(self._start, self._single[0], drift[0], alpha=-1.0)
        else:
            scores = self._start - Rows(self._single).against(drift)[:, 0]
        by_chunk = scores.view(-1, _CHUNK)
        greatest, chunks = by_chunk.amax(dim=1).topk(min(_CHUNKS + 1, len(by_chunk)))
        chunks = chunks[:_CHUNKS]
        values, places = by_chunk.index_select(0, chunks).flatten().topk(_LOOKED_AT + 1)
        rest = values[-1:] if len(greatest) <= _CHUNKS else torch.maximum(values[-1:], greatest[-1:])
        rows, values = chunks[places[:-1] // _CHUNK] * _CHUNK + places[:-1] % _CHUNK, values[:-1]
        # Rows that only fill the last chunk have no gain, like those of which no sample is left.
        near = self._exact.take(rows.clamp(max=len(self._exact) - 1))
        gains = near.against(self._vector)[:, 0].masked_fill_(values == -torch.inf, -torch.inf)
        two, order = gains.topk(2)
        winner = rows[order[:1]].clamp(max=len(self._exact) - 1)
        self._picks[step : step + 1] = winner
        self._notes[step, :2] = two
        self._notes[step, 2:] = rest
        self._vector.sub_(2.0 * self._exact.take(winner).sum())
        self._left.index_add_(0, winner, -torch.ones_like(winner))
        self._start[winner] = self._start[winner].masked_fill(self._left[winner] <= 0, -torch.inf)

    def _recorded(self) -> Callable[[], object]:
        """Record the kernels of a block as a CUDA graph, and return the function that runs them."""
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._step(0)  # what libraries set up at their first use cannot be recorded
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        left = self._left.clone()
        with torch.cuda.graph(graph):
            self._block()
        self._left.copy_(left)
        return graph.replay


def _samples_left(pool: Pool) -> NDArray[np.int64]:
    """Return for each row how many equal samples it stands for."""
    twins = pool.group.twins
    if twins is None:
        return np.ones(len(pool), dtype=np.int64)
    chain = [1] * len(twins)
    for sample, following in reversed(list(enumerate(twins.tolist()))):
        if following >= 0:
            chain[sample] += chain[following]
    return np.array(chain, dtype=np.int64)[pool.samples]
