"""Whole images stored as files, whose beginnings are shared."""

import contextlib
import io
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dq_lightning.core.errors import StoreError
from dq_lightning.core.records import EncodedImage, StoredImage
from dq_lightning.packed.columns import leaf_from_json
from dq_lightning.packed.file_stream import shared_starts, write_file
from dq_lightning.packed.lossy import encode_lossy
from dq_lightning.packed.reader import DECODING_ERRORS, PackedDataset
from dq_lightning.packed.whole_images import FileReader
from dq_lightning.packed.writer import write_packed
from tests.store.test_damage import reseal
from tests.store.test_packed import jpeg, pack, photo
from tests.store.trees import equal

CODECS = ("jpeg", "webp")


def stored(image: Image.Image, codec: str, layout: str = "pil") -> StoredImage:
    return StoredImage(encode_lossy(image, codec, 60), "pil", layout, b"")


def decoded(file: StoredImage) -> Any:
    with Image.open(io.BytesIO(file.data)) as image:
        return np.array(image)


@pytest.mark.parametrize("codec", CODECS)
def test_heads_are_stored_once(tmp_path: Path, codec: str) -> None:
    files = [stored(photo(32, 32, seed), codec) for seed in range(100)]
    store = PackedDataset(pack(tmp_path, [(file, 1) for file in files]))
    whole = sum(len(file.data) for file in files)
    shared = {"jpeg": 625, "webp": 27}[codec]
    assert (tmp_path / "values.bin").stat().st_size <= whole - 100 * (shared - 4)
    assert not store.has_patches
    for (image, label), file in zip(store, files, strict=True):
        assert (type(image), image.format, image.info, label) == (Image.Image, None, {}, 1)
        assert np.array_equal(np.asarray(image), decoded(file))


@pytest.mark.parametrize("layout", ["array", "tensor", "array_hw1", "tensor_1hw"])
def test_files_of_arrays_come_back_as_arrays(tmp_path: Path, layout: str) -> None:
    """Also where the first samples decide for another layout, and where a sample has another structure."""
    mode = "RGB" if layout in ("array", "tensor") else "L"
    files = [stored(photo(20, 9 + seed, seed).convert(mode), "jpeg", layout) for seed in range(3)]
    items = [(files[0], 0), (files[1], 0), (stored(photo(8, 8), "webp"), 0), {"other": files[2]}]
    store = PackedDataset(pack(tmp_path, [*items[:2]] * 33 + items[2:]))
    for at, file in ((0, files[0]), (65, files[1]), (67, files[2])):
        image = store[at]["other"] if at == 67 else store[at][0]
        pixels = decoded(file)
        wanted = {"array": pixels, "array_hw1": pixels[..., None], "tensor_1hw": pixels[None]}.get(layout)
        wanted = pixels.transpose(2, 0, 1) if wanted is None else wanted
        assert isinstance(image, torch.Tensor if layout.startswith("tensor") else np.ndarray)
        assert np.array_equal(np.asarray(image), wanted)
    assert np.array_equal(np.asarray(store[66][0]), decoded(items[2][0]))


def test_original_files_share_their_heads_and_keep_what_they_hold(tmp_path: Path) -> None:
    """The files of a folder as its loader gives them, and images that were opened from files."""
    files = [jpeg(photo(80, 60 + seed % 3, seed), quality=80, dpi=(72, 72)) for seed in range(70)]
    opened = [Image.open(io.BytesIO(data)) for data in files]
    loaded = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    originals = [EncodedImage(data, "pil_rgb") for data in files]
    for name, images, encoded in (("opened", opened, None), ("loaded", loaded, originals)):
        folder = pack(tmp_path / name, [(image, 0) for image in images], encoded)
        assert all(equal(image, read[0]) for image, read in zip(images, PackedDataset(folder), strict=True))
        assert (folder / "values.bin").stat().st_size < sum(map(len, files)) - 70 * 550


@pytest.mark.parametrize("codec", CODECS)
def test_damaged_and_hostile_files_are_refused(codec: str) -> None:
    """Any bytes give an image of the allowed size, or a known error."""
    files = [stored(photo(24, 24 + seed % 2, seed), codec) for seed in range(12)]
    starts = shared_starts(files)
    columns = [{"kind": "file", "dtype": "pil/pil/beside", "starts": [[p.hex(), b.hex()] for p, b in starts]}]
    read = FileReader(leaf_from_json(columns[0]))
    bare = FileReader(leaf_from_json(columns[0] | {"starts": []}))
    data = write_file(files[0], starts)
    assert read(data, 24 * 24)[1] == 24 * 24
    with pytest.raises(StoreError):
        read(data, 24 * 24 - 1)
    draw = random.Random(0)
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(min(len(data), 40))] = draw.randrange(256)
        for reader in (read, bare):
            with contextlib.suppress(*DECODING_ERRORS):
                assert reader(bytes(changed[: draw.randint(0, len(data))]), 1000)[1] <= 1000


IMPOSSIBLE = {
    "many beginnings": {"starts": [["", "ffd8"]] * 9},
    "long beginning": {"starts": [["", "ff" * 20_000]]},
    "no hexadecimal digits": {"starts": [["", "xy"]]},
    "no pair": {"starts": [["ff"]]},
    "no list": {"starts": "ffd8"},
    "unknown layout": {"dtype": "pil/other/beside"},
    "array with info of its own": {"dtype": "pil/array/own"},
    "no facts": {"dtype": "pil"},
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_columns_of_files_are_refused(tmp_path: Path, case: str) -> None:
    pack(tmp_path, [stored(photo(16, 16, seed), "jpeg") for seed in range(3)])
    reseal(tmp_path, lambda description: description["columns"][0].update(IMPOSSIBLE[case]))
    with pytest.raises(StoreError):
        PackedDataset(tmp_path)


def test_other_beginnings_than_those_written_are_found(tmp_path: Path) -> None:
    """They are sealed with the description; whoever seals them anew is told apart by the digest."""
    files = [stored(photo(16, 16, seed), "jpeg") for seed in range(3)]
    digest = PackedDataset(pack(tmp_path, files)).digest

    def swap(description: dict[str, Any]) -> None:
        start = description["columns"][0]["starts"][0]
        start[1] = start[1][:40] + "00" + start[1][42:]

    reseal(tmp_path, swap)
    with pytest.raises(StoreError, match="holds another store"):
        PackedDataset(tmp_path).require(digest)


def squeezed(folder: Path, items: list[Any], ids: list[str] | None = None) -> Path:
    index = torch.arange(len(items)) * 3 + 5
    bins = (torch.arange(len(items)) % 7).to(torch.int16) - 1
    names = ids or [str(position) for position in index.tolist()]
    write_packed(folder, items, ids=names, index=index, bins=bins, attributes={"a": 1}, squeeze=True)
    return folder


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_small_arrays_come_back_from_one_file(tmp_path: Path, count: int, named: bool) -> None:
    items = [((stored(photo(32, 32, i), "jpeg"), i % 10, 0.5 * i, i % 3 == 0), None) for i in range(min(count, 60))]
    items = (items * 5)[:count]
    ids = [f"folder é/{i}" for i in range(count)] if named else None
    plain = PackedDataset(pack(tmp_path / "plain", [item for item, _ in items]))
    store = PackedDataset(squeezed(tmp_path / "squeezed", items, ids), verify="hash")
    assert store.index.tolist() == [3 * i + 5 for i in range(count)]
    assert store.bin.tolist() == [i % 7 - 1 for i in range(count)]
    assert list(store.ids) == (ids or [str(3 * i + 5) for i in range(count)])
    assert list(store.ids[:2]) == [store.ids[i] for i in range(min(count, 2))]
    assert all(equal(store[i], plain[i]) for i in range(count))
    if count > 1:
        saved = sum(file.stat().st_size for file in (tmp_path / "plain").iterdir())
        saved -= sum(file.stat().st_size for file in (tmp_path / "squeezed").iterdir())
        assert saved > 40 * count


def resize(description: dict[str, Any], size: int) -> None:
    description["files"]["small.bin"]["size"] = size


def test_damaged_small_arrays_are_refused(tmp_path: Path) -> None:
    """Every byte of the file is held by its digest, and without the digest no bytes give other sizes."""
    items = [((stored(photo(16, 16, i), "jpeg"), i), None) for i in range(20)]
    path = squeezed(tmp_path, items) / "small.bin"
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(StoreError):
            PackedDataset(tmp_path)
        with contextlib.suppress(StoreError):
            list(PackedDataset(tmp_path, verify="off"))
    for changed in (data[:-1], data + b"x", data[:50], b""):
        path.write_bytes(changed)
        reseal(tmp_path, partial(resize, size=len(changed)))
        with pytest.raises(StoreError):
            PackedDataset(tmp_path, verify="off")


SQUEEZED = {
    "no facts": lambda d: d.pop("squeezed"),
    "other count": lambda d: d.update(num_samples=19),
    "huge count": lambda d: d.update(num_samples=1 << 26),
    "ids that are not there": lambda d: d["squeezed"].update(ids_bytes=10),
    "columns that are not there": lambda d: d["squeezed"].update(columns=[7]),
    "a column twice": lambda d: d["squeezed"].update(columns=[1, 1]),
    "a column of files": lambda d: d["squeezed"].update(columns=[0]),
    "no columns": lambda d: d["squeezed"].update(columns=[]),
    "a wider column": lambda d: d["columns"][1].update(kind="bool"),
}


@pytest.mark.parametrize("case", SQUEEZED)
def test_impossible_facts_about_small_arrays_are_refused(tmp_path: Path, case: str) -> None:
    squeezed(tmp_path, [((stored(photo(16, 16, i), "jpeg"), i), None) for i in range(20)])
    reseal(tmp_path, SQUEEZED[case])
    for verify in ("size", "off"):
        with pytest.raises(StoreError):
            PackedDataset(tmp_path, verify=verify)
