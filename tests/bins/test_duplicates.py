"""Near-duplicates: against the twin, around the edges of blocks, on real embeddings."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dq_lightning.bins import duplicates
from dq_lightning.bins.duplicates import find_duplicates, near_pairs
from dq_lightning.core.errors import ConfigError, FeatureError
from tests.reference.duplicates_twin import find_duplicates_twin


@given(
    count=st.integers(0, 40),
    width=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    threshold=st.sampled_from([0.3, 0.8, 0.95, 1.0]),
)
def test_equals_the_twin(count, width, seed, threshold):
    # few whole numbers: many exact duplicates, zero rows and ties
    rows = np.random.default_rng(seed).integers(-2, 3, (count, width)).astype(np.float64)
    assert find_duplicates(rows, threshold).tolist() == find_duplicates_twin(rows, threshold)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_equals_the_twin_across_blocks(monkeypatch, threshold):
    monkeypatch.setattr(duplicates, "_BLOCK", 16)
    monkeypatch.setattr(duplicates, "_PAIRS", 3)
    rows = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    found = find_duplicates(torch.from_numpy(rows), threshold)
    assert found.tolist() == find_duplicates_twin(rows, threshold)
    assert 1 < len(found.unique()) < 200


def test_similarities_at_the_threshold_are_decided_in_double_precision():
    angle = np.arccos(0.9)
    for shift, kept in ((1e-9, True), (-1e-9, False)):
        rows = np.array([[1.0, 0.0], [np.cos(angle + shift), np.sin(angle + shift)]])
        assert (find_duplicates(rows, 0.9)[1] == 1) == kept


def test_what_a_left_out_row_stood_for_is_judged_against_what_stays():
    # 0 and 1 are close, 1 and 2 are close, 0 and 2 are not: 2 stays
    rows = np.array([[np.cos(a), np.sin(a)] for a in (0.0, 0.3, 0.6)])
    assert find_duplicates(rows, np.cos(0.4)).tolist() == [0, 0, 2]


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_lengths_do_not_matter(scale):
    rows = np.array([[1.0, 1.0], [2.0, 2.0], [1.0, -1.0], [0.0, 0.0], [0.0, 0.0]])
    assert find_duplicates(rows * scale, 1.0).tolist() == [0, 0, 2, 3, 4]


def test_what_cannot_be_compared():
    with pytest.raises(ConfigError, match=r"threshold must be in \(0, 1\], got 1\.5"):
        find_duplicates(torch.ones(2, 2), 1.5)
    with pytest.raises(FeatureError, match=r"floating matrix.*int64"):
        find_duplicates(torch.ones(2, 2, dtype=torch.int64), 0.9)
    with pytest.raises(FeatureError, match="40 positions for 2 rows"):
        near_pairs(torch.ones(2, 2), torch.arange(40))
    with pytest.raises(FeatureError, match="NaN"):
        find_duplicates(torch.tensor([[1.0, float("nan")]]), 0.9)


def test_no_more_than_a_block_of_similarities_at_a_time(monkeypatch):
    sizes, real = [], duplicates._Search._close

    def recorded(self, rows, others):
        sizes.append(len(rows) * len(others))
        return real(self, rows, others)

    monkeypatch.setattr(duplicates._Search, "_close", recorded)
    found = find_duplicates(np.random.default_rng(0).normal(size=(5000, 8)).astype(np.float32), 0.999999)
    assert len(found.unique()) > 4900
    assert sum(sizes) > 5000 * 5000 / 2
    assert max(sizes) <= 1024 * 1024


def test_real_embeddings(shared_dir):
    with np.load(shared_dir / "data" / "alpaca" / "minilm_embeddings_int8.npz") as file:
        rows = (file["q"][:800] * file["scale"][:800, None]).astype(np.float32)
    found = find_duplicates(rows, 0.8)
    assert found.tolist() == find_duplicates_twin(rows, 0.8)
    assert 500 < len(found.unique()) < 800


@pytest.mark.parametrize("threshold", [0.8, 0.9, 0.97])
def test_rows_that_a_bound_rules_out(monkeypatch, threshold):
    monkeypatch.setattr(duplicates, "_BLOCK", 16)
    monkeypatch.setattr(duplicates, "_WIDTHS", (4, 8))
    monkeypatch.setattr(duplicates, "_GATHERING", 4)
    generator = np.random.default_rng(1)
    rows = generator.normal(size=(40, 24))[generator.integers(0, 40, 300)] + generator.normal(size=(300, 24)) * 0.2
    search = duplicates._Search(torch.from_numpy(rows), threshold)
    assert search.bounds is not None
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert (search.bounds.astype(float) @ search.bounds.T >= unit @ unit.T - search.error).all()
    found = search.run()
    assert found.tolist() == find_duplicates_twin(rows, threshold)
    assert 1 < len(found.unique()) < 300


def test_within_classes_and_against_another_set(monkeypatch):
    monkeypatch.setattr(duplicates, "_BLOCK", 16)
    rows = np.random.default_rng(2).normal(size=(120, 3))
    labels = np.arange(120) % 3
    found = find_duplicates(rows, 0.9, labels=labels).numpy()
    for label in range(3):
        members = np.flatnonzero(labels == label)
        assert found[members].tolist() == members[find_duplicates_twin(rows[members], 0.9)].tolist()

    train, validation = rows[:80], rows[80:]
    cosine = train @ validation.T / np.linalg.norm(train, axis=1)[:, None] / np.linalg.norm(validation, axis=1)
    leaked = find_duplicates(train, 0.9, against=validation)
    assert leaked.tolist() == [int(np.argmax(row >= 0.9)) if (row >= 0.9).any() else -1 for row in cosine]
    pairs, values = near_pairs(train, leaked, against=validation)
    assert pairs[:, 0].sort().values.tolist() == np.flatnonzero(leaked >= 0).tolist()
    assert np.allclose(values, cosine[pairs[:, 0], pairs[:, 1]])
    assert (values.diff() <= 0).all()
    with pytest.raises(FeatureError, match="columns"):
        find_duplicates(train, 0.9, against=validation[:, :2])
