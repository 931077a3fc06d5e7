from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_lightning.core.errors import ConfigError
from dq_lightning.core.records import Bins
from dq_lightning.selection.allocate import count_kept
from dq_lightning.selection.select import is_split_of, select
from tests.full_count import examples


def made_up_bins(group_sizes, num_bins, seed=0):
    """Even bins per group, samples in random order."""
    rows = [
        (group, number, rank)
        for group, size in enumerate(group_sizes)
        for number in range(num_bins)
        for rank in range(size // num_bins + (number < size % num_bins))
    ]
    table = np.random.default_rng(seed).permutation(np.array(rows, dtype=np.int64).reshape(-1, 3))
    group, assignment, rank = torch.from_numpy(table).unbind(1)
    return Bins(
        assignment.to(torch.int16), rank.to(torch.int32), torch.zeros(len(table)), group.to(torch.int32), num_bins
    )


@settings(max_examples=examples(60), deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    classes=st.integers(1, 4),
    balance=st.sampled_from(["proportional", "sqrt", "equal"]),
    ratios=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    seed=st.integers(0, 5),
)
def test_classes_of_clusters_have_the_shares_that_whole_classes_have(sizes, classes, balance, ratios, seed):
    bins = made_up_bins(sizes, 3, seed)
    owner = torch.arange(len(sizes)) % classes
    of_each = owner[bins.group.long()]
    assert is_split_of(bins, of_each)
    whole = replace(bins, group=of_each.to(torch.int32))
    assert not is_split_of(whole, bins.group.long()) or len(sizes) <= classes
    last = set()
    for ratio in sorted(ratios):
        if count_kept(len(bins), ratio) == 0:
            continue
        kept = select(bins, keep_ratio=ratio, seed=seed, balance=balance, labels=of_each).index
        twin = select(whole, keep_ratio=ratio, seed=seed, balance=balance).index
        counts = torch.bincount(of_each[kept], minlength=classes)
        assert torch.equal(counts, torch.bincount(of_each[twin], minlength=classes))
        for group, size in enumerate(sizes):
            share = Fraction(int(counts[owner[group]]) * size, int((of_each == owner[group]).sum()))
            assert abs(int((bins.group[kept] == group).sum()) - share) < 1
        assert last <= set(kept.tolist())
        last = set(kept.tolist())


UNEQUAL = st.lists(st.one_of(st.integers(1, 3), st.integers(1, 400)), min_size=1, max_size=6)


@settings(max_examples=examples(150), deadline=None)
@given(
    sizes=UNEQUAL,
    num_bins=st.integers(1, 12),
    ratios=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    seed=st.integers(0, 5),
    draw=st.sampled_from(["seeded", "rank", "scored"]),
)
def test_counts_shares_and_subsets(sizes, num_bins, ratios, seed, draw):
    bins = made_up_bins(sizes, num_bins, seed)
    small, large = sorted(ratios)
    if count_kept(len(bins), small) == 0:
        with pytest.raises(ConfigError, match="keeps none"):
            select(bins, keep_ratio=small)
        return
    scores = torch.from_numpy(np.random.default_rng(seed).integers(0, 9, len(bins))).float()
    selections = [select(bins, keep_ratio=ratio, seed=seed, draw=draw, scores=scores) for ratio in (small, large)]
    assert set(selections[0].index.tolist()) <= set(selections[1].index.tolist())
    for ratio, chosen in zip((small, large), selections, strict=True):
        total, kept = len(bins), count_kept(len(bins), ratio)
        assert len(chosen) == kept
        assert (chosen.index.dtype, chosen.bin.dtype) == (torch.int64, torch.int16)
        assert torch.equal(chosen.index, chosen.index.unique())
        assert torch.equal(chosen.bin, bins.assignment[chosen.index])
        for group, size in enumerate(sizes):
            inside = chosen.index[bins.group[chosen.index] == group]
            assert abs(len(inside) - Fraction(size * kept, total)) < 1
            for number in range(num_bins):
                bin_size = int(((bins.group == group) & (bins.assignment == number)).sum())
                drawn = int((bins.assignment[inside] == number).sum())
                assert abs(drawn - Fraction(bin_size * len(inside), size)) < 1


def test_rank_takes_prefixes_and_seeds_differ():
    bins = made_up_bins([100, 37], 5)
    chosen = select(bins, keep_ratio=0.3, draw="rank")
    for group in (0, 1):
        for number in range(5):
            ranks = bins.rank[chosen.index][(bins.group[chosen.index] == group) & (chosen.bin == number)]
            assert sorted(ranks.tolist()) == list(range(len(ranks)))
    first, second, again = (select(bins, keep_ratio=0.3, seed=s).index.tolist() for s in (0, 1, 0))
    assert first == again
    assert first != second


def test_a_seeded_draw_is_uniform_inside_a_bin():
    bins = made_up_bins([40], 2)
    hits = torch.zeros(40)
    for seed in range(2000):
        hits[select(bins, keep_ratio=0.25, seed=seed).index] += 1
    # 2,000 draws with probability 1/4: five standard deviations are 97
    assert (hits - 500).abs().max() < 97


def test_order_of_the_samples_does_not_matter():
    bins = made_up_bins([60, 9], 4)
    order = torch.from_numpy(np.random.default_rng(3).permutation(len(bins)))
    shuffled = Bins(bins.assignment[order], bins.rank[order], bins.gain[order], bins.group[order], 4)
    mine = select(bins, keep_ratio=0.4, seed=2).index
    assert torch.equal(order[select(shuffled, keep_ratio=0.4, seed=2).index].sort().values, mine)


def test_weights_replace_the_even_share():
    bins = made_up_bins([1000], 4)
    chosen = select(bins, keep_ratio=0.1, bin_weights=[3, 1, 0, 0])
    assert torch.bincount(chosen.bin.long(), minlength=4).tolist() == [75, 25, 0, 0]
    crowded = select(bins, keep_ratio=0.45, bin_weights=[3, 1, 0, 0])
    assert torch.bincount(crowded.bin.long(), minlength=4).tolist() == [250, 200, 0, 0]
    with pytest.raises(
        ConfigError, match="group 0: 600 samples are to be kept, but only 500 are in bins of positive weight"
    ):
        select(bins, keep_ratio=0.6, bin_weights=[3, 1, 0, 0])
    with pytest.raises(ConfigError, match="2 values for 4 bins"):
        select(bins, keep_ratio=0.6, bin_weights=[3, 1])
    with pytest.raises(ConfigError, match="not all zero"):
        select(bins, keep_ratio=0.6, bin_weights=[0, 0, 0, 0])


@settings(max_examples=examples(60), deadline=None)
@given(
    sizes=UNEQUAL,
    ratios=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    seed=st.integers(0, 5),
    balance=st.sampled_from(["equal", "sqrt"]),
)
def test_balanced_groups_share_what_the_small_ones_lack(sizes, ratios, seed, balance):
    bins = made_up_bins(sizes, 4, seed)
    small, large = sorted(max(ratio, 1 / len(bins)) for ratio in ratios)
    chosen = [select(bins, keep_ratio=ratio, seed=seed, balance=balance) for ratio in (small, large)]
    assert set(chosen[0].index.tolist()) <= set(chosen[1].index.tolist())
    goals = [1.0 if balance == "equal" else size**0.5 for size in sizes]
    for ratio, selection in zip((small, large), chosen, strict=True):
        kept = count_kept(len(bins), ratio)
        counts = torch.bincount(bins.group[selection.index].long(), minlength=len(sizes)).tolist()
        assert sum(counts) == kept
        # The level is found by halving: every group has min(size, level * goal), to within one.
        low, high = 0.0, float(kept + max(sizes))
        for _ in range(60):
            level = (low + high) / 2
            enough = sum(min(n, level * goal) for n, goal in zip(sizes, goals, strict=True)) >= kept
            low, high = (low, level) if enough else (level, high)
        for count, size, goal in zip(counts, sizes, goals, strict=True):
            assert abs(count - min(size, high * goal)) < 1 + 1e-3


def test_equal_groups_of_a_long_tail():
    bins = made_up_bins([1000, 100, 10], 5)
    kept = {
        balance: torch.bincount(bins.group[select(bins, keep_ratio=0.2, balance=balance).index].long()).tolist()
        for balance in ("proportional", "sqrt", "equal")
    }
    assert kept == {"proportional": [200, 20, 2], "sqrt": [161, 51, 10], "equal": [112, 100, 10]}


def test_cifar_counts():
    bins = made_up_bins([5000] * 10, 10)
    chosen = select(bins, keep_ratio=0.125)
    assert len(chosen) == 6250
    assert set(torch.bincount(bins.group[chosen.index].long()).tolist()) == {625}


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1, float("nan")])
def test_ratios_out_of_range(ratio):
    with pytest.raises(ConfigError, match="keep_ratio"):
        select(made_up_bins([10], 2), keep_ratio=ratio)


def test_nothing_kept_says_what_would_be_enough():
    with pytest.raises(ConfigError, match=r"keep_ratio=0.01 of 10 samples keeps none; pass at least 0.05"):
        select(made_up_bins([10], 2), keep_ratio=0.01)


@pytest.mark.parametrize(
    ("ratio", "share"), [(0.025, 0.3), (0.05, 0.3), (0.1, 0.5), (0.2, 0.7), (0.3, 1.0), (0.6, 1.0)]
)
def test_a_scored_draw_is_uniform_among_the_best_of_a_bin(ratio, share):
    bins, scores = made_up_bins([240], 2), np.random.default_rng(1).permutation(240).astype(np.float32)
    hits, runs = np.zeros(240), 400
    for seed in range(runs):
        hits[select(bins, keep_ratio=ratio, seed=seed, draw="scored", scores=scores).index.numpy()] += 1
    for number in (0, 1):
        members = np.flatnonzero(bins.assignment.numpy() == number)
        best = members[np.argsort(-scores[members])]
        pool = round(share * len(members))
        assert hits[best[pool:]].sum() == 0
        expected = runs * ratio / share
        # five standard deviations of each count
        assert np.abs(hits[best[:pool]] - expected).max() < 5 * np.sqrt(expected * (1 - ratio / share) + 1)


def test_scores_are_needed_only_where_they_are_used():
    bins, scores = made_up_bins([40], 2), torch.arange(40.0)
    plain = select(bins, keep_ratio=0.2).index
    assert torch.equal(select(bins, keep_ratio=0.2, draw="auto").index, plain)
    assert torch.equal(select(bins, keep_ratio=0.2, draw="seeded", scores=scores).index, plain)
    drawn = select(bins, keep_ratio=0.2, draw="scored", scores=scores).index
    assert torch.equal(select(bins, keep_ratio=0.2, draw="auto", scores=scores.numpy()).index, drawn)
    with pytest.raises(ConfigError, match="needs the scores"):
        select(bins, keep_ratio=0.2, draw="scored")
    for wrong in (scores[1:], scores > 3, torch.full((40,), float("nan"))):
        with pytest.raises(ConfigError, match="one a sample"):
            select(bins, keep_ratio=0.2, draw="scored", scores=wrong)


def test_numbers_of_any_type_are_drawn_by_alike():
    bins, scores = made_up_bins([200], 2), np.random.default_rng(2).permutation(200)
    drawn = select(bins, keep_ratio=0.1, draw="scored", scores=scores.astype(np.float64)).index
    for alike in (scores, scores.astype(np.uint8), scores.astype(np.float32) * 1e30, scores + 2.0**40):
        assert torch.equal(select(bins, keep_ratio=0.1, draw="scored", scores=alike).index, drawn)


def test_samples_of_equal_scores_are_drawn_alike_wherever_they_are():
    bins, runs = made_up_bins([40], 2), 2000
    # Samples without labels have no scores, and make a group of their own.
    scores, hits = torch.full((40,), -float("inf")), torch.zeros(40)
    order = torch.from_numpy(np.random.default_rng(3).permutation(40))
    shuffled = Bins(bins.assignment[order], bins.rank[order], bins.gain[order], bins.group[order], 2)
    for seed in range(runs):
        index = select(bins, keep_ratio=0.1, seed=seed, scores=scores).index
        hits[index] += 1
        if seed < 5:
            again = select(shuffled, keep_ratio=0.1, seed=seed, scores=scores).index
            assert torch.equal(order[again].sort().values, index)
    # 2,000 draws with probability 1/10: five standard deviations are 67
    assert (hits - 200).abs().max() < 67
