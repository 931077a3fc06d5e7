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

from dq_lightning.bins.graph_cut.costs import LEAST, SHARE, Costs
from dq_lightning.bins.graph_cut.pool import Pool
from dq_lightning.bins.graph_cut.proof import Proof
from dq_lightning.bins.graph_cut.scores import Scores, pick_in_turn

# No round picks more than this share of the candidates.
_GREATEST_SHARE = 0.8
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
        entries: greatest number of entries of the rows of candidates without a matrix.
        targets: numbers of picks to try in a round, by level and kind of candidates; rounds change them.
        level: 0 for all rows, 1 for candidates that have rounds, and so on.
    """

    def __init__(
        self, pool: Pool, costs: Costs, entries: int, targets: dict[tuple[int, bool], int] | None = None, level: int = 0
    ) -> None:
        self.pool, self._costs, self._entries, self._level = pool, costs, entries, level
        self._targets = {} if targets is None else targets
        self._largest = costs.best_round(len(pool))
        self._gains: Tensor | None = None
        self._wanted: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def round(self, count: int) -> tuple[int, float, float]:
        """Make at most `count` picks; if ties made the first one wrong, there are none, and the next round makes some.

        Returns:
            The number of picks, what they cost, and what each of them would cost if as many had been aimed at.
        """
        pool, group, costs = self.pool, self.pool.group, self._costs
        many, size, aim = self._plan(count)
        gains = pool.gains() if self._gains is None else self._gains
        passes = 1 + (self._gains is None)
        top = self._choose(gains, size)
        outside = gains > -torch.inf
        outside[torch.from_numpy(top).to(outside.device)] = False
        target = min(count, aim) if bool(outside.any()) else count
        start = group.length
        child = Pool(group, pool.table.take(torch.from_numpy(top)), pool.samples[top], pool.vector, pool.error)
        proving = passes * costs.check(len(pool))
        if many:
            cost = self._rounds(child, target, _PATIENCE * proving)
        else:
            pick_in_turn(child, Scores(child, matrix=True), target)
            cost = costs.candidates(len(top), target)
        rows, values = child.rows, child.values
        picked = child.table.take(torch.from_numpy(rows))
        proof = Proof(pool, gains, outside, picked, values, child.slack, start)
        kept, self._wanted = proof.first_fault()
        walking = costs.walk(proof.walked)
        group.rewind(start + kept)
        chosen = top[rows[:kept]]
        for row in chosen.tolist():
            pool.advance(row)
        pool.apply(chosen, values[:kept], picked.span(0, kept), child.slack)
        self._gains = None
        if kept == len(rows):
            self._gains = proof.after.masked_fill_(torch.from_numpy(~pool.alive).to(gains.device), -torch.inf)
            if kept == aim:
                self._targets[self._level, many] = min(int(_GREATEST_SHARE * size), max(aim + 1, int(1.2 * aim)))
        else:
            self._targets[self._level, many] = max(4, int(0.9 * kept))
        cost += proving + walking
        least = max(1, kept)
        return kept, cost, cost / least if many else costs.in_a_round(len(pool), least) + walking / least

    def _plan(self, count: int) -> tuple[bool, int, int]:
        """Return whether the candidates of a round have rounds of their own, how many there are, and picks to aim at."""
        rows, costs, below = len(self.pool), self._costs, len(self.pool) // _PART
        few = self._targets.setdefault((self._level, False), max(1, int(SHARE * self._largest)))
        size = int(min(self._largest, max(LEAST, few / SHARE)))
        if below <= 2 * LEAST or below * sum(self.pool.group.rows.widths) > self._entries:
            return False, size, few
        aim = self._targets.setdefault((self._level, True), max(1, int(SHARE * below)))
        inner = self._targets.get((self._level + 1, False), few)
        nested = costs.check(rows) / min(aim, count) + costs.in_a_round(below, inner)
        many = nested < costs.in_a_round(rows, min(few, count))
        return (True, below, aim) if many else (False, size, few)

    def _rounds(self, child: Pool, target: int, patience: float) -> float:
        """Make up to `target` picks in rounds, at least one, while they cost less than `patience`; return the cost."""
        rounds = Candidates(child, self._costs, self._entries, self._targets, self._level + 1)
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
