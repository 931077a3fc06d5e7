"""Samples that are packed in loader processes: the same bytes as from one process, and the same errors."""

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from dq_lightning import (
    EncodingConfig,
    FeatureConfig,
    PackedDataset,
    QuantizeConfig,
    SelectionConfig,
    load_selection,
    quantize,
)
from dq_lightning.core.errors import FeatureError, SourceError
from dq_lightning.core.handles import FORK
from dq_lightning.packed import packing_shards, writer
from dq_lightning.pipeline import packing

pytestmark = [
    pytest.mark.usefixtures("quick_collections"),
    pytest.mark.skipif(FORK is None, reason="processes are forked on Linux alone"),
]
COUNT = 90


class Images(Dataset):
    """Images of several sizes and modes; every reading of one writes the number of its process into a file."""

    def __init__(self, folder, act=None):
        self.folder, self.act, self.own = folder, act or (lambda i, is_own: None), os.getpid()

    def __len__(self):
        return COUNT

    def __getitem__(self, i):
        with (self.folder / "readers").open("a") as file:
            file.write(f"{os.getpid()}\n")
        self.act(i, os.getpid() == self.own)
        side = 70 if i % 30 == 7 else 20 + i % 3
        pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
        return Image.fromarray(pixels).convert("L" if i % 11 == 3 else "RGB"), {"class": i % 4, "name": "x" * (i % 5)}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(writer, "LOOK_AHEAD_SAMPLES", 5)
    monkeypatch.setattr(writer, "PIECE_SAMPLES", 7)


@pytest.fixture
def packed(tmp_path):
    """Pack the images with so many loader processes into a cache of its own: the info, and the processes that read."""

    def make(workers, act=None, data=None, **encoding):
        np.save(tmp_path / "features.npy", np.random.default_rng(0).normal(size=(COUNT, 8)).astype(np.float32))
        config = QuantizeConfig(
            FeatureConfig(encoder=str(tmp_path / "features.npy"), num_workers=workers),
            selection=SelectionConfig(keep_ratio=0.9),
            store="packed",
            encoding=EncodingConfig(**encoding),
        )
        (tmp_path / "readers").write_text("")
        cache = tmp_path / f"cache-{workers}"
        info = quantize(data or Images(tmp_path, act), config, cache_dir=cache, progress=False)
        return info, set((tmp_path / "readers").read_text().split()) - {str(os.getpid())}

    return make


def contents(info):
    """The files of a store by name, without those that tell the settings."""
    told = ("manifest.json", "compact.json")
    return {path.name: path.read_bytes() for path in Path(info.path).iterdir() if path.name not in told}


@pytest.mark.parametrize(
    "encoding", [{}, {"codec": "jpeg", "quality": 60}, {"codec": "webp", "quality": 30, "longest_side": 30}]
)
def test_processes_write_the_bytes_of_one(packed, encoding):
    (one, alone), (several, readers) = packed(0, **encoding), packed(2, **encoding)
    assert not alone
    assert len(readers) == 2
    assert contents(several) == contents(one)
    assert len(PackedDataset(several.path)) == several.num_samples == 81


def test_files_of_a_folder_are_kept(packed, tmp_path):
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    for i in range(COUNT):
        Images(tmp_path)[i][0].save(folder / f"{i:02}.jpg", quality=50)
    data = ImageFolder(folder.parent)
    info = packed(2, data=data)[0]
    assert contents(info) == contents(packed(0, data=data)[0])
    assert sum(path.stat().st_size for path in folder.iterdir()) > info.bytes


def test_errors_are_those_of_one_process(packed, tmp_path):
    texts, causes = [], []
    for workers in (0, 2):

        def act(i, is_own, fails_here=workers == 0):
            # The file that this writes is there once the sample was read for the identity of the data.
            seen = tmp_path / f"seen-{i}"
            if i == 71 and seen.exists() and is_own == fails_here:
                raise OSError("the disk is on fire")
            seen.write_text("")

        (tmp_path / "seen-71").unlink(missing_ok=True)
        with pytest.raises(SourceError, match="disk is on fire") as caught:
            packed(workers, act)
        texts.append(str(caught.value))
        causes.append(repr(caught.value.__cause__))
    assert texts[0] == texts[1]
    assert causes == ["OSError('the disk is on fire')"] * 2
    # The traceback of the process is told, too.
    assert "in act" in "".join(caught.value.__notes__)


def test_processes_use_no_file_that_this_process_opened(packed, tmp_path):
    class Lazy(Images):
        """Opens its file at the first read, and again in a copy."""

        file, opened_by = None, None

        def __getstate__(self):
            return self.__dict__ | {"file": None}

        def __getitem__(self, i):
            if self.file is None:
                self.file, self.opened_by = (tmp_path / "blob").open("rb"), os.getpid()
            if self.opened_by != os.getpid():
                (tmp_path / "shared").touch()
            return super().__getitem__(i)

    (tmp_path / "blob").write_text("text")
    assert packed(2, data=Lazy(tmp_path))[1]
    assert not (tmp_path / "shared").exists()


def test_rows_of_an_hdf5_file(packed, tmp_path):
    h5py = pytest.importorskip("h5py")
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 9, 9, 3), dtype=np.uint8)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = pixels

    class Rows(Images):
        file = None

        def __getstate__(self):
            return self.__dict__ | {"file": None}

        def __getitem__(self, i):
            self.file = self.file or h5py.File(tmp_path / "a.h5")
            super().__getitem__(i)
            return Image.fromarray(self.file["x"][i]), i % 4

    info, readers = packed(2, data=Rows(tmp_path))
    assert len(readers) == 2
    stored, index = PackedDataset(info.path), load_selection(info.path).index
    for number, position in enumerate(index.tolist()):
        assert (np.asarray(stored[number][0]) == pixels[position]).all()


def test_few_slow_samples_are_shared_too(packed, monkeypatch):
    monkeypatch.setattr(writer, "PIECE_SAMPLES", 256)
    monkeypatch.setattr(packing, "PIECE_SECONDS", 60.0)
    assert len(packed(2, lambda i, is_own: time.sleep(0.005))[1]) == 2


def test_shards_hold_whole_pieces(packed, monkeypatch):
    kept = []
    monkeypatch.setattr(packing_shards.UnsavedSamples, "is_due", lambda self, more: self._shards is not None)
    monkeypatch.setattr(packing_shards.UnsavedSamples, "keep", lambda self, facts: kept.append(len(self._lengths)))
    monkeypatch.setattr(
        packing_shards.UnsavedSamples, "add", lambda self, columns, values, lengths: setattr(self, "_lengths", lengths)
    )
    packed(2)
    assert kept == [1] * 5 + [7] * 10 + [6]


def test_a_daemon_process_reads_by_itself(packed):
    process = multiprocessing.get_context("fork").Process(target=packed, args=(2,), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_a_killed_process_is_named(packed):
    with pytest.raises(FeatureError, match="a loader process ended"):
        packed(2, lambda i, is_own: None if is_own else os._exit(9))


@pytest.mark.parametrize(("least", "cores", "used"), [(0.0, 2, True), (0.0, 1, False), (60.0, 2, False)])
def test_processes_are_used_where_they_pay_off(packed, monkeypatch, least, cores, used):
    monkeypatch.setattr(packing, "WORKER_START_SECONDS", least)
    monkeypatch.setattr(packing, "available_cores", lambda: cores)
    assert bool(packed("auto", codec="jpeg")[1]) == used


def test_a_dataset_with_an_open_file_is_read_in_this_process(packed, tmp_path, caplog):
    (tmp_path / "held").write_text("text")
    with (tmp_path / "held").open() as held:
        data = Images(tmp_path)
        data.held = held
        assert not packed(2, data=data)[1]
    assert "read in one process" in caplog.text
