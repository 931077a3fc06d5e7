import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_lightning.bins import plan
from dq_lightning.bins.any_objective import pick_group
from dq_lightning.bins.graph_cut.workers import Workers
from dq_lightning.bins.make import make_bins
from dq_lightning.bins.prepare import as_factors, prepare
from dq_lightning.core.config import BinConfig
from dq_lightning.core.errors import ConfigError, FeatureError
from dq_lightning.core.records import Features
from tests.full_count import examples
from tests.reference import objective_twin as twin

OBJECTIVES = ["graph_cut", "facility_location", "log_determinant", "sum_redundancy", "feature_based"]
SIMILARITIES = ["cosine", "dot", "rbf"]


def walk(bins, num_bins):
    """(left, picked so far, next pick) of every step, positions being those among what is left."""
    left = np.arange(len(bins))
    for number in range(num_bins):
        members = np.flatnonzero(bins.assignment.numpy() == number)
        members = members[np.argsort(bins.rank.numpy()[members])]
        places = np.searchsorted(left, members).tolist()
        for step, place in enumerate(places):
            yield left, places[:step], place
        left = np.setdiff1d(left, members)


def positive(seed, total, width):
    return np.abs(np.random.default_rng(seed).standard_normal((total, width))) + 0.1


def slack_of(S):
    return 1e-9 * max(1.0, np.abs(S).sum())


@settings(max_examples=examples(120), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    total=st.integers(1, 16),
    num_bins=st.integers(1, 4),
    objective=st.sampled_from(OBJECTIVES),
    maximizer=st.sampled_from(["naive", "lazy"]),
    similarity=st.sampled_from(SIMILARITIES),
    lam=st.sampled_from([1.0, 0.4]),
)
def test_every_pick_has_the_greatest_gain(seed, total, num_bins, objective, maximizer, similarity, lam):
    values = positive(seed, total, 4)
    bins = make_bins(
        values, num_bins=num_bins, objective=objective, maximizer=maximizer, similarity=similarity, lam=lam, gamma=0.3
    )
    S = twin.similarity_matrix(values, similarity, 0.3)
    unit = values / np.linalg.norm(values, axis=1, keepdims=True) if similarity == "cosine" else values
    for left, picked, pick in walk(bins, num_bins):
        gains = twin.gains(objective, picked, S[np.ix_(left, left)], unit[left], lam)
        assert gains[pick] >= gains.max() - slack_of(S)
        assert float(bins.gain[left[pick]]) == pytest.approx(gains[pick], rel=1e-5, abs=1e-5)


def test_no_objective_is_another_one_in_disguise():
    values = positive(0, 60, 4)
    answers = {o: make_bins(values, num_bins=3, objective=o).assignment.tolist() for o in OBJECTIVES}
    for one, other in pairwise(sorted(answers)):
        assert answers[one] != answers[other]


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_plain_way_and_the_matrix_free_way_agree(similarity):
    values = positive(3, 90, 5)
    config = BinConfig(num_bins=3, similarity=similarity)
    device = torch.device("cpu")
    prepared = prepare(as_factors(values), unit=similarity == "cosine", device=device, workers=Workers())
    order, gains = pick_group(prepared, np.arange(90), [30, 30, 30], config, lambda _: None)
    bins = make_bins(values, num_bins=3, similarity=similarity)
    # the cosine's last two picks of a bin can tie, so gains are compared as well as picks
    assert np.array_equal(bins.assignment[order], np.repeat([0, 1, 2], 30))
    assert np.allclose(bins.gain[order], gains, rtol=1e-6)


@settings(max_examples=examples(40), deadline=None)
@given(seed=st.integers(0, 2**32 - 1), objective=st.sampled_from(OBJECTIVES), similarity=st.sampled_from(SIMILARITIES))
def test_approximate_lazy_keeps_its_promise(seed, objective, similarity):
    values = positive(seed, 20, 4)
    bins = make_bins(
        values,
        num_bins=2,
        objective=objective,
        similarity=similarity,
        gamma=0.3,
        maximizer="approximate_lazy",
        beta=0.7,
    )
    S = twin.similarity_matrix(values, similarity, 0.3)
    unit = values / np.linalg.norm(values, axis=1, keepdims=True) if similarity == "cosine" else values
    for left, picked, pick in walk(bins, 2):
        gains = twin.gains(objective, picked, S[np.ix_(left, left)], unit[left], 1.0)
        best = gains.max()
        assert gains[pick] >= (0.7 * best if best > 0 else best) - slack_of(S)


def test_stochastic_is_seeded_and_close_to_greedy():
    values = positive(1, 200, 6)
    kwargs = {"num_bins": 4, "objective": "facility_location"}
    first, again, other = (make_bins(values, maximizer="stochastic", search_seed=s, **kwargs) for s in (0, 0, 1))
    assert torch.equal(first.rank, again.rank)
    assert not torch.equal(first.assignment, other.assignment)
    greedy = make_bins(values, **kwargs)
    covered = [float(b.gain[b.assignment == 0].sum()) for b in (first, greedy)]
    # Mirzasoleiman et al. 2015: 1 - 1/e - epsilon of the optimum in expectation; far more on such data
    assert 0.9 * covered[1] < covered[0] <= covered[1] * 1.0001


@pytest.mark.parametrize("maximizer", ["lazy", "approximate_lazy"])
@pytest.mark.parametrize("objective", ["graph_cut", "sum_redundancy"])
def test_lazy_is_refused_by_name_where_gains_can_grow(objective, maximizer):
    values = np.random.default_rng(0).standard_normal((20, 3))
    with pytest.raises(ConfigError, match=f"'{maximizer}'.*'{objective}'.*'dot'"):
        make_bins(values, objective=objective, maximizer=maximizer, similarity="dot")
    make_bins(values, objective=objective, maximizer=maximizer)
    make_bins(np.abs(values), objective=objective, maximizer=maximizer, similarity="dot")


def test_feature_based_refuses_negative_entries():
    with pytest.raises(ConfigError, match=r"feature_based.*negative"):
        make_bins(-np.ones((4, 2)), objective="feature_based")


def test_objectives_take_gradient_features():
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    features = Features(embedding, torch.randn(30, 3, generator=generator, dtype=torch.float64))
    written = torch.einsum("nc,nd->ncd", features.head_gradient, torch.cat([torch.ones(30, 1), embedding], 1))
    for objective in ("facility_location", "log_determinant"):
        mine = make_bins(features, num_bins=3, objective=objective)
        theirs = make_bins(written.flatten(1), num_bins=3, objective=objective)
        # two samples that serve each other best have equal gains: the lower one wins whatever the rounding
        assert torch.equal(mine.assignment, theirs.assignment)
        assert torch.equal(mine.rank, theirs.rank)
        assert torch.allclose(mine.gain, theirs.gain, rtol=1e-5)


def test_radial_width_follows_the_data():
    values = positive(2, 25, 3)
    auto = make_bins(values, num_bins=2, similarity="rbf")
    told = make_bins(values, num_bins=2, similarity="rbf", gamma=float(1 / twin.mean_squared_distance(values)))
    assert torch.allclose(auto.gain, told.gain)
    scaled = make_bins(values * 1000, num_bins=2, similarity="rbf")
    assert torch.equal(auto.rank, scaled.rank)


@pytest.mark.parametrize("gamma", [None, 0.5])
def test_distances_beside_a_large_mean_are_kept(gamma):
    """Whole numbers are added to a large one without rounding, so that all distances stay as they are."""
    values = np.random.default_rng(1).integers(-40, 40, (60, 4)).astype(float) / 32
    near = make_bins(values, num_bins=3, similarity="rbf", gamma=gamma)
    far = make_bins(values + 2.0**40, num_bins=3, similarity="rbf", gamma=gamma)
    assert torch.equal(near.assignment, far.assignment)
    assert torch.equal(near.rank, far.rank)
    assert torch.equal(near.gain, far.gain)


@pytest.mark.parametrize("maximizer", ["naive", "lazy", "stochastic", "approximate_lazy"])
def test_what_float64_cannot_hold_is_refused(maximizer):
    """These picked some samples twice, or searched for the greatest gain for ever."""
    values = np.random.default_rng(0).standard_normal((24, 3))
    with pytest.raises(FeatureError, match="similarity 'rbf' squares the distances of features, and the mean"):
        make_bins(values * 1e-160, num_bins=3, similarity="rbf", maximizer=maximizer)
    with pytest.raises(FeatureError, match="too large for float64"):
        make_bins(np.abs(values) * 1e150, num_bins=3, similarity="dot", maximizer=maximizer, lam=1e200)
    # All rows are equal here, and there is nothing to square.
    assert (
        make_bins(values * 0.0, num_bins=3, similarity="rbf", maximizer=maximizer).assignment.bincount().tolist()
        == [8] * 3
    )


def test_what_does_not_fit_is_refused_before_it_is_allocated(monkeypatch):
    monkeypatch.setattr(plan, "free_memory", lambda device: 1 << 20)
    with pytest.raises(ConfigError, match=r"facility_location.*38.\d MiB.*2,000 samples.*1.0 MiB are free.*lazy"):
        make_bins(np.ones((2000, 2), np.float32), objective="facility_location")


def test_the_way_and_the_memory_are_told_before(caplog):
    with caplog.at_level(logging.INFO, logger="dq_lightning"):
        logging.getLogger("dq_lightning").propagate = True
        make_bins(np.ones((50, 2), np.float32), labels=np.arange(50) % 5)
    assert "50 samples in 5 groups" in caplog.text
    assert "beyond the features" in caplog.text


def peers_values():
    return positive(7, 300, 8)


def first_bin(bins):
    members = torch.nonzero(bins.assignment == 0).flatten()
    return members[bins.rank[members].argsort()].tolist()


@pytest.mark.parametrize(
    ("objective", "name", "similarity"),
    [
        ("graph_cut", "GraphCutSelection", "cosine"),
        # under the cosine every S[x, x] is 1, which ties the first picks here; the inner product has no ties
        ("facility_location", "FacilityLocationSelection", "dot"),
        ("sum_redundancy", "SumRedundancySelection", "dot"),
    ],
)
def test_same_picks_as_apricot(objective, name, similarity):
    apricot = pytest.importorskip("apricot", reason="apricot-select is not installed (extra 'peers')")
    values = peers_values()
    S = twin.similarity_matrix(values, similarity)
    selector = getattr(apricot, name)(60, metric="precomputed", optimizer="naive").fit(S)
    bins = make_bins(values, num_bins=5, objective=objective, similarity=similarity)
    assert first_bin(bins) == selector.ranking.tolist()


def test_same_picks_as_apricot_feature_based():
    apricot = pytest.importorskip("apricot", reason="apricot-select is not installed (extra 'peers')")
    values = peers_values()
    selector = apricot.FeatureBasedSelection(60, concave_func="sqrt", optimizer="naive").fit(values)
    bins = make_bins(values, num_bins=5, objective="feature_based", similarity="dot")
    assert first_bin(bins) == selector.ranking.tolist()


@pytest.mark.parametrize("objective", ["graph_cut", "facility_location", "log_determinant"])
def test_same_picks_as_submodlib(objective):
    submodlib = pytest.importorskip("submodlib", reason="submodlib-py is not installed (extra 'peers')")
    values = peers_values()
    if objective == "graph_cut":
        # it computes the cosine itself, not halved, and counts S[x, x], which is 1 for all
        values = values / np.linalg.norm(values, axis=1, keepdims=True)
        function = submodlib.GraphCutFunction(n=300, mode="dense", lambdaVal=1.0, data=values, metric="cosine")
    elif objective == "facility_location":
        S = twin.similarity_matrix(values, "dot")
        function = submodlib.FacilityLocationFunction(n=300, mode="dense", separate_rep=False, sijs=S)
    else:
        S = twin.similarity_matrix(values, "dot")
        function = submodlib.LogDeterminantFunction(n=300, mode="dense", lambdaVal=1.0, sijs=S)
    theirs = function.maximize(
        budget=60, optimizer="NaiveGreedy", stopIfZeroGain=False, stopIfNegativeGain=False, show_progress=False
    )
    bins = make_bins(values, num_bins=5, objective=objective, similarity="dot")
    useful = [pick for pick, gain in theirs if gain > 0]  # among gains of zero it takes the last, we the first
    assert len(useful) > 15
    assert first_bin(bins)[: len(useful)] == useful
