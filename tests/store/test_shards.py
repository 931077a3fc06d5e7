"""Finished work of an unfinished entry: what is kept comes back, whatever else is there is dropped, and nothing is an error."""

import errno
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dq_lightning.cache import files, shards
from dq_lightning.cache.entries import Cache
from dq_lightning.cache.shards import KeptShards, partial_folder, remove_abandoned
from dq_lightning.commands.cache_care import prune
from dq_lightning.core.errors import StoreError
from tests.store.calls import at_call

TOTAL = 100
PARTS = {"data": "abc"}


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    return tmp_path / "1-features" / ("0123456789abcdef" * 2)


def arrays(start: int, stop: int) -> dict[str, Any]:
    places = np.arange(start, stop)
    return {
        "places": places,
        "rows": np.outer(places, [1, 0.5, -1]).astype(np.float32),
        "bytes": np.arange(stop - start - 1, dtype=np.uint8),
        "sizes": places.astype(np.int32)[:, None],
    }


def kept(entry: Path, cuts: list[int], start: int = 0, **attributes: Any) -> KeptShards:
    """Shards that end at `cuts`, by a builder that begins at `start`."""
    made = opened(entry, **attributes)
    for _ in made.restore(TOTAL):
        pass
    made._done = start
    for stop in cuts:
        made.keep(stop - start, arrays(start, stop))
        start = stop
    return made


def opened(entry: Path, made_from: str = "") -> KeptShards:
    made = KeptShards(entry, "features")
    made.made_from = made_from
    return made


def restored(entry: Path, **attributes: Any) -> list[tuple[int, int]]:
    """Ranges of the shards that come back, each compared with what was kept."""
    found = []
    for piece in opened(entry, **attributes).restore(TOTAL):
        start, stop = int(piece["places"][0]), int(piece["places"][-1]) + 1
        wanted = arrays(start, stop)
        assert sorted(piece) == sorted(wanted)
        for name, array in wanted.items():
            assert piece[name].dtype == array.dtype
            np.testing.assert_array_equal(piece[name], array)
        found.append((start, stop))
    return found


def listed(entry: Path) -> list[Path]:
    return sorted(partial_folder(entry).glob("*"))


def test_what_is_kept_comes_back_in_order(entry: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert restored(entry) == []
    kept(entry, [30, 35, 60])
    with caplog.at_level("INFO", "dq_lightning"):
        assert restored(entry) == [(0, 30), (30, 35), (35, 60)]
        assert caplog.messages == ["resuming features: 60 of 100 samples are done already"]
        kept(entry, [90], start=60)
        assert restored(entry)[-1] == (60, 90)
    assert len(listed(entry)) == 4
    KeptShards(entry, "features", fresh=True)
    assert listed(entry) == []
    assert restored(entry) == []


def test_a_builder_goes_on_after_what_it_has_read(entry: Path) -> None:
    kept(entry, [30])
    second = opened(entry)
    assert len(list(second.restore(TOTAL))) == 1
    second.keep(20, arrays(30, 50))
    assert restored(entry) == [(0, 30), (30, 50)]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def moved_from_another_key(path: Path) -> None:
    other = path.parent.parent.parent.parent / "1-features" / "another"
    kept(other, [30, 35])
    (found,) = partial_folder(other).glob("*030-*035-*")
    path.write_bytes(found.read_bytes())


def renamed_from_elsewhere(path: Path) -> None:
    (first,) = path.parent.glob("*000-*030-*")
    path.write_bytes(first.read_bytes())


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flip": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "another key": moved_from_another_key,
    "another place": renamed_from_elsewhere,
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_shard_is_dropped_with_a_line(
    entry: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept(entry, [30, 35, 60])
    (path,) = partial_folder(entry).glob("*030-*035-*")
    DAMAGES[damage](path)
    with caplog.at_level("INFO", "dq_lightning"):
        assert restored(entry) == [(0, 30)]
    assert not path.exists()
    assert caplog.messages[0].startswith(f"features: a file of finished work cannot be used and is removed ({path}: ")
    assert caplog.messages[1:] == ["resuming features: 30 of 100 samples are done already"]
    # with its samples done again, what lies behind it is of use again
    kept(entry, [35], start=30)
    assert restored(entry) == [(0, 30), (30, 35), (35, 60)]


def test_every_changed_byte_is_noticed(entry: Path) -> None:
    kept(entry, [4])
    (path,) = listed(entry)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert restored(entry) == []
    path.write_bytes(whole)
    assert restored(entry) == [(0, 4)]


@pytest.mark.parametrize("header", [b"[]", b"{}", b"[" * 5000, b'{"__metadata__": {"dq_lightning": "{}"}}', b"\xff"])
def test_a_file_of_others_is_no_shard(entry: Path, header: bytes) -> None:
    kept(entry, [4])
    (path,) = listed(entry)
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert restored(entry) == []


def test_dtypes_that_cannot_be_kept(entry: Path) -> None:
    with pytest.raises(StoreError, match="complex64"):
        opened(entry).keep(1, {"complex": np.zeros(1, np.complex64)})


def test_shards_made_from_something_else_are_not_used(entry: Path) -> None:
    kept(entry, [30, 60], made_from="one choice")
    assert restored(entry, made_from="another choice") == []
    kept(entry, [30], made_from="another choice")
    assert restored(entry, made_from="another choice") == [(0, 30)]


def test_builders_side_by_side(entry: Path) -> None:
    one, other = opened(entry), opened(entry)
    one.keep(20, arrays(0, 20))
    other.keep(30, arrays(0, 30))
    one.keep(30, arrays(20, 50))
    other.keep(25, arrays(30, 55))
    one.keep(20, arrays(50, 70))
    assert restored(entry) == [(0, 30), (30, 55)]
    # where one's are damaged, the other's lead on
    (path,) = partial_folder(entry).glob("*000-*030-*")
    flip(path)
    assert restored(entry) == [(0, 20), (20, 50), (50, 70)]
    # one finishes and takes all away while the other still works
    shards.remove_shards(entry)
    other.keep(5, arrays(55, 60))
    assert restored(entry) == []
    assert len(listed(entry)) == 1


def test_a_shard_that_vanishes_while_it_is_read_is_no_damage(entry: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept(entry, [30, 60])
    reading = opened(entry).restore(TOTAL)
    next(reading)
    shards.remove_shards(entry)
    with caplog.at_level("WARNING", "dq_lightning"):
        assert list(reading) == []
    assert caplog.messages == []


def operations(entry: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    seen = []
    monkeypatch.setattr(files, "observer", lambda operation, path: seen.append(operation))
    kept(entry, [30])
    monkeypatch.setattr(files, "observer", None)
    assert seen.index("fsync") < seen.index("replace") == len(seen) - 1
    return len(seen)


def test_killed_at_every_commit_point(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = operations(entry.with_name("undisturbed"), monkeypatch)
    kept(entry, [20])
    for number in range(points):
        child = os.fork()
        if child == 0:
            files.observer = at_call(number, lambda _: os.kill(os.getpid(), signal.SIGKILL))
            kept(entry, [30 + number], start=20)
            os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert restored(entry) == [(0, 20)]
    kept(entry, [30], start=20)
    assert restored(entry) == [(0, 20), (20, 30)]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS])
def test_a_disk_that_refuses_costs_no_more_than_the_shards(
    entry: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    points = operations(entry.with_name("undisturbed"), monkeypatch)

    def fail(path: Path) -> None:
        raise OSError(code, os.strerror(code), str(path))

    for number in range(points):
        caplog.clear()
        place = entry.with_name(f"{number}")
        monkeypatch.setattr(files, "observer", at_call(number, fail))
        made = kept(place, [20, 30])
        monkeypatch.setattr(files, "observer", None)
        assert listed(place) == []
        (message,) = caplog.messages
        assert os.strerror(code) in message
        assert "the next one continues after 0 samples" in message
        monkeypatch.setattr(shards, "MIN_SECONDS", 0.0)
        assert not made.is_due()


def test_room_that_the_entry_needs_is_left(entry: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = opened(entry)
    made.reserve_bytes = shutil.disk_usage(entry.parent.parent).free + (1 << 30)
    made.keep(10, arrays(0, 10))
    assert listed(entry) == []
    assert "No space left" in caplog.text


def test_when_a_shard_is_due(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    cost = 0.1
    made = opened(entry)
    monkeypatch.setattr(made, "_write", lambda *given: now.__setitem__(0, now[0] + cost))

    def waits() -> float:
        since = now[0]
        while not made.is_due():
            now[0] += 0.5
        made.keep(1, {})
        return now[0] - since

    assert waits() == pytest.approx(shards.MIN_SECONDS + cost, abs=0.6)
    assert waits() == pytest.approx(shards.MIN_SECONDS + cost, abs=0.6)
    cost = 0.6
    waits()
    # at most two percent of the time goes into them
    assert waits() == pytest.approx(50 * 0.6 + 0.6, abs=0.6)
    cost = 30.0
    waits()
    assert waits() == pytest.approx(shards.MAX_SECONDS + 30, abs=0.6)


def write(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"some bytes")


def test_they_go_when_the_entry_is_there(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    place = cache.place("1-features", PARTS)
    kept(place, [30])

    def fails(folder: Path) -> None:
        raise StoreError("no")

    with pytest.raises(StoreError):
        cache.build("1-features", PARTS, fails)
    assert len(listed(place)) == 1
    assert cache.build("1-features", PARTS, write) == place
    assert not partial_folder(place).exists()
    assert [entry.path for entry in cache.entries()] == [place]


@pytest.mark.parametrize("by", ["build", "prune"])
def test_abandoned_ones_go_and_young_ones_stay(by: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    young, old, touched = (cache.place("1-features", {"data": name}) for name in ("young", "old", "touched"))
    for place in (young, old, touched):
        kept(place, [30, 60])
    long_ago = time.time() - shards.ABANDONED_SECONDS - 3600
    for place in (old, touched):
        for path in [*listed(place), partial_folder(place)]:
            os.utime(path, (long_ago, long_ago))
    os.utime(listed(touched)[-1])
    if by == "build":
        cache.build("1-features", PARTS, write)
    else:
        cache.root.joinpath("1-features").mkdir()
        prune(tmp_path, older_than_days=30)
    assert [partial_folder(place).exists() for place in (young, old, touched)] == [True, False, True]


def test_the_clock_of_the_disk_decides(entry: Path) -> None:
    kept(entry, [30])
    entry.parent.mkdir()
    remove_abandoned(entry.parent, files.clock_of(entry.parent) + shards.ABANDONED_SECONDS - 60)
    assert restored(entry) == [(0, 30)]
    remove_abandoned(entry.parent, files.clock_of(entry.parent) + shards.ABANDONED_SECONDS + 60)
    assert restored(entry) == []


def test_messages_name_the_work(entry: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept(entry, [30])
    with caplog.at_level(logging.INFO, "dq_lightning"):
        assert len(list(KeptShards(entry, "filling").restore(50_000))) == 1
    assert caplog.messages == ["resuming filling: 30 of 50,000 samples are done already"]
