"""The share of wrong labels is estimated, the samples left are nearly clean, and clean data lose nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dq_lightning.demo.sample_data import SampleCIFAR10
from dq_lightning.quality.margin import leave_one_out
from dq_lightning.quality.mislabelled import drop_worst, find_mislabelled
from tests.quality.test_margin import clusters


def changed(own, share, classes, *, pairs=None, seed=0):
    """Labels of which a share is replaced by others: any, or the next class for the classes in `pairs`."""
    random = np.random.default_rng([seed, 7])
    hit = random.random(len(own)) < share
    if pairs is not None:
        hit &= np.isin(own, pairs)
    step = 1 if pairs is not None else random.integers(1, classes, size=len(own))
    return np.where(hit, (own + step) % classes, own)


@pytest.mark.parametrize("spread", [0.6, 1.5], ids=["overlapping", "apart"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5])
def test_wrong_labels_are_counted_and_left_out(spread, share):
    features, own = clusters(4000, 24, 8, spread=spread)
    labels = changed(own, share, 8)
    shown = find_mislabelled(leave_one_out(features, labels), labels)
    found, wrong = shown.found.numpy(), labels != own
    if (spread, share) == (0.6, 0.5):
        # Too little is left to learn from: half of the clean samples would go with the wrong ones.
        assert np.isnan(shown.share)
        assert not found.any()
        return
    assert abs(shown.share - wrong.mean()) < max(4 * shown.error, 0.02)
    if share == 0:
        assert not found.any()
    else:
        assert wrong[~found].mean() < 0.02
        # Whoever knew which labels are wrong would still lose some clean samples at 1 % wrong ones.
        order = np.argsort(-leave_one_out(features, labels).margin.numpy())
        kept = np.flatnonzero(np.cumsum(wrong[order]) <= 0.01 * np.arange(1, len(order) + 1))[-1] + 1
        least = 1 - (~wrong[order[:kept]]).sum() / (~wrong).sum()
        assert (found & ~wrong).sum() / (~wrong).sum() < least + 0.2


def test_labels_that_are_mistaken_for_one_other_class_are_found():
    features, own = clusters(4000, 24, 8, spread=0.8)
    labels = changed(own, 0.4, 8, pairs=[1, 5])
    shown = find_mislabelled(leave_one_out(features, labels), labels)
    wrong = labels != own
    assert abs(shown.share - wrong.mean()) < 0.02
    assert wrong[~shown.found.numpy()].mean() < 0.02


def test_features_that_know_nothing_of_the_classes_leave_out_nothing():
    random = np.random.default_rng(0)
    own = random.integers(5, size=2000)
    shown = find_mislabelled(leave_one_out(random.normal(size=(2000, 8)), own), own)
    assert np.isnan(shown.share)
    assert not shown.found.any()
    weak = np.eye(5)[own] * 1.4 + random.normal(size=(2000, 5))
    assert not find_mislabelled(leave_one_out(weak, own), own).found.any()


def test_no_class_vanishes():
    features, own = clusters(3000, 12, 6)
    labels = own.copy()
    labels[np.flatnonzero(own == 2)[5:]] = 3
    labels[np.flatnonzero(own == 4)[:100]] = 2
    found = find_mislabelled(leave_one_out(features, labels), labels).found.numpy()
    kept = np.bincount(labels[~found], minlength=6)
    assert (kept >= np.bincount(labels) * 0.1).all()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=40), st.floats(0, 0.99))
def test_the_worst_of_each_group_are_dropped(rows, share):
    groups, scores = np.array(rows).T
    dropped = drop_worst(scores.astype(float), share, groups)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        count = min(int(len(members) * share + 0.5), len(members) - 1)
        worst = sorted(members, key=lambda place: (scores[place], -place))[:count]
        assert sorted(np.flatnonzero(dropped & (groups == group))) == sorted(worst)


def test_samples_left_are_the_same_for_any_labels_of_the_classes():
    features, own = clusters(1000, 12, 4)
    labels = changed(own, 0.2, 4)
    first = find_mislabelled(leave_one_out(features, labels), labels)
    second = find_mislabelled(leave_one_out(features, labels * 10 - 3), torch.from_numpy(labels * 10 - 3))
    assert torch.equal(first.found, second.found)


def test_foreign_samples_are_left_out():
    features, own = clusters(4000, 24, 10, spread=1.2)
    known = own < 8
    labels = np.where(known, own, np.random.default_rng(3).integers(8, size=4000))
    shown = find_mislabelled(leave_one_out(features, labels), labels)
    assert abs(shown.share - (~known).mean()) < 4 * shown.error
    assert (~known)[~shown.found.numpy()].mean() < 0.05
    assert shown.found.numpy()[known].mean() < 0.35


def test_pixels_that_hardly_tell_the_classes_apart_judge_no_label():
    sample = SampleCIFAR10()
    pixels = sample.data.reshape(2000, 8, 4, 8, 4, 3).mean((2, 4)).reshape(2000, -1)
    for kept in (range(10), (0, 1, 8, 9), (2, 3, 4, 5, 6, 7), (0, 2, 4, 6, 8), (0, 4), (1, 7), (4, 5)):
        place = np.flatnonzero(np.isin(sample.targets, list(kept)))
        labels = np.array(sample.targets)[place]
        assert not find_mislabelled(leave_one_out(pixels[place], labels), labels).found.any()


def unequal(sizes, width, spread, seed):
    """Features and classes of clusters of these sizes."""
    random = np.random.default_rng(seed)
    own = np.repeat(np.arange(len(sizes)), sizes)
    centres = random.normal(size=(len(sizes), width)) * spread
    return centres[own] + random.normal(size=(len(own), width)), own


def test_clean_classes_of_unequal_sizes_are_left_alone():
    sizes = [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]
    for seed in range(4):
        # Of such features the regression, whose classes weigh the same, predicts rare classes too often.
        features, own = unequal(sizes, 64, 0.3, seed + 10)
        shown = find_mislabelled(leave_one_out(features, own), own)
        assert not shown.found.any(), (seed, shown.share)


def test_the_share_of_wrong_labels_is_right_where_classes_are_small():
    # Without a sample its class has less to say for it, the more so the smaller the class is.
    for seed in range(3):
        features, own = unequal([10] * 200, 64, 1.0, seed)
        given_labels = changed(own, 0.2, 200, seed=seed)
        shown = find_mislabelled(leave_one_out(features, given_labels), given_labels)
        wrong = given_labels != own
        assert abs(shown.share - wrong.mean()) < 0.04
        assert wrong[shown.found.numpy()].mean() > 0.95
        assert wrong[~shown.found.numpy()].mean() < 0.02
