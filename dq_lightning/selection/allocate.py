"""Divides a count of samples among groups or bins: exact, close to every share, and growing with the count. Pure."""

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import floor, gcd, lcm

from dq_lightning.core.errors import ConfigError


def count_kept(total: int, ratio: float) -> int:
    """Return floor(total * ratio + 1/2), where the ratio is read as the decimal number that was written.

    In binary floating point 45 * 0.7 is 31.499999999999996, which would be rounded down instead of up.

    >>> count_kept(50_000, 0.125), count_kept(45, 0.7)
    (6250, 32)
    """
    return floor(total * Fraction(repr(float(ratio))) + Fraction(1, 2))


class Shares:
    """The ideal share of every party (a group or bin) when m units are given out, 0 <= m <= sum of the sizes.

    Party b of size n_b and pull p_b has the share `min(n_b, level * p_b)`: it is proportional to the pull until the
    party is exhausted. The level is determined by the sum of the shares, which is m. All arithmetic is exact. The pulls
    are whole numbers and not negative, or else weight times size for a weight of each party; None means equal weights.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float] | None = None, *, pulls: Sequence[int] | None = None
    ) -> None:
        self.sizes = list(sizes)
        if pulls is None:
            fractions = [Fraction(1)] * len(sizes) if weights is None else [Fraction(repr(float(w))) for w in weights]
            scale = lcm(*(f.denominator for f in fractions)) if fractions else 1
            pulls = [int(f * scale) * n for f, n in zip(fractions, self.sizes, strict=True)]
        self.pulls = list(pulls)
        pairs = [(n, pull) for n, pull in zip(self.sizes, self.pulls, strict=True) if n > 0 and pull > 0]
        # The shares grow at the same rate until a party is exhausted, which happens at the level size / pull.
        ends: dict[Fraction, tuple[int, int]] = {}
        for n, pull in pairs:
            size, pulled = ends.get(Fraction(n, pull), (0, 0))
            ends[Fraction(n, pull)] = size + n, pulled + pull
        exhausted, slope = 0, sum(pull for _, pull in pairs)
        self._segments = []
        for end in sorted(ends):
            self._segments.append((end, exhausted, slope))
            exhausted, slope = exhausted + ends[end][0], slope - ends[end][1]

    @property
    def proportional(self) -> bool:
        """Whether the shares are proportional to the sizes for every m."""
        return len(self._segments) == 1 and all(self.pulls[p] > 0 for p, n in enumerate(self.sizes) if n > 0)

    def reached(self, party: int, units: int) -> tuple[int, int]:
        """Return the count m, as a fraction, at which the share of a party of positive pull reaches `units`."""
        pull = self.pulls[party]  # level = units / pull
        low, high = 0, len(self._segments) - 1
        while low < high:
            middle = (low + high) // 2
            end = self._segments[middle][0]
            if units * end.denominator <= end.numerator * pull:
                high = middle
            else:
                low = middle + 1
        _, exhausted, slope = self._segments[low]
        return exhausted * pull + units * slope, pull


def apportion(shares: Shares, count: int, tie_keys: Sequence[int]) -> list[int]:
    """Give out `count` units one by one so that every party is within one of its share at every step.

    Unit j of a party may be given once the party's share exceeds j, and must be given before the share exceeds j + 1;
    the unit with the earliest deadline goes first. Such a schedule always exists, since the shares add up to the count
    (Tijdeman 1980, "The chairman assignment problem"). A smaller `count` stops earlier in the same sequence, so each of
    its counts is at most that of a larger one.

    Args:
        shares: ideal shares of P parties.
        count: number of units to give out, at most what the parties of positive pull have.
        tie_keys: P distinct keys; among equal deadlines the party with the smaller key goes first.

    Returns:
        P counts that add up to `count`; 0 <= counts[p] <= sizes[p].

    Raises:
        ConfigError: `count` is larger than what the parties of positive pull have.

    Complexity: O(count log P), where count is at most one period of the shares if they are proportional to the sizes.

    >>> apportion(Shares([6, 3, 1]), 5, tie_keys=[0, 1, 2])
    [3, 2, 0]
    """
    sizes = shares.sizes
    counts = [0] * len(sizes)
    if shares.proportional:
        # Shares that are proportional to the sizes are whole numbers again after sum/gcd steps, so the schedule is periodic.
        period = sum(sizes) // gcd(*sizes)
        counts = [count // period * size // gcd(*sizes) for size in sizes]
    waiting: list[tuple[int, int]] = []
    ready: list[tuple[int, int, int]] = []

    def announce(party: int) -> None:
        given = counts[party]
        if given < sizes[party] and shares.pulls[party] > 0:
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
            raise ConfigError(
                f"{count} samples are to be kept, but only {step - 1} are in bins of positive weight: lower keep_ratio, or "
                "give more bins a weight"
            )
        party = heapq.heappop(ready)[2]
        counts[party] += 1
        announce(party)
    return counts
