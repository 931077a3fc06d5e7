"""Picks among the rows of greatest gain, which are then proved to be the greedy picks among all rows.

One pick hardly changes the order of the gains where the sum of what is left is long, so the next hundreds of picks are
among the rows whose gains are greatest now. These candidates have a small matrix of inner products. Their picks are
checked against all other rows in one pass; if another row should have been picked, that pick and all later ones are
undone and the row becomes a candidate. Candidates of many rows have candidates among themselves.
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
# Candidates that have rounds of their own are this part of the rows, and their picks are proved once they have cost so
# many times as much as that.
_PART, _PATIENCE = 8, 8.0


class Candidates:
    """Rounds of candidates and proof in one bin.

    The candidates of a round are either few, with a matrix, or an eighth of the rows, with rounds of their own. The
    fewer rows of these are proved against more often, and all rows more seldom.

    Args:
        pool: all rows that are left.
        costs: what matrices and passes cost.
        most: greatest number of candidates with a matrix.
        entries: greatest number of entries of the rows of other candidates.
        targets: numbers of picks to try in a round, by level and kind of candidates; rounds change them.
        level: 0 for all rows, 1 for candidates that have rounds, and so on.
    """

    def __init__(
        self,
        pool: Pool,
        costs: Costs,
        most: int,
        entries: int,
        targets: dict[tuple[int, bool], int] | None = None,
        level: int = 0,
    ) -> None:
        self.pool, self._costs, self._most, self._entries, self._level = pool, costs, most, entries, level
        self._targets = {} if targets is None else targets
        self._largest = round_size(len(pool), costs, most)
        self._gains: Tensor | None = None
        self._wanted: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def round(self, count: int) -> tuple[int, float, float]:
        """Make at least one and at most `count` picks.

        Returns:
            The number of picks, what they cost, and what each of them would cost if as many had been aimed at.
        """
        pool, referee = self.pool, self.pool.group.referee
        many, size, aim = self._plan(count)
        gains = pool.gains() if self._gains is None else self._gains
        passes = 1 + (self._gains is None)
        top = self._choose(gains, size)
        outside = gains > -torch.inf
        outside[torch.from_numpy(top).to(outside.device)] = False
        target = min(count, aim) if bool(outside.any()) else count
        start = referee.length
        child = Pool(pool.group, pool.table.take(torch.from_numpy(top)), pool.samples[top], pool.vector, pool.error)
        proving = passes * self._costs.check(len(pool))
        if many:
            cost = self._rounds(child, target, _PATIENCE * proving)
        else:
            pick_in_turn(child, MatrixScores(child), target)
            cost = self._costs.candidates(len(top), target)
        rows, values = child.rows, child.values
        picked = child.table.take(torch.from_numpy(rows))
        proof = Proof(pool, gains, outside, picked, values, child.slack, start)
        fault = proof.first_fault()
        kept, walking = fault.step, self._costs.pairs(proof.walked)
        referee.rewind(start + kept)
        chosen = top[rows[:kept]]
        pool.apply(chosen, values[:kept], picked.span(0, kept), child.slack)
        self._wanted = fault.rows
        self._gains = None
        if kept == len(rows):
            self._gains = fault.gains.masked_fill_(torch.from_numpy(~pool.alive).to(gains.device), -torch.inf)
            if kept == aim:
                self._targets[self._level, many] = min(int(_GREATEST_SHARE * size), max(aim + 1, int(1.2 * aim)))
        else:
            self._targets[self._level, many] = max(4, int(0.9 * kept))
        cost += proving + walking
        return kept, cost, cost / kept if many else cost_of_a_pick(len(pool), kept, self._costs) + walking / kept

    def _plan(self, count: int) -> tuple[bool, int, int]:
        """Return whether the candidates of a round have rounds of their own, how many there are, and picks to aim at."""
        rows, costs, below = len(self.pool), self._costs, len(self.pool) // _PART
        few = self._targets.setdefault((self._level, False), max(1, int(SHARE * self._largest)))
        size = int(min(self._largest, max(LEAST, few / SHARE)))
        if below <= 2 * LEAST or below * sum(self.pool.group.referee.rows.widths) > self._entries:
            return False, size, few
        aim = self._targets.setdefault((self._level, True), max(1, int(SHARE * below)))
        inner = self._targets.get((self._level + 1, False), few)
        nested = costs.check(rows) / min(aim, count) + cost_of_a_pick(below, inner, costs)
        many = nested < cost_of_a_pick(rows, min(few, count), costs)
        return (True, below, aim) if many else (False, size, few)

    def _rounds(self, child: Pool, target: int, patience: float) -> float:
        """Make up to `target` picks in rounds, at least one, while they cost less than `patience`; return the cost."""
        rounds = Candidates(child, self._costs, self._most, self._entries, self._targets, self._level + 1)
        made, spent = 0, 0.0
        while made < target and (made == 0 or spent < patience):
            kept, cost, _ = rounds.round(target - made)
            made, spent = made + kept, spent + cost
        return spent

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
