"""Packed compact sets: the same items as the wrapped dataset gives, alone, elsewhere, and verified."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms import v2

from dq_lightning import PackedDataset, QuantizeConfig, QuantizedDataModule, as_source, load_selection, quantize
from dq_lightning.cli import main
from dq_lightning.core.errors import CacheError, ConfigError, DQError, SourceError, StoreError
from dq_lightning.demo.sample_data import SampleCIFAR10
from tests import warm_processes
from tests.lightning_scripts.common import Recorder, held_out, name_of, photos, to_tensor, trainer

AUGMENT = v2.Compose([v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
COUNT = 60


def array_dataset():
    """Torchvision's CIFAR10 around bundled images, with both transforms."""
    made = CIFAR10.__new__(CIFAR10)
    sample = SampleCIFAR10()
    picked = list(range(0, 2000, 2000 // COUNT))[:COUNT]
    made.data, made.targets = sample.data[picked], [sample.targets[i] for i in picked]
    made.classes, made.train = sample.classes, True
    made.transform, made.target_transform = AUGMENT, lambda label: float(label) / 2
    made.transforms, made.root = None, ""
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The photos as JPEG files, one folder a class."""
    root = tmp_path_factory.mktemp("images")
    for i, (image, label) in enumerate(photos(COUNT, transform=None)):
        place = root / SampleCIFAR10().classes[label]
        place.mkdir(exist_ok=True)
        image.save(place / f"{i:04}.jpg", quality=95)
    return root


def folder_dataset(folder):
    return ImageFolder(folder, transform=AUGMENT, target_transform=str)


def hub_dataset(folder):
    datasets = pytest.importorskip("datasets")
    plain = ImageFolder(folder)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=plain.classes)})
    rows = {"image": [path for path, _ in plain.samples], "label": [label for _, label in plain.samples]}
    made = datasets.Dataset.from_dict(rows, features=features)
    made.set_transform(augment_rows)
    return made


def augment_rows(rows):
    return {"pixels": [AUGMENT(image) for image in rows["image"]], "label": rows["label"]}


MAKERS = {
    "arrays": lambda folder: array_dataset(),
    "files": folder_dataset,
    "hub": hub_dataset,
    "any": lambda folder: photos(COUNT, AUGMENT),
}


def ready(dataset, cache_dir, **settings):
    module = QuantizedDataModule(dataset, keep_ratio=0.25, num_bins=3, cache_dir=cache_dir, **settings)
    module.prepare_data()
    module.setup("fit")
    return module


def flat(item):
    """Type and content of an item, to compare."""
    if isinstance(item, dict):
        return {name: flat(value) for name, value in item.items()}
    if isinstance(item, tuple):
        return tuple(map(flat, item))
    return type(item), item.tolist() if isinstance(item, torch.Tensor) else item


@pytest.mark.parametrize("kind", MAKERS)
def test_packed_gives_the_items_of_the_dataset(kind, folder, tmp_path):
    dataset = MAKERS[kind](folder)
    packed = ready(dataset, tmp_path, store="packed")
    indices = ready(dataset, tmp_path, store="indices")
    assert packed.info.kind == "packed"
    assert indices.info.kind == "indices"
    assert packed.info.content_hash == indices.info.content_hash
    assert packed.info.bytes > indices.info.bytes
    ours, theirs = packed.train_dataloader().dataset, indices.train_dataloader().dataset
    assert len(ours) == len(theirs) == 15
    for i, position in enumerate(packed.selection.index.tolist()):
        items = []
        for read in (lambda i=i: ours[i], lambda i=i: theirs[i], lambda p=position: dataset[p]):
            torch.manual_seed(i)
            items.append(flat(read()))
        assert items[0] == items[1] == items[2]


@pytest.mark.parametrize("store", ["indices", "packed"])
@pytest.mark.parametrize("kind", ["arrays", "files", "any"])
def test_transforms_can_be_replaced(kind, store, folder, tmp_path):
    dataset = MAKERS[kind](folder)
    module = ready(dataset, tmp_path, store=store, transform=np.asarray, target_transform=None)
    for item in module.train_dataloader().dataset:
        assert isinstance(item[0], np.ndarray)
        assert isinstance(item[1], int)


def test_trains_without_the_original_data_elsewhere(folder, tmp_path):
    own = tmp_path / "images"
    shutil.copytree(folder, own)
    info = ready(ImageFolder(own), tmp_path / "cache", store="packed").info
    expected = {name_of(image) for image, _ in PackedDataset(info.path)}
    copied = tmp_path / "usb stick"
    shutil.copytree(info.path, copied)
    shutil.rmtree(own)
    shutil.rmtree(tmp_path / "cache")

    module = QuantizedDataModule.from_store(copied, transform=to_tensor, val=held_out(), batch_size=4)
    assert module.num_classes == 10
    running = trainer()
    running.fit(Recorder(), module)
    assert running.global_step == 4
    assert module.info.num_samples == 15
    assert module.info.content_hash == info.content_hash
    assert module.data_keep_ratio == 0.25
    with pytest.raises(CacheError, match="stay in the cache where it was made"):
        _ = module.bins

    script = (
        "import sys, zlib, numpy\n"
        "from dq_lightning import QuantizedDataModule\n"
        "module = QuantizedDataModule.from_store(sys.argv[1], num_workers=1, collate_fn=list, batch_size=5)\n"
        "module.setup('fit')\n"
        "print(sorted(zlib.crc32(numpy.asarray(i).tobytes()) for b in module.train_dataloader() for i, _ in b))\n"
    )
    (tmp_path / "elsewhere.py").write_text(script)
    done = warm_processes.run([tmp_path / "elsewhere.py", copied], warm_processes.environment())
    assert done.stdout.strip() == str(sorted(expected)), done.stderr


@pytest.fixture
def store(tmp_path):
    path = ready(photos(COUNT, None), tmp_path / "cache", store="packed").info.path
    return Path(shutil.copytree(path, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["compact.json", "manifest.json", "store.json", "tensors.safetensors", "ids.bin"])
def test_damage_is_noticed_outside_the_cache_too(store, name):
    data = bytearray((store / name).read_bytes())
    data[len(data) // 2] ^= 1
    (store / name).write_bytes(data)
    with pytest.raises(DQError, match="copy"):
        QuantizedDataModule.from_store(store)


def test_what_is_no_store_is_told(store, tmp_path):
    (store / "compact.json").unlink()
    with pytest.raises(StoreError, match=r"compact.json is missing.*StoreInfo.path"):
        QuantizedDataModule.from_store(store)
    with pytest.raises(StoreError, match=r"no compact set.*no manifest"):
        QuantizedDataModule.from_store(tmp_path)
    with pytest.raises(StoreError, match=r"nowhere does not exist.*StoreInfo.path"):
        QuantizedDataModule.from_store(tmp_path / "nowhere")
    indices = ready(photos(COUNT), tmp_path / "cache").info.path
    for open_it in (QuantizedDataModule.from_store, PackedDataset):
        with pytest.raises(StoreError, match=r"holds indices.*store='packed'"):
            open_it(indices)


@pytest.mark.parametrize("kind", ["indices", "packed"])
def test_the_selection_can_be_read_without_lightning(kind, tmp_path):
    info = quantize(photos(COUNT, None), QuantizeConfig(store=kind), cache_dir=tmp_path, progress=False)
    selection = load_selection(info.path)
    assert len(selection) == info.num_samples == 8
    assert selection.content_hash() == info.content_hash
    if kind == "packed":
        assert torch.equal(PackedDataset(info.path).index, selection.index)


class TwoImages(torch.utils.data.Dataset):
    """Samples in which nothing tells the one image apart."""

    def __init__(self):
        self.photos = photos(COUNT, None)

    def __len__(self):
        return COUNT

    def __getitem__(self, i):
        left, label = self.photos[i]
        return {"left": left, "right": left.rotate(90), "label": label}


@pytest.mark.parametrize("through", ["config", "source"])
def test_a_column_that_was_named_stays_known(through, tmp_path):
    named = through == "config"
    config = QuantizeConfig(store="packed", image_column="right" if named else None)
    source = TwoImages() if named else as_source(TwoImages(), image_column="right")
    info = quantize(source, config, cache_dir=tmp_path, progress=False)
    module = QuantizedDataModule.from_store(info.path, collate_fn=list, num_workers=0)
    module.setup("fit")
    positions = load_selection(info.path).index.tolist()
    plain = module.train_dataloader().dataset
    expected = TwoImages()
    assert [name_of(sample["right"]) for sample in plain] == [name_of(expected[i]["right"]) for i in positions]
    module = QuantizedDataModule.from_store(info.path, transform=np.asarray)
    module.setup("fit")
    sample = module.train_dataloader().dataset[0]
    assert isinstance(sample["right"], np.ndarray)
    assert isinstance(sample["left"], Image.Image)


def test_what_cannot_be_packed_is_told_before_the_work(tmp_path, monkeypatch):
    class Hidden(torch.utils.data.Dataset):
        def __init__(self):
            self.transform = to_tensor

        def __len__(self):
            return COUNT

        def __getitem__(self, i):
            image, label = photos(COUNT, None)[i]
            # what is done to the transformed image is in no attribute
            return (image, label) if self.transform is None else (self.transform(image) + 1, label)

    monkeypatch.setattr("dq_lightning.pipeline.extracting.extract_features", None)
    with pytest.raises(SourceError, match="can't be made from its plain items"):
        ready(Hidden(), tmp_path, store="packed")


def test_damage_inside_the_cache_is_repaired(tmp_path, caplog):
    path = Path(ready(photos(COUNT), tmp_path).info.path)
    before = (path / "tensors.safetensors").read_bytes()
    (path / "compact.json").write_text("{}")
    again = ready(photos(COUNT), tmp_path)
    assert not again.info.reused
    assert "damaged" in caplog.text
    assert (path / "tensors.safetensors").read_bytes() == before


def test_a_full_disk_is_told_before_the_work(tmp_path, monkeypatch):
    asked = []
    for module in ("extracting", "packing"):
        monkeypatch.setattr(f"dq_lightning.pipeline.{module}.require_space", lambda path, needed: asked.append(needed))
    info = ready(photos(COUNT, None), tmp_path, store="packed").info
    features, packed = asked
    assert features > 0
    assert features % (COUNT * 4) == 0
    assert info.bytes / 3 < packed < 3 * info.bytes

    def full(path, needed):
        raise CacheError("no room")

    monkeypatch.setattr("dq_lightning.pipeline.extracting.require_space", full)
    with pytest.raises(CacheError, match="no room"):
        quantize(photos(COUNT, None), cache_dir=tmp_path / "other")
    assert not list((tmp_path / "other").glob("[1-5]-*/[0-9a-f]*"))


def test_same_images_by_torchvision_and_hugging_face(folder, tmp_path):
    """The same ten images give the same features and the same selection."""
    from dq_lightning.cache.tensors import read_features

    ten = sorted(folder.rglob("*.jpg"))[::6]
    own = tmp_path / "ten"
    for i, path in enumerate(ten):
        place = own / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(place / f"{i}.png")
    by_folder = ready(ImageFolder(own), tmp_path / "a")
    by_hub = ready(hub_dataset(own), tmp_path / "b")
    assert by_folder.info.num_source_samples == 10
    assert torch.equal(by_folder.selection.index, by_hub.selection.index)
    assert torch.equal(by_folder.bins.assignment, by_hub.bins.assignment)
    first, second = (read_features(next((tmp_path / name / "1-features").glob("[0-9a-f]*"))) for name in "ab")
    assert torch.equal(first.embedding, second.embedding)


def test_a_store_is_a_finished_choice(store):
    with pytest.raises(ConfigError, match=r"a finished choice: leave out keep_ratio=, labels=, or"):
        QuantizedDataModule(store, keep_ratio=0.5, labels=False)
    # what the set was drawn by is in the set's own description
    assert QuantizedDataModule.from_store(store, seed=3).hparams == {"keep_ratio": None, "num_bins": None, "seed": 3}


def test_a_set_at_an_address_is_copied_once(tmp_path, monkeypatch, capsys):
    fsspec = pytest.importorskip("fsspec")
    info = quantize(photos(20), {"store": "packed"}, indices=[3, 1, 7], cache_dir=tmp_path / "made", progress=False)
    bucket, address = fsspec.filesystem("memory"), "memory://bucket/results"
    bucket.put(info.path, "/bucket/results/compact", recursive=True)
    monkeypatch.setenv("DQ_LIGHTNING_CACHE", str(tmp_path / "cache"))
    module = QuantizedDataModule.from_store(address)
    module.setup("fit")
    assert module.info.path.startswith(str(tmp_path / "cache"))
    copied, made = (list(PackedDataset(path)) for path in (module.info.path, info.path))
    assert [(name_of(image), label) for image, label in copied] == [(name_of(image), label) for image, label in made]
    main(["verify", address])
    assert "1 of 1 entry is intact" in capsys.readouterr().out
    # the copy serves as long as the manifest there is the same
    for name in bucket.ls("/bucket/results/compact", detail=False):
        if not name.endswith("manifest.json"):
            bucket.rm(name)
    QuantizedDataModule.from_store(address)
    with pytest.raises(StoreError, match="can't be read as a compact set"):
        QuantizedDataModule.from_store(address, cache_dir=tmp_path / "other")
    with pytest.raises(StoreError, match=r"can't be read as a compact set .*nowhere"):
        QuantizedDataModule("memory://nowhere")
    for opener in (PackedDataset, load_selection):
        with pytest.raises(StoreError, match="from_store copies"):
            opener(address)
    with pytest.raises(StoreError, match="pass it as text"):
        QuantizedDataModule.from_store(Path(address))


def test_a_set_from_an_address_never_takes_the_place_of_an_own_one(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    made = [
        quantize(Noisy(shift), {"store": "packed"}, indices=[3], fingerprint="one", cache_dir=tmp_path / str(shift))
        for shift in (0, 1)
    ]
    fsspec.filesystem("memory").put(made[0].path, "/bucket/other", recursive=True)
    cache = tmp_path / "1"
    copied = QuantizedDataModule.from_store("memory://bucket/other", cache_dir=cache)
    copied.setup("fit")
    own = quantize(Noisy(1), {"store": "packed"}, indices=[3], fingerprint="one", cache_dir=cache)
    assert own == replace(made[1], reused=True, seconds=own.seconds)
    assert copied.info.path != own.path
    assert not torch.equal(PackedDataset(copied.info.path)[0][0], PackedDataset(own.path)[0][0])
    # also where there is none of one's own yet
    cache = tmp_path / "none"
    QuantizedDataModule.from_store("memory://bucket/other", cache_dir=cache).setup("fit")
    assert not quantize(Noisy(1), {"store": "packed"}, indices=[3], fingerprint="one", cache_dir=cache).reused


class Noisy:
    """Five dark images, lighter by a shift."""

    def __init__(self, shift):
        self.shift = shift

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return torch.full((3, 8, 8), (i + self.shift) / 10), i % 2
