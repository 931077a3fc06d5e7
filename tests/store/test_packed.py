"""What goes into a packed store comes out again, for any sample and in any process."""

import collections
import io
import os
import pickle
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from dq_lightning.core.errors import StoreError
from dq_lightning.core.records import EncodedImage
from dq_lightning.packed import open_files
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.packed.writer import LOOK_AHEAD_SAMPLES, write_packed
from tests.full_count import examples
from tests.store.trees import equal, samples

relaxed = settings(deadline=None, max_examples=examples(120), suppress_health_check=list(HealthCheck))


def pack(folder: Path, items: list[Any], encoded: list[Any] | None = None, **attributes: Any) -> Path:
    pairs = zip(items, encoded or [None] * len(items), strict=True)
    index = torch.arange(len(items)) * 3
    bins = (torch.arange(len(items)) % 5).to(torch.int16)
    write_packed(
        folder, pairs, ids=[f"id {i}" for i in range(len(items))], index=index, bins=bins, attributes=attributes
    )
    return folder


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


@relaxed
@given(st.lists(samples, max_size=5))
def test_any_samples_come_back(tmp_path_factory: pytest.TempPathFactory, items: list[Any]) -> None:
    folder = pack(tmp_path_factory.mktemp("store"), items)
    for verify in ("size", "hash", "off"):
        read = PackedDataset(folder, verify=verify)
        assert len(read) == len(items)
        assert all(map(equal, items, read)), (items, list(read))


@relaxed
@given(samples, st.integers(1, 4))
def test_alike_samples_come_back(tmp_path_factory: pytest.TempPathFactory, item: Any, count: int) -> None:
    read = PackedDataset(pack(tmp_path_factory.mktemp("store"), [item] * count))
    assert all(equal(item, seen) for seen in read)


def test_a_sample_that_differs_after_the_look_ahead_comes_back(tmp_path: Path) -> None:
    items: list[Any] = [(np.full((2, 2), i, np.float32), i) for i in range(LOOK_AHEAD_SAMPLES + 5)]
    items[-4] = (None, 1 << 70)
    items[-3] = {"another": "tree"}
    items[-2] = (np.zeros((5, 1), np.float32), -1)
    read = PackedDataset(pack(tmp_path / "s", items))
    assert all(map(equal, items, read))
    assert equal(np.load(tmp_path / "s" / "column-1.npy")[:3], np.arange(3))


def test_namedtuples_are_refused(tmp_path: Path) -> None:
    pair = collections.namedtuple("pair", "x y")
    late: list[Any] = [(0, 1)] * (LOOK_AHEAD_SAMPLES + 1)
    for name, items in {
        "whole": [pair(0, 1)] * 2,
        "inside": [(pair(0, 1), 2)] * 2,
        "late": [*late, pair(0, 1)],
    }.items():
        with pytest.raises(StoreError, match=r'pair, which a packed store cannot hold unchanged.*store="indices"'):
            pack(tmp_path / name, items)


def test_results_are_independent(tmp_path: Path) -> None:
    read = PackedDataset(pack(tmp_path / "s", [(np.zeros(3), torch.ones(2)), (np.ones(3), torch.ones(2))]))
    read[0][0][:] = 7
    read[0][1][:] = 7
    assert equal(read[0], (np.zeros(3), torch.ones(2)))


def test_an_empty_store_and_positions(tmp_path: Path) -> None:
    assert len(PackedDataset(pack(tmp_path / "empty", []))) == 0
    read = PackedDataset(pack(tmp_path / "s", [10, 11, 12], answer=[1, "x"]), finisher=lambda i, item: (i, item))
    assert read[-1] == (2, 12)
    assert read.__getitems__([2, 0]) == [(2, 12), (0, 10)]
    assert read.index.tolist() == [0, 3, 6]
    assert read.bin.tolist() == [0, 1, 2]
    assert list(read.ids) == ["id 0", "id 1", "id 2"]
    assert read.attributes == {"answer": [1, "x"]}
    with pytest.raises(IndexError):
        read[3]


def test_original_bytes_are_kept_when_they_give_the_same_pixels(tmp_path: Path) -> None:
    original = photo(120, 80)
    data = jpeg(original, quality=80)
    delivered = Image.open(io.BytesIO(data)).convert("RGB")
    folder = pack(tmp_path / "s", [(delivered, 1)] * 3, [EncodedImage(data, "pil_rgb")] * 3)
    assert (folder / "values.bin").stat().st_size < 3 * (len(data) + 100)
    assert equal(PackedDataset(folder)[2], (delivered, 1))


def test_original_bytes_that_give_other_pixels_are_not_used(tmp_path: Path) -> None:
    data, other = jpeg(photo(120, 80)), photo(120, 80, seed=1)
    folder = pack(tmp_path / "s", [(other, 1)], [EncodedImage(data, "pil_rgb")])
    assert equal(PackedDataset(folder)[0], (other, 1))


def test_hub_decoding_turns_by_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = jpeg(photo(120, 80), exif=exif)
    turned = Image.frombytes(
        "RGB", (80, 120), Image.open(io.BytesIO(data)).transpose(Image.Transpose.ROTATE_270).tobytes()
    )
    grey = turned.convert("L")
    folder = pack(tmp_path / "s", [turned, grey], [EncodedImage(data, "hf"), EncodedImage(data, "hf:L")])
    assert (folder / "values.bin").stat().st_size < 2 * (len(data) + 100)
    assert equal(PackedDataset(folder)[0], turned)
    assert equal(PackedDataset(folder)[1], grey)


@pytest.mark.parametrize("mode", ["CMYK", "F", "I", "I;16", "P", "L", "RGBA", "1", "LA", "YCbCr"])
def test_large_images_of_every_mode(tmp_path: Path, mode: str) -> None:
    base = photo(200, 150)
    image = base.convert("L").convert("I").convert("I;16") if mode == "I;16" else base.convert(mode)
    assert equal(PackedDataset(pack(tmp_path / "s", [image, image]))[1], image)


@pytest.mark.parametrize("value", [object(), np.array([object()]), torch.ones(2).to_sparse(), {1, 2}, lambda: 0])
def test_what_cannot_be_stored_is_refused_with_its_place(tmp_path: Path, value: Any) -> None:
    with pytest.raises(StoreError, match=r"sample 1: .*indices"):
        pack(tmp_path / "s", [(0, 1), (0, {"here": value})])


def test_counts_that_differ_are_refused(tmp_path: Path) -> None:
    for count in (2, 4):
        with pytest.raises(StoreError, match="3 ids"):
            write_packed(
                tmp_path / str(count),
                [(0, None)] * count,
                ids=list("abc"),
                index=torch.arange(3),
                bins=torch.zeros(3, dtype=torch.int16),
                attributes={},
            )


def test_pickled_moved_and_forked(tmp_path: Path) -> None:
    items = [(photo(16, 16, seed=i), i) for i in range(40)]
    pack(tmp_path / "old", items)
    shutil.move(tmp_path / "old", tmp_path / "new")
    read = PackedDataset(tmp_path / "new")
    state = pickle.dumps(read)
    assert len(state) < 1000
    assert equal(pickle.loads(state)[7], items[7])
    loader = DataLoader(read, batch_size=8, num_workers=2, collate_fn=list, multiprocessing_context="fork")
    seen = [item for batch in loader for item in batch]
    assert len(seen) == len(items)
    assert all(map(equal, items, seen))
    # the parent's own descriptors still work after its workers closed theirs
    assert equal(read[3], items[3])


def test_writing_needs_bounded_memory(tmp_path: Path) -> None:
    count = 600
    items = (((np.full(1 << 14, i, np.int32), i), None) for i in range(count))
    tracemalloc.start()
    try:
        write_packed(
            tmp_path / "s",
            items,
            ids=[str(i) for i in range(count)],
            index=torch.arange(count),
            bins=torch.zeros(count, dtype=torch.int16),
            attributes={},
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # 600 samples of 64 KiB are 38 MiB; looking ahead holds 4 MiB of them
    assert peak < 24 << 20


def test_samples_that_changed_places_are_noticed(tmp_path: Path) -> None:
    pack(tmp_path / "store", [10, 11, 12, 13])
    for name in ("column-0.npy", "checksums.npy"):
        path = tmp_path / "store" / name
        rows = np.load(path)
        rows[[1, 2]] = rows[[2, 1]]
        header = path.stat().st_size - rows.nbytes
        path.write_bytes(path.read_bytes()[:header] + rows.tobytes())
    store = PackedDataset(tmp_path / "store", verify="off")
    assert [store[i] for i in range(4)] == [10, 12, 11, 13]
    with pytest.raises(StoreError, match=r"checksum|another content"):
        list(PackedDataset(tmp_path / "store"))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", ["column-0.npy", "values.bin"])
def test_a_file_that_is_cut_under_a_reader_is_an_error(
    tmp_path: Path, name: str, batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_files, "HELD_BYTES", 0)
    count = 3000
    pack(tmp_path / "store", [(i, "text" * (i % 5)) for i in range(count)])
    store = PackedDataset(tmp_path / "store")
    assert store[count - 1][0] == count - 1
    os.truncate(tmp_path / "store" / name, 100)
    with pytest.raises(StoreError, match=rf"{name} ends at 100 bytes, it was cut"):
        store.__getitems__([count - 1]) if batched else store[count - 1]
