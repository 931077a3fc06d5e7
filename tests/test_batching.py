"""Batches that do not fit the device's memory: every row comes out once, in order, and pieces only become smaller."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dq_lightning.core import batching
from dq_lightning.core.batching import HalvedBatches, images_at_once
from dq_lightning.core.config import PatchConfig
from dq_lightning.core.errors import FeatureError, PatchError
from dq_lightning.features.encoders import NetworkEncoder
from dq_lightning.patches.saliency import make_scorer
from dq_lightning.patches.score import ScoreLoop, score_images
from dq_lightning.sources.adapt import as_source
from tests.full_count import examples
from tests.lightning_scripts.common import photos

pytestmark = pytest.mark.usefixtures("quick_collections")


class Short:
    """A function of [B, T] and two further tensors whose device holds so many elements at once."""

    def __init__(self, room):
        self.room, self.taken = room, []

    def __call__(self, batch, factors, absent):
        assert absent is None
        self.taken.append(batch.shape)
        if batch.numel() > self.room:
            raise torch.OutOfMemoryError
        return batch.sum(1) * factors


@settings(max_examples=examples(100))
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), min_size=1, max_size=6), st.integers(1, 60))
def test_every_row_comes_out_once_and_in_order(shapes, room):
    function, halved = Short(room), HalvedBatches("work", PatchError)
    for rows, columns in shapes:
        batch, factors = torch.arange(rows * columns).view(rows, columns), torch.arange(rows)
        if columns > room:
            with pytest.raises(PatchError, match="work: one sample alone"):
                halved.run(function, batch, factors, None)
        else:
            assert torch.equal(halved.run(function, batch, factors, None), batch.sum(1) * factors)
    limit = 10**9
    for rows, columns in function.taken:
        # A piece of several samples is never larger than half of one that has failed.
        assert rows == 1 or rows * columns <= limit
        if rows > 1 and rows * columns > room:
            limit = rows * columns // 2


class Scorer:
    def __init__(self, most):
        self.most, self.taken = most, []

    def scores(self, images, labels, positions, patch_size):
        self.taken.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError
        return (positions * 10 + labels)[:, None].float().expand(-1, 16)


def test_saliency_goes_on_with_smaller_batches():
    source, index, labels = as_source(photos(20, None)), torch.arange(3, 20), torch.arange(17) % 5

    def score(scorer):
        return score_images(ScoreLoop(source, index, scorer, 8, labels=labels, batch_size=8), progress=False)[0]

    scorer = Scorer(2)
    assert torch.equal(score(scorer), score(Scorer(99)))
    assert scorer.taken[:3] == [8, 4, 2]
    with pytest.raises(PatchError, match='device="cpu"'):
        score(Scorer(0))
    assert not issubclass(PatchError, FeatureError)


@pytest.mark.parametrize("count", [1, 4, 10])
def test_a_network_on_a_cpu_is_given_few_images_at_once(monkeypatch, count):
    """Features and scores are those of a network that is given all images at once, each by its own label."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ).eval()
    images, labels = torch.rand(count, 3, 16, 16), torch.arange(count) % 5
    seen = []

    def made():
        encoder = NetworkEncoder(network, lambda image: image, torch.device("cpu"))
        scorer = make_scorer(PatchConfig(target="label"), network, num_classes=5)
        encoder.network.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
        return encoder.embed(images), scorer.scores(images, labels, torch.arange(count), 4)

    whole = made()
    assert seen == [count]
    seen.clear()
    monkeypatch.setattr(batching, "CPU_ELEMENTS", 4 * images[0].numel())
    assert images_at_once(images, images.device) == 4
    pieces = made()
    assert seen == [min(4, count - start) for start in range(0, count, 4)]
    torch.testing.assert_close(pieces, whole)
    # The scores depend on the labels, so labels of other images would have shown.
    if count > 1:
        other = make_scorer(PatchConfig(target="label"), network, num_classes=5)
        assert not torch.allclose(other.scores(images, labels.flip(0), torch.arange(count), 4), whole[1], atol=1e-3)


def test_a_single_image_that_is_large_is_one_piece():
    assert images_at_once(torch.empty(2, 3, 9000, 9000, device="meta"), torch.device("cpu")) == 1
    assert images_at_once(torch.empty(64, 3, 9000, 9000, device="meta"), torch.device("cuda")) == 64
    assert images_at_once(torch.empty(0, 3, 8, 8), torch.device("cpu")) > 0
