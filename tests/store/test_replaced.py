"""A reader belongs to one store: what is put in place of its files is an error or changes nothing, and kills nobody."""

import os
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dq_lightning.core.errors import StoreError
from dq_lightning.packed import open_files
from dq_lightning.packed.patches import pack_image
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.packed.writer import write_packed
from tests.robustness.worlds import ended, forked
from tests.store.trees import write_samples

COUNT = 60


def write(folder: Path, seed: int, patched: bool = False) -> Path:
    """Stores of the same sizes, whatever the seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (COUNT, 8, 8, 3), dtype=np.uint8)
    mask = torch.tensor([True, True, True, False])
    images: Any = [pack_image(image, mask, 4, "raw") for image in pixels] if patched else pixels
    items = [((image, seed * 1000 + i, f"caption {seed} {i:03}"), None) for i, image in enumerate(images)]
    write_packed(
        folder,
        items,
        ids=[f"{seed}-{i:03}" for i in range(COUNT)],
        index=torch.arange(COUNT) + seed,
        bins=torch.zeros(COUNT, dtype=torch.int16),
        attributes={},
    )
    return folder


def copy_over(source: Path, target: Path) -> None:
    """As `cp` does: the same files, with other bytes."""
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)


@pytest.fixture(params=["held", "read"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns in memory, and columns that are read row by row."""
    if request.param == "read":
        monkeypatch.setattr(open_files, "HELD_BYTES", 0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_another_store_copied_over_an_open_one(tmp_path: Path, patched: bool, batched: bool) -> None:
    mine, other = write(tmp_path / "mine", 1, patched), write(tmp_path / "other", 2, patched)
    whole = list(PackedDataset(mine))
    store = PackedDataset(mine)
    copy_over(other, mine)
    wrong = 0
    for i in range(COUNT):
        try:
            (image, label, text) = store.__getitems__([i])[0] if batched else store[i]
        except StoreError:
            continue
        wrong += not (np.array_equal(image, whole[i][0]) and (label, text) == whole[i][1:])
    assert wrong == 0
    assert store.index.tolist() == list(range(1, COUNT + 1))
    assert list(store.ids) == [f"1-{i:03}" for i in range(COUNT)]


@pytest.mark.usefixtures("way")
def test_a_pickle_is_of_a_store_and_not_of_a_path(tmp_path: Path) -> None:
    mine, other = write(tmp_path / "mine", 1), write(tmp_path / "other", 2)
    pickled = pickle.dumps(PackedDataset(mine))
    assert pickle.loads(pickled)[3][1] == 1003
    assert PackedDataset(shutil.copytree(mine, tmp_path / "copy")).digest == PackedDataset(mine).digest
    copy_over(other, mine)
    with pytest.raises(StoreError, match=r"holds another store than when it was opened first.*Start again"):
        pickle.loads(pickled)


def test_nobody_is_killed_by_files_that_are_cut_and_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "HELD_BYTES", 0)
    mine = write(tmp_path / "mine", 1)
    contents = {path: path.read_bytes() for path in mine.iterdir() if path.suffix in (".npy", ".bin")}

    def read() -> None:
        store = PackedDataset(mine)
        stop = threading.Event()

        def disturb() -> None:
            while not stop.is_set():
                for path, content in contents.items():
                    os.truncate(path, 0)
                    path.write_bytes(content)

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            for i in range(3000):
                try:
                    assert store[i % COUNT][1] == 1000 + i % COUNT
                except StoreError:
                    continue
        finally:
            stop.set()
            thread.join()

    assert ended(forked(read), 60) == 0


def test_rows_are_the_caller_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.full((2048,), float(i)) for i in range(5)]
    write_samples(tmp_path / "s", [(tensor, torch.tensor([i])) for i, tensor in enumerate(tensors)])
    for held in (0, 1 << 20):
        monkeypatch.setattr(open_files, "HELD_BYTES", held)
        store = PackedDataset(tmp_path / "s")
        for value in store[2]:
            value.zero_()
        assert torch.equal(store[2][0], tensors[2])
        assert store[2][1].tolist() == [2]
        assert PackedDataset(tmp_path / "s")[3][1].tolist() == [3]


def test_open_files_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "HELD_BYTES", 0)
    write(tmp_path / "s", 1)
    open_now = Path("/proc/self/fd")
    if not open_now.exists():
        pytest.skip("open files are counted in /proc")
    before = len(list(open_now.iterdir()))
    for _ in range(20):
        PackedDataset(tmp_path / "s")[0]
    for _ in range(20):
        with pytest.raises(StoreError):
            PackedDataset(tmp_path)
    assert len(list(open_now.iterdir())) <= before
