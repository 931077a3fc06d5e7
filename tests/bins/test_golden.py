"""Answers on real features, made by the published code and by a dense float64 greedy, which agree on every pick."""

import numpy as np
import pytest
import torch

from dq_lightning.bins.make import make_bins
from dq_lightning.core.records import Features


@pytest.fixture
def cifar(shared_dir):
    return np.load(shared_dir / "golden" / "cifar10_resnet20_500_per_class.npz")


@pytest.mark.parametrize("engine", ["dense", "candidates", "stream"])
def test_cifar_embeddings_per_class(cifar, engine):
    bins = make_bins(cifar["embedding"], labels=cifar["label"], engine=engine)
    assert np.array_equal(bins.assignment, cifar["bin_embedding"])
    assert np.array_equal(bins.rank, cifar["rank_embedding"])


def test_cifar_gradients_per_class(cifar):
    features = Features(torch.from_numpy(cifar["embedding"]), torch.from_numpy(cifar["head_gradient"]))
    bins = make_bins(features, labels=cifar["label"])
    assert np.array_equal(bins.assignment, cifar["bin_gradient"])
    assert np.array_equal(bins.rank, cifar["rank_gradient"])


def alpaca_rows(shared_dir):
    stored = np.load(shared_dir / "data" / "alpaca" / "minilm_embeddings_int8.npz")
    values = stored["q"].astype(np.float32) * stored["scale"][:, None]
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.mark.parametrize("engine", ["dense", "candidates"])
def test_alpaca_without_labels(shared_dir, engine):
    golden = np.load(shared_dir / "golden" / "alpaca_rows0_2000_k10.npz")
    bins = make_bins(alpaca_rows(shared_dir)[golden["rows"]], similarity="dot", engine=engine)
    assert np.array_equal(bins.assignment, golden["bin"])
    assert np.array_equal(bins.rank, golden["rank"])
