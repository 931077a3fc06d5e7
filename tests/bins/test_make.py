import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_lightning import margin_scores
from dq_lightning.bins.make import make_bins
from dq_lightning.core.errors import ConfigError, DQError, FeatureError
from dq_lightning.core.records import Features
from tests.full_count import examples
from tests.reference import greedy_twin as twin


def random_features(seed, total, width, kind):
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((total, width))
    if kind == "clustered":
        values = generator.standard_normal((3, width))[generator.integers(0, 3, total)] + 0.05 * values
    elif kind == "duplicates":
        values = values[generator.integers(0, max(1, total // 3), total)]
    elif kind == "positive":
        values = np.abs(values) + 1.0
    elif kind == "zeros":
        values[generator.random(total) < 0.4] = 0.0
    elif kind == "tiny":
        values = values * 10.0 ** generator.integers(-20, 0, (total, 1))
    return values


KINDS = ["plain", "clustered", "duplicates", "positive", "zeros", "tiny"]


def assert_greedy(bins, S, lam, num_bins):
    """Every pick has the greatest gain up to the rounding of the dense sums, and lies lowest among equal rows."""
    total = len(S)
    left = list(range(total))
    for number in range(num_bins):
        members = np.flatnonzero(bins.assignment.numpy() == number)
        assert len(members) == total // num_bins + (number < total % num_bins)
        members = members[np.argsort(bins.rank.numpy()[members])]
        assert sorted(bins.rank.numpy()[members]) == list(range(len(members)))
        for step, pick in enumerate(members):
            free = [x for x in left if x not in set(members[:step])]
            gains = twin.graph_cut_gains(S, left, list(members[:step]), lam)[np.searchsorted(left, free)]
            noise = 1e-13 * max(1.0, np.abs(S).max()) * total * max(1.0, lam)
            mine = gains[free.index(pick)]
            assert mine >= gains.max() - noise
            assert bins.gain.numpy()[pick] == pytest.approx(mine, rel=1e-6, abs=1e-4 * noise + 1e-7 * np.abs(S).max())
            same = [x for x in free if np.array_equal(S[x], S[pick]) and S[x, pick] == S[pick, pick] == S[x, x]]
            assert pick == same[0] or pick in same
        left = [x for x in left if x not in set(members)]


@settings(max_examples=examples(1000), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    total=st.integers(0, 40),
    width=st.integers(1, 6),
    num_bins=st.integers(1, 12),
    kind=st.sampled_from(KINDS),
    similarity=st.sampled_from(["cosine", "dot"]),
    lam=st.sampled_from([1.0, 0.3, 2.5]),
)
def test_every_pick_is_greedy(seed, total, width, num_bins, kind, similarity, lam):
    values = random_features(seed, total, width, kind)
    bins = make_bins(values, num_bins=num_bins, similarity=similarity, lam=lam)
    assert_greedy(bins, twin.similarity_matrix(values, similarity), lam, num_bins)


@settings(max_examples=examples(1000), deadline=None)
@given(
    values=st.integers(1, 5).flatmap(
        lambda width: st.lists(st.lists(st.integers(-3, 3), min_size=width, max_size=width), min_size=1, max_size=24)
    ),
    num_bins=st.integers(1, 6),
    lam=st.sampled_from([1, 2]),
)
def test_true_ties_go_to_the_lowest_position(values, num_bins, lam):
    bins = make_bins(np.array(values, dtype=np.float32), num_bins=num_bins, similarity="dot", lam=lam)
    for number, picked in enumerate(twin.rational_bins_twin(values, num_bins, lam)):
        assert [int(bins.assignment[x]) for x in picked] == [number] * len(picked)
        assert [int(bins.rank[x]) for x in picked] == list(range(len(picked)))


@settings(max_examples=examples(60), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    total=st.integers(3, 60),
    # the last two samples of a bin's remainder always tie under the cosine (both gains are 1 + cos), so one bin there
    choice=st.sampled_from([("dot", 1, 3), ("dot", 4, 1), ("dot", 7, 3), ("cosine", 1, 1)]),
)
def test_permuting_the_samples_permutes_the_answer(seed, total, choice):
    similarity, num_bins, num_labels = choice
    generator = np.random.default_rng(seed)
    values, labels = generator.standard_normal((total, 5)), generator.integers(0, num_labels, total)
    order = generator.permutation(total)
    first = make_bins(values, num_bins=num_bins, labels=labels, similarity=similarity)
    second = make_bins(values[order], num_bins=num_bins, labels=labels[order], similarity=similarity)
    assert torch.equal(second.assignment, first.assignment[order])
    assert torch.equal(second.rank, first.rank[order])
    assert torch.allclose(second.gain, first.gain[order], rtol=1e-6, atol=1e-6)


@settings(max_examples=examples(60), deadline=None)
@given(seed=st.integers(0, 2**32 - 1), total=st.integers(1, 30), num_bins=st.integers(1, 5))
def test_gradient_features_are_never_written_out_but_act_as_if(seed, total, num_bins):
    generator = np.random.default_rng(seed)
    embedding, gradient = generator.standard_normal((total, 4)), generator.standard_normal((total, 3)) * 1e-20
    gradient[generator.random(total) < 0.1] = 0.0
    features = Features(torch.from_numpy(embedding), torch.from_numpy(gradient))
    bins = make_bins(features, num_bins=num_bins)
    S = twin.similarity_matrix(twin.last_layer_gradient(embedding, gradient))
    assert_greedy(bins, S, 1.0, num_bins)


def test_groups_are_split_alone():
    generator = np.random.default_rng(0)
    values, labels = generator.standard_normal((50, 6)), generator.choice([7, -2, 3], 50, p=[0.7, 0.2, 0.1])
    bins = make_bins(values, num_bins=4, labels=torch.from_numpy(labels))
    assert torch.equal(bins.group, torch.from_numpy(labels).to(torch.int32))
    for label in (7, -2, 3):
        members = np.flatnonzero(labels == label)
        alone = make_bins(values[members], num_bins=4)
        assert torch.equal(bins.assignment[members], alone.assignment)
        assert torch.equal(bins.rank[members], alone.rank)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_floating_type_means_its_exact_values(dtype):
    values = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    bins, wide = make_bins(values, num_bins=3), make_bins(values.double(), num_bins=3)
    assert torch.equal(bins.assignment, wide.assignment)
    assert torch.equal(bins.rank, wide.rank)
    assert [t.dtype for t in (bins.assignment, bins.rank, bins.gain, bins.group)] == [
        torch.int16,
        torch.int32,
        torch.float32,
        torch.int32,
    ]


def test_power_of_two_scales_change_nothing_down_to_the_smallest_numbers():
    values = np.random.default_rng(1).standard_normal((60, 5))
    scaled = np.ldexp(values, np.random.default_rng(2).integers(-900, 900, (60, 1)))
    assert torch.equal(make_bins(values, num_bins=4).rank, make_bins(scaled, num_bins=4).rank)


@pytest.mark.parametrize(("total", "num_bins"), [(0, 3), (1, 3), (2, 10), (5, 1)])
def test_tiny_sets(total, num_bins):
    bins = make_bins(np.eye(5, dtype=np.float32)[:total], num_bins=num_bins)
    assert bins.num_bins == num_bins
    assert bins.assignment.tolist() == ([0] * total if num_bins == 1 else list(range(total)))


def test_equal_rows_come_in_order():
    bins = make_bins(np.ones((600, 3), np.float32), num_bins=10)
    assert bins.assignment.tolist() == [i // 60 for i in range(600)]
    assert bins.rank.tolist() == [i % 60 for i in range(600)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_counted_and_named(bad):
    values = np.zeros((30, 2), np.float32)
    values[[4, 17], 1] = bad
    with pytest.raises(FeatureError, match=r"2 of 30 .*rows 4, 17\b"):
        make_bins(values)
    with pytest.raises(FeatureError, match=r"head_gradient: 2 of 30"):
        make_bins(Features(torch.zeros(30, 2), torch.from_numpy(values)))


def test_wrong_input_is_refused_with_what_was_seen():
    with pytest.raises(FeatureError, match=r"int64 \(3, 2\)"):
        make_bins(np.zeros((3, 2), np.int64))
    with pytest.raises(DQError, match=r"3 samples, got shape \(2,\)"):
        make_bins(np.zeros((3, 2)), labels=np.zeros(2, int))
    with pytest.raises(DQError, match="float32"):
        make_bins(np.zeros((3, 2)), labels=np.zeros(3, np.float32))
    with pytest.raises(ConfigError, match="num_bins"):
        make_bins(np.zeros((3, 2)), num_bins=0)
    with pytest.raises(ConfigError, match="similarity"):
        make_bins(np.zeros((3, 2)), similarity="euclid")


@pytest.mark.parametrize(
    "change", [lambda a: a[::-1].copy()[::-1], lambda a: a.astype(">f8"), lambda a: a.astype(np.longdouble)]
)
def test_arrays_that_torch_does_not_read(change):
    values, labels = random_features(0, 60, 5, "plain"), np.arange(60) % 3
    wanted = make_bins(values, num_bins=4, labels=labels)
    made = make_bins(change(values), num_bins=4, labels=labels)
    assert torch.equal(made.assignment, wanted.assignment)
    assert torch.equal(margin_scores(change(values), labels), margin_scores(values, labels))
    back = make_bins(values[::-1], num_bins=4, labels=labels[::-1])
    assert torch.equal(back.gain.sort().values, wanted.gain.sort().values)
