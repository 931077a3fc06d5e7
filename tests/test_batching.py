"""Batches that do not fit the device's memory: every row comes out once, in order, and pieces only become smaller."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_lightning.core.batching import HalvedBatches
from dq_lightning.core.errors import FeatureError, PatchError
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
