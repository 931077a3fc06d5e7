"""Exact graph cut of one group, bin after bin, for similarities that are linear in the inner product."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.bins.graph_cut.candidates import Candidates
from dq_lightning.bins.graph_cut.costs import Costs
from dq_lightning.bins.graph_cut.device import MATRIX_FROM, DevicePicks
from dq_lightning.bins.graph_cut.exact import Array
from dq_lightning.bins.graph_cut.group import ROUNDING, Group
from dq_lightning.bins.graph_cut.pool import Pool
from dq_lightning.bins.graph_cut.scores import Scores, entry_bytes, holds_exactly, pick_in_turn
from dq_lightning.bins.plan import Room
from dq_lightning.bins.prepare import Prepared
from dq_lightning.bins.rows import Rows
from dq_lightning.core.config import BinConfig
from dq_lightning.core.errors import FeatureError


def pick_group(
    prepared: Prepared,
    members: NDArray[np.int64],
    sizes: Sequence[int],
    config: BinConfig,
    room: Room,
    tick: Callable[[int], object],
) -> tuple[NDArray[np.int64], Array]:
    """Pick all samples of a group, bin after bin.

    The gain of x is `lam * sum_j S[j, x] - 2 * sum_{s picked} S[s, x]` (Zhou et al. 2023, eq. 3). Here j runs over the
    samples that remained when the bin was begun, s runs over the picks of the bin so far, and S is a . b, or
    1/2 + (a . b)/2 for the cosine. For such a similarity `sum_j S[j, x]` is the inner product of x with one vector.

    Args:
        prepared: features of all samples.
        members: int64 [n], the samples of the group, ascending.
        sizes: number of samples in each bin.
        config: similarity, `lam`, and the regime to use; the picks are the same in each.
        room: limits on the working arrays.
        tick: progress callback, called with the number of picks made.

    Returns:
        Indices of the members (0 to n - 1) in the order of picking, int64 [n], and their gains, float64 [n].
    """
    group = Group(prepared, members, lam=config.lam, halved=config.similarity == "cosine")
    run = _Run(group, config, room, tick)
    order, values = [np.empty(0, dtype=np.int64)], [np.empty(0)]
    for number, size in enumerate(sizes):
        if size:
            left = group.num_left
            gains = run.one_bin(sizes[number:]) * group.step**2
            order.append(group.close_bin())
            values.append(0.5 * (group.lam * left - 2.0 * np.arange(size)) + 0.5 * gains if group.halved else gains)
    return np.concatenate(order), np.concatenate(values)


class _Run:
    """The state of one group: the rows that are left, the sum of their vectors, and the regime."""

    def __init__(self, group: Group, config: BinConfig, room: Room, tick: Callable[[int], object]) -> None:
        self.group, self._engine, self._room, self._tick = group, config.engine, room, tick
        # Equal samples share one row, which represents the lowest of them that is left.
        distinct = np.ones(len(group.rows), dtype=bool)
        if group.twins is not None:
            distinct[group.twins[group.twins >= 0]] = False
        self._row = np.flatnonzero(distinct)
        self._sum, self._sum_error = group.sum()
        rows = group.rows
        self._pool = Pool(group, rows, self._row.copy(), self._sum, 0.0)
        self._scores: Scores | DevicePicks | None = None
        self._gains: list[Array] = []
        threads = max(1, rows.workers.count)
        self._costs = Costs(sum(rows.widths), rows.width, room.candidates, rows.device.type, threads)
        # Whether candidates were tried, and what they cost above their steady cost.
        self._tried, self._wasted = False, 0.0
        # What picks would cost lately, and how many they were; each round counts half as much as the next.
        self._recent = (0.0, 0.0)
        # What the latest rounds of the bin cost, and how many picks they made.
        self._latest = (0.0, 0.0)

    def one_bin(self, sizes: Sequence[int]) -> Array:
        """Make the picks of a bin of `sizes[0]` samples, followed by bins of the other sizes; return their gains."""
        group, norm = self.group, float(self._sum.norm())
        vector, error = group.lam * self._sum, group.lam * (self._sum_error + ROUNDING * norm)
        if not math.isfinite(group.longest * float(vector.norm())):
            raise FeatureError(
                f"the gains of the graph cut with lam={group.lam:g} are too large for float64; "
                "lower lam, or scale the features down"
            )
        self._gains, self._latest = [], (0.0, 0.0)
        self._begin(vector, error)
        if self._scores is None and self._engine == "auto":
            self._begin_at_once(sizes)
        elif self._scores is None and self._engine == "dense":
            self._use_matrix()
        elif self._engine == "stream":
            self._use_passes()
        rounds: Candidates | None = None
        while (left := sizes[0] - group.length) > 0:
            if isinstance(self._scores, DevicePicks):
                self._scores.pick(left, self._tick)
            elif self._scores is not None:
                pick_in_turn(self._pool, self._scores, left, self._tick)
            else:
                rounds = rounds or Candidates(self._pool, self._costs, self._room.rows)
                made, cost, rate = rounds.round(left)
                self._tick(made)
                if self._engine == "auto" and made < left:
                    self._reconsider(made, cost, rate, sizes, left - made)
        self._gains.append(self._pool.values)
        # The vector is now lam * sum(left) - 2 * sum(picked).
        self._sum = self._sum - 0.5 * (vector - self._pool.vector)
        self._sum_error += 0.5 * (self._pool.error - error) + ROUNDING * (norm + float(self._pool.vector.norm()))
        return np.concatenate(self._gains)

    def _begin(self, vector: Tensor, error: float) -> None:
        """Begin a bin; the rows without a sample leave the pool, unless there is a matrix that they belong to."""
        if self._scores is not None and self._scores.matrix is not None:
            self._pool.begin(vector, error)
            return
        self._scores = None
        keep = self._pool.alive
        self._row = self._row[keep]
        stored = self.group.rows.only(torch.from_numpy(self._row))
        fits = len(stored) * sum(stored.widths) <= self._room.rows
        table = stored.take(torch.arange(len(stored))) if fits else stored
        self._pool = Pool(self.group, table, self._pool.samples[keep], vector, error)

    def _use_matrix(self) -> None:
        """Change over to the matrix of the rows that are left."""
        if not self._pool.alive.all():
            self._gains.append(self._pool.values)
            self._begin(self._pool.vector, self._pool.error)
        picks_there = on_device(self._pool, MATRIX_FROM) and not holds_exactly(self._pool, entry_bytes(self._pool))
        self._scores = DevicePicks(self._pool, matrix=True) if picks_there else Scores(self._pool, matrix=True)

    def _use_passes(self) -> None:
        """Change over to passes for the rest of the bin."""
        self._scores = (
            DevicePicks(self._pool, matrix=False) if on_device(self._pool) else Scores(self._pool, matrix=False)
        )

    def _dense(self, picks: int) -> float:
        """Return the cost of the matrix and of the next `picks` picks from it, or infinity if it does not fit."""
        rows = int(self._pool.alive.sum())
        if rows > self._room.dense:
            return float("inf")
        return self._costs.matrix(rows) + picks * self._costs.from_matrix(rows)

    def _begin_at_once(self, sizes: Sequence[int]) -> None:
        """Make the matrix, or use passes, at the start of a bin, if that is known to be cheaper than candidates.

        On a GPU the matrix is made if it saves a tenth of what passes cost, or if it is exact, because blocks of picks end
        at ties; otherwise passes are made. On the CPU the cheaper of the two is taken if it costs less than twice what
        candidates would at best, or, once candidates were tried, less than what was wasted so far.
        """
        rows, picks = len(self._pool), sum(sizes)
        dense, passes = self._dense(picks), self._costs.passes(rows, sizes)
        if on_device(self._pool):
            exact = holds_exactly(self._pool, entry_bytes(self._pool)) and rows <= self._room.dense
            self._use_cheaper(0.0 if exact else dense, 0.9 * passes)
        elif min(dense, passes) <= (self._wasted if self._tried else 2.0 * picks * self._costs.steady(rows)):
            self._use_cheaper(dense, passes)

    def _reconsider(self, made: int, cost: float, rate: float, sizes: Sequence[int], left: int) -> None:
        """Change over to the matrix or to passes if a round of candidates has kept few picks.

        The cost that exceeds the steady one is wasted. If what was wasted so far, and would be until the last pick if
        rounds went on as lately, is more than the cost of the matrix and of all picks that are left, the matrix is
        made, unless passes cost less. Passes are made for the rest of the bin if they cost less than the latest rounds;
        so many rounds are looked at that they cost about a tenth of these passes, because a few bad rounds say little.
        """
        rows, picks = len(self._pool), left + sum(sizes[1:])
        steady, a_pass = self._costs.steady(rows), self._costs.from_pass(rows)
        self._tried = True
        self._wasted += max(0.0, cost - made * steady)
        weight = max(1, made)
        self._recent = 0.5 * self._recent[0] + rate * weight, 0.5 * self._recent[1] + weight
        rate = self._recent[0] / self._recent[1]
        excess = max(0.0, min(rate, a_pass) - steady)
        enough = max(1e-9, 0.1 * left * a_pass)
        fade = math.exp(-cost / enough)
        self._latest = fade * self._latest[0] + cost, fade * self._latest[1] + made
        dense = self._dense(picks)
        if self._wasted + excess * picks > dense and dense <= self._costs.passes(rows, [left, *sizes[1:]]):
            self._use_matrix()
        elif self._latest[0] > max(0.5 * enough, self._latest[1] * a_pass):
            self._wasted += excess * left
            self._use_passes()

    def _use_cheaper(self, dense: float, passes: float) -> None:
        if dense <= passes:
            self._use_matrix()
        else:
            self._use_passes()


def on_device(pool: Pool, least: int = 0) -> bool:
    """Return whether picks are made on a GPU: all rows are there in float64, and there are at least so many."""
    return pool.vector.is_cuda and isinstance(pool.table, Rows) and len(pool) >= least
