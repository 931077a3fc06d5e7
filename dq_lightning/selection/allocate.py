"""How many samples each party gets: exact, fair at every count, and growing with the count. PURE."""

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import floor, gcd, lcm

from dq_lightning.core.errors import ConfigError


def count_kept(total: int, ratio: float) -> int:
    """Return floor(total * ratio + 1/2), the ratio read as the decimal number that was written.

    In binary floating point 45 * 0.7 is 31.499999999999996, and the half would be lost.

    >>> count_kept(50_000, 0.125), count_kept(45, 0.7)
    (6250, 32)
    """
    return floor(total * Fraction(repr(float(ratio))) + Fraction(1, 2))


class Shares:
    """The ideal share of every party when m units have been given out, m = 0 ... sum of the sizes.

    Party b of size n_b and weight w_b has the share `n_b * min(1, level * w_b)`: proportional to weight times size until
    the party is exhausted; the level follows from the shares' sum being m. All arithmetic is exact.

    Args:
        sizes: units that each party can give at most.
        weights: one non-negative weight a party; equal when None.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None = None) -> None:
        fractions = [Fraction(1)] * len(sizes) if weights is None else [Fraction(repr(float(w))) for w in weights]
        scale = lcm(*(f.denominator for f in fractions)) if fractions else 1
        self.sizes = list(sizes)
        self.weights = [int(f * scale) for f in fractions]
        heaviest = sorted(set(self.weights), reverse=True)
        # while the level is in (1/heaviest[i-1], 1/heaviest[i]] the parties heavier than heaviest[i] are exhausted
        self._segments = [
            (
                weight,
                sum(n for n, w in zip(self.sizes, self.weights, strict=True) if w > weight),
                sum(n * w for n, w in zip(self.sizes, self.weights, strict=True) if w <= weight),
            )
            for weight in heaviest
            if weight > 0
        ]

    def reached(self, party: int, units: int) -> tuple[int, int]:
        """Return the count m at which the party's share reaches `units`, as numerator and denominator."""
        base = self.sizes[party] * self.weights[party]  # level = units / base
        for weight, exhausted, slope in self._segments:
            if units * weight <= base:
                return exhausted * base + units * slope, base
        raise AssertionError("a share never exceeds the party's size")


def apportion(shares: Shares, count: int, tie_keys: Sequence[int]) -> list[int]:
    """Give out `count` units one by one so that every party is within one of its share at every step.

    Unit j of a party may be given once its share exceeds j and must be given before its share exceeds j + 1; the earliest
    deadline goes first. Such a schedule always exists, since shares add up to the count (Tijdeman 1980, "The chairman
    assignment problem"). The counts for a smaller `count` are a prefix of the same sequence, so they never exceed these.

    Args:
        shares: of P parties.
        count: units to give out; at most what the parties with positive weight have.
        tie_keys: P distinct keys; the smaller goes first where deadlines are equal.

    Returns:
        P counts that add up to `count`; 0 <= counts[p] <= sizes[p].

    Complexity: O(count log P), at most one period of the shares.
    """
    sizes = shares.sizes
    counts = [0] * len(sizes)
    if len(set(shares.weights)) == 1 and any(shares.weights) and any(sizes):
        # equal weights: after sum/gcd steps all shares are whole numbers again, and the windows repeat
        period = sum(sizes) // gcd(*sizes)
        counts = [count // period * size // gcd(*sizes) for size in sizes]
    waiting: list[tuple[int, int]] = []
    ready: list[tuple[int, int, int]] = []

    def announce(party: int) -> None:
        given = counts[party]
        if given < sizes[party] and shares.weights[party] > 0:
            numerator, denominator = shares.reached(party, given)
            heapq.heappush(waiting, (numerator // denominator + 1, party))

    for party in range(len(sizes)):
        announce(party)
    for step in range(sum(counts) + 1, count + 1):
        while waiting and waiting[0][0] <= step:
            party = heapq.heappop(waiting)[1]
            numerator, denominator = shares.reached(party, counts[party] + 1)
            heapq.heappush(ready, (-(-numerator // denominator), tie_keys[party], party))
        if not ready:
            raise ConfigError(f"only {step - 1} samples lie in bins of positive weight, but {count} are wanted there")
        party = heapq.heappop(ready)[2]
        counts[party] += 1
        announce(party)
    return counts
