from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_lightning.core.errors import ConfigError
from dq_lightning.selection.allocate import Shares, apportion, count_kept
from tests.full_count import examples
from tests.reference.allocation_twin import apportion_twin

SIZES = st.lists(st.one_of(st.integers(0, 4), st.integers(0, 300)), min_size=1, max_size=9)


@settings(max_examples=examples(300), deadline=None)
@given(sizes=SIZES, data=st.data())
def test_counts_match_the_twin_and_stay_within_one_of_their_share(sizes, data):
    total = sum(sizes)
    count = data.draw(st.integers(0, total))
    keys = data.draw(st.permutations(range(len(sizes))))
    counts = apportion(Shares(sizes), count, keys)
    assert sum(counts) == count
    assert counts == apportion_twin(sizes, count, keys)
    for size, given_out in zip(sizes, counts, strict=True):
        assert 0 <= given_out <= size
        assert abs(given_out - Fraction(size * count, max(1, total))) < 1


@settings(max_examples=examples(100), deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_counts_only_grow(sizes):
    keys = list(range(len(sizes)))
    sequence = [apportion(Shares(sizes), count, keys) for count in range(sum(sizes) + 1)]
    for before, after in pairwise(sequence):
        assert sum(b != a for b, a in zip(before, after, strict=True)) == 1
        assert all(b <= a for b, a in zip(before, after, strict=True))


def ideal(sizes, weights, count):
    """Water filling by bisection of the level, in fractions: exact enough to test within one."""
    low, high = Fraction(0), Fraction(1)
    while sum(min(Fraction(n), high * w * n) for n, w in zip(sizes, weights, strict=True)) < count:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if sum(min(Fraction(n), middle * w * n) for n, w in zip(sizes, weights, strict=True)) < count:
            low = middle
        else:
            high = middle
    return [min(Fraction(n), high * w * n) for n, w in zip(sizes, weights, strict=True)]


@settings(max_examples=examples(100), deadline=None)
@given(
    parties=st.lists(
        st.tuples(st.integers(0, 60), st.sampled_from([0.0, 0.1, 0.5, 1.0, 1.0, 3.7])), min_size=1, max_size=6
    ),
    data=st.data(),
)
def test_weighted_shares_fill_up_to_the_size(parties, data):
    sizes, weights = zip(*parties, strict=True)
    room = sum(n for n, w in parties if w > 0)
    count = data.draw(st.integers(0, room))
    counts = apportion(Shares(sizes, weights), count, list(range(len(sizes))))
    assert sum(counts) == count
    if count:
        shares = ideal(sizes, [Fraction(str(w)) for w in weights], count)
        assert all(abs(c - s) < 1 + Fraction(1, 10**9) for c, s in zip(counts, shares, strict=True))
    if room < sum(sizes):
        with pytest.raises(ConfigError, match=f"only {room} are in bins of positive weight"):
            apportion(Shares(sizes, weights), room + 1, list(range(len(sizes))))


@pytest.mark.parametrize(
    ("total", "ratio", "kept"),
    [(50_000, 0.125, 6250), (45, 0.7, 32), (5, 0.3, 2), (3, 0.1, 0), (10, 1.0, 10), (1, 0.5, 1)],
)
def test_halves_are_rounded_up_as_written(total, ratio, kept):
    assert count_kept(total, ratio) == kept


@settings(max_examples=examples(100), deadline=None)
@given(parties=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), min_size=1, max_size=7), data=st.data())
def test_pulls_are_shared_out_like_the_weights_that_they_stand_for(parties, data):
    sizes, pulls = zip(*parties, strict=True)
    room = sum(n for n, pull in parties if pull)
    count = data.draw(st.integers(0, room))
    counts = apportion(Shares(sizes, pulls=pulls), count, list(range(len(sizes))))
    weights = [Fraction(pull, max(n, 1)) for n, pull in parties]
    assert sum(counts) == count
    for given_out, size, share in zip(counts, sizes, ideal(sizes, weights, count), strict=True):
        assert 0 <= given_out <= size
        assert abs(given_out - share) < 1 + Fraction(1, 10**9)
