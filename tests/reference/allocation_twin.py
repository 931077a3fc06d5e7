"""The slow, obvious way to give out units one by one: earliest deadline first, every window in fractions."""

from fractions import Fraction
from math import ceil, floor


def apportion_twin(sizes, count, tie_keys):
    """Counts after `count` steps, for shares proportional to the sizes."""
    total = sum(sizes)
    counts = [0] * len(sizes)
    for step in range(1, count + 1):
        open_parties = [
            p for p, n in enumerate(sizes) if counts[p] < n and floor(Fraction(counts[p] * total, n)) < step
        ]
        best = min(open_parties, key=lambda p: (ceil(Fraction((counts[p] + 1) * total, sizes[p])), tie_keys[p]))
        counts[best] += 1
    return counts
