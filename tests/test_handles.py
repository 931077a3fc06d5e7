"""Datasets that hold something open are read in one process; plain ones in several."""

import io
import logging
import mmap
import os
import pickle
import socket
import sqlite3
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from dq_lightning import QuantizedDataModule
from dq_lightning.cache.tensors import read_features
from dq_lightning.core import handles
from dq_lightning.core.config import FeatureConfig, QuantizeConfig
from dq_lightning.core.handles import find_open_handle, loader_processes
from dq_lightning.features import loading
from dq_lightning.loading.loaders import LoaderSettings, make_loader
from dq_lightning.loading.trainer_facts import TrainerFacts
from dq_lightning.pipeline.quantize import quantize

SIDE = 8
ROW = SIDE * SIDE * 3


@pytest.fixture(autouse=True)
def untold():
    handles._warned.clear()


@pytest.fixture
def rows(tmp_path):
    """One file with the pixels of 240 images, no two alike, and their pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (240, ROW), dtype=np.uint8)
    (tmp_path / "rows.bin").write_bytes(pixels.tobytes())
    return tmp_path / "rows.bin", pixels.reshape(-1, SIDE, SIDE, 3)


class InOneFile(Dataset):
    """Seeks in a file that is opened when the dataset is made."""

    def __init__(self, path, count=240):
        self.file = path.open("rb")
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.file.seek(index * ROW)
        # a pause between the two, in which another process may move the position
        os.sched_yield()
        data = self.file.read(ROW)
        return Image.fromarray(np.frombuffer(data, np.uint8).reshape(SIDE, SIDE, 3)), index % 2


class OpenedLate(InOneFile):
    """Opens the file at the first read."""

    def __init__(self, path, count=240):
        self.path, self.file, self.count = path, None, count

    def __getitem__(self, index):
        if self.file is None:
            self.file = self.path.open("rb")
        return super().__getitem__(index)


class Reopens(InOneFile):
    """Leaves the file out of its pickle and opens it again."""

    def __init__(self, path, count=240):
        super().__init__(path, count)
        self.path = path

    def __getstate__(self):
        return vars(self) | {"file": None}

    def __getitem__(self, index):
        self.file = self.file or self.path.open("rb")
        return super().__getitem__(index)


class InZip(Dataset):
    def __init__(self, path):
        self.archive = zipfile.ZipFile(path)
        self.names = sorted(self.archive.namelist())

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return Image.open(io.BytesIO(self.archive.read(self.names[index]))).convert("RGB"), index % 2


class Holding(Dataset):
    def __init__(self, held=None):
        self.held = held

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return Image.new("RGB", (SIDE, SIDE)), index % 2


GLOBAL = None


class UsesGlobal(Holding):
    def __getitem__(self, index):
        return self.read(index)

    def read(self, index):
        return GLOBAL.read(index)


class Sensor:
    """Stands for a file of HDF5: its class is of such a library, and nothing of it shows in Python."""

    __slots__ = ()


@pytest.fixture
def several(monkeypatch):
    """`"auto"` means two processes, however short the reading is."""
    monkeypatch.setattr(loading, "choose_num_workers", lambda *_: 2)
    monkeypatch.setattr("dq_lightning.pipeline.scoring._num_workers", lambda plan, count: 2)
    monkeypatch.setattr("dq_lightning.loading.loaders.automatic_workers", lambda processes=1: 2)


class Flat(torch.nn.Module):
    """An encoder whose features are the pixels themselves."""

    def forward(self, x):
        return x.flatten(1)


def encode(image):
    return torch.from_numpy(np.array(image)).float()


def features_of(dataset, tmp_path, **settings):
    config = QuantizeConfig(features=FeatureConfig(batch_size=4, **settings.pop("features", {})), **settings)
    info = quantize(
        dataset,
        config,
        encoder=(Flat(), encode),
        labels=False,
        cache_dir=tmp_path / "cache",
        device="cpu",
        fingerprint="x",
    )
    (entry,) = (tmp_path / "cache" / "1-features").iterdir()
    return info, read_features(entry).embedding


@pytest.mark.parametrize("kind", [InOneFile, OpenedLate, Reopens])
@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, range(240)), lambda d: ConcatDataset([d])])
def test_rows_of_one_file_are_the_right_ones(kind, wrap, rows, several, tmp_path, caplog):
    path, pixels = rows
    _, features = features_of(wrap(kind(path)), tmp_path)
    assert torch.equal(features, torch.from_numpy(pixels).flatten(1).float())
    told = [record.message for record in caplog.records if "one process" in record.message]
    # what opens its file in each process by itself is read in several
    assert len(told) == (kind is InOneFile)
    assert all(str(path) in text and "__getstate__" in text for text in told)


def test_a_number_of_processes_that_was_named_makes_no_wrong_features(rows, tmp_path):
    _, features = features_of(InOneFile(rows[0]), tmp_path, features={"num_workers": 2})
    assert torch.equal(features, torch.from_numpy(rows[1]).flatten(1).float())


def test_samples_of_an_archive_are_not_called_unreadable(rows, several, tmp_path, caplog):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, image in enumerate(rows[1][:80]):
            data = io.BytesIO()
            Image.fromarray(image).save(data, "PNG")
            archive.writestr(f"{number:03}.png", data.getvalue())
    info, features = features_of(InZip(path), tmp_path, on_error="skip")
    assert info.num_unreadable == 0
    assert torch.equal(features, torch.from_numpy(rows[1][:80]).flatten(1).float())
    # the reading pass and the features: said once
    assert sum("one process" in record.message for record in caplog.records) == 1


def test_zero_processes_of_a_data_module_hold_for_the_features_too(rows, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(loading, "choose_num_workers", lambda *_: seen.append("auto") or 0)
    make = partial(QuantizedDataModule, InOneFile(rows[0]), encoder=(Flat(), encode), labels=False, cache_dir=tmp_path)
    zero = make(num_workers=0)
    assert zero.config.features.num_workers == 0
    zero.prepare_data()
    assert not seen
    assert make(num_workers=2).config.features.num_workers == "auto"
    two = QuantizeConfig(features=FeatureConfig(num_workers=2))
    assert make(num_workers=0, config=two).config.features.num_workers == 2


def test_train_loaders_of_our_own_choice_are_safe(rows, several, caplog):
    automatic = LoaderSettings(num_workers="auto", collate_fn=list)
    assert make_loader(InOneFile(rows[0]), automatic, TrainerFacts()).num_workers == 0
    assert make_loader(Holding(), automatic, TrainerFacts()).num_workers == 2
    assert sum("one process" in record.message for record in caplog.records) == 1
    fresh = make_loader(Reopens(rows[0]), automatic, TrainerFacts())
    assert fresh.num_workers == 2
    images = [np.array(image) for batch in fresh for image, _ in batch]
    assert {image.tobytes() for image in images} == {image.tobytes() for image in rows[1]}


def test_a_number_that_the_user_named_is_kept_and_the_danger_told_once(rows, caplog):
    for _ in range(2):
        loader = make_loader(InOneFile(rows[0]), LoaderSettings(num_workers=3), TrainerFacts())
        assert loader.num_workers == 3
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "num_workers=3 was asked for" in caplog.text


def test_what_is_open_is_found_wherever_it_is_held(tmp_path, rows):
    file = rows[0].open("rb")

    def closure():
        return file

    class InClass(Holding):
        shared = file

    @lru_cache
    def remembered():
        return 0

    remembered.__wrapped__.owner = file
    left, right = socket.socketpair()
    pool = ThreadPoolExecutor(1)
    pool.submit(int).result()
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(rows[0])
    objects = np.empty(2, object)
    objects[1] = file
    held = [
        *(file, [file], {"a": (1, (file,))}, {file}, closure, partial(print, file), file.read, lambda x=file: x),
        *(Holding(Holding(file)), Subset(Holding(file), [0]), ConcatDataset([Holding(), Holding(file)]), objects),
        *(remembered, left, zipfile.ZipFile(make_zip(tmp_path)), tarfile.TarFile(tmp_path / "a.tar")),
        *(sqlite3.connect(tmp_path / "a.db", check_same_thread=False), pool, (x for x in file)),
    ]
    for one in held:
        assert find_open_handle(Holding(one)) is not None, one
    assert find_open_handle(InClass()) is not None
    pool.shutdown()
    left.close(), right.close()


def make_zip(folder):
    with zipfile.ZipFile(folder / "b.zip", "w") as archive:
        archive.writestr("a", b"a")
    return folder / "b.zip"


def test_what_the_code_of_a_dataset_names_is_looked_at(rows, monkeypatch):
    assert find_open_handle(UsesGlobal()) is None
    monkeypatch.setitem(globals(), "GLOBAL", rows[0].open("rb"))
    assert find_open_handle(UsesGlobal()) is not None
    assert find_open_handle(Holding()) is None


def test_objects_of_libraries_that_hide_their_files(monkeypatch):
    monkeypatch.setattr(Sensor, "__module__", "h5py._hl.files")
    assert "h5py._hl.files.Sensor" in find_open_handle(Holding(Sensor()))


def test_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.arange(8)
    file = h5py.File(tmp_path / "a.h5")
    assert find_open_handle(Holding(file)) is not None
    assert find_open_handle(Holding(file["x"])) is not None
    file.close()
    assert find_open_handle(Holding(file)) is None


def test_plain_datasets_are_read_in_several_processes(tmp_path, rows, monkeypatch, caplog):
    from torchvision.datasets import CIFAR10, ImageFolder
    from torchvision.transforms import v2

    closed = rows[0].open("rb")
    closed.close()
    log = logging.getLogger("of a dataset")
    log.addHandler(logging.FileHandler(tmp_path / "log.txt"))
    with rows[0].open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name / "0.png")
    circle = []
    circle.append(circle)
    folder = ImageFolder(tmp_path / "images", transform=v2.Compose([v2.ToImage(), v2.Lambda(lambda x: x)]))
    cifar = object.__new__(CIFAR10)
    cifar.data, cifar.targets, cifar.transform = np.zeros((4, 8, 8, 3), np.uint8), [0] * 4, None
    plain = [
        *(
            folder,
            Subset(folder, [0]),
            cifar,
            TensorDataset(torch.zeros(4, 3)),
            circle,
            [(f"{i}.png", i) for i in range(99)],
        ),
        *(
            closed,
            mapped,
            np.memmap(rows[0]),
            io.BytesIO(b"x"),
            zipfile.ZipFile(io.BytesIO(make_zip(tmp_path).read_bytes())),
        ),
        *(
            log,
            threading.Lock(),
            torch.nn.Linear(1, 1),
            np.random.default_rng(0),
            lambda x: x,
            (tmp_path / "log.txt").open("a"),
        ),
        *(Image.open(tmp_path / "images" / "a" / "0.png").convert("L"), print, os.sep, OpenedLate(rows[0])),
    ]
    for one in plain:
        assert find_open_handle(Holding(one)) is None, one
        assert loader_processes(Holding(one), 2, asked=False, context="fork")[1] == 2
    assert not caplog.records


def test_rows_of_hugging_face_are_plain(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"x": [1, 2]}).save_to_disk(tmp_path / "rows")
    assert find_open_handle(Holding(datasets.load_from_disk(tmp_path / "rows"))) is None


def test_packed_sets_are_read_in_several_processes(rows, tmp_path):
    config = QuantizeConfig(store="packed")
    module = QuantizedDataModule(
        InOneFile(rows[0]), encoder=(Flat(), encode), labels=False, cache_dir=tmp_path, num_workers=0, config=config
    )
    module.prepare_data()
    module.setup("fit")
    dataset = module.train_dataloader().dataset
    assert find_open_handle(dataset) is None


def test_where_processes_are_not_forked_what_cannot_be_pickled_is_read_in_one(rows, caplog):
    assert loader_processes(Holding(lambda: 0), 2, asked=False, context="spawn")[1] == 0
    assert loader_processes(Holding(lambda: 0), 2, asked=False, context="fork")[1] == 2
    assert loader_processes(Holding(lambda: 0), 2, asked=True, context="spawn")[1] == 2
    # each process opens the file that it is told of
    assert loader_processes(Reopens(rows[0]), 2, asked=False, context="spawn")[1] == 2
    assert "can't be sent to loader processes" in caplog.text
    assert pickle.dumps(Reopens(rows[0]))


def test_long_lists_of_files_are_looked_through_quickly():
    import time

    many = Holding([(f"{i}.png", i % 10) for i in range(500_000)])
    started = time.process_time()
    assert find_open_handle(many) is None
    assert time.process_time() - started < 10
