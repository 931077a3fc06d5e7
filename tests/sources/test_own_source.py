"""Sources that a user writes: the abstract methods of `Source` are enough, and what else is defined is used."""

import pickle

import pytest
import torch
from torch.utils.data import Subset

from dq_lightning import BinConfig, PatchConfig, QuantizeConfig, SelectionConfig, as_source, quantize
from dq_lightning.cache.entries import Cache
from dq_lightning.core.errors import ConfigError, PatchError, SourceError
from dq_lightning.loading.train_set import BuildOptions, DatasetTrainSet
from dq_lightning.pipeline.wanted import Wanted
from dq_lightning.sources.base import Source
from tests.identity.test_runs import Mean
from tests.lightning_scripts.common import photos, to_tensor

SETTINGS = QuantizeConfig(bins=BinConfig(num_bins=2), selection=SelectionConfig(keep_ratio=0.5))


class Own:
    """The small contract and nothing else; what it gives is that of an adapter."""

    modality = "image"
    identity_is_certain = True

    def __init__(self, dataset):
        self._source = as_source(dataset)

    def __len__(self):
        return len(self._source)


def passed_on(name):
    return lambda self, *given: getattr(self._source, name)(*given)


for name in Source.__abstractmethods__ - {"__len__", "identity_is_certain"}:
    setattr(Own, name, passed_on(name))


class OwnText(Own):
    modality = "text"
    texts = passed_on("texts")


class Inherits(Own, Source):
    """The same, by inheritance."""


class More(Own):
    """Methods that have defaults are the user's own where the user defines them."""

    by_items = False
    image_leaf = passed_on("image_leaf")

    def marks(self, *, fresh):
        return "a time"


@pytest.mark.parametrize("kind", [Own, Inherits, More])
def test_a_source_of_the_users_own_runs_like_its_dataset(kind, tmp_path):
    own = kind(photos(40))
    source = as_source(own)
    assert as_source(source) is source
    assert isinstance(own, Source) is (source is own)
    assert (source.by_items, source.marks(fresh=True)) == ((False, "a time") if kind is More else (True, ""))
    assert (source.grouping, source.label_column, source.path(0), source.sample_digest()) == (None, None, None, "")
    assert source.plain_items()[3] == source.plain(3)
    assert pickle.loads(pickle.dumps(source)).describe() == own.describe()

    def run(data, cache, **more):
        config = QuantizeConfig.from_dict(SETTINGS.to_dict() | more)
        return quantize(data, config, encoder=(Mean(), to_tensor), cache_dir=tmp_path / cache, progress=False)

    made = run(own, "own", on_error="skip")
    assert made.content_hash == run(photos(40), "adapted").content_hash
    assert run(own, "own", on_error="skip").reused
    with pytest.raises(ConfigError, match="transform= was given for a source that is made already"):
        as_source(own, transform=None)
    with pytest.raises(ConfigError, match="a grouping of its own"):
        as_source(own, labels=False)
    patches = {"patches": PatchConfig(drop_ratio=0.5, saliency="random", reconstruct="off").to_dict()}
    if kind is More:
        assert run(own, "own", **patches).kind == "packed"
    else:
        with pytest.raises(PatchError, match="does not tell where in its samples the image is"):
            run(own, "own", **patches)


def test_a_source_of_the_users_own_trains(tmp_path):
    cache, own = Cache(tmp_path), Own(photos(40))
    first, second = (DatasetTrainSet(own, Wanted(SETTINGS, encoder=(Mean(), to_tensor))) for _ in range(2))
    first.prepare(cache, BuildOptions("cpu", progress=False))
    opened = second.open(cache, second.locate(cache))
    index = opened.compact.selection.index
    expected = Subset(photos(40), index.tolist())
    assert all(torch.equal(opened.dataset[i][0], expected[i][0]) for i in range(len(index)))


def test_a_text_source_of_the_users_own_is_checked_by_its_texts():
    rows = [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "c", "input": "", "output": "d"}]
    source = as_source(OwnText(rows))
    source.check(1)
    assert source.text_identity() == {}
    with pytest.raises(SourceError, match="range"):
        source.check(2)
