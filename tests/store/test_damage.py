"""Every changed byte of an entry is noticed before its data trains a model; hostile stores give an error."""

import contextlib
import json
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dq_lightning.cache import files, tensors
from dq_lightning.cache.entries import Cache
from dq_lightning.core.errors import DQError, StoreError
from dq_lightning.core.records import Bins, Features, Selection
from dq_lightning.packed import values
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.packed.writer import write_packed
from tests.full_count import FULL, examples
from tests.store.trees import write_samples

PARTS = {"data": "abc"}


def write(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 3), dtype=np.uint8)
    items = [((Image.fromarray(pixels[i]), i, f"caption {i}"), None) for i in range(6)]
    ids = [f"photo/{i}.png" for i in range(6)]
    write_packed(
        folder, items, ids=ids, index=torch.arange(6), bins=torch.zeros(6, dtype=torch.int16), attributes={"a": 1}
    )


def everything(entry: Path) -> Any:
    """All that a reader can learn from a store, in comparable form."""
    read = PackedDataset(entry)
    items = [(image.mode, image.size, image.tobytes(), label, text) for image, label, text in read]
    return items, read.index.tolist(), read.bin.tolist(), list(read.ids), read.attributes


def flip(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def zero(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    end = min(len(data), start + draw.randrange(1, 200))
    data[start:end] = bytes(end - start)


@pytest.mark.parametrize("damage", [flip, cut, zero])
@pytest.mark.parametrize("in_cache", [True, False])
def test_no_damage_goes_unnoticed(
    tmp_path: Path, damage: Callable[[bytearray, random.Random], None], in_cache: bool
) -> None:
    cache = Cache(tmp_path / "cache")
    entry = cache.build("5-store", PARTS, write)
    assert len(everything(entry)[0]) == 6
    shutil.copytree(entry, tmp_path / "pristine")
    place = entry if in_cache else tmp_path / "copy"
    draw, times = random.Random(0), 25 if FULL else 10
    noticed = 0
    for name in sorted(path.name for path in entry.iterdir()):
        original = (tmp_path / "pristine" / name).read_bytes()
        if not original or (name == "manifest.json" and not in_cache):
            continue
        for _ in range(times):
            data = bytearray(original)
            damage(data, draw)
            if data == original:
                continue
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(tmp_path / "pristine", place)
            (place / name).write_bytes(data)
            if in_cache and not cache.find("5-store", PARTS):
                noticed += 1
                continue
            with pytest.raises(StoreError):
                everything(place)
            noticed += 1
    assert noticed > 6 * times


def test_the_report_names_sample_file_and_remedy(tmp_path: Path) -> None:
    write(tmp_path / "s")
    path = tmp_path / "s" / "column-0.npy"
    data = bytearray(path.read_bytes())
    data[-10] ^= 4
    path.write_bytes(data)
    read = PackedDataset(tmp_path / "s")
    assert read[0][1] == 0
    with pytest.raises(StoreError, match=r"sample 5 \(photo/5.png\).*column-0.npy.*made again"):
        read[5]
    with pytest.raises(StoreError, match="another content"):
        PackedDataset(tmp_path / "s", verify="hash")
    assert PackedDataset(tmp_path / "s", verify="off")[5][1] == 5


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """What an attacker would do: change the description and make it match itself again."""
    path = folder / "store.json"
    description = json.loads(path.read_text())
    del description["digest"]
    change(description)
    path.write_bytes(files.seal(description))


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "huge count": lambda d: d.update(num_samples=1 << 31),
    "negative count": lambda d: d.update(num_samples=-1),
    "text count": lambda d: d.update(num_samples="6"),
    "huge column": lambda d: d["columns"][1].update(kind="array", dtype="<f8", shape=[1 << 40, 1 << 40]),
    "other dtype": lambda d: d["columns"][1].update(kind="array", dtype="<f8", shape=[2]),
    "huge empty column": lambda d: d["columns"][1].update(kind="tensor", dtype="float32", shape=[0, 1 << 47, 1 << 47]),
    "text as a size": lambda d: d["columns"][1].update(kind="tensor", dtype="float32", shape=["2"]),
    "size of a file as text": lambda d: d["files"]["values.bin"].update(size="9"),
    "too many samples": lambda d: d.update(num_samples=(1 << 27) + 1),
    "object dtype": lambda d: d["columns"][1].update(kind="array", dtype="|O", shape=[1]),
    "structured dtype": lambda d: d["columns"][1].update(kind="array", dtype="i4,i4", shape=[1]),
    "negative shape": lambda d: d["columns"][1].update(kind="array", dtype="<i8", shape=[-1]),
    "unknown mode": lambda d: d["columns"][0].update(dtype="EPS"),
    "leaf out of range": lambda d: d.update(tree=7),
    "deep tree": lambda d: d.update(tree=_nested(200)),
    "path": lambda d: d["files"].update({"../../etc/passwd": {"size": 1, "sha256": ""}}),
    "absolute path": lambda d: d["files"].update({"/etc/passwd": {"size": 1, "sha256": ""}}),
    "missing file": lambda d: d["files"].pop("values.bin"),
    "other version": lambda d: d.update(version=99),
    "no tree": lambda d: d.pop("tree"),
    "columns of text": lambda d: d.update(columns=["int"]),
}


def _nested(levels: int) -> Any:
    tree: Any = 0
    for _ in range(levels):
        tree = {"kind": "list", "keys": [], "children": [tree]}
    return tree


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_descriptions_are_errors(tmp_path: Path, name: str) -> None:
    write(tmp_path / "s")
    reseal(tmp_path / "s", HOSTILE[name])
    for verify in ("size", "hash", "off"):
        with pytest.raises(StoreError):
            PackedDataset(tmp_path / "s", verify=verify)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "s")
    (tmp_path / "s" / "values.bin").rename(tmp_path / "elsewhere")
    (tmp_path / "s" / "values.bin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="not a plain file"):
        PackedDataset(tmp_path / "s")


def test_offsets_that_lie_are_errors(tmp_path: Path) -> None:
    write(tmp_path / "s")
    path = tmp_path / "s" / "value_offsets.npy"
    path.write_bytes(path.read_bytes()[:-56] + struct.pack("<7q", 0, -5, 1 << 60, 3, 2, 1, 10**6))
    read = PackedDataset(tmp_path / "s", verify="off")
    for i in range(6):
        with pytest.raises(StoreError):
            read[i]


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (tmp_path / "exploded").touch, ()

    write(tmp_path / "s")
    for path in list((tmp_path / "s").iterdir()):
        kept = path.read_bytes()
        path.write_bytes(pickle.dumps(Bomb(), protocol=2).ljust(len(kept), b"\0"))
        with pytest.raises(StoreError):
            list(PackedDataset(tmp_path / "s"))
        path.write_bytes(kept)
    assert not (tmp_path / "exploded").exists()


def text_of(node: Any, buffers: bytes = b"") -> bytes:
    text = json.dumps(node).encode()
    return struct.pack("<I", len(text)) + text + buffers


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xff\xff\xff",
        struct.pack("<I", 100000) + b"[" * 100000,
        text_of(["y", 1 << 50]),
        text_of(["y", -1], b"xx"),
        text_of(["a", "<f8", [1 << 47, 1 << 47], 8], b"12345678"),
        text_of(["a", "<f8", [0, 1 << 47, 1 << 47], 0]),
        text_of(["T", "float32", [0, 1 << 47, 1 << 47], 0]),
        text_of(["T", "float32", ["5"], 8], b"12345678"),
        text_of(["a", "|O", [1], 8], b"12345678"),
        text_of(["T", "float32", [5], 8], b"12345678"),
        text_of(["T", "quint8", [8], 8], b"12345678"),
        text_of(["p", ["r", "RGB", 1 << 20, 1 << 20, None, None], 3], b"rgb"),
        text_of(["p", ["r", "RGB", 0, 1 << 60, None, None], 0]),
        text_of(["p", ["e", "hf"], 25], b"%!PS-Adobe-3.0 EPSF-3.0\n\n"),
        text_of(["i", "0x" + "z"]),
        text_of(["unknown"]),
        text_of(["d", ["l"], 1]),
        text_of(True, b"left over"),
    ],
)
def test_hostile_values_are_errors(data: bytes) -> None:
    with pytest.raises(StoreError):
        values.decode_value(data)


@settings(deadline=None, max_examples=examples(300), suppress_health_check=list(HealthCheck))
@given(
    st.recursive(
        st.one_of(st.none(), st.integers(), st.sampled_from("icfytldgaTp"), st.text(max_size=3)), st.lists, max_leaves=8
    )
)
def test_any_value_bytes_give_a_value_or_an_error(node: Any) -> None:
    with contextlib.suppress(DQError):
        values.decode_value(text_of(node, b"0123456789abcdef"))


def test_a_decompression_bomb_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("L", (3000, 3000))
    data = values.encode_value(image)
    assert len(data) < 50_000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(StoreError, match="DecompressionBomb"):
        values.decode_value(data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensor_folders(tmp_path: Path, dtype: torch.dtype) -> None:
    features = Features(torch.randn(50, 7).to(dtype), torch.randn(50, 3))
    tensors.write_features(tmp_path / "f", features)
    read = tensors.read_features(tmp_path / "f")
    assert torch.equal(read.embedding, features.embedding)
    assert torch.equal(read.head_gradient, features.head_gradient)
    read.embedding.zero_()
    assert torch.equal(tensors.read_features(tmp_path / "f").embedding, features.embedding)

    index = torch.arange(5)
    bins = Bins(index.to(torch.int16), index.to(torch.int32), index.float(), index.to(torch.int32), num_bins=9)
    tensors.write_bins(tmp_path / "b", bins)
    assert tensors.read_bins(tmp_path / "b").num_bins == 9
    assert torch.equal(tensors.read_bins(tmp_path / "b").gain, bins.gain)
    selection = Selection(index, index.to(torch.int16))
    tensors.write_selection(tmp_path / "s", selection)
    assert tensors.read_selection(tmp_path / "s").content_hash() == selection.content_hash()
    with pytest.raises(StoreError, match="no embedding"):
        tensors.read_features(tmp_path / "s")


def test_damaged_tensors_are_noticed(tmp_path: Path) -> None:
    tensors.write_tensor_folder(tmp_path / "t", {"x": torch.arange(100), "empty": torch.empty(0, 3)}, {})
    assert tensors.read_tensor_folder(tmp_path / "t")[0]["empty"].shape == (0, 3)
    path, draw = tmp_path / "t" / tensors.TENSORS_FILE, random.Random(0)
    original = path.read_bytes()
    for _ in range(100):
        data = bytearray(original)
        flip(data, draw)
        path.write_bytes(data)
        with pytest.raises(StoreError):
            tensors.read_tensor_folder(tmp_path / "t")


def test_many_images_in_one_sample_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of a screen: almost blank, each hundreds of times larger than its file."""
    # as large beside the bound as twenty frames of 2000 x 2000 are beside the real one
    monkeypatch.setattr(values, "ALWAYS_DECODED_BYTES", 1 << 26)
    frames = [Image.new("RGB", (500, 500), (i, 0, 0)) for i in range(20)]
    write_samples(tmp_path / "s", [(frames, i) for i in range(2)])
    found = PackedDataset(tmp_path / "s")[1][0]
    assert [frame.getpixel((5, 5)) for frame in found] == [(i, 0, 0) for i in range(20)]


def test_what_could_not_be_read_back_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "ALWAYS_DECODED_BYTES", 1 << 20)
    with pytest.raises(StoreError, match=r"images of one sample take .*divide it into several samples"):
        values.encode_value([Image.new("RGB", (600, 600))] * 20)
    monkeypatch.setattr(values, "MAX_STRUCTURE_BYTES", 1000)
    with pytest.raises(StoreError, match="deliver numbers as arrays"):
        values.encode_value([0.5] * 1000)


def test_a_long_list_of_numbers_is_no_thousand_files(tmp_path: Path) -> None:
    samples = [[i + n for n in range(2000)] for i in range(3)]
    write_samples(tmp_path / "s", samples)
    assert len(list((tmp_path / "s").iterdir())) < 20
    assert PackedDataset(tmp_path / "s")[2] == samples[2]


def test_bins_and_selections_of_other_shapes_are_errors(tmp_path: Path) -> None:
    index = torch.arange(4)
    wrong: list[dict[str, torch.Tensor]] = [
        {"index": index.float(), "bin": index.short()},
        {"index": index[None], "bin": index.short()},
        {"index": index, "bin": index[:2].short()},
    ]
    for count, case in enumerate(wrong):
        tensors.write_tensor_folder(tmp_path / str(count), case, {})
        with pytest.raises(StoreError, match="cannot be used"):
            tensors.read_selection(tmp_path / str(count))
    tensors.write_tensor_folder(tmp_path / "text", {"index": index, "bin": index.short()}, {"num_unreadable": "many"})
    with pytest.raises(StoreError, match="num_unreadable of 'many'"):
        tensors.read_selection(tmp_path / "text")
