"""Kill, fill and race the builder: afterwards an undisturbed run gives the undisturbed bytes."""

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch

from dq_lightning.cache import files, lock
from dq_lightning.cache.entries import Cache
from dq_lightning.core.errors import CacheError
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.packed.writer import write_packed
from tests.full_count import FULL
from tests.store.calls import at_call

PARTS = {"data": "abc", "config": {"ratio": 0.5}}


def write(folder: Path) -> None:
    items = [((torch.full((3,), i), i, "text" * i), None) for i in range(5)]
    ids = [str(i) for i in range(5)]
    write_packed(folder, items, ids=ids, index=torch.arange(5), bins=torch.zeros(5, dtype=torch.int16), attributes={})


def build(root: Path) -> Path:
    return Cache(root).build("5-store", PARTS, write)


def content(entry: Path) -> dict[str, str]:
    """Digest of every file but the manifest, which tells when it was made."""
    return {path.name: files.file_digest(path) for path in entry.iterdir() if path.name != "manifest.json"}


def operations(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What an undisturbed build does to the disk, in order."""
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(files, "observer", lambda operation, path: seen.append((operation, path.name)))
    build(root)
    monkeypatch.setattr(files, "observer", None)
    return seen


def in_child(act: Callable[[], Any]) -> int:
    """Run in a forked child; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def test_order_of_fsync_and_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = operations(tmp_path, monkeypatch)
    written = {name for operation, name in seen if operation == "write"}
    manifest_created = seen.index(("create", "manifest.json"))
    renamed = next(i for i, (operation, _) in enumerate(seen) if operation == "rename")
    for name in written - {"manifest.json"}:
        assert seen.index(("fsync", name)) < manifest_created
    assert manifest_created < seen.index(("fsync", "manifest.json")) < renamed
    temp = next(name for operation, name in seen if operation == "mkdir" and name.startswith(".tmp-"))
    assert seen.index(("fsync", "manifest.json")) < seen.index(("fsync", temp)) < renamed
    assert seen[renamed + 1 :] == [("fsync", "5-store")]


def test_killed_at_commit_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = len(operations(tmp_path / "undisturbed", monkeypatch))
    expected = content(build(tmp_path / "undisturbed"))
    assert points > 20
    for number in range(0, points, 1 if FULL else 2):
        root = tmp_path / str(number)

        def killed(root: Path = root, number: int = number) -> None:
            files.observer = at_call(number, lambda _: os.kill(os.getpid(), signal.SIGKILL))
            build(root)

        assert os.WIFSIGNALED(in_child(killed))
        found = Cache(root, verify="hash").find("5-store", PARTS)
        assert found is None or content(found) == expected
        assert content(build(root)) == expected
        assert len(PackedDataset(build(root), verify="hash")) == 5


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_error_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    points = len(operations(tmp_path / "undisturbed", monkeypatch))
    expected = content(build(tmp_path / "undisturbed"))

    def fail(path: Path) -> None:
        raise OSError(code, os.strerror(code), str(path))

    for number in range(points):
        root = tmp_path / str(number)
        monkeypatch.setattr(files, "observer", at_call(number, fail))
        with pytest.raises(CacheError, match="cannot write") as caught:
            build(root)
        assert caught.value.__cause__ is not None
        monkeypatch.setattr(files, "observer", None)
        assert not list(root.glob("*/.tmp-*"))
        assert content(build(root)) == expected


def test_racing_builders_give_one_whole_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = content(build(tmp_path / "undisturbed"))
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.01)
    for number, lying in enumerate([False, True] * (5 if FULL else 2)):
        root = tmp_path / str(number)

        def racer(root: Path = root, lying: bool = lying) -> None:
            if lying:
                lock.FileLock.acquire = lambda self, *a, **k: None
                lock.FileLock.release = lambda self, *a, **k: None
            if content(build(root)) == expected:
                (root / f"right-{os.getpid()}").touch()

        children = []
        for _ in range(4):
            child = os.fork()
            if child == 0:
                try:
                    racer()
                finally:
                    os._exit(0)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
        assert len(list(root.glob("right-*"))) == 4
        assert len([p for p in (root / "5-store").iterdir() if not p.name.startswith(".")]) == 1
        assert not list(root.glob("5-store/.tmp-*"))
        assert not list(root.glob("5-store/.damaged-*"))


def test_who_waits_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 0.5)
    place = tmp_path / "entry"
    (tmp_path / "entry.owner").write_text(json.dumps({"host": "elsewhere", "pid": 7, "beat": 0}))
    with (
        caplog.at_level("INFO", "dq_lightning"),
        filelock.FileLock(place, thread_local=False),
        lock.work_lock(place, lambda: False) as held,
    ):
        assert not held
    assert [m for m in caplog.messages if "waiting until process 7 on elsewhere" in m] == caplog.messages[:1]


def test_nobody_waits_for_a_dead_or_silent_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 0.3)
    cache = Cache(tmp_path)
    place = cache.root / ".locks" / f"5-store-{cache.key('5-store', PARTS)}"
    place.parent.mkdir(parents=True)
    # a child that inherits the lock keeps it when its builder dies; here the owner is this process, and never beats
    with filelock.FileLock(place, thread_local=False):
        assert PackedDataset(cache.build("5-store", PARTS, write))[1][1] == 1


def test_a_dead_owner_of_this_machine_is_overtaken_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 1000.0)
    cache = Cache(tmp_path)
    place = cache.root / ".locks" / f"5-store-{cache.key('5-store', PARTS)}"
    place.parent.mkdir(parents=True)
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    owner = {"host": lock.host_name(), "pid": dead, "beat": 3}
    place.with_name(place.name + ".owner").write_text(json.dumps(owner))
    # a child of the dead one has inherited the lock
    with filelock.FileLock(place, thread_local=False):
        assert PackedDataset(cache.build("5-store", PARTS, write))[1][1] == 1


def test_who_comes_second_looks_at_what_the_first_has_made(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    target = cache.place("5-store", PARTS)

    def beside(folder: Path) -> None:
        write(folder)
        target.mkdir()
        (target / "half").write_bytes(b"of an entry")

    entry = cache.build("5-store", PARTS, beside)
    assert content(entry) == content(build(tmp_path / "undisturbed"))


def test_a_writer_that_fails_leaves_nothing_and_its_own_error(tmp_path: Path) -> None:
    def bad(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise FileNotFoundError(errno.ENOENT, "no such image", "/photos/cat.jpg")

    with pytest.raises(FileNotFoundError, match="cat"):
        Cache(tmp_path).build("1-features", PARTS, bad)
    assert not list((tmp_path / "1-features").iterdir())
