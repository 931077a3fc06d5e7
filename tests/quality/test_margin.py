"""Leave-one-out margins are those of fits without each sample, and find labels that were changed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dq_lightning import margin_scores
from dq_lightning.core.errors import ConfigError, FeatureError
from dq_lightning.quality import margin as margin_file
from dq_lightning.quality.margin import leave_one_out
from tests.reference.margin_twin import predictions


def clusters(total, width, classes, *, spread=1.0, seed=0):
    """Features [N, D] around one centre a class, and the classes [N]; the first samples have the classes 0 to C - 1."""
    random = np.random.default_rng(seed)
    own = np.concatenate([np.arange(classes), random.integers(classes, size=total - classes)])
    centres = random.normal(size=(classes, width)) * spread
    return centres[own] + random.normal(size=(total, width)), own


@given(st.integers(6, 24), st.integers(1, 60), st.integers(2, 5), st.integers(0, 2**16), st.booleans())
def test_margins_are_those_of_fits_without_the_sample(total, width, classes, seed, constant):
    features, own = clusters(total, width, classes, seed=seed)
    if constant:
        features[:, 0] = 7
    found = leave_one_out(features, own * 3 - 4)
    outputs = predictions(features, own, found.ridge)
    here = np.arange(total)
    others = np.where(np.eye(classes, dtype=bool)[own], -np.inf, outputs)
    np.testing.assert_allclose(found.margin, outputs[here, own] - others.max(axis=1), atol=1e-6)
    ordered = np.sort(outputs, axis=1)
    counts = np.bincount(own)[own]
    fair = outputs.copy()
    fair[here, own] *= counts / np.maximum(counts - 1, 1)
    best = outputs.argmax(axis=1)
    second = np.maximum(np.where(best == own, -np.inf, fair[here, own]), ordered[:, -2])
    np.testing.assert_allclose(found.confidence, np.maximum(fair[here, best] - second, 0), atol=1e-6)
    np.testing.assert_allclose(found.outputs, outputs[found.rows], atol=1e-5)
    suggested = (found.suggested.numpy() + 4) // 3
    np.testing.assert_allclose(outputs[here, suggested], ordered[:, -1], atol=1e-6)
    # The ridge is one of 17 multiples of the mean eigenvalue, however many rows there are.
    weight = (total / classes / np.bincount(own))[own]
    mean_eigenvalue = weight @ np.square(features - weight @ features / total).sum(axis=1) / width
    steps = 2 * np.log10(found.ridge / mean_eigenvalue)
    assert abs(steps - round(steps)) < 1e-6
    assert -12 <= round(steps) <= 4


def test_the_ridge_has_the_least_leave_one_out_error():
    features, own = clusters(60, 40, 3, spread=0.5)
    chosen = leave_one_out(features, own).ridge
    truth, weight = np.eye(3)[own], (1 / np.bincount(own))[own]

    def error(ridge):
        return float(weight @ np.square(predictions(features, own, ridge) - truth).sum(axis=1))

    assert error(chosen) <= min(error(chosen * factor) for factor in (0.1, 10**-0.5, 10**0.5, 10.0))


def test_changed_labels_have_the_lowest_margins():
    features, own = clusters(2000, 20, 5)
    given_labels = own.copy()
    given_labels[:200] = (own[:200] + 1 + np.arange(200) % 4) % 5
    scores = margin_scores(features.astype(np.float16), given_labels)
    assert scores.dtype == torch.float64
    assert scores.shape == (2000,)
    assert set(scores.argsort()[:190].tolist()) <= set(range(200))
    assert (leave_one_out(features, given_labels).suggested.numpy()[:200] == own[:200]).mean() > 0.97


def test_blocks_and_precision_change_nothing_but_the_last_digits(monkeypatch):
    features, own = clusters(1500, 30, 4)
    whole = leave_one_out(features + 1000, own)
    monkeypatch.setattr(margin_file, "_BLOCK_NUMBERS", 1)
    monkeypatch.setattr(margin_file, "_COLUMNS", 7)
    monkeypatch.setattr(margin_file, "_WIDE_WORK", 0)
    parts = leave_one_out(torch.from_numpy(features + 1000), own.tolist())
    torch.testing.assert_close(parts.margin, whole.margin, atol=1e-4, rtol=0)
    torch.testing.assert_close(parts.outputs, whole.outputs, atol=1e-4, rtol=0)


def test_large_classes_do_not_outvote_small_ones():
    features, own = clusters(3000, 10, 2, spread=1.5)
    some = np.concatenate([np.flatnonzero(own == 0), np.flatnonzero(own == 1)[:15]])
    margins = margin_scores(features[some], own[some])
    assert (margins[-15:] > 0).float().mean() > 0.9


@pytest.mark.parametrize("value", [0.0, 1e-200, 1e100])
def test_features_of_any_size_are_scored(value):
    scores = margin_scores(torch.full((4, 3), value, dtype=torch.float64), [0, 0, 1, 1])
    assert scores.isfinite().all()


def test_what_cannot_be_scored_is_refused():
    features = torch.randn(4, 2)
    with pytest.raises(ConfigError, match="all 4 labels are 1"):
        margin_scores(features, [1, 1, 1, 1])
    with pytest.raises(ConfigError, match="3 labels for 4 rows"):
        margin_scores(features, [0, 1, 1])
    with pytest.raises(ConfigError, match="integer labels"):
        margin_scores(features, torch.rand(4))
    for bad in (float("nan"), float("inf")):
        features[2, 1] = bad
        with pytest.raises(FeatureError, match="finite"):
            margin_scores(features, [0, 1, 0, 1])
    for wrong in (torch.zeros(4), torch.zeros(4, 2, dtype=torch.int64), torch.zeros(0, 2)):
        with pytest.raises(FeatureError, match="floating features"):
            margin_scores(wrong, [0, 1, 0, 1])
