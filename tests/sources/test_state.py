"""No dataset is taken for the one that it was before: what changes any item changes the identity, wherever it is kept."""

import collections
import datetime
import decimal
import functools
import logging
import os
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from dq_lightning import as_source
from dq_lightning.sources.items import evenly_spaced
from dq_lightning.sources.reading import SAMPLED_ITEMS

COUNT = 60
# an item that is not among those that are looked at
HIDDEN = next(i for i in range(COUNT) if i not in evenly_spaced(COUNT, SAMPLED_ITEMS))
PIXELS = np.random.default_rng(0).integers(0, 255, (COUNT, 6, 5, 3), dtype=np.uint8)
CLASSES = [i % 2 for i in range(COUNT)]
ROWS = [[1, 0], [0, 1]]


def identity(dataset, memory):
    """As a run finds it."""
    source = as_source(dataset)
    return (source.quick_digest(memory) if source.identity_is_certain else None) or source.digest(memory)


class Sized(Dataset):
    def __len__(self):
        return COUNT


class OfTheModule(Sized):
    """The usual class of a notebook."""

    def __getitem__(self, index):
        return Image.fromarray(PIXELS[index]), CLASSES[index]


def lookup(index):
    return CLASSES[index]


class ByAFunction(Sized):
    def __getitem__(self, index):
        return Image.fromarray(PIXELS[index]), lookup(index)


class OfTheClass(Sized):
    table = CLASSES

    def __getitem__(self, index):
        return Image.fromarray(PIXELS[index]), self.table[index]


class NamedList(list):
    pass


class Aliased(Sized):
    """Many names for two objects."""

    def __init__(self):
        self.rows = [ROWS[target] for target in CLASSES]

    def __getitem__(self, index):
        return Image.fromarray(PIXELS[index]), self.rows[index].index(1)


class Reader:
    shift = 0

    def read(self, index):
        return CLASSES[index] + self.shift


class Delegated(Sized):
    def __init__(self):
        self.reader = Reader()

    def __getitem__(self, index):
        return Image.fromarray(PIXELS[index]), self.reader.read(index)


def closed_over():
    targets = CLASSES

    class Local(Sized):
        def __getitem__(self, index):
            return Image.fromarray(PIXELS[index]), targets[index]

    return Local()


MADE = {
    "module": OfTheModule,
    "function": ByAFunction,
    "class": OfTheClass,
    "list": lambda: NamedList(
        (Image.fromarray(pixels), target) for pixels, target in zip(PIXELS, CLASSES, strict=True)
    ),
    "aliases": Aliased,
    "object": Delegated,
    "closure": closed_over,
}


@pytest.mark.parametrize("kind", MADE)
def test_a_changed_label_that_is_not_looked_at(kind, memory):
    before = identity(MADE[kind](), memory)
    assert identity(MADE[kind](), memory) == before
    CLASSES[HIDDEN] = 1 - CLASSES[HIDDEN]
    try:
        assert identity(MADE[kind](), memory) != before
    finally:
        CLASSES[HIDDEN] = 1 - CLASSES[HIDDEN]
    assert identity(MADE[kind](), memory) == before


class Template(Sized):
    def __init__(self, folder):
        self.pattern = f"{folder}/{{:04d}}.npy"

    def __getitem__(self, index):
        return Image.fromarray(np.load(self.pattern.format(index))), CLASSES[index]


class Prefix(Template):
    def __init__(self, folder):
        self.start = f"{folder}/0"

    def __getitem__(self, index):
        return Image.fromarray(np.load(f"{self.start}{index:03d}.npy")), CLASSES[index]


class Listed(Template):
    def __init__(self, folder):
        self.paths = [f"{folder}/{index:04d}.npy" for index in range(COUNT)]

    def __getitem__(self, index):
        return Image.fromarray(np.load(self.paths[index])), CLASSES[index]


def written_in_the_code(folder):
    names = {}
    exec(  # the path stands in the code alone
        f"def read(self, index):\n return Image.fromarray(np.load(f'{folder}/{{index:04d}}.npy')), CLASSES[index]",
        {"np": np, "Image": Image, "CLASSES": CLASSES, "__name__": "__main__"},
        names,
    )
    return type("InTheCode", (Sized,), {"__getitem__": names["read"]})()


def around_hugging_face(folder):
    datasets = pytest.importorskip("datasets")
    for index in range(COUNT):
        Image.fromarray(np.load(f"{folder}/{index:04d}.npy")).save(f"{folder}/{index:04d}.png")
    table = datasets.Dataset.from_dict({"image": [f"{folder}/{index:04d}.png" for index in range(COUNT)]})
    table = table.cast_column("image", datasets.Image())

    class Wrapped(Sized):
        def __init__(self):
            self.table = table

        def __getitem__(self, index):
            return self.table[index]["image"], CLASSES[index]

    return Wrapped()


@pytest.mark.parametrize("make", [Template, Prefix, Listed, written_in_the_code, around_hugging_face])
def test_a_rewritten_file_of_the_same_size_and_date(make, memory, tmp_path):
    for index, pixels in enumerate(PIXELS):
        np.save(tmp_path / f"{index:04d}.npy", pixels)
    before = identity(make(tmp_path), memory)
    path = tmp_path / f"{HIDDEN:04d}.npy"
    seen = path.stat()
    np.save(path, 255 - PIXELS[HIDDEN])
    # as tar, rsync and cp -p do
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert identity(make(tmp_path), memory) != before


def test_usual_code_leaves_nothing_unseen():
    """Its key is certain: the items are not read again at every start."""

    class Usual(Sized):
        scale = torch.float32

        def __getitem__(self, index):
            part = functools.partial(torch.as_tensor, dtype=self.scale)
            return part(PIXELS[index, ..., :]).permute(2, 0, 1) / 255, lookup(index)

    assert as_source(Usual()).identity_is_certain


def test_a_hugging_face_dataset_that_is_closed_over_is_known_by_its_history(memory):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"value": list(range(COUNT))})

    class Around(Sized):
        def __getitem__(self, index):
            return Image.fromarray(PIXELS[index]), table[index]["value"]

    before = identity(Around(), memory)
    assert as_source(Around()).identity_is_certain
    table = datasets.Dataset.from_dict({"value": [*range(1, COUNT), 0]})
    assert identity(Around(), memory) != before


def image_folder(tmp_path):
    place = tmp_path / "images" / "a"
    place.mkdir(parents=True)
    for index, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(place / f"{index:02}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("value", [float, lambda age: (age, age), lambda age: torch.tensor([1.0 * age]), str])
def test_targets_of_a_list_of_files_that_are_no_classes(value, memory, tmp_path):
    data = ImageFolder(str(image_folder(tmp_path)))
    data.samples = [(path, value(20 + index)) for index, (path, _) in enumerate(data.samples)]
    before = identity(data, memory)
    assert identity(data, memory) == before
    data.samples[HIDDEN] = (data.samples[HIDDEN][0], value(90))
    assert identity(data, memory) != before


class Ages(ImageFolder):
    """Targets beside the list of files; it counts what is read."""

    def __init__(self, root, ages):
        super().__init__(root)
        self.ages, self.reads = ages, 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)[0], self.ages[index]


def test_targets_that_a_folder_class_keeps_beside(memory, tmp_path):
    root, ages = image_folder(tmp_path), list(range(COUNT))
    before = identity(Ages(root, ages), memory)
    again = Ages(root, ages)
    again[3]
    assert identity(again, memory) == before
    root.rename(tmp_path / "moved")
    assert identity(Ages(tmp_path / "moved", ages), memory) == before
    ages[HIDDEN] = 99
    assert identity(Ages(tmp_path / "moved", ages), memory) != before


class Remembering(ImageFolder):
    """Keeps what it has read."""

    def __init__(self, root):
        super().__init__(root)
        self.kept = {}

    def __getitem__(self, index):
        if index not in self.kept:
            self.kept[index] = super().__getitem__(index)
        return self.kept[index]


OPENED = {}


def remembering_loader(path):
    if path not in OPENED:
        OPENED[path] = Image.open(path).convert("RGB")
    return OPENED[path]


@pytest.mark.parametrize("make", [Remembering, lambda root: ImageFolder(root, loader=remembering_loader)])
def test_what_a_folder_remembers_of_its_images_is_not_its_identity(make, memory, tmp_path):
    root = str(image_folder(tmp_path))
    OPENED.clear()
    data = make(root)
    before = identity(data, memory)
    for index in range(COUNT):
        data[index]
    assert identity(data, memory) == before
    OPENED.clear()
    assert identity(make(root), memory) == before


class MapRemembering(Sized):
    def __init__(self):
        self.kept = {}

    def __getitem__(self, index):
        if index not in self.kept:
            self.kept[index] = Image.fromarray(PIXELS[index])
        return self.kept[index], CLASSES[index]


def test_a_growing_memory_is_left_out_of_the_key(memory):
    """Another process, which has read other items, finds what was remembered."""
    one, other = MapRemembering(), MapRemembering()
    for index in range(1, COUNT, 7):
        other[index]
    assert as_source(one).digest(memory) == as_source(other).quick_digest(memory)


class Plain(Sized):
    """All that is looked at lies in attributes."""

    def __init__(self, value):
        self.value, self.images = value, PIXELS

    def __getitem__(self, index):
        return Image.fromarray(self.images[index]), CLASSES[index]


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class SlottedBelow(Slotted):
    pass


CERTAIN = {
    "range": range(3),
    "dtype": torch.float32,
    "numpy dtype": np.dtype("int16"),
    "device": torch.device("cpu"),
    "pattern": re.compile("a+"),
    "partial": functools.partial(int, base=2),
    "date": datetime.date(2026, 1, 2),
    "decimal": decimal.Decimal("1.5"),
    "deque": collections.deque([1, 2]),
    "bytearray": bytearray(b"x"),
    "slots": Slotted(3),
    "logger": logging.getLogger("some.where"),
}


@pytest.mark.parametrize("name", CERTAIN)
def test_plain_attributes_leave_nothing_unseen(name):
    assert as_source(Plain(CERTAIN[name])).identity_is_certain


ODD = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed": lambda: torch.eye(3).to_sparse_csr(),
    "conjugate": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "meta": lambda: torch.empty(3, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "arrow": lambda: pytest.importorskip("pyarrow").array(["a", None]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD)
def test_odd_attributes_stop_nothing(name, memory):
    before = identity(Plain(ODD[name]()), memory)
    assert identity(Plain(ODD[name]()), memory) == before


def table(order):
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame({"a": [1, 2, 3], "b": [0.5, 1.5, 2.5]}, index=order)


PAIRS = {
    "index of a table": (lambda: table([0, 1, 2]), lambda: table([0, 2, 1])),
    "large numbers of a table": (
        lambda: table([0, 1, 2]).assign(a=[2**60, 1, 2]),
        lambda: table([0, 1, 2]).assign(a=[2**60 + 1, 1, 2]),
    ),
    "mask": (lambda: np.ma.array([1, 2], mask=[0, 1]), lambda: np.ma.array([1, 2], mask=[1, 0])),
    "order": (lambda: {"a": 1, "b": 2}, lambda: {"b": 2, "a": 1}),
    "slots of a base": (lambda: SlottedBelow(1), lambda: SlottedBelow(2)),
    "sparse": (lambda: torch.eye(3).to_sparse(), lambda: (2 * torch.eye(3)).to_sparse()),
    "slice": (lambda: slice(1, 2), lambda: slice(1, 3)),
    "day": (lambda: datetime.date(2026, 1, 2), lambda: datetime.date(2026, 1, 3)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_attributes_that_differ_have_different_keys(name):
    one, other = PAIRS[name]
    assert as_source(Plain(one())).state_key() == as_source(Plain(one())).state_key()
    assert as_source(Plain(one())).state_key() != as_source(Plain(other())).state_key()


class ByName(Sized):
    """The names of the files stand in the code alone."""

    def __getitem__(self, index):
        return Image.fromarray(np.load(f"some_{index}.npy")), CLASSES[index]


class ByEnvironment(Sized):
    def __getitem__(self, index):
        return Image.fromarray(np.load(os.environ["FOLDER_OF_THE_TEST"] + f"/{index}.npy")), CLASSES[index]


class BySplit(Sized):
    def __init__(self, root):
        self.pattern = f"{root}/{{split}}/{{index}}.npy"

    def __getitem__(self, index):
        return Image.fromarray(np.load(self.pattern.format(split="train", index=index))), CLASSES[index]


@pytest.mark.parametrize("way", ["name", "environment", "split"])
def test_files_that_are_named_at_the_last_moment(way, memory, tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    folder, start = {"name": (tmp_path, "some_"), "environment": (tmp_path, ""), "split": (tmp_path / "train", "")}[way]
    for index, pixels in enumerate(PIXELS):
        np.save(folder / f"{start}{index}.npy", pixels)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOLDER_OF_THE_TEST", str(tmp_path))
    make = {"name": ByName, "environment": ByEnvironment, "split": lambda: BySplit(tmp_path)}[way]
    before = identity(make(), memory)
    np.save(folder / f"{start}{HIDDEN}.npy", 255 - PIXELS[HIDDEN])
    assert identity(make(), memory) != before


@pytest.mark.parametrize("value", [random.Random(0), np.random.default_rng(0), "images.sqlite"])
def test_streams_and_databases_are_read_at_every_start(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images.sqlite").write_bytes(b"SQLite format 3")
    os.utime(tmp_path / "images.sqlite", (1, 1))
    assert not as_source(Plain(value)).identity_is_certain
