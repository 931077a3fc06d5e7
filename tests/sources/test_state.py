"""No dataset is taken for the one that it was before: what changes any item changes the identity, wherever it is kept."""

import functools
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from dq_lightning import as_source
from dq_lightning.sources.items import evenly_spaced
from dq_lightning.sources.reading import SPOT_CHECKS

COUNT = 60
# an item that is not among those that are looked at
HIDDEN = next(i for i in range(COUNT) if i not in evenly_spaced(COUNT, SPOT_CHECKS))
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
