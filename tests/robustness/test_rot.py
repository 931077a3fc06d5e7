"""Every changed byte of an entry of every station is noticed before its data trains a model, or changes nothing."""

import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from dq_lightning import PackedDataset
from dq_lightning.cache import manifest
from dq_lightning.cache.tensors import read_bins, read_features, read_scores, read_selection
from dq_lightning.core.errors import DQError, StoreError
from dq_lightning.pipeline.compact import open_compact
from dq_lightning.pipeline.plan import BINS, FEATURES, FILLED, PATCHES, SELECTION, STORE
from tests.robustness.worlds import RUNS, content, delivered, entries, image_run, plain

# what must be made anew, and so reads its parent, for an entry of each station to be read at all
READERS = {
    FEATURES: (BINS, SELECTION, STORE),
    BINS: (SELECTION, STORE),
    SELECTION: (STORE,),
    PATCHES: (STORE, FILLED),
    STORE: (),
    FILLED: (),
}


def flip(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def zero(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    end = min(len(data), start + draw.randrange(1, 1 + len(data)))
    data[start:end] = bytes(end - start)


DAMAGES = (flip, cut, zero)


def damage_files(place: Path, name: str, times: int, run: Callable[[Path], Any]) -> int:
    """Damage each file of each entry so many times, in the three ways in turn; how many damages were tried."""
    whole = place / "whole"
    info = run(whole)
    expected, seen = content(whole), delivered(info)
    draw, tried = random.Random(name), 0
    for entry in entries(whole):
        for file in sorted(path.name for path in entry.iterdir()):
            original = (entry / file).read_bytes()
            for _ in range(times if original else 0):
                data = bytearray(original)
                damage = DAMAGES[tried % 3]
                damage(data, draw)
                if data == original:
                    continue
                root = shutil.copytree(whole, place / "damaged")
                for station in READERS[entry.parent.name]:
                    shutil.rmtree(root / station, ignore_errors=True)
                (root / entry.relative_to(whole) / file).write_bytes(data)
                try:
                    use_until_right(root, run, seen)
                    assert content(root) == expected
                except BaseException as error:
                    error.add_note(f"{damage.__name__} in {entry.parent.name}/{file}")
                    raise
                shutil.rmtree(root)
                tried += 1
    return tried


def use_until_right(root: Path, run: Callable[[Path], Any], seen: Any) -> None:
    """A run either finds the damage and makes the entry again, or its reader refuses; then the next run must find it."""
    with suppress(StoreError):
        assert delivered(run(root)) == seen
    assert delivered(run(root)) == seen


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "size"), [("indices", "as small files"), ("patches", "as large files")])
def test_no_damage_reaches_a_training(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: str, times: int
) -> None:
    if size == "as large files":
        # those that are not compared whole each time that an entry is found
        monkeypatch.setattr(manifest, "SMALL_BYTES", 0)
    assert damage_files(place, name, times, RUNS[name]) >= 8 * times


def tensors(*found: torch.Tensor | None) -> list[Any]:
    return [None if tensor is None else (str(tensor.dtype), tensor.tolist()) for tensor in found]


def all_of_store(path: Path) -> Any:
    """All that can be learnt of a compact set, its samples one by one and in batches."""
    compact = open_compact(path, {})
    return (
        [compact.config, compact.patches, compact.info.kind, *tensors(compact.selection.index, compact.selection.bin)],
        all_of_samples(path),
    )


def all_of_samples(path: Path) -> Any:
    store = PackedDataset(path)
    every = range(len(store))
    samples = [[plain(store[i]) for i in every], [plain(sample) for sample in store.__getitems__(list(every))]]
    return samples, store.index.tolist(), store.bin.tolist(), list(store.ids), store.attributes


CONTENT: dict[str, Callable[[Path], Any]] = {
    FEATURES: lambda path: tensors(read_features(path).embedding, read_features(path).head_gradient),
    BINS: lambda path: tensors(*(getattr(read_bins(path), n) for n in ("assignment", "rank", "gain", "group"))),
    SELECTION: lambda path: tensors(read_selection(path).index, read_selection(path).bin),
    PATCHES: lambda path: tensors(*read_scores(path)),
    STORE: all_of_store,
    FILLED: all_of_samples,
}


def damage_and_read(place: Path, name: str, times: int) -> tuple[int, int]:
    """Damage each file of each entry so many times and read the entry; how many were noticed, and how many harmless."""
    RUNS[name](place)
    draw, noticed, harmless = random.Random(name), 0, 0
    for entry in entries(place):
        station, key = entry.parent.name, entry.name
        read = CONTENT[station]
        seen = read(entry)
        for file in sorted(entry.iterdir()):
            original = file.read_bytes()
            for number in range(times if original else 0):
                data = bytearray(original)
                DAMAGES[number % 3](data, draw)
                if data == original:
                    continue
                file.write_bytes(data)
                try:
                    manifest.check_entry(entry, "size", station=station, key=key)
                    found = read(entry)
                except (manifest.Damage, StoreError):
                    noticed += 1
                else:
                    assert found == seen, f"{DAMAGES[number % 3].__name__} in {station}/{file.name}"
                    harmless += 1
                file.write_bytes(original)
                (entry / manifest.FULL_CHECK).unlink(missing_ok=True)
    return noticed, harmless


@pytest.mark.parametrize("times", [5, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["patches", "packed", "text"])
def test_damages_of_every_file(place: Path, monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> None:
    # as if all files were too large to be compared whole each time that an entry is found
    monkeypatch.setattr(manifest, "SMALL_BYTES", 0)
    noticed, harmless = damage_and_read(place, name, times)
    assert noticed > 12 * times
    assert harmless == 0


@pytest.mark.parametrize("station", READERS)
def test_missing_and_foreign_files_are_noticed(place: Path, caplog: Any, station: str) -> None:
    run = RUNS["patches"]
    seen = delivered(run(place))
    expected = content(place)
    entry = next(path for path in entries(place) if path.parent.name == station)

    def missing() -> None:
        next(path for path in sorted(entry.iterdir()) if path.name != manifest.MANIFEST).unlink()

    def foreign() -> None:
        (entry / "more.bin").write_bytes(b"x")

    def unmanifested() -> None:
        (entry / manifest.MANIFEST).unlink()

    def swapped() -> None:
        other = next(path for path in entries(place) if path.parent.name != station)
        shutil.copy(other / manifest.MANIFEST, entry / manifest.MANIFEST)

    for damage in (missing, foreign, unmanifested, swapped):
        for reader in READERS[station]:
            shutil.rmtree(place / reader, ignore_errors=True)
        damage()
        caplog.clear()
        with caplog.at_level("WARNING", "dq_lightning"):
            assert delivered(run(place)) == seen
        assert content(place) == expected
        assert f"{entry} is damaged: " in caplog.text


def test_off_trusts_and_hash_compares_first(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "SMALL_BYTES", 0)
    info = image_run(place, store="packed")
    seen = delivered(info)
    column = Path(info.path) / "column-0.npy"
    data = bytearray(column.read_bytes())
    data[-1] ^= 1
    column.write_bytes(data)
    last = len(seen[0][0]) - 1
    assert len(PackedDataset(info.path, verify="off")) == last + 1
    PackedDataset(info.path, verify="off")[last]
    with pytest.raises(DQError, match=r"column-0\.npy has another content"):
        PackedDataset(info.path, verify="hash")
    assert image_run(place, store="packed", verify="hash").reused is False
    assert delivered(image_run(place, store="packed", verify="hash")) == seen
