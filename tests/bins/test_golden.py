"""Answers on real features, made by the published code and by a dense float64 greedy, which agree on every pick."""

import numpy as np
import pytest
import torch

from dq_lightning.bins.graph_cut import engine as graph_cut
from dq_lightning.bins.graph_cut import scores
from dq_lightning.bins.make import make_bins
from dq_lightning.core.records import Features

# Those "in blocks" are the ways of a GPU, run on the CPU.
REGIMES = ["auto", "dense", "dense in 2 bytes", "candidates", "stream", "dense in blocks", "stream in blocks"]


@pytest.fixture(params=REGIMES)
def regime(request, monkeypatch):
    if request.param.endswith("in blocks"):
        monkeypatch.setattr(graph_cut, "on_device", lambda pool, least=0: True)
    if request.param.endswith("2 bytes"):
        monkeypatch.setattr(scores, "WIDE", 0)
    return request.param.split()[0]


@pytest.fixture
def cifar(shared_dir):
    return np.load(shared_dir / "golden" / "cifar10_resnet20_500_per_class.npz")


def test_cifar_embeddings_per_class(cifar, regime):
    bins = make_bins(cifar["embedding"], labels=cifar["label"], engine=regime)
    assert np.array_equal(bins.assignment, cifar["bin_embedding"])
    assert np.array_equal(bins.rank, cifar["rank_embedding"])


def test_cifar_gradients_per_class(cifar, regime):
    features = Features(torch.from_numpy(cifar["embedding"]), torch.from_numpy(cifar["head_gradient"]))
    bins = make_bins(features, labels=cifar["label"], engine=regime)
    assert np.array_equal(bins.assignment, cifar["bin_gradient"])
    assert np.array_equal(bins.rank, cifar["rank_gradient"])


def test_alpaca_without_labels(shared_dir, regime):
    golden = np.load(shared_dir / "golden" / "alpaca_rows0_2000_k10.npz")
    stored = np.load(shared_dir / "data" / "alpaca" / "minilm_embeddings_int8.npz")
    values = stored["q"][golden["rows"]].astype(np.float32) * stored["scale"][golden["rows"], None]
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    bins = make_bins(values, similarity="dot", engine=regime)
    assert np.array_equal(bins.assignment, golden["bin"])
    assert np.array_equal(bins.rank, golden["rank"])
