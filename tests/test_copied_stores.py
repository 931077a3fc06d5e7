"""Stores from elsewhere, opened side by side in one cache: each gives its own samples, and decides nothing for the machine."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dq_lightning import (
    FeatureConfig,
    PackedDataset,
    PatchConfig,
    QuantizeConfig,
    QuantizedDataModule,
    SelectionConfig,
    quantize,
)
from dq_lightning.cache import files, manifest, tensors
from dq_lightning.core.errors import CacheError, DQError, StoreError
from dq_lightning.core.records import Selection
from dq_lightning.exports.samples import kept_of_store
from dq_lightning.pipeline.plan import BINS, FEATURES, FILLED, PATCHES, SELECTION, STORE
from tests.lightning_scripts.common import photos
from tests.lightning_scripts.patched_images import small_mae

COUNT = 40
CONFIG = QuantizeConfig(
    features=FeatureConfig(encoder="bundled"),
    selection=SelectionConfig(keep_ratio=0.5),
    patches=PatchConfig(drop_ratio=0.2, saliency="variance", reconstructor="bundled"),
)


@pytest.fixture
def other_device(monkeypatch):
    """Call it, and the features that are made from then on are those of another device: other bins, the same identity."""
    from dq_lightning.pipeline import extracting

    real = extracting.extract_features

    def elsewhere(*given, **settings):
        made = real(*given, **settings)
        noise = torch.randn(made.embedding.shape, generator=torch.Generator().manual_seed(1))
        return replace(made, embedding=made.embedding + noise)

    return lambda: monkeypatch.setattr(extracting, "extract_features", elsewhere)


def made(cache, config=CONFIG):
    return Path(quantize(photos(COUNT, None), config, cache_dir=cache, progress=False).path)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A store that is made once; tests change copies of it."""
    return made(tmp_path_factory.mktemp("original"))


@pytest.fixture
def store(original, tmp_path):
    """A copy of that store, from elsewhere."""
    return Path(shutil.copytree(original, tmp_path / "elsewhere" / original.name))


def opened(store, cache, **given):
    module = QuantizedDataModule.from_store(store, cache_dir=cache, num_workers=0, collate_fn=list, **given)
    module.prepare_data()
    module.setup("fit")
    return module


def labels_of(module):
    return [label for _, label in module.train_dataloader().dataset]


def change(path, edit):
    """Change a sealed file and seal it again."""
    values = json.loads(path.read_text())
    del values["digest"]
    edit(values)
    path.write_bytes(files.seal(values))


def reseal(entry):
    """Name the files of an entry in its manifest as they are now."""

    def edit(values):
        for name in values["files"]:
            path = entry / name
            values["files"][name] = {"size": path.stat().st_size, "sha256": files.file_digest(path)}

    change(entry / manifest.MANIFEST, edit)


def test_equal_claims_with_different_samples(tmp_path, other_device):
    first = made(tmp_path / "a")
    other_device()
    second = made(tmp_path / "b")
    assert first.name == second.name
    for store in (first, second, first):
        module = opened(store, tmp_path / "mine")
        assert labels_of(module) == [label for _, label in PackedDataset(store)]
        assert torch.equal(module.train_dataloader().dataset.index, module.selection.index)
    assert len([path for path in (tmp_path / "mine" / FILLED).iterdir() if path.name[0] != "."]) == 2


def test_a_copy_shares_the_filled_images_of_its_original(tmp_path):
    store = made(tmp_path / "cache")
    (filled,) = (path for path in (tmp_path / "cache" / FILLED).iterdir() if path.name[0] != ".")
    before = (filled / manifest.MANIFEST).read_bytes()
    module = opened(shutil.copytree(store, tmp_path / "copy"), tmp_path / "cache")
    assert Path(module.train_dataloader().dataset.path) == filled
    assert (filled / manifest.MANIFEST).read_bytes() == before


def test_a_store_made_again_elsewhere_is_filled_again(tmp_path, other_device):
    """One cache: its store is damaged, and made again on another device, under the same key."""
    store = made(tmp_path)
    shutil.rmtree(store)
    for station in (FEATURES, BINS, SELECTION):
        shutil.rmtree(tmp_path / station)
    other_device()
    module = QuantizedDataModule(
        photos(COUNT, None), config=CONFIG, cache_dir=tmp_path, num_workers=0, batch_size=4, collate_fn=list
    )
    module.prepare_data()
    module.setup("fit")
    assert Path(module.info.path) == store
    again = PackedDataset(store, patches="packed")
    assert labels_of(module) == [label for _, label in again]
    assert [photos(COUNT, None)[i][1] for i in module.selection.index.tolist()] == labels_of(module)


def test_scores_belong_to_the_samples_that_they_were_made_of(tmp_path, other_device):
    made(tmp_path)
    for station in (FEATURES, BINS, SELECTION, STORE, FILLED):
        shutil.rmtree(tmp_path / station)
    other_device()
    store = made(tmp_path)
    fresh = made(tmp_path / "fresh")
    assert len([path for path in (tmp_path / PATCHES).iterdir() if path.name[0] != "."]) == 2
    masks = [[PackedDataset(path, patches="packed").patched(i).mask for i in range(20)] for path in (store, fresh)]
    assert masks[0] == masks[1]


def test_bins_that_were_made_again_and_differ_are_told(tmp_path, other_device):
    made(tmp_path, replace(CONFIG, patches=PatchConfig()))
    for station in (FEATURES, BINS):
        shutil.rmtree(tmp_path / station)
    other_device()
    # another ratio makes the bins again
    made(tmp_path, replace(CONFIG, patches=PatchConfig(), selection=SelectionConfig(keep_ratio=0.25)))
    module = QuantizedDataModule(photos(COUNT, None), config=replace(CONFIG, patches=PatchConfig()), cache_dir=tmp_path)
    module.prepare_data()
    module.setup("fit")
    with pytest.raises(CacheError, match="came out different"):
        _ = module.bins


@pytest.mark.parametrize("seal_all", [False, True])
def test_a_resealed_store_poisons_nothing(tmp_path, seal_all, store):
    """Other pixels and labels under the claims of a good store."""
    good = store
    expected = labels_of(opened(good, tmp_path / "clean"))
    bad = shutil.copytree(good, tmp_path / "bad")
    column = next(path for path in sorted(bad.glob("column-*.npy")) if path.stat().st_size < 1000)
    rows = np.load(column)
    header = column.stat().st_size - rows.nbytes
    column.write_bytes(column.read_bytes()[:header] + rows[::-1].tobytes())
    # checksums that fit what is there now
    write_checksums(bad)
    if seal_all:
        change(bad / "store.json", lambda values: values["files"].update(facts_of(bad, values["files"])))
    reseal(bad)
    cache = tmp_path / "mine"
    if seal_all:
        assert labels_of(opened(bad, cache)) == expected[::-1]
    else:
        with pytest.raises(DQError, match="another content"):
            opened(bad, cache)
    assert labels_of(opened(good, cache)) == expected


def facts_of(folder, names):
    return {
        name: {"size": (folder / name).stat().st_size, "sha256": files.file_digest(folder / name)} for name in names
    }


def write_checksums(folder):
    import zlib

    store = PackedDataset(folder, verify="off")
    made_anew = []
    for at in range(len(store)):
        checksum = at
        for _, row, _ in store._columns:
            checksum = zlib.crc32(row(at), checksum)
        made_anew.append(zlib.crc32(store._value(store._offsets[at], store._offsets[at + 1]), checksum))
    path = folder / "checksums.npy"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 4 * len(store)] + np.array(made_anew, "<u4").tobytes())


def test_positions_of_another_selection_are_refused(store):
    selection = tensors.read_selection(store)
    shifted = Selection(selection.index.flip(0), selection.bin)
    (store / tensors.TENSORS_FILE).unlink()
    tensors.write_selection(store, shifted)
    reseal(store)
    with pytest.raises(StoreError, match="samples of another selection"):
        QuantizedDataModule.from_store(store)


def test_a_store_that_is_replaced_between_opening_and_setup(tmp_path):
    config = replace(CONFIG, store="packed", patches=PatchConfig())
    first = made(tmp_path / "a", config)
    second = made(tmp_path / "b", replace(config, selection=SelectionConfig(keep_ratio=0.5, seed=1)))
    place = shutil.copytree(first, tmp_path / "store")
    module = QuantizedDataModule.from_store(place)
    shutil.rmtree(place)
    shutil.copytree(second, place)
    with pytest.raises(StoreError, match="holds another store than when it was opened first"):
        module.setup("fit")


@pytest.mark.parametrize("name", ["somebody/large-mae", "/home/somebody/mae"])
def test_a_store_does_not_choose_a_network(name, monkeypatch, tmp_path, store):
    def edit(values):
        values["config"]["patches"]["reconstructor"] = name

    change(store / "compact.json", edit)
    reseal(store)
    monkeypatch.setattr("dq_lightning.patches.reconstructors.find_commit", None)
    with pytest.raises(StoreError, match=rf"reconstructor='{name}'.*does not choose.*\"bundled\""):
        QuantizedDataModule.from_store(store)
    with pytest.raises(StoreError, match=rf"reconstructor='{name}'.*does not choose"):
        list(kept_of_store(store, progress=False))
    assert len(list(kept_of_store(store, fill=False))) == 20
    QuantizedDataModule.from_store(store, reconstruct="off")
    for given in ("bundled", small_mae()):
        assert len(labels_of(opened(store, tmp_path / "mine", reconstructor=given))) == 20


WRONG = {
    "a text as a count": {"num_source_samples": "40"},
    "no count": {"num_source_samples": True},
    "fewer than there are": {"num_source_samples": 3},
    "classes": {"num_classes": "ten"},
    "names": {"class_names": 5},
    "kind": {"kind": ["packed"]},
    "config": {"config": []},
    "config of patches": {"config": {"patches": []}},
    "patches": {"patches": "all"},
    "size of a patch": {"patches": {"patch_size": "4"}},
    "size of images": {"patches": {"image_size": [32]}},
    "share": {"patches": {"keep_ratio": "most"}},
}


@pytest.mark.parametrize("case", WRONG)
def test_impossible_descriptions_are_our_own_errors(case, store):
    def edit(values):
        for name, value in WRONG[case].items():
            both = isinstance(value, dict) and isinstance(values[name], dict)
            values[name] = values[name] | value if both else value

    change(store / "compact.json", edit)
    reseal(store)
    with pytest.raises(DQError):
        QuantizedDataModule.from_store(store).setup("fit")


@pytest.mark.parametrize("place", [None, "image", [0.5], ["nowhere"], [1]])
def test_an_impossible_place_of_the_image_is_our_own_error(place, tmp_path, store):
    change(store / "store.json", lambda values: values["attributes"].update(image_place=place))
    reseal(store)
    for reconstruct in ("prepare", "batch"):
        given = {"batch_transform": lambda images: images} if reconstruct == "batch" else {}
        with pytest.raises(DQError):
            opened(store, tmp_path / "mine", reconstruct=reconstruct, **given).train_dataloader().dataset[0]
