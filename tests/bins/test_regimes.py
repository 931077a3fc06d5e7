"""The regimes of the graph cut, with few candidates and short blocks, on sets that a twin can check."""

import runpy
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, target
from hypothesis import strategies as st

from dq_lightning.bins.graph_cut import candidates, costs, device, engine, group, pool, proof, scores
from dq_lightning.bins.make import make_bins
from dq_lightning.core.errors import ConfigError, FeatureError
from dq_lightning.core.records import Features
from tests.bins.test_make import KINDS, assert_greedy, random_features
from tests.full_count import examples
from tests.reference import greedy_twin as twin

BENCHMARK = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "bins_regimes.py"))
# Those "in blocks" are the ways of a GPU, run on the CPU.
REGIMES = ["dense", "dense in 2 bytes", "candidates", "stream", "dense in blocks", "stream in blocks", "auto"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(candidates, "LEAST", 4)
    monkeypatch.setattr(costs, "LEAST", 4)
    monkeypatch.setattr(candidates, "_PART", 2)
    # passes over few rows cost little, so that candidates have candidates
    monkeypatch.setattr(costs.Costs, "check", lambda self, rows: rows * 1e-3)
    monkeypatch.setattr(proof, "_PICKS_A_CHECKPOINT", 3)
    monkeypatch.setattr(scores, "_TILE", {"cpu": 32, "cuda": 32})
    # with entries of 2**24 the range of 4 bytes ends 64 similarities below the greatest gain; coarse entries of 2 bytes
    # propose many wrong picks, which are undone
    monkeypatch.setattr(scores, "FULL", {4: 1 << 24, 2: 300})
    monkeypatch.setattr(scores, "_FIRST", 6)
    monkeypatch.setattr(scores, "_SHORT", 2)
    monkeypatch.setattr(device, "_LONG", 8)
    monkeypatch.setattr(device, "_SHORT", 3)
    monkeypatch.setattr(device, "_ROWS", 16)
    monkeypatch.setattr(device, "_CHECKED", 32)


def bins_in(regime, values, **settings):
    with pytest.MonkeyPatch.context() as patch:
        if regime.endswith("in blocks"):
            patch.setattr(engine, "on_device", lambda pool, least=0: True)
        if regime.endswith("2 bytes"):
            patch.setattr(scores, "WIDE", 0)
        if regime == "auto":
            # What costs nothing, by chance, is changed over to, at the start of a bin or within it.
            chance = np.random.default_rng(len(values))
            for cost in ("matrix", "from_pass", "steady"):
                patch.setattr(costs.Costs, cost, lambda self, rows: float(chance.choice([0.0, 1e-3, 1.0])))
        return make_bins(values, engine=regime.split()[0], **settings)


def picks_of(bins, num_bins):
    order = np.lexsort((bins.rank.numpy(), bins.assignment.numpy()))
    return np.split(order, np.cumsum(np.bincount(bins.assignment.numpy(), minlength=num_bins))[:-1])


@settings(max_examples=examples(600), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    total=st.integers(5, 100),
    width=st.integers(1, 12),
    num_bins=st.integers(1, 6),
    kind=st.sampled_from([*KINDS, *BENCHMARK["DISTRIBUTIONS"], "drifting"]),
    similarity=st.sampled_from(["cosine", "dot", "dot"]),
    lam=st.sampled_from([1.0, 1.0, 0.0, 0.3, 2.5]),
    regime=st.sampled_from(REGIMES),
)
# all gains are equal, and no candidate is the lowest row
@example(0, 7, 1, 1, "plain", "dot", 0.0, "candidates")
def test_the_picks_are_those_of_the_dense_greedy(seed, total, width, num_bins, kind, similarity, lam, regime):
    if kind == "drifting":
        # a far cluster whose gains overtake those of the candidates late: the proofs must notice
        generator = np.random.default_rng(seed)
        values = np.abs(generator.standard_normal((total, width)))
        values[: total // 3, 0] += 5.0
    elif kind in BENCHMARK["DISTRIBUTIONS"]:
        values = BENCHMARK["distribution"](kind, total, width, seed)
    else:
        values = random_features(seed, total, width, kind)
    bins = bins_in(regime, values, num_bins=num_bins, similarity=similarity, lam=lam)
    S = twin.similarity_matrix(values, similarity)
    if (
        kind not in ("tiny", "zeros")
        and similarity == "dot"
        and width > 1
        and lam
        and len(np.unique(values, axis=0)) == total
    ):
        # no ties here, so the picks are the same one by one
        dense = twin.make_bins_twin(S, num_bins, lam)
        assert np.array_equal(bins.assignment, dense[0])
        assert np.array_equal(bins.rank, dense[1])
    elif total <= 60:
        assert_greedy(bins, S, lam, num_bins)


@settings(max_examples=examples(200), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    total=st.integers(5, 40),
    width=st.integers(1, 4),
    reach=st.sampled_from([1, 1, 2, 9]),
    num_bins=st.integers(1, 5),
    lam=st.sampled_from([1.0, 1.0, 2.0, 0.5]),
    way=st.sampled_from(["whole", "tenths", "twos", "one-hot", "two-hot", "referee"]),
    regime=st.sampled_from(REGIMES),
)
def test_true_ties_go_to_the_lowest_position(seed, total, width, reach, num_bins, lam, way, regime):
    generator = np.random.default_rng(seed)
    values = generator.integers(-reach, reach + 1, (total, width)).astype(np.float64)
    if way.endswith("hot"):
        # equal rows, and other rows of equal gains; for two ones the cosine divides by a rounded root
        shuffled = generator.permuted(np.tile(np.arange(width + 2), (total, 1)), axis=1)
        values = (shuffled < (1 if way == "one-hot" else 2)).astype(np.float64)
    features = values * {"tenths": float(np.float32(0.1)), "twos": 2.0**-20}.get(way, 1.0)
    if way == "referee":
        # a small constant changes no comparison, but is no common measure with the rest, so exact arithmetic decides
        features = np.concatenate([values, np.full((total, 1), 2.0**-30)], axis=1)
    similarity = "cosine" if way.endswith("hot") else "dot"
    bins = bins_in(regime, features, num_bins=num_bins, similarity=similarity, lam=lam)
    expected = twin.rational_bins_twin(values, num_bins, Fraction(lam))
    assert [part.tolist() for part in picks_of(bins, num_bins)] == expected


@settings(max_examples=examples(100), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    total=st.integers(5, 60),
    gap=st.sampled_from([0, 1, 2]),
    regime=st.sampled_from(REGIMES),
)
def test_gains_one_rounding_apart_are_told_apart(seed, total, gap, regime):
    """Rows differ in their last bits, so float64 running gains can't order them, and the exact ones can."""
    generator = np.random.default_rng(seed)
    values = 1.0 + gap * generator.integers(0, 4, (total, 2)) * 2.0**-50
    bins = bins_in(regime, values, num_bins=2, similarity="dot")
    scaled = [[int(Fraction(float(v)) * 2**52) for v in row] for row in values]
    exact = twin.rational_bins_twin(scaled, 2)
    rows = [tuple(row) for row in scaled]

    def gain(pick, picked, left):
        dot = lambda a, b: sum(x * y for x, y in zip(rows[a], rows[b], strict=True))  # noqa: E731
        return sum(dot(j, pick) for j in left) - 2 * sum(dot(s, pick) for s in picked)

    left, picked = list(range(total)), []
    for mine, theirs in zip(picks_of(bins, 2)[0], exact[0], strict=True):
        if mine != theirs:
            # equal once rounded to float64
            assert float(Fraction(gain(mine, picked, left), 2**104)) == float(
                Fraction(gain(theirs, picked, left), 2**104)
            )
            return
        picked.append(mine)


@settings(max_examples=examples(60), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    total=st.integers(5, 60),
    num_bins=st.integers(1, 4),
    regime=st.sampled_from(REGIMES),
)
def test_gradient_features(seed, total, num_bins, regime):
    generator = np.random.default_rng(seed)
    embedding, gradient = generator.standard_normal((total, 4)), generator.standard_normal((total, 3)) * 1e-20
    bins = bins_in(regime, Features(torch.from_numpy(embedding), torch.from_numpy(gradient)), num_bins=num_bins)
    assert_greedy(bins, twin.similarity_matrix(twin.last_layer_gradient(embedding, gradient)), 1.0, num_bins)


def test_a_wrong_pick_would_be_noticed(monkeypatch):
    """Without the proof, or without the bounds, the same data give another answer: the tests above can fail."""
    values = np.abs(np.random.default_rng(5).standard_normal((150, 3)))
    monkeypatch.setattr(scores, "FULL", {4: 300, 2: 300})
    right = make_bins(values, num_bins=3, similarity="dot")
    for regime in REGIMES:
        assert torch.equal(bins_in(regime, values, num_bins=3, similarity="dot").rank, right.rank)

    checked = proof.Proof.first_fault

    def believe(check):
        checked(check)
        return len(check.picked), np.empty(0, dtype=np.int64)

    monkeypatch.setattr(proof.Proof, "first_fault", believe)
    monkeypatch.setattr(scores.Scores, "margin", property(lambda self: -1.0, lambda self, value: None), raising=False)
    monkeypatch.setattr(device, "_products", lambda factors: torch.zeros(len(factors[0]), len(factors[0])))
    monkeypatch.setattr(
        device.DevicePicks,
        "_check",
        lambda picks, gains, made: (made.double(), torch.ones(len(made), dtype=torch.bool)),
    )
    for regime in ("candidates", "dense", "dense in 2 bytes", "stream", "dense in blocks"):
        assert not torch.equal(bins_in(regime, values, num_bins=3, similarity="dot").rank, right.rank)


def test_scores_of_coarse_passes_start_again_after_wrong_picks(monkeypatch):
    values = np.random.default_rng(0).standard_normal((200, 5))
    right = make_bins(values, num_bins=3, engine="dense")
    wrong, confirm, fine = [], pool.Pool.confirm, scores.scaled_rows

    def coarse(pool, *args, **settings):
        factors, lengths = fine(pool, *args, **settings)
        return tuple(factor.bfloat16().float() for factor in factors), lengths

    def watched(pool, rows, doubts):
        made = confirm(pool, rows, doubts)
        wrong.extend(rows[len(made) :])
        return made

    monkeypatch.setattr(scores, "scaled_rows", coarse)
    # bounds multiply this by width + 10, so it covers two roundings to bfloat16
    monkeypatch.setattr(scores, "SINGLE", 3e-4)
    monkeypatch.setattr(pool.Pool, "confirm", watched)
    assert torch.equal(make_bins(values, num_bins=3, engine="stream").rank, right.rank)
    assert len(wrong) > 20


@settings(max_examples=examples(40), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    total=st.integers(2, 150),
    width=st.integers(1, 6),
    mean=st.sampled_from((0.0, 30.0)),
    size=st.sampled_from((1e-170, 1e-20, 1.0, 1e15)),
    engine=st.sampled_from(("stream", "dense")),
)
def test_scores_of_passes_and_of_the_matrix_are_within_their_bounds(seed, total, width, mean, size, engine):
    values = (np.random.default_rng(seed).standard_normal((total, width)) + mean) * size
    start, pick, shares, pools = scores.Scores.start, scores.Scores.pick, [], []

    def check(self, row, gone):
        group = pools[-1].group
        # The pick itself is the last one of the trail, and its row is hidden.
        picked = group.trail[: group.length - 1]
        gains = values @ (values.sum(axis=0) - 2.0 * values[picked].sum(axis=0))
        mine = self.values.astype(np.float64)
        mine[row] += scores._GONE
        near = mine >= mine[row] - abs(mine[row]) / 20
        near[picked] = False
        if len(picked):
            off = (gains - gains[row]) / self._unit - (mine - mine[row])
            rounding = 1e-12 * total * np.square(values).sum(axis=1).max() / self._unit
            assert np.abs(off[near]).max() <= self.margin + rounding
            shares.append(np.abs(off[near]).max() / (self.margin + rounding))
        pick(self, row, gone)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores.Scores, "start", lambda self, pool: pools.append(pool) or start(self, pool))
        patch.setattr(scores.Scores, "pick", check)
        make_bins(values, num_bins=1, similarity="dot", engine=engine)
    target(max(shares, default=0.0))


@pytest.mark.parametrize("lam", [1e7, 1e9, 1e13, 1e17])
@pytest.mark.parametrize("regime", REGIMES)
def test_a_large_lam(monkeypatch, lam, regime):
    """Gains reach beyond all scores, and the error of a gain becomes greater than what a pick changes."""
    monkeypatch.setattr(scores, "FULL", {4: 1 << 19, 2: 32700})
    values = np.random.default_rng(0).standard_normal((45, 3))
    values[20:40] = values[:20] * (1 + 2.0**-40)
    expected = twin.rational_bins_twin(values, 3, Fraction(lam), rounding=float)
    bins = bins_in(regime, values, num_bins=3, similarity="dot", lam=lam)
    assert [part.tolist() for part in picks_of(bins, 3)] == expected


def test_near_ties_reach_the_referee(monkeypatch):
    asked = []
    settle = group.Group.settle
    monkeypatch.setattr(
        group.Group, "settle", lambda self, near, length=None: asked.append(len(near)) or settle(self, near, length)
    )
    make_bins(0.3 + np.eye(40, dtype=np.float32), num_bins=3)
    assert asked


def test_threads_and_memory_layout_do_not_matter():
    values = torch.randn(300, 7, generator=torch.Generator().manual_seed(1))
    first = make_bins(values, num_bins=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        second = make_bins(values.T.contiguous().T, num_bins=3)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first.assignment, second.assignment)
    assert torch.equal(first.rank, second.rank)


def test_features_mapped_from_a_file(tmp_path):
    values = np.random.default_rng(0).standard_normal((200, 9)).astype(np.float16)
    np.save(tmp_path / "features.npy", values)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    first, second = make_bins(mapped, num_bins=4), make_bins(values, num_bins=4)
    assert torch.equal(first.rank, second.rank)
    assert torch.equal(first.assignment, second.assignment)


def test_candidates_have_candidates(monkeypatch):
    levels, make = [], candidates.Candidates.round
    monkeypatch.setattr(
        candidates.Candidates, "round", lambda rounds, count: levels.append(rounds._level) or make(rounds, count)
    )
    values = np.random.default_rng(1).standard_normal((300, 4)) + 2.0
    bins = make_bins(values, num_bins=3, engine="candidates")
    assert max(levels) > 1
    assert torch.equal(bins.rank, make_bins(values, num_bins=3, engine="dense").rank)


def test_equal_rows_far_apart_cost_nothing_and_come_in_order():
    values = np.repeat(np.random.default_rng(2).standard_normal((3, 4)), 200, axis=0)
    bins = make_bins(values, num_bins=4)
    for start in (0, 200, 400):
        when = bins.assignment.long()[start : start + 200] * 1000 + bins.rank[start : start + 200]
        assert torch.equal(when, when.sort().values)


def test_the_matrix_takes_no_more_memory_than_allowed(caplog, monkeypatch):
    monkeypatch.setattr(costs.Costs, "from_pass", lambda self, rows: 1.0)
    values = np.random.default_rng(0).standard_normal((300, 4))
    made, make = [], scores._products
    monkeypatch.setattr(scores, "_products", lambda *args: made.append(len(args[2])) or make(*args))
    with caplog.at_level("INFO", "dq_lightning"):
        free = make_bins(values, num_bins=3)
        assert max(made) == 300
        made.clear()
        bound = make_bins(values, num_bins=3, matrix_memory="100KB")
    # 4 bytes an entry
    assert made
    assert all(4 * rows**2 <= 100_000 for rows in made)
    assert torch.equal(free.rank, bound.rank)
    assert "graph cut (dense)" in caplog.messages[0]
    assert "of memory beyond the features" in caplog.messages[0]
    assert "graph cut (candidates, stream where few of them are proved; " in caplog.messages[1]
    with pytest.raises(ConfigError, match=r"engine='dense' needs 351.6 KiB .* matrix_memory='100KB' allows"):
        make_bins(values, engine="dense", matrix_memory="100KB")
    with pytest.raises(ConfigError, match="matrix_memory='much' is not a budget"):
        make_bins(values, matrix_memory="much")


@pytest.mark.gpu
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_gpu_gives_the_same_bins(similarity):
    values = torch.randn(2000, 32, generator=torch.Generator().manual_seed(3))
    first = make_bins(values, similarity=similarity, device="cpu")
    for second in (
        make_bins(values, similarity=similarity, device="cuda"),
        make_bins(values.cuda(), similarity=similarity),
    ):
        assert torch.equal(first.assignment, second.assignment)
        assert torch.equal(first.rank, second.rank)


def test_gains_beyond_float64_are_refused():
    values = np.random.default_rng(0).standard_normal((20, 3))
    with pytest.raises(FeatureError, match=r"lam=1e\+200 are too large for float64; lower lam"):
        make_bins(values, num_bins=2, lam=1e200)
