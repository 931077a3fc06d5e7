"""Picks in blocks that a GPU makes without waiting for the processor, and one float64 product that checks a block.

The kernels of a pick are few: find the greatest score, take that row out, and subtract from all scores a row of a matrix
of inner products, or a product of the float32 rows with the picked row. They are recorded as a CUDA graph for a block of
picks. The scores only propose picks. Afterwards the float64 gains of all rows at every step of the block are computed by
one product of matrices, and the picks are kept up to the first one that they do not confirm with certainty. That pick is
made from float64 gains, by exact arithmetic if it has to be, and the next block begins.
"""

import logging
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.bins.graph_cut.pool import Doubt, Pool
from dq_lightning.bins.graph_cut.scores import scaled_rows
from dq_lightning.bins.rows import Rows

# From this many rows on a GPU picks from a matrix faster than the processor does.
MATRIX_FROM = 4096
# Picks in a block, and in a block after one of which few picks were confirmed.
_LONG, _SHORT = 64, 8
# Scores start between minus this and 0, in the unit in which the longest row's inner product with itself is at most 1. A
# pick changes a score by at most 2, so no row this far below the greatest one can become the greatest within a block.
_REACH = 8.0 * _LONG
# The matrix is computed this many rows at a time, and a block of picks is checked with this many rows at a time.
_ROWS, _CHECKED = 4096, 1 << 18

log = logging.getLogger("dq_lightning")


class DevicePicks:
    """Makes picks from all rows of a pool whose float64 rows are on the device.

    Args:
        pool: n rows of width W.
        matrix: whether to make the matrix of inner products, float32 [n, n]; otherwise each pick makes a pass over
            float32 rows, which take 4 n W bytes.
    """

    def __init__(self, pool: Pool, *, matrix: bool) -> None:
        assert isinstance(pool.table, Rows)
        self._pool, self._exact = pool, pool.table
        self._single, lengths = scaled_rows(pool)
        self._scale = math.prod(lengths) ** 2
        self.matrix: Tensor | None = _products(self._single) if matrix else None
        device = pool.vector.device
        self._scores = torch.zeros(len(pool), device=device)
        # How many equal samples each row stands for; None if every row stands for one.
        self._left = None if pool.group.twins is None else torch.from_numpy(_samples_left(pool)).to(device)
        self._greatest = torch.zeros(_LONG, device=device)
        self._picks = torch.zeros(_LONG, dtype=torch.int64, device=device)
        self._blocks: dict[int, Callable[[], object]] = {}

    def pick(self, count: int, tick: Callable[[int], object]) -> None:
        """Make `count` picks."""
        length = _LONG
        while count > 0:
            asked = min(count, length)
            made = self._one_block(asked, length)
            length = _LONG if made == asked or made > _LONG // 4 else _SHORT
            if made < asked:
                self._one_exactly()
                made += 1
            count -= made
            tick(made)

    def _one_block(self, count: int, length: int) -> int:
        """Propose `length` picks, and make the first ones of `count` that are confirmed; return how many."""
        pool = self._pool
        gains = pool.gains()
        alive = gains > -torch.inf
        relative = ((gains - gains.max()) / self._scale).clamp_(min=-_REACH)
        self._scores.copy_(relative.masked_fill_(~alive, -torch.inf))
        left = None if self._left is None else self._left.clone()
        self._block(length)()
        if self._left is not None and left is not None:
            self._left.copy_(left)
        picks = self._picks[:count].clone()
        values, certain = self._check(gains, picks)
        confirmed = certain.cpu().numpy()
        made = int(np.argmin(np.append(confirmed, False)))
        done = picks[:made]
        rows, first = done.cpu().numpy(), values[:made].cpu().numpy()
        for row in rows.tolist():
            pool.take(row)
        pool.apply(rows, first, self._exact.take(done), pool.bound(count))
        if self._left is not None:
            self._left.index_add_(0, done, -torch.ones_like(done))
        return made

    def _check(self, gains: Tensor, picks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gains of the picks of a block, float64 [T], and whether each is certainly the greatest, bool [T].

        Args:
            gains: float64 [n], gains of all rows before the first pick.
            picks: int64 [T].
        """
        picked, steps = self._exact.take(picks), torch.arange(len(picks), device=picks.device)
        values = picked.gains_after(self._pool.vector, picked, steps)
        limits = values - 2.0 * self._pool.bound(len(picks))
        # A row leaves once as many picks as it has samples were made of it, and no pick is compared with itself.
        so_far = (picks[:, None] == picks).tril().sum(dim=1)
        gone = so_far >= (1 if self._left is None else self._left[picks])
        apart = (gone & (steps < steps[:, None])) | (steps == steps[:, None])
        before = Rows((-2.0 * picked.factors[0][:-1], *(factor[:-1] for factor in picked.factors[1:])))
        certain = torch.ones(len(picks), dtype=torch.bool, device=picks.device)
        for first in range(0, len(gains), _CHECKED):
            last = min(first + _CHECKED, len(gains))
            states = torch.cat([gains[None, first:last], before.inner(self._exact.span(first, last))])
            torch.cumsum(states, dim=0, out=states)
            inside = (picks >= first) & (picks < last)
            removal = torch.zeros(apart.shape, dtype=torch.float64, device=picks.device)
            removal.masked_fill_(apart & inside, -torch.inf)
            states.index_add_(1, (picks - first).clamp(0, last - first - 1), removal)
            certain &= (states < limits[:, None]).all(dim=1)
        return values, certain

    def _one_exactly(self) -> None:
        pool, gains = self._pool, self._pool.gains()
        near = torch.nonzero(gains >= gains.max() - 2.0 * pool.bound()).flatten().cpu().numpy()
        doubt = Doubt(0, near, pool.samples[near])
        pool.take(int(near[0]))
        (row,) = pool.confirm([int(near[0])], [doubt])
        if self._left is not None:
            self._left[int(row)] -= 1

    def _step(self, step: int) -> None:
        """Propose one pick; nothing here waits for the device or depends on its data."""
        part = slice(step, step + 1)
        torch.max(self._scores, 0, keepdim=True, out=(self._greatest[part], self._picks[part]))
        winner = self._picks[part]
        if self._left is None:
            self._scores.index_fill_(0, winner, -torch.inf)
        else:
            self._left.index_add_(0, winner, -torch.ones_like(winner))
            left = self._left.index_select(0, winner)
            self._scores.index_add_(
                0, winner, torch.zeros_like(self._greatest[part]).masked_fill_(left <= 0, -torch.inf)
            )
        if self.matrix is not None:
            self._scores.sub_(self.matrix.index_select(0, winner)[0])
            return
        rows = [factor.index_select(0, winner)[0] for factor in self._single]
        if len(rows) == 1:
            self._scores.addmv_(self._single[0], rows[0], alpha=-2.0)
        else:
            self._scores.addcmul_(self._single[0] @ rows[0], self._single[1] @ rows[1], value=-2.0)

    def _block(self, length: int) -> Callable[[], object]:
        """Return the function that proposes `length` picks; on a GPU its kernels are recorded as a graph once."""

        def steps() -> None:
            for step in range(length):
                self._step(step)

        if length not in self._blocks:
            self._blocks[length] = self._recorded(steps) if self._scores.is_cuda else steps
        return self._blocks[length]

    def _recorded(self, steps: Callable[[], None]) -> Callable[[], object]:
        kept = [(part, part.clone()) for part in (self._scores, self._left) if part is not None]
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._step(0)  # what libraries set up at their first use cannot be recorded
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                steps()
            replay: Callable[[], object] = graph.replay
        except RuntimeError as error:
            log.warning(
                "bins: the picks could not be recorded as a CUDA graph (%s); they are launched one by one", error
            )
            replay = steps
        for part, before in kept:
            part.copy_(before)
        return replay


def _products(factors: tuple[Tensor, ...]) -> Tensor:
    """Return twice the inner products of all rows, float32 [n, n]."""
    total = len(factors[0])
    matrix = torch.empty(total, total, device=factors[0].device)
    for start in range(0, total, _ROWS):
        part = matrix[start : start + _ROWS]
        torch.mm(2.0 * factors[0][start : start + _ROWS], factors[0].T, out=part)
        for factor in factors[1:]:
            part *= factor[start : start + _ROWS] @ factor.T
    return matrix


def _samples_left(pool: Pool) -> NDArray[np.int64]:
    """Return for each row how many equal samples it stands for."""
    twins = pool.group.twins
    assert twins is not None
    chain = [1] * len(twins)
    for sample, following in reversed(list(enumerate(twins.tolist()))):
        if following >= 0:
            chain[sample] += chain[following]
    return np.array(chain, dtype=np.int64)[pool.samples]
