"""Samples that can't be read: an error that names them, or left out, counted and named."""

import errno
import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchvision.datasets import ImageFolder

from dq_lightning import (
    FeatureConfig,
    PackedDataset,
    PatchConfig,
    QuantizedDataModule,
    SelectionConfig,
    as_source,
    cli,
    load_selection,
    quantize,
)
from dq_lightning.cache import shards
from dq_lightning.cache.entries import Cache
from dq_lightning.cache.tensors import read_bins
from dq_lightning.core.config import QuantizeConfig
from dq_lightning.core.errors import ConfigError, FeatureError, SourceError
from dq_lightning.features import readable
from dq_lightning.features.readable import find_unreadable
from dq_lightning.pipeline.compact import open_compact
from dq_lightning.pipeline.plan import BINS, FEATURES, make_plan
from dq_lightning.pipeline.quantize import find_or_build, station_of_dataset
from dq_lightning.pipeline.wanted import Wanted
from tests.inputs.broken import MeanColour, Pictures, compact, encode, encoded, picture, settings
from tests.lightning_scripts.common import to_tensor
from tests.lightning_scripts.patched_images import small_mae
from tests.robustness.worlds import Edges
from tests.store.calls import DueShards

NAN = torch.full((3, 4, 4), float("nan"))
BROKEN = {
    "raises": OSError("truncated"),
    "empty": (np.zeros((0, 4, 3), np.uint8), 1),
    "text": ("no image", 1),
    "none": None,
    "nan": (NAN, 0),
}


@pytest.fixture
def folder(tmp_path):
    """A folder of 12 images in two classes, of which 1 is cut, 4 empty and 9 text."""
    for index in range(12):
        place = tmp_path / "images" / ("ab"[index // 6]) / f"{index:02}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded(index, "JPEG", size=(40, 40)))
    files = sorted((tmp_path / "images").rglob("*.jpg"))
    files[1].write_bytes(files[1].read_bytes()[:300])
    files[4].write_bytes(b"")
    files[9].write_bytes(b"text")
    return tmp_path / "images"


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("place", [0, 7])
def test_one_broken_item_is_an_error_or_left_out(tmp_path, caplog, kind, place):
    data = Pictures(broken={place: BROKEN[kind]})
    with pytest.raises(SourceError, match=rf"(?i)item {place} of Pictures.*on_error=\"skip\""):
        compact(data, tmp_path)
    info = compact(data, tmp_path, on_error="skip")
    assert (info.num_samples, info.num_source_samples, info.num_unreadable) == (10, 20, 1)
    assert place not in load_selection(info.path).index.tolist()
    assert json.loads(json.dumps(info.to_dict()))["num_unreadable"] == 1
    (told,) = [message for message in caplog.messages if "left out" in message]
    assert f"1 of 20 samples can't be read and are left out: sample {place}: Item {place}" in told


def test_a_run_that_raises_never_takes_what_skipped_and_the_other_way_round(tmp_path):
    bad, good = Pictures(broken={3: OSError("gone")}), Pictures()
    skipped = compact(bad, tmp_path, on_error="skip")
    assert compact(bad, tmp_path, on_error="skip").reused
    assert open_compact(Path(skipped.path)).info.num_unreadable == 1
    with pytest.raises(SourceError, match="Item 3"):
        compact(bad, tmp_path)
    whole = compact(good, tmp_path)
    again = compact(good, tmp_path, on_error="skip")
    assert again.reused
    assert again.path == whole.path
    assert again.num_unreadable == 0


def test_what_is_left_is_quantized_as_if_the_rest_were_not_there(tmp_path):
    broken = {3: OSError("gone"), 11: OSError("gone")}
    with_broken = compact(Pictures(broken=broken), tmp_path, settings(0.25), on_error="skip")
    rest = [index for index in range(20) if index not in broken]
    alone = compact(Subset(Pictures(), rest), tmp_path, settings(5 / 18))
    kept = [rest[place] for place in load_selection(alone.path).index.tolist()]
    assert load_selection(with_broken.path).index.tolist() == kept


def test_image_files(folder, tmp_path, caplog):
    data = ImageFolder(str(folder))
    with pytest.raises(SourceError, match=r"01\.jpg\) can't be read.*on_error"):
        compact(data, tmp_path / "cache")
    for store in ("indices", "packed"):
        info = compact(data, tmp_path / "cache", settings(store=store), on_error="skip")
        assert (info.num_samples, info.num_unreadable) == (6, 3)
        assert not {1, 4, 9} & set(load_selection(info.path).index.tolist())
    told = next(message for message in caplog.messages if "left out" in message)
    assert all(name in told for name in ("01.jpg", "04.jpg", "09.jpg"))


def test_a_file_that_is_gone_or_mended_changes_the_identity(folder, tmp_path):
    data = ImageFolder(str(folder))
    first = compact(data, tmp_path / "cache", on_error="skip")
    (folder / "a" / "02.jpg").unlink()
    second = compact(data, tmp_path / "cache", on_error="skip")
    assert (second.reused, second.num_unreadable) == (False, 4)
    (folder / "a" / "02.jpg").write_bytes(encoded(2, "JPEG", size=(40, 40)))
    (folder / "a" / "04.jpg").write_bytes(encoded(4, "JPEG", size=(40, 40)))
    third = compact(data, tmp_path / "cache", on_error="skip")
    assert (third.reused, third.num_unreadable) == (False, 2)
    assert len({info.path for info in (first, second, third)}) == 3


@pytest.mark.parametrize("nest", [lambda d: Subset(d, range(1, 12)), lambda d: ConcatDataset([d, Pictures(8)])])
def test_nested_datasets(folder, tmp_path, nest):
    info = compact(nest(ImageFolder(str(folder))), tmp_path / "cache", on_error="skip")
    assert info.num_unreadable == 3


def test_hugging_face_files_that_are_gone(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    paths = sorted(map(str, folder.rglob("*.jpg")))
    paths[2] = str(folder / "gone.jpg")
    table = datasets.Dataset.from_dict({"image": paths, "label": [0, 1] * 6})
    table = table.cast_column("image", datasets.Image()).cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    with pytest.raises(SourceError, match=r"gone\.jpg"):
        compact(table, tmp_path / "cache")
    info = compact(table, tmp_path / "cache", on_error="skip")
    assert (info.num_samples, info.num_unreadable, info.num_classes) == (6, 4, 2)


def test_rows_of_text(tmp_path):
    rows = [{"instruction": f"say {i}", "input": "", "output": str(i)} for i in range(10)]
    rows[2]["output"], rows[5]["instruction"] = None, 7
    del rows[8]["instruction"]
    embedding = np.random.default_rng(0).normal(size=(10, 4))
    config = settings(0.5)

    def run(**more):
        return quantize(rows, config, encoder=embedding, cache_dir=tmp_path, device="cpu", progress=False, **more)

    assert run().num_unreadable == 0  # ready-made features read no sample
    info = run(on_error="skip")
    assert (info.num_samples, info.num_unreadable) == (5, 3)
    assert not {2, 5, 8} & set(load_selection(info.path).index.tolist())


@pytest.mark.parametrize("targets", ["numbers", "strings"])
def test_classes_are_those_of_the_samples_that_can_be_read(tmp_path, targets):
    names = ["cat", "dog", "emu"]
    broken = {i: (picture(i), names[i % 3]) for i in range(20)} if targets == "strings" else {}
    info = compact(Pictures(broken=broken | {4: OSError("gone")}, classes=3), tmp_path, on_error="skip")
    assert (info.num_classes, info.num_unreadable) == (3, 1)


@pytest.mark.parametrize(
    "features", [FeatureConfig(kind="gradient"), FeatureConfig(kind="gradient", selection_epochs=1)]
)
def test_gradient_features_and_selection_epochs(tmp_path, features):
    data = Pictures(broken={4: OSError("gone")}, classes=3)
    assert compact(data, tmp_path, settings(features=features), on_error="skip").num_unreadable == 1


def test_near_duplicates_are_left_out_too(tmp_path):
    broken = {4: OSError("gone"), 6: (picture(5), 1)}
    info = compact(Pictures(broken=broken), tmp_path, settings(0.25, deduplicate=0.9999999), on_error="skip")
    assert (info.num_samples, info.num_unreadable) == (5, 1)
    config = settings(0.25, deduplicate=0.9999999, on_error="skip")
    cache = Cache(tmp_path)
    made = find_or_build(
        make_plan(Pictures(broken=broken), Wanted(config, encoder=(MeanColour(), encode))), cache, device="cpu"
    )
    bins = read_bins(cache.find(BINS, made.parts[BINS]))
    assert (bins.assignment == -1).nonzero().flatten().tolist() == [4, 6]


def test_too_few_that_can_be_read(tmp_path):
    broken = {index: OSError("gone") for index in range(12)}
    with pytest.raises(ConfigError, match=r"wants 10, but only 8 are left.*12 that can't be read"):
        compact(Pictures(broken=broken), tmp_path, on_error="skip")
    with pytest.raises((SourceError, FeatureError), match="gone"):
        compact(Pictures(broken={index: OSError("gone") for index in range(20)}), tmp_path, on_error="skip")


def test_the_data_module(tmp_path):
    data = Pictures(broken={3: OSError("gone"), 4: OSError("gone")})
    keywords = {"keep_ratio": 0.5, "encoder": (MeanColour(), encode), "cache_dir": tmp_path, "device": "cpu"}
    with pytest.raises(SourceError, match="Item 3"):
        QuantizedDataModule(data, **keywords).prepare_data()
    module = QuantizedDataModule(data, on_error="skip", **keywords)
    module.prepare_data()
    module.setup("fit")
    assert (module.info.num_samples, module.info.num_unreadable) == (10, 2)
    assert not {3, 4} & set(module.selection.index.tolist())
    assert (module.bins.assignment == -1).nonzero().flatten().tolist() == [3, 4]
    other_rank = QuantizedDataModule(data, on_error="skip", **keywords)
    other_rank.setup("fit")
    assert other_rank.info.content_hash == module.info.content_hash


def test_patches_of_what_can_be_read(folder, tmp_path):
    data, config = ImageFolder(str(folder)), settings(patches=PatchConfig(drop_ratio=0.5))
    networks = {"classifier": (Edges(), to_tensor), "reconstructor": small_mae()}
    with pytest.raises(SourceError, match=r"(01|04|09)\.jpg"):
        compact(data, tmp_path, config, **networks)
    info = compact(data, tmp_path, config, on_error="skip", **networks)
    store = PackedDataset(info.path)
    assert (len(store), info.num_unreadable, store.has_patches) == (6, 3, True)
    assert [target for _, target in store] == [data.targets[index] for index in load_selection(info.path).index]
    assert not {"01.jpg", "04.jpg", "09.jpg"} & {Path(name).name for name in store.ids}


def test_a_wrapped_data_module(tmp_path):
    class Inner(L.LightningDataModule):
        def setup(self, stage):
            self.train = Pictures(broken={3: OSError("gone")})

        def train_dataloader(self):
            return DataLoader(self.train, batch_size=4, collate_fn=list)

    keywords = {"keep_ratio": 0.5, "encoder": (MeanColour(), encode), "cache_dir": tmp_path, "device": "cpu"}
    with pytest.raises(SourceError, match="Item 3"):
        QuantizedDataModule.from_datamodule(Inner(), **keywords).prepare_data()
    module = QuantizedDataModule.from_datamodule(Inner(), on_error="skip", **keywords)
    module.prepare_data()
    module.setup("fit")
    assert (module.info.num_samples, module.info.num_unreadable) == (10, 1)
    assert [len(batch) for batch in module.train_dataloader()] == [4, 4, 2]


def test_the_command(folder, tmp_path, capsys):
    common = ["quantize", f"--data_path={folder}", f"--output={tmp_path / 'out'}", f"--cache_dir={tmp_path / 'cache'}"]
    common += ["--keep_ratio=0.5", "--num_bins=2", "--encoder=bundled", "--device=cpu"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(common)
    assert stopped.value.code
    assert 'on_error="skip"' in capsys.readouterr().err
    cli.main([*common, "--on_error=skip"])
    assert "3 samples could not be read and were skipped" in capsys.readouterr().out


def test_a_run_that_stopped_at_a_sample_is_continued_by_one_that_leaves_it_out(tmp_path, monkeypatch):
    (tmp_path / "images" / "a").mkdir(parents=True)
    for index in range(40):
        # the one that is broken is not among those that are looked at beforehand
        content = encoded(index, "JPEG", size=(40, 40))
        (tmp_path / "images" / "a" / f"{index:02}.jpg").write_bytes(b"text" if index == 25 else content)
    data, done = ImageFolder(str(tmp_path / "images")), []

    class Counting(MeanColour):
        def forward(self, images):
            done.append(len(images))
            return super().forward(images)

    def run(name, **more):
        done.clear()
        config = settings(features=FeatureConfig(batch_size=4, num_workers=0))
        return compact(data, tmp_path / name, config, model=Counting(), **more)

    expected = run("undisturbed", on_error="skip")
    assert done == [4] * 6 + [3] + [4] * 3
    monkeypatch.setattr(shards, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(shards, "MAX_SECONDS", 0.0)
    with pytest.raises(SourceError, match=r"25\.jpg"):
        run("cache")
    assert done == [4] * 6
    found = run("cache", on_error="skip")
    assert done == [3] + [4] * 3
    assert found.content_hash == expected.content_hash
    (one,), (other,) = ((tmp_path / name / FEATURES).glob("*/tensors.safetensors") for name in ("undisturbed", "cache"))
    assert one.read_bytes() == other.read_bytes()


class Read(Exception):  # noqa: N818
    """The end of a run."""


@pytest.mark.parametrize("per_shard", [1, 3])
def test_reading_goes_on_where_it_was(per_shard, monkeypatch):
    data = Pictures(count=30, broken={3: OSError("gone"), 11: OSError("gone"), 29: OSError("gone")})
    source = as_source(data, on_error="skip")
    monkeypatch.setattr(readable, "SAMPLES_AT_ONCE", 4)
    image, seen, stop = source.image, [], [None]

    def watched(index):
        if len(seen) == stop[0]:
            raise Read
        seen.append(index)
        return image(index)

    monkeypatch.setattr(source, "image", watched)
    for at in range(0, 30, 3):
        memory = DueShards(per_shard)
        seen.clear()
        stop[0] = at
        with pytest.raises(Read):
            find_unreadable(source, num_workers=0, progress=False, shards=memory)
        seen.clear()
        stop[0] = None
        memory.asked = 0
        found = find_unreadable(source, num_workers=0, progress=False, shards=memory)
        assert found.tolist() == [3, 11, 29]
        batch = 4 * per_shard
        assert seen == list(range(at // batch * batch, 30))


def test_the_bins_alone(tmp_path):
    data = Pictures(broken={3: OSError("gone")})
    config = QuantizeConfig(FeatureConfig(encoder="bundled"), on_error="skip", selection=SelectionConfig())
    assert station_of_dataset(data, config, BINS, cache_dir=tmp_path, device="cpu", progress=False).num_unreadable == 1


class Fading(Pictures):
    """Item 10 can be read so many times, and then no more: storage that goes away."""

    def __init__(self, limit):
        super().__init__()
        self.left = limit

    def __getitem__(self, index):
        if index == 10:
            self.left -= 1
            if self.left < 0:
                raise OSError("the server is gone")
        return super().__getitem__(index)


PASSING = [OSError(errno.ESTALE, "stale"), MemoryError("no room"), TimeoutError("slow"), ConnectionResetError("gone")]


@pytest.mark.parametrize("failure", PASSING, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_failure_that_may_pass_is_never_left_out(tmp_path, failure, num_workers):
    """Nothing is wrong with the sample, and what is left out once stays out."""
    data = Pictures(count=40)
    config = settings(features=FeatureConfig(num_workers=num_workers))
    # not among those that are looked at beforehand
    data.broken[25] = failure
    with pytest.raises(SourceError, match="Item 25"):
        compact(data, tmp_path, config, on_error="skip", fingerprint="fixed", labels=False)
    del data.broken[25]
    assert compact(data, tmp_path, config, on_error="skip", fingerprint="fixed", labels=False).num_unreadable == 0


def test_data_that_change_while_they_are_read_are_not_kept(tmp_path):
    images = tmp_path / "images" / "a"
    images.mkdir(parents=True)
    contents = [[encoded(index + start, size=(40, 40)) for index in range(20)] for start in (0, 100)]

    def write(which):
        for index, content in enumerate(contents[which]):
            (images / f"{index:02}.png").write_bytes(content)

    class Disturbed(MeanColour):
        def forward(self, found):
            write(1)
            return super().forward(found)

    def run(name, model=None, **more):
        return compact(ImageFolder(str(images.parent)), tmp_path / name, settings(**more), model=model)

    for more in ({}, {"store": "packed"}):
        write(0)
        config = {"features": FeatureConfig(batch_size=4, num_workers=0)} | more
        with pytest.raises(SourceError, match="changed while it was read"):
            run("cache", Disturbed(), **config)
        write(0)
        found = run("cache", **config)
        assert found.content_hash == run("undisturbed", **config).content_hash
        assert not found.reused


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_sample_that_can_be_read_at_first_and_not_later_is_an_error(tmp_path, on_error):
    seen = set()
    for limit in (2, 5, 6, 7, 8, 9, 10, 11, 12):
        data = Fading(limit)
        try:
            compact(data, tmp_path / str(limit), settings(0.99, store="packed"), fingerprint="fixed", on_error=on_error)
        except (SourceError, ConfigError) as error:
            seen.add("the dataset changed meanwhile" in str(error))
    assert True in seen
