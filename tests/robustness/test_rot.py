"""Every changed byte of an entry of every station is noticed before its data trains a model, or changes nothing."""

import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dq_lightning import PackedDataset
from dq_lightning.errors import DQError, StoreError
from dq_lightning.plan import BINS, FEATURES, FILLED, PATCHES, SELECTION, STORE
from dq_lightning.store import manifest
from tests.robustness.worlds import RUNS, content, delivered, entries, image_run

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
    """Damage each file of each entry so many times; how many damages were tried."""
    whole = place / "whole"
    info = run(whole)
    expected, seen = content(whole), delivered(info)
    draw, tried = random.Random(name), 0
    for entry in entries(whole):
        for file in sorted(path.name for path in entry.iterdir()):
            original = (entry / file).read_bytes()
            for number in range(times if original else 0):
                data = bytearray(original)
                DAMAGES[number % 3](data, draw)
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
                    error.add_note(f"{DAMAGES[number % 3].__name__} in {entry.parent.name}/{file}")
                    raise
                shutil.rmtree(root)
                tried += 1
    return tried


def use_until_right(root: Path, run: Callable[[Path], Any], seen: Any) -> None:
    """A run either finds the damage and makes the entry again, or its reader refuses; then the next run must find it."""
    with suppress(StoreError):
        assert delivered(run(root)) == seen
    assert delivered(run(root)) == seen


@pytest.mark.parametrize("name", ["patches", "indices"])
@pytest.mark.parametrize("size", ["as small files", "as large files"])
def test_no_damage_reaches_a_training(place: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: str) -> None:
    if size == "as large files":
        # those that are not compared whole each time that an entry is found
        monkeypatch.setattr(manifest, "SMALL_BYTES", 0)
    assert damage_files(place, name, 3, RUNS[name]) >= 40


@pytest.mark.slow
@pytest.mark.parametrize("name", ["patches", "text"])
def test_two_hundred_damages_of_every_file(place: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(manifest, "SMALL_BYTES", 0)
    assert damage_files(place, name, 200, RUNS[name]) > 4000


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
