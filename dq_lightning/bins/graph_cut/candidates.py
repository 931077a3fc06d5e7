"""Picks among the rows of greatest gain, which are then proved to be the greedy picks among all rows.

One pick hardly changes the order of the gains where the sum of what is left is long, so the next hundreds of picks are
among the rows whose gains are greatest now. These candidates have a small matrix of inner products. Their picks are
checked against all other rows in one pass; if another row should have been picked, that pick and all later ones are
undone and the row becomes a candidate.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.bins.graph_cut.costs import Costs
from dq_lightning.bins.graph_cut.pool import Pool
from dq_lightning.bins.graph_cut.proof import Proof
from dq_lightning.bins.graph_cut.scores import MatrixScores, pick_in_turn

# There are at least this many candidates.
LEAST = 256
# For a first round, this share of the candidates is picked; no round picks more than the other share of them.
SHARE, _GREATEST_SHARE = 0.4, 0.8


class Candidates:
    """Rounds of candidates and proof in one bin.

    Args:
        pool: all rows that are left.
        costs: what matrices and passes cost.
        most: greatest number of candidates that the memory allows.
    """

    def __init__(self, pool: Pool, costs: Costs, most: int) -> None:
        self.pool, self._costs = pool, costs
        self.size = round_size(len(pool), costs, most)
        self._target = max(1, int(SHARE * self.size))
        self._gains: Tensor | None = None
        self._wanted: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def round(self, count: int) -> tuple[int, float]:
        """Make at least one and at most `count` picks; return how many, and what they cost."""
        pool, referee = self.pool, self.pool.group.referee
        size = int(min(self.size, max(LEAST, self._target / SHARE)))
        gains = pool.gains() if self._gains is None else self._gains
        passes = 1 + (self._gains is None)
        top = self._choose(gains, size)
        outside = gains > -torch.inf
        outside[torch.from_numpy(top).to(outside.device)] = False
        target = min(count, self._target) if bool(outside.any()) else count
        start = referee.length
        child = Pool(pool.group, pool.table.take(torch.from_numpy(top)), pool.samples[top], pool.vector, pool.error)
        pick_in_turn(child, MatrixScores(child), target)
        picked = child.table.take(torch.from_numpy(child.rows))
        fault = Proof(pool, gains, outside, picked, child.values, child.slack, start).first_fault()
        kept = fault.step
        referee.rewind(start + kept)
        chosen = top[child.rows[:kept]]
        pool.apply(chosen, child.values[:kept], picked.span(0, kept))
        self._wanted = fault.rows
        self._gains = None
        if kept == target:
            self._target = min(int(_GREATEST_SHARE * self.size), max(target + 1, int(1.2 * target)))
            self._gains = fault.gains.masked_fill_(torch.from_numpy(~pool.alive).to(gains.device), -torch.inf)
        else:
            self._target = max(4, int(0.9 * kept))
        return kept, passes * self._costs.check(len(pool)) + self._costs.candidates(len(top), target)

    def _choose(self, gains: Tensor, size: int) -> NDArray[np.int64]:
        """Return the rows of greatest gain and those that spoilt the round before, int64, ascending."""
        top = torch.topk(gains, min(size, len(gains)), sorted=False).indices.cpu().numpy()
        # If more than `size` rows were better than the rejected pick, the best of them are among the top rows already.
        top = np.union1d(top, self._wanted[:0] if len(self._wanted) > size else self._wanted)
        return np.asarray(top[self.pool.alive[top]])


def round_size(rows: int, costs: Costs, most: int) -> int:
    """Return the number of candidates among `rows` rows, at most `most`, for which a pick costs least."""
    sizes = [LEAST << power for power in range(12) if LEAST << power <= min(most, rows // 2)]
    return min(sizes or [LEAST], key=lambda size: cost_of_a_pick(rows, int(SHARE * size), costs))


def steady_cost(rows: int, costs: Costs, most: int) -> float:
    """Return the cost of a pick among `rows` rows where the order of the gains is steady."""
    return cost_of_a_pick(rows, int(SHARE * round_size(rows, costs, most)), costs)


def cost_of_a_pick(rows: int, picks: int, costs: Costs) -> float:
    """Return the cost of each of `picks` picks that a round makes among as many candidates as that takes."""
    return (costs.check(rows) + costs.candidates(int(max(LEAST, picks / SHARE)), picks)) / picks
