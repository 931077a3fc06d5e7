"""Every fault of the disk, at every call: the run says the true cause, or does without; a clean one gives the right bytes."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dq_lightning.cache import entries as cache_module
from dq_lightning.cache import files, leftovers, lock
from dq_lightning.cache.entries import Cache
from dq_lightning.commands import cache_care
from dq_lightning.core.errors import CacheError
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.pipeline.plan import FEATURES, STORE
from tests.robustness.worlds import (
    RUNS,
    Points,
    assert_only_right_entries,
    content,
    delivered,
    ended,
    entries,
    forked,
    image_run,
    new_root,
    points_of,
    some_points,
    started,
    until,
)


def outcome(run: Callable[[Path], Any], root: Path) -> CacheError | None:
    """The error of a run; any other than a CacheError is not expected."""
    try:
        run(root)
    except CacheError as error:
        return error
    return None


CODES = (errno.ENOSPC, errno.EIO, errno.EACCES)
SHIFTS = [pytest.param(shift, marks=pytest.mark.slow) for shift in range(3)]


@pytest.mark.parametrize("name", ["indices", "patches", "paid"])
def test_faults_at_some_calls(place: Path, name: str) -> None:
    fail_at_calls(place, name, CODES, every=False)


@pytest.mark.parametrize("name", ["indices", "patches", "paid"])
@pytest.mark.parametrize("shift", SHIFTS)
def test_fault_at_every_call(place: Path, name: str, shift: int) -> None:
    fail_at_calls(place, name, CODES[shift:] + CODES[:shift], every=True)


def fail_at_calls(place: Path, name: str, codes: tuple[int, ...], every: bool) -> None:
    """Each call fails once, with the error codes in turn."""
    run, start, report = RUNS[name], started(name, place), place / "report.json"
    run(new_root(start, place / "warm"))
    names = points_of(run, new_root(start, place / "undisturbed"))
    expected = content(place / "undisturbed")
    numbers = list(range(len(names))) if every else some_points(names)

    def disturbed() -> None:
        points, told, number, code = Points(place), [], -1, 0
        points.install()

        def fail(path: str) -> None:
            if len(points.names) > number:
                points.act = lambda path: None
                raise OSError(code, os.strerror(code), path)

        for turn, number in enumerate(numbers):
            code = codes[turn % len(codes)]
            root = new_root(start, place / str(number))
            points.names, points.act = [], fail
            error = outcome(run, root)
            assert points.act is not fail, f"there was no call {number}"
            fault = points.names[number]
            if error is None:
                assert saves_work_only(*fault), fault
            else:
                told.append((code, str(error)))
                assert isinstance(error.__cause__, OSError), (fault, error)
                assert error.__cause__.errno == code, (fault, error)
            assert not list(root.glob("[1-9]*/.tmp-*")), fault
            assert_only_right_entries(root, expected)
            run(root)
            assert content(root) == expected, fault
            shutil.rmtree(root)
        points.act = lambda path: None
        report.write_text(json.dumps(told))

    assert ended(forked(disturbed, place / "log"), 300) == 0, (place / "log").read_text()
    told = json.loads(report.read_text())
    assert len(told) > len(numbers) // 2
    advice = {errno.ENOSPC: "make room", errno.EACCES: "cache_dir="}
    for code, message in told:
        assert os.strerror(code) in message
        assert str(place) in message
        assert advice.get(code, "cannot write") in message


def saves_work_only(event: str, path: str) -> bool:
    """Whether a run may pass over a fault here: locks, remembered digests, folders that exist already, removal, dates."""
    return ".locks" in path or "0-digests" in path or event in ("os.mkdir", "os.remove", "os.rmdir", "os.utime")


def test_all_that_changes_a_cache_goes_through_one_layer(place: Path) -> None:
    def watched() -> None:
        root = place / "cache"
        points, announced = Points(root), set()
        points.install()
        observe = files.observer
        assert observe is not None

        def both(operation: str, path: Path) -> None:
            announced.add(str(path))
            observe(operation, path)

        files.observer = both
        for run in RUNS.values():
            run(root)
        image_run(root, force_recompute=True)
        silent = {
            path
            for name, path in points.names
            if path not in announced
            # removal and dates need no order; locks and folders are not content
            and name not in ("os.remove", "os.rmdir", "os.utime")
            and not (name == "os.mkdir" or path.startswith(str(root / ".locks")))
        }
        assert not silent
        assert any(name == "os.rename" for name, _ in points.names)

    assert ended(forked(watched, place / "log")) == 0, (place / "log").read_text()


def read_only(root: Path) -> None:
    """Let this process see a file system that refuses every change under a folder."""
    points = Points(root)

    def refuse(path: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    points.act = refuse
    points.install()


def test_a_read_only_cache_is_used_and_never_believed_when_damaged(place: Path) -> None:
    root = place / "cache"
    info = RUNS["packed"](root)
    seen = delivered(info)

    def visitor() -> None:
        read_only(root)
        found = RUNS["packed"](root)
        assert found.reused
        assert delivered(found) == seen
        with pytest.raises(CacheError, match="cache_dir="):
            image_run(root, seed=7)
        with pytest.raises(CacheError, match="cache_dir="):
            image_run(root, store="packed", force_recompute=True)

    assert ended(forked(visitor, place / "log")) == 0, (place / "log").read_text()
    damaged = Path(info.path) / "index.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")

    def disappointed() -> None:
        read_only(root)
        with pytest.raises(CacheError, match="cannot write"):
            RUNS["packed"](root)

    assert ended(forked(disappointed, place / "log")) == 0, (place / "log").read_text()
    assert delivered(RUNS["packed"](root)) == seen


def test_folders_without_write_permission(place: Path) -> None:
    cache, parts = Cache(place / "cache"), {"a": 1}

    def write(folder: Path) -> None:
        files.write_bytes(folder / "a", b"content")

    entry = cache.build("2-bins", parts, write)
    place.chmod(0o755)
    for folder in (entry, entry.parent, cache.root, cache.root / ".locks"):
        folder.chmod(0o555)

    def visitor() -> None:
        if os.geteuid() == 0:
            # root may write anywhere
            os.setegid(65534)
            os.seteuid(65534)
        assert cache.find("2-bins", parts) == cache.build("2-bins", parts, write) == entry
        with pytest.raises(CacheError, match="cache_dir="):
            cache.build("2-bins", {"a": 2}, write)

    child = forked(visitor, place / "log")
    try:
        assert ended(child) == 0, (place / "log").read_text()
    finally:
        for folder in (entry, entry.parent, cache.root, cache.root / ".locks"):
            folder.chmod(0o755)


def test_the_cache_may_be_on_another_file_system_than_temporary_files(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tmp_path.stat().st_dev == place.stat().st_dev:
        pytest.skip("this machine has one file system to write to")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "temporary").mkdir()
    found = []
    for root in (place / "cache", tmp_path / "cache"):
        delivered(RUNS["patches"](root))
        found.append(content(root))
    assert found[0] == found[1]
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("days", [-400, 400])
@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_nobody_cleans_up_after_the_living_when_a_clock_jumps(place: Path, days: int, host: str) -> None:
    root, marker, on = place / "cache", place / "marker", place / "go on"
    expected = content(Path(RUNS["packed"](place / "undisturbed").path).parents[1])
    jump = days * 86400.0
    now = time.time

    def owner() -> None:
        if host == "elsewhere":
            for module in (cache_module, leftovers, lock):
                module.host_name = lambda: host

        def wait(operation: str, path: Path) -> None:
            if operation == "fsync" and path.parent.name.startswith(".tmp-") and not on.exists():
                marker.touch()
                until(on.exists)

        files.observer = wait
        RUNS["packed"](root)

    def jumped() -> None:
        time.time = lambda: now() + jump
        RUNS["text"](root)
        cache_care.prune(root, older_than_days=5)
        assert len(entries(root)) == 4

    child = forked(owner, place / "log")
    until(marker.exists, child)
    living = [*root.glob("*/.tmp-*")]
    assert ended(forked(jumped, place / "log")) == 0, (place / "log").read_text()
    assert living
    assert all(folder.is_dir() for folder in living)
    on.touch()
    assert ended(child) == 0, (place / "log").read_text()
    assert content(root).items() >= expected.items()


def test_rot_in_a_large_file_is_made_good_by_the_next_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr("dq_lightning.cache.manifest.SMALL_BYTES", 0)
    info = RUNS["packed"](place)
    seen = delivered(info)
    column = Path(info.path) / "column-0.npy"
    data = bytearray(column.read_bytes())
    data[-1] ^= 1
    column.write_bytes(data)
    found = RUNS["packed"](place)
    assert found.reused
    with pytest.raises(Exception, match="does not match its checksum"):
        list(PackedDataset(found.path))
    with caplog.at_level("WARNING", "dq_lightning"):
        made = RUNS["packed"](place)
    assert not made.reused
    assert "column-0.npy has another content than was written" in caplog.text
    assert "moved to .damaged-" in caplog.text
    assert delivered(made) == seen


@pytest.mark.parametrize("station", [FEATURES, STORE])
def test_a_full_disk_is_told_before_the_work(place: Path, monkeypatch: pytest.MonkeyPatch, station: str) -> None:
    image_run(place)
    if station == FEATURES:
        shutil.rmtree(place)
    written = []
    monkeypatch.setattr(files, "observer", lambda operation, path: written.append(path))
    room = shutil.disk_usage(place.parent)._replace(free=50)
    monkeypatch.setattr("dq_lightning.cache.entries.shutil.disk_usage", lambda path: room)
    with pytest.raises(CacheError, match=r"bytes are needed under .*, but only 50 are free: make room"):
        image_run(place, store="packed")
    # the trial with a few samples is made elsewhere
    inside = [path for path in written if place in path.parents]
    assert not [path for path in inside if FEATURES in path.parts and path.name == "tensors.safetensors"]
    assert not [path for path in inside if path.name in ("column-0.npy", "values.bin")]
    assert not list(place.glob("*/.tmp-*"))
    monkeypatch.undo()
    assert image_run(place, store="packed").num_samples == 4
