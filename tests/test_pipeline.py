"""The flow without Lightning: what is computed, what is said, and what a key is made of."""

import random
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dq_lightning import (
    BinConfig,
    FeatureConfig,
    QuantizeConfig,
    QuantizedDataModule,
    SelectionConfig,
    as_source,
    quantize,
)
from dq_lightning.cache.entries import Cache
from dq_lightning.core.errors import ConfigError, SourceError
from dq_lightning.features.whitening import whiten
from dq_lightning.pipeline import binning, extracting
from dq_lightning.pipeline.compact import open_compact
from dq_lightning.pipeline.plan import (
    BINS,
    FEATURES,
    SELECTION,
    STORE,
    known_identity,
    make_plan,
    source_identity,
    station_parts,
)
from dq_lightning.pipeline.wanted import Wanted
from tests.lightning_scripts.common import photos, to_tensor


def settings(keep_ratio=0.1, seed=0, num_bins=5, **more):
    return QuantizeConfig(
        bins=BinConfig(num_bins=num_bins), selection=SelectionConfig(keep_ratio=keep_ratio, seed=seed), **more
    )


class TwoNumbers(torch.nn.Module):
    """An encoder for tests: mean colour through fixed weights."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(scale * torch.tensor([[1.0, 0.5], [0.2, -1.0], [0.3, 0.1]]))

    def forward(self, images):
        return images.mean(dim=(2, 3)) @ self.weight


def test_every_setting_of_the_bins_reaches_them(tmp_path, monkeypatch):
    given, real = [], binning.make_shared_bins
    monkeypatch.setattr(
        binning, "make_shared_bins", lambda *all, **more: given.append((all[1], more)) or real(*all, **more)
    )
    bins = BinConfig(num_bins=4, lam=0.5, similarity="dot", engine="dense", by_label=False)
    features = np.random.default_rng(0).normal(size=(40, 3))
    quantize(photos(40), QuantizeConfig(bins=bins), cache_dir=tmp_path, encoder=features, progress=False)
    assert given[0][0] == bins
    assert given[0][1]["labels"] is None


def test_one_line_says_what_is_computed_and_why(tmp_path, caplog):
    def told(dataset, config, **more):
        caplog.clear()
        with caplog.at_level("INFO", "dq_lightning"):
            quantize(dataset, config, cache_dir=tmp_path, encoder=(TwoNumbers(), to_tensor), progress=False, **more)
        return next(m for m in caplog.messages if m.startswith(("computing", "reusing")))

    data = photos(40)
    assert told(data, settings()) == "computing the compact set: nothing cached yet; encoder: the given TwoNumbers"
    assert re.fullmatch(r"reusing the compact set of 4 of 40 samples: .*5-store.\w+", told(data, settings()))
    assert told(data, settings(keep_ratio=0.125)) == (
        "computing the compact set because keep_ratio changed (0.1 -> 0.125); reusing features and bins"
    )
    assert told(data, settings(seed=3)) == (
        "computing the compact set because seed changed (0 -> 3); reusing features and bins"
    )
    assert told(data, settings(num_bins=4)) == (
        "computing the compact set because num_bins changed (5 -> 4); reusing features"
    )
    assert told(data, settings(store="packed")) == (
        "computing the compact set because store changed (indices -> packed); reusing features, bins and selection"
    )
    assert told(data, settings(keep_ratio=1.0)).startswith(
        "computing the compact set because now the samples were given, or all are kept"
    )
    changed = photos(40)
    changed.dataset.data = 255 - changed.dataset.data
    assert re.fullmatch(
        r"computing the compact set: the cache has none for these data, which are new, were changed, or were split at "
        r"random without a seed \(\w{8} -> \w{8}\); encoder: the given TwoNumbers",
        told(changed, settings()),
    )
    assert told(data, settings(), force_recompute=True) == (
        "computing everything because force_recompute=True; encoder: the given TwoNumbers"
    )
    caplog.clear()
    with caplog.at_level("INFO", "dq_lightning"):
        other = (TwoNumbers(scale=-2.0), to_tensor)
        quantize(data, settings(), cache_dir=tmp_path, encoder=other, progress=False)
    assert re.search(r"because the encoder changed \(\w{8} -> \w{8}\); encoder: the given", caplog.text)


def parts_of(tmp_path, dataset=None, config=None, **more):
    plan = make_plan(dataset or photos(40), Wanted(config or settings(), encoder=(TwoNumbers(), to_tensor), **more))
    memory = Cache(tmp_path).memory
    source, identities = source_identity(plan, memory), plan.identities(memory)
    return station_parts(plan, source, identities)


def test_keys_hold_what_changes_the_result_and_nothing_else(tmp_path):
    base = parts_of(tmp_path)
    stations = (FEATURES, BINS, SELECTION, STORE)

    def changed(**more):
        parts = parts_of(tmp_path, **more)
        return [station for station in stations if parts[station] != base[station]]

    assert changed() == []
    workers = FeatureConfig(batch_size=7, num_workers=0, precision="float32")
    assert changed(config=settings(features=workers)) == []
    assert changed(dataset=photos(40, transform=None)) == []
    assert changed(config=settings(store="packed")) == [STORE]
    assert changed(config=settings(seed=1)) == [SELECTION, STORE]
    assert changed(config=settings(num_bins=3)) == [BINS, SELECTION, STORE]
    assert changed(labels=False) == [BINS, SELECTION, STORE]
    assert changed(labels=[0, 1] * 20) == [BINS, SELECTION, STORE]
    assert changed(labels="1") == [BINS, SELECTION, STORE]
    assert changed(config=settings(label_column="1")) == [BINS, SELECTION, STORE]
    assert changed(config=settings(features=FeatureConfig(kind="gradient"))) == list(stations)
    assert changed(dataset=photos(50)) == list(stations)
    assert changed(fingerprint="mine") == list(stations)


def test_the_grouping_of_a_source_is_part_of_the_key(tmp_path):
    plain, halves = photos(40), [0] * 20 + [1] * 20
    base = parts_of(tmp_path, plain)
    made = [
        parts_of(tmp_path, as_source(plain, **options))
        for options in ({"labels": halves}, {"labels": [0, 1] * 20}, {"labels": False}, {"label_column": "1"})
    ]
    assert all(parts[FEATURES] == base[FEATURES] for parts in made)
    assert len({str(parts[STORE]) for parts in (base, *made)}) == 5
    # whichever door the grouping came through
    assert made[0] == parts_of(tmp_path, plain, labels=halves)
    assert made[0] == parts_of(tmp_path, as_source(plain), labels=halves)
    assert made[2] == parts_of(tmp_path, plain, labels=False)
    assert made[3] == parts_of(tmp_path, plain, config=settings(label_column="1"))
    assert base == parts_of(tmp_path, as_source(plain))


def test_options_that_come_too_late_for_a_source_are_told():
    source = as_source(photos(40), label_column="1")
    assert make_plan(source, Wanted(settings(label_column="1"))).source is source
    for options in ({"transform": np.asarray}, {"transform": None}, {"target_transform": str}):
        with pytest.raises(ConfigError, match=r"transform= was given for a source that is made already"):
            make_plan(source, Wanted(settings(), **options))
    with pytest.raises(ConfigError, match=r"image_column=, label_column= was given"):
        make_plan(source, Wanted(settings(image_column="0", label_column="0")))


def test_auto_looks_at_more_than_the_first_image():
    class Sizes(torch.utils.data.Dataset):
        def __init__(self, odd):
            self.odd = odd

        def __len__(self):
            return 20

        def __getitem__(self, i):
            return Image.new("RGB", (500, 400) if (i == 0) == self.odd else (60, 50)), 0

    small, large = (make_plan(Sizes(odd), Wanted(settings())).encoder.description for odd in (True, False))
    assert "images up to 64 px" in small
    assert "images over 64 px" in large


def test_identity_is_looked_up_where_nothing_is_built(tmp_path):
    class Counting(torch.utils.data.Dataset):
        def __init__(self):
            self.photos = photos(80, transform=None)

        def __len__(self):
            return 80

        def __getitem__(self, i):
            READS.append(i)
            return self.photos[i]

    READS: list[int] = []
    cache = Cache(tmp_path)
    plan = make_plan(Counting(), Wanted(settings()))
    assert known_identity(plan, cache.memory) is None
    assert len(READS) < 80
    known = source_identity(plan, cache.memory)
    READS.clear()
    assert known_identity(make_plan(Counting(), Wanted(settings())), Cache(tmp_path).memory) == known
    assert len(READS) < 80


def test_random_state_stays_as_it_was(tmp_path):
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        quantize(photos(40), settings(), cache_dir=tmp_path, progress=False)
        assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_info_of_a_build_and_of_a_hit(tmp_path):
    built = quantize(photos(40), settings(), cache_dir=tmp_path, progress=False)
    assert not built.reused
    assert list(built.seconds) == ["identity", "features", "bins", "selection", "store"]
    again = quantize(photos(40), settings(), cache_dir=tmp_path, progress=False)
    assert again.reused
    assert again.seconds == {}
    assert (again.path, again.content_hash, again.bytes) == (built.path, built.content_hash, built.bytes)
    assert open_compact(tmp_path / "5-store" / built.path.rsplit("/", 1)[1]).info.num_classes == 10


def test_hidden_randomness_is_refused(tmp_path):
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, i):
            return torch.rand(3, 8, 8), 0

    with pytest.raises(SourceError, match=r"Two reads of item"):
        quantize(Noisy(), settings(), cache_dir=tmp_path, fingerprint="noise", progress=False)


def test_gradient_features(tmp_path):
    config = settings(features=FeatureConfig(encoder="bundled", kind="gradient"))
    info = quantize(photos(40), config, cache_dir=tmp_path, progress=False)
    assert info.num_samples == 4
    embedding = quantize(photos(40), settings(), cache_dir=tmp_path, progress=False)
    assert embedding.path != info.path


def test_clusters_change_neither_the_shares_of_classes_nor_what_is_listed_as_near(tmp_path, caplog):
    """`Bins.group` numbers clusters, so classes must come from the dataset."""
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [25, 10, 5])
    features = generator.normal(size=(40, 4)).astype(np.float32)
    features[:25, 0] *= 9
    features[7] = features[3]
    made = {}
    for classes in (labels, False):
        config = QuantizeConfig(
            bins=BinConfig(num_bins=2, clusters=3, deduplicate=0.9999),
            selection=SelectionConfig(0.5, draw="seeded", balance="equal"),
        )
        dm = QuantizedDataModule(photos(40), config=config, cache_dir=tmp_path, encoder=features, labels=classes)
        dm.prepare_data()
        dm.setup("fit")
        assert dm.duplicates.pairs.tolist() == [[7, 3]]
        made[classes is False] = dm.selection.index.numpy()
        assert ("has no effect" in caplog.text) == (classes is False)
    assert np.bincount(labels[made[False]]).tolist() in ([8, 7, 5], [7, 8, 5])
    # Without classes every cluster has a share in proportion to its size.
    counts, sizes = (dm.bins.group[places].bincount() for places in (made[True], dm.bins.assignment >= 0))
    assert (counts - sizes * 20 / 39).abs().max() < 1


@pytest.mark.parametrize(("width", "equal"), [(30, True), (19, True), (18, False)])
def test_whitening_too_few_samples_is_told(tmp_path, caplog, width, equal):
    features = np.random.default_rng(0).normal(size=(20, width))
    config = settings(0.5, features=FeatureConfig(whiten=True))
    quantize(photos(20), config, cache_dir=tmp_path, encoder=features, labels=False, progress=False)
    assert ("all equally similar" in caplog.text) == equal
    whitened = torch.nn.functional.normalize(whiten(torch.from_numpy(features)))
    cosines = (whitened @ whitened.T)[~torch.eye(20, dtype=torch.bool)]
    assert (float(cosines.std()) < 1e-4) == equal


@pytest.mark.parametrize(
    ("given", "labels", "said"),
    [
        ({"selection": {"bin_weights": (1, 2)}}, None, "bin_weights has 2 values for 10 bins"),
        ({"selection": {"keep_ratio": 0.01}}, None, "keeps none; pass at least 0.025"),
        ({"selection": {"balance": "equal"}}, np.eye(4, dtype=int)[np.arange(20) % 4], "several labels each"),
        ({"selection": {"draw": "scored"}}, False, 'draw="scored" compares labels'),
        ({"quality": {"drop_worst": 0.2}}, "quantiles:2", "drop_worst=0.2 compares labels"),
        ({"features": {"kind": "gradient", "selection_epochs": 1}, "bins": {"clusters": 2}}, None, "plain embeddings"),
    ],
)
def test_what_the_last_steps_refuse_is_refused_before_features_are_made(tmp_path, monkeypatch, given, labels, said):
    def extract(*given, **more):
        raise AssertionError("features are made")

    monkeypatch.setattr(extracting, "extract_features", extract)
    with pytest.raises(ConfigError, match=said):
        quantize(photos(20), given, labels=labels, cache_dir=tmp_path, progress=False)
