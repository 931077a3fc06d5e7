"""Greedy algorithms that pick the samples of one bin so that an objective is large.

To add a maximizer, write one function of a `Search` and add one line to `MAXIMIZERS`.
"""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dq_lightning.bins.graph_cut.exact import Array
from dq_lightning.bins.objectives import Objective
from dq_lightning.core.config import Maximizer
from dq_lightning.core.errors import FeatureError

Picks = tuple[NDArray[np.int64], Array]


@dataclass(frozen=True)
class Search:
    """Inputs of a maximizer.

    Attributes:
        objective: objective of one bin.
        total: number n of samples that are left when the bin is begun.
        count: number of samples to pick.
        generator: random generator of maximizers that draw samples at random.
        epsilon: accuracy of `stochastic`.
        beta: accuracy of `approximate_lazy`.
        tick: progress callback, called with 1 after every pick.
    """

    objective: Objective
    total: int
    count: int
    generator: np.random.Generator
    epsilon: float
    beta: float
    tick: Callable[[int], object]


# The rounding error of running sums is about this share of the largest gain. Gains that are closer than that count as
# tied, and the lowest position wins.
_NOISE = 2.0**-42


def _first_best(gains: Array, noise: float) -> int:
    greatest = gains.max()
    _refuse_overflow(greatest)
    return int(np.argmax(gains >= greatest - noise))


def _noise(gains: Array) -> float:
    noise = _NOISE * float(np.abs(gains).max(initial=0.0))
    _refuse_overflow(noise)
    return noise


def _refuse_overflow(gain: float) -> None:
    """Raise an error if a gain is infinite or no number, because no comparison with it would mean anything."""
    if not math.isfinite(gain):
        raise FeatureError(
            "the gains are too large for float64 with these features, `lam` and `gamma`; scale the features down"
        )


def naive(search: Search) -> Picks:
    """Compute all gains at every step and pick the greatest."""
    rows = torch.arange(search.total)
    free = np.ones(search.total, dtype=bool)
    picks, values = np.empty(search.count, dtype=np.int64), np.empty(search.count)
    noise = _noise(search.objective.gains(rows).cpu().numpy())
    for step in range(search.count):
        gains = np.where(free, search.objective.gains(rows).cpu().numpy(), -np.inf)
        best = _first_best(gains, noise)
        picks[step], values[step], free[best] = best, gains[best], False
        search.objective.add(best)
        search.tick(1)
    return picks, values


def lazy(search: Search, beta: float = 1.0) -> Picks:
    """Recompute only gains that may still be the greatest, which is correct if gains never grow (Minoux 1978).

    With beta < 1, a sample is picked as soon as its gain is at least beta times the upper bound on all other gains
    (Badanidiyuru and Vondrak 2014).
    """
    gains = search.objective.gains(torch.arange(search.total)).cpu().numpy()
    bounds = [(-gain, row) for row, gain in enumerate(gains.tolist())]
    heapq.heapify(bounds)
    picks, values = np.empty(search.count, dtype=np.int64), np.empty(search.count)
    noise = _noise(gains)
    for step in range(search.count):
        while True:
            row = heapq.heappop(bounds)[1]
            gain = float(search.objective.gains(torch.tensor([row]))[0])
            _refuse_overflow(gain)
            rest = -bounds[0][0] if bounds else -math.inf
            if beta < 1.0 and gain >= beta * rest > 0:
                break
            if gain >= rest - noise:
                row, gain = _lowest_of_ties(search, bounds, row, gain, noise)
                break
            heapq.heappush(bounds, (-gain, row))
        picks[step], values[step] = row, gain
        search.objective.add(row)
        search.tick(1)
    return picks, values


def _lowest_of_ties(
    search: Search, bounds: list[tuple[float, int]], row: int, gain: float, noise: float
) -> tuple[int, float]:
    """Return the lowest of the samples that tie with the given one; the others return to the heap with new gains."""
    pool = [(row, gain)]
    while bounds and -bounds[0][0] >= gain - noise:
        other = heapq.heappop(bounds)[1]
        pool.append((other, float(search.objective.gains(torch.tensor([other]))[0])))
    greatest = max(value for _, value in pool)
    chosen = min(pair for pair in pool if pair[1] >= greatest - noise)
    for pair in pool:
        if pair != chosen:
            heapq.heappush(bounds, (-pair[1], pair[0]))
    return chosen


def approximate_lazy(search: Search) -> Picks:
    """Run `lazy` with the `beta` of the search."""
    return lazy(search, beta=search.beta)


def stochastic(search: Search) -> Picks:
    """Take the best of a random sample of (n / count) log(1 / epsilon) at every step (Mirzasoleiman et al. 2015)."""
    size = max(1, math.ceil(search.total / search.count * math.log(1.0 / search.epsilon)))
    free = np.arange(search.total)
    noise = _noise(search.objective.gains(torch.from_numpy(free)).cpu().numpy())
    picks, values = np.empty(search.count, dtype=np.int64), np.empty(search.count)
    for step in range(search.count):
        drawn = np.sort(search.generator.choice(len(free), min(size, len(free)), replace=False))
        gains = search.objective.gains(torch.from_numpy(free[drawn])).cpu().numpy()
        best = _first_best(gains, noise)
        picks[step], values[step] = free[drawn[best]], gains[best]
        search.objective.add(int(picks[step]))
        free = np.delete(free, drawn[best])
        search.tick(1)
    return picks, values


MAXIMIZERS: dict[Maximizer, Callable[[Search], Picks]] = {
    "naive": naive,
    "lazy": lazy,
    "stochastic": stochastic,
    "approximate_lazy": approximate_lazy,
}
# These maximizers use old gains as upper bounds, so they need gains that never grow.
LAZY: frozenset[Maximizer] = frozenset({"lazy", "approximate_lazy"})
