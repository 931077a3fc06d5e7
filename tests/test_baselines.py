"""Baselines, k-means and the report of diversity."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dq_lightning.bins.clusters import kmeans, nearest
from dq_lightning.core.errors import ConfigError, FeatureError
from dq_lightning.core.records import Features
from dq_lightning.evaluation.baselines import baseline_selection, response_lengths
from dq_lightning.selection.allocate import count_kept

DIVERSITY = runpy.run_path(str(Path(__file__).resolve().parents[1] / "benchmarks" / "diversity.py"))
# Lloyd's algorithm finds the three clusters from first centres that lie one in each
SEED_OF_ONE_EACH = 1


def points(count, width=3, seed=0):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


@given(
    count=st.integers(1, 200),
    ratio=st.sampled_from([0.01, 0.1, 0.125, 0.5, 0.7, 1.0]),
    seed=st.integers(0, 50),
    values=st.integers(1, 300),
)
def test_every_baseline_keeps_exactly_the_share(count, ratio, seed, values):
    wanted = count_kept(count, ratio)
    # equal rows leave clusters empty
    features = torch.from_numpy(points(values)[np.arange(count) % values])
    for name, data in (("random", range(count)), ("longest", torch.arange(count) % 7), ("kmeans", features)):
        if wanted == 0:
            with pytest.raises(ConfigError, match="keeps none"):
                baseline_selection(name, data, keep_ratio=ratio, seed=seed)
            continue
        made = baseline_selection(name, data, keep_ratio=ratio, seed=seed)
        assert made.index.dtype == torch.int64
        assert made.bin.tolist() == [0] * wanted
        assert made.index.tolist() == sorted(set(made.index.tolist()))
        assert len(made) == wanted
        assert 0 <= int(made.index[0]) <= int(made.index[-1]) < count
        again = baseline_selection(name, data, keep_ratio=ratio, seed=seed)
        assert torch.equal(made.index, again.index)


def test_random_is_nested_and_uniform():
    small, large = (
        set(baseline_selection("random", range(1000), keep_ratio=r, seed=3).index.tolist()) for r in (0.1, 0.3)
    )
    assert small < large
    counts = np.zeros(50)
    for seed in range(400):
        counts[baseline_selection("random", range(50), keep_ratio=0.2, seed=seed).index.numpy()] += 1
    # binomial, 400 draws of probability 0.2: standard deviation 8
    assert counts.sum() == 4000
    assert np.abs(counts - 80).max() < 40


def test_longest_by_response_with_ties_by_position():
    rows = [{"prompt": "p" * 99, "completion": "x" * n} for n in (3, 9, 1, 9, 9, 4)]
    assert response_lengths(rows).tolist() == [3, 9, 1, 9, 9, 4]
    assert baseline_selection("longest", rows, keep_ratio=0.34).index.tolist() == [1, 3]
    assert baseline_selection("longest", np.array([3, 9, 1, 9, 9, 4]), keep_ratio=0.67).index.tolist() == [1, 3, 4, 5]


def test_nearest_to_the_centres_of_plain_clusters():
    centres = np.array([[0, 0], [10, 0], [0, 10]], dtype=np.float32)
    around = np.concatenate([centres + offset for offset in points(60, 2) * 0.1])
    made = baseline_selection("kmeans", Features(torch.from_numpy(around)), keep_ratio=3 / 180, seed=SEED_OF_ONE_EACH)
    assert sorted(i % 3 for i in made.index.tolist()) == [0, 1, 2]
    for i in made.index.tolist():
        members = around[i % 3 :: 3]
        gaps = np.linalg.norm(members - members.mean(axis=0), axis=1)
        assert np.linalg.norm(around[i] - members.mean(axis=0)) == pytest.approx(gaps.min(), abs=1e-6)


def test_what_baselines_refuse():
    with pytest.raises(ConfigError, match=r"'random', 'longest', 'kmeans'.*'best'"):
        baseline_selection("best", range(3), keep_ratio=0.5)
    with pytest.raises(ConfigError, match=r"in \(0, 1\]"):
        baseline_selection("random", range(3), keep_ratio=1.5)
    with pytest.raises(FeatureError, match="finite floating"):
        baseline_selection("kmeans", torch.tensor([[float("nan")]]), keep_ratio=1.0)


# k-means


@pytest.mark.parametrize("count", [1, 7, 256, 300, 900, 1000])
def test_clusters_are_a_partition_with_near_centres(count):
    rows = points(1000, 5)
    centres, label = kmeans(rows, count)
    assert centres.shape == (count, 5)
    assert label.min() >= 0
    assert label.max() < count
    spread = np.square(rows - centres[label]).sum()
    random_centres = rows[np.random.default_rng(1).permutation(1000)[:count]]
    by_chance = np.square(rows - random_centres[nearest(rows, random_centres)]).sum()
    assert spread < by_chance or count == 1000
    assert np.array_equal(kmeans(rows, count)[1], label)


def test_lloyd_converges_to_the_means():
    rows = np.concatenate([points(50, 2, n) * 0.1 + 10 * n for n in range(3)])
    centres, label = kmeans(rows, 3, seed=1)
    for number in range(3):
        assert np.allclose(centres[number], rows[label == number].mean(axis=0), atol=1e-5)


def test_nearest_against_all_distances():
    rows, centres = points(300, 4), points(20, 4, 1)
    every = np.linalg.norm(rows[:, None] - centres[None], axis=2)
    assert np.array_equal(nearest(rows, centres), every.argmin(axis=1))


# diversity


def test_neighbour_distances_against_all_distances():
    rows = points(1300, 6)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[1200] = rows[5]
    every = np.linalg.norm(rows[:, None].astype(np.float64) - rows[None], axis=2)
    np.fill_diagonal(every, np.inf)
    found = DIVERSITY["neighbour_distances"](rows)
    assert found == pytest.approx(every.min(axis=1), abs=1e-4)
    assert found[5] == found[1200] == 0


@pytest.mark.parametrize(
    ("text", "verb"),
    [
        ("Rewrite this sentence.", "rewrite"),
        ("  please, list", "list"),
        ("Please list three", "list"),
        ("Can you please explain", "explain"),
        ("I want you to act", "act"),
        ("What is love?", None),
        ("The cat", None),
        ("écris une lettre", "écris"),
        ("3 tips", None),
        ("", None),
    ],
)
def test_verbs(text, verb):
    assert DIVERSITY["instruction_verb"](text) == verb


def test_report():
    verbs = ["Write", "write", "List", "What is"]
    rows = [{"instruction": f"{verbs[i % 4]} {i}", "input": "", "output": "x" * i} for i in range(20)]
    features = points(20)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    clusters = np.arange(20) // 4
    index = np.array([0, 1, 2, 3, 9])
    made = DIVERSITY["measure_diversity"](rows, features, clusters, index)
    assert (made.rows, made.clusters, made.verbs, made.response_length) == (5, 2, 2, 3.0)
    assert made.neighbour_distance == pytest.approx(DIVERSITY["neighbour_distances"](features[index]).mean())
