"""Keys, reuse, damage, permissions and messages of the cache, and the memory of digests."""

import errno
import logging
import os
import shutil
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from dq_lightning.cache import digests, files
from dq_lightning.cache.digests import DigestMemory
from dq_lightning.cache.entries import Cache, default_cache_dir, require_space
from dq_lightning.cache.manifest import MANIFEST
from dq_lightning.core.errors import CacheError, ConfigError

KEY = "8a658282381fa47c978bb03a154a8a45"
PARTS: dict[str, Any] = {"source": "abc", "config": {"num_bins": 10, "lam": 1.0}, "algorithm": 1}


def write(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"some bytes")
    (folder / "large.bin").write_bytes(bytes(3 << 20))


def build(cache: Cache, parts: dict[str, Any] = PARTS, **options: Any) -> Path:
    return cache.build("2-bins", parts, write, **options)


def test_the_key_never_changes(tmp_path: Path) -> None:
    # a changed literal means that every user's cache is made anew: raise the algorithm's version instead; that it is the same
    # in every process shows because the interpreter draws a new seed of hashes each time
    assert Cache(tmp_path).key("2-bins", PARTS) == KEY


def test_keys_differ_where_parts_differ(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    reordered = {"algorithm": 1, "config": {"lam": 1.0, "num_bins": 10}, "source": "abc"}
    assert cache.key("2-bins", reordered) == cache.key("2-bins", PARTS)
    others = [
        {**PARTS, "algorithm": 2},
        {**PARTS, "algorithm": "1"},
        {**PARTS, "algorithm": True},
        {**PARTS, "more": None},
    ]
    assert len({cache.key(s, p) for s in ("1-features", "2-bins") for p in (PARTS, *others)}) == 10


@pytest.mark.parametrize("parts", [{1: "x"}, {"a": {2: 3}}, {"a": float("nan")}, {"a": object()}, {"a": b"x"}])
def test_parts_must_be_plain(tmp_path: Path, parts: Any) -> None:
    with pytest.raises(CacheError, match="key of 2-bins"):
        Cache(tmp_path).key("2-bins", parts)


def test_find_build_force_and_move(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "one")
    assert cache.find("2-bins", PARTS) is None
    assert not (tmp_path / "one").exists()
    made = build(cache)
    assert cache.find("2-bins", PARTS) == made == build(cache)
    inode = made.stat().st_ino
    assert build(cache, force=True) == made
    assert made.stat().st_ino != inode
    assert [p.name for p in made.parent.iterdir()] == [made.name]
    (entry,) = cache.entries()
    assert (entry.station, entry.key, entry.path, entry.parts) == ("2-bins", made.name, made, PARTS)
    assert entry.bytes == 10 + (3 << 20)
    shutil.move(tmp_path / "one", tmp_path / "two")
    assert Cache(tmp_path / "two", verify="hash").find("2-bins", PARTS)
    with pytest.raises(CacheError, match="is not a station"):
        cache.find("9-else", PARTS)
    with pytest.raises(ConfigError):
        Cache(tmp_path, verify="maybe")  # type: ignore[arg-type]


def other_version(entry: Path) -> None:
    values = files.read_sealed(entry / MANIFEST)
    (entry / MANIFEST).write_bytes(files.seal({**values, "version": 99}))


def other_key(entry: Path) -> None:
    values = files.read_sealed(entry / MANIFEST)
    (entry / MANIFEST).write_bytes(files.seal({**values, "key": "0" * 32}))


def path_trick(entry: Path) -> None:
    values = files.read_sealed(entry / MANIFEST)
    values["files"]["../../outside"] = values["files"]["a.bin"]
    (entry / MANIFEST).write_bytes(files.seal(values))


def link(entry: Path) -> None:
    (entry / "a.bin").rename(entry.parent.parent / "elsewhere")
    (entry / "a.bin").symlink_to(entry.parent.parent / "elsewhere")


DAMAGES = {
    "no manifest": lambda entry: (entry / MANIFEST).unlink(),
    "is missing": lambda entry: (entry / "a.bin").unlink(),
    "9 bytes instead of 10": lambda entry: (entry / "a.bin").write_bytes(b"123456789"),
    "another content": lambda entry: (entry / "a.bin").write_bytes(b"0123456789"),
    "does not name: foreign": lambda entry: (entry / "foreign").touch(),
    "version 99": other_version,
    "belongs to": other_key,
    "outside": path_trick,
    "not a plain file": link,
    "is not JSON": lambda entry: (entry / MANIFEST).write_bytes(b"[" * 100_000),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_damage_is_moved_aside_reported_once_and_repaired(
    tmp_path: Path, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(tmp_path)
    entry = build(cache)
    DAMAGES[reason](entry)
    with caplog.at_level(logging.WARNING, logger="dq_lightning"):
        assert cache.find("2-bins", PARTS) is None
        assert cache.find("2-bins", PARTS) is None
    assert len(caplog.records) == 1
    assert reason in caplog.text
    assert len(list(entry.parent.glob(".damaged-*"))) == 1
    assert (build(cache) / "a.bin").read_bytes() == b"some bytes"


def test_what_each_policy_notices(tmp_path: Path) -> None:
    entry = build(Cache(tmp_path))
    with (entry / "large.bin").open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"x")
    assert Cache(tmp_path).find("2-bins", PARTS)
    (entry / "a.bin").unlink()
    assert Cache(tmp_path, verify="off").find("2-bins", PARTS)
    (entry / "a.bin").write_bytes(b"some bytes")
    assert Cache(tmp_path, verify="hash").find("2-bins", PARTS) is None


def test_a_good_entry_that_replaced_a_damaged_one_is_put_back(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    entry = build(cache)
    cache._move_aside(entry, "it was damaged when somebody looked")
    assert cache.find("2-bins", PARTS) == entry


def test_read_only_cache_is_read_and_says_what_to_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    entry = build(cache)

    def refuse(operation: str, path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(files, "observer", refuse)
    assert build(cache) == entry
    with pytest.raises(CacheError, match="cache_dir="):
        build(cache, {**PARTS, "algorithm": 2})
    (entry / "a.bin").unlink()
    assert cache.find("2-bins", PARTS) is None
    assert entry.exists()


def test_entries_hold_plain_files_only(tmp_path: Path) -> None:
    for number, make in enumerate((lambda f: (f / "sub").mkdir(), lambda f: (f / "l").symlink_to("/etc/passwd"))):
        with pytest.raises(CacheError, match="plain files only"):
            Cache(tmp_path).build("2-bins", {"n": number}, make)


def test_stale_temp_folders_are_cleaned(tmp_path: Path) -> None:
    from dq_lightning.cache.lock import host_name

    station = tmp_path / "2-bins"
    nobody, here, elsewhere = 2**22 + 5, host_name(), f"{host_name()}_"
    # host, process and age in seconds of who made it, and whether it stays
    made = [(here, nobody, 120, False), (here, nobody, 5, True), (here, os.getpid(), 10**6, True)]
    made += [(elsewhere, nobody, 5 * 86400, True), (elsewhere, nobody, 8 * 86400, False)]
    folders = [station / f".tmp-{host}-{pid}-key-{age}" for host, pid, age, _ in made]
    for folder, (_, _, age, _) in zip(folders, made, strict=True):
        folder.mkdir(parents=True)
        os.utime(folder, (time.time() - age,) * 2)
    build(Cache(tmp_path))
    assert [folder.exists() for folder in folders] == [stays for *_, stays in made]


def test_where_machines_cannot_be_told_apart_leftovers_stay_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dq_lightning.cache import leftovers, lock

    monkeypatch.setattr(leftovers, "host_name", lambda: f"mac_{lock.UNKNOWN}")
    folders = [tmp_path / f".tmp-mac_{lock.UNKNOWN}-{2**22 + 5}-{age}" for age in (3600, 2 * 86400)]
    for folder, age in zip(folders, (3600, 2 * 86400), strict=True):
        folder.mkdir()
        os.utime(folder, (time.time() - age,) * 2)
    leftovers.remove_stale(tmp_path, time.time())
    assert [folder.exists() for folder in folders] == [True, False]


def test_containers_and_boots_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dq_lightning.cache import lock

    names = set()
    for boot in ("one", "another"):
        (tmp_path / boot).write_text(boot)
        monkeypatch.setattr(lock, "BOOT", tmp_path / boot)
        for space in ("pid:[1]", "pid:[2]"):
            link = tmp_path / f"{boot}{space}"
            link.symlink_to(space)
            monkeypatch.setattr(lock, "PROCESS_NUMBERS", link)
            names |= {lock.host_name.__wrapped__(), lock.host_name.__wrapped__()}
    monkeypatch.setattr(lock, "BOOT", tmp_path / "missing")
    names.add(lock.host_name.__wrapped__())
    assert len(names) == 5
    assert all("-" not in name for name in names)


def test_misses_are_explained_by_the_nearest_entry(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.explain_miss("2-bins", PARTS) == "computing bins: nothing cached yet"
    build(cache)
    build(cache, {"source": "z", "config": {"num_bins": 3, "lam": 2.0}, "algorithm": 0})
    changed = {**PARTS, "config": {"num_bins": 5, "lam": 1.0}}
    assert cache.explain_miss("2-bins", changed) == "computing bins because config.num_bins changed (10 -> 5)"
    assert cache.explain_miss("2-bins", {**PARTS, "more": 1}) == "computing bins because more changed (not set -> 1)"
    assert "again" in cache.explain_miss("2-bins", PARTS)
    scored = {**PARTS, "draw": "auto", "draw_scores": "margin", "scores_version": 1}
    assert cache.explain_miss("2-bins", scored) == "computing bins because draw changed (not set -> auto)"
    versioned = {**PARTS, "scores_version": 1}
    assert "scores_version changed" in cache.explain_miss("2-bins", versioned)
    # the data first, and what comes with the patches in one word
    patched = PARTS | {
        "patches": {"saliency": "gradcam", "map": None},
        "stored_patches": {"drop_ratio": 0.2, "codec": "raw"},
    }
    assert cache.explain_miss("2-bins", patched) == "computing bins because drop_ratio changed (0 -> 0.2)"
    build(cache, patched)
    less = patched | {"stored_patches": {"drop_ratio": 0.5, "codec": "raw"}}
    assert cache.explain_miss("2-bins", less) == "computing bins because drop_ratio changed (0.2 -> 0.5)"
    other = cache.explain_miss("2-bins", {**PARTS, "source": "other", "algorithm": 7})
    assert other == "computing bins: the cache has none for these data, which are new or were changed (abc -> other)"
    # what changed is told of an entry of the same data, also where one of other data has more in common
    build(cache, {**PARTS, "source": "other"})
    same = cache.explain_miss("2-bins", {**PARTS, "algorithm": 7, "config": {"num_bins": 3, "lam": 0.5}})
    assert "algorithm changed (1 -> 7)" in same


def test_space_and_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(CacheError, match="bytes are needed"):
        require_space(tmp_path / "not" / "yet", 1 << 60)
    monkeypatch.setenv("DQ_LIGHTNING_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("DQ_LIGHTNING_CACHE")
    assert default_cache_dir().name == "dq_lightning"


def old_file(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the files that were really read; files count as old enough to be trusted."""
    seen: list[str] = []
    hash_file = digests._hash_file
    monkeypatch.setattr(digests, "RACY_NANOSECONDS", 0)
    monkeypatch.setattr(digests, "_hash_file", lambda path: (seen.append(path), hash_file(path))[1])
    return seen


def test_digests_are_remembered_until_a_file_changes(tmp_path: Path, counted: list[str]) -> None:
    paths = [old_file(tmp_path / "data" / f"{i % 3}" / f"{i}", f"content {i}".encode()) for i in range(20)]
    expected = [files.file_digest(Path(path)) for path in paths]
    time.sleep(0.02)
    assert DigestMemory(tmp_path / "m").files(paths) == expected
    assert sorted(counted) == sorted(paths)
    counted.clear()
    assert DigestMemory(tmp_path / "m").files(paths) == expected
    assert DigestMemory(tmp_path / "m").files(paths[::-1]) == expected[::-1]
    assert counted == []
    # the same size and the old date back: only the change time tells
    before = Path(paths[4]).stat()
    old_file(Path(paths[4]), b"CONTENT 4")
    os.utime(paths[4], ns=(before.st_atime_ns, before.st_mtime_ns))
    time.sleep(0.02)
    assert DigestMemory(tmp_path / "m").files(paths)[4] == files.file_digest(Path(paths[4])) != expected[4]
    assert counted == [paths[4]]
    counted.clear()
    more = old_file(tmp_path / "data" / "0" / "new", b"new")
    time.sleep(0.02)
    assert DigestMemory(tmp_path / "m").files([more, *paths[5:]])[1:] == expected[5:]
    assert counted == [more]


def test_single_files_keys_and_damaged_memories(tmp_path: Path, counted: list[str]) -> None:
    path = old_file(tmp_path / "weights", b"weights")
    time.sleep(0.02)
    for _ in range(2):
        assert DigestMemory(tmp_path / "m").file(path) == files.file_digest(Path(path))
    assert counted == [path]
    memory = DigestMemory(tmp_path / "m")
    memory.files([path])
    assert memory.recall("a key") is None
    memory.remember("a key", "abc")
    assert DigestMemory(tmp_path / "m").recall("a key") == "abc"
    for stored in (tmp_path / "m").iterdir():
        data = bytearray(stored.read_bytes())
        data[len(data) // 2] ^= 1
        stored.write_bytes(data)
    assert memory.recall("a key") is None
    assert memory.file(path) == memory.files([path])[0] == files.file_digest(Path(path))


def test_young_files_are_not_trusted(tmp_path: Path) -> None:
    memory = DigestMemory(tmp_path / "m")
    path = old_file(tmp_path / "data", b"first")
    first = memory.file(path), memory.files([path])
    old_file(tmp_path / "data", b"other")
    assert (memory.file(path), memory.files([path])) != first


def test_a_change_within_the_clocks_step_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time_ns()
    monkeypatch.setattr(digests, "file_stamp", lambda path: (5, now, now, 1))
    memory, path = DigestMemory(tmp_path / "m"), tmp_path / "data"
    path.write_bytes(b"first")
    first = memory.file(path), memory.files([str(path)])
    path.write_bytes(b"other")
    second = memory.file(path), memory.files([str(path)])
    assert first[0] != second[0]
    assert first[1] != second[1]


def file_in_place(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_bytes(b"a file")


def test_a_file_in_the_place_of_an_entry_is_moved_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path)
    file_in_place(build(cache))
    with caplog.at_level(logging.WARNING, logger="dq_lightning"):
        assert (build(cache) / "a.bin").read_bytes() == b"some bytes"
    assert "it is not a folder" in caplog.text


def test_a_memory_that_cannot_be_written_still_answers(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("a file in the way")
    path = old_file(tmp_path / "data", b"x")
    memory = DigestMemory(tmp_path / "m")
    memory.remember("k", "v")
    assert memory.recall("k") is None
    assert memory.files([path]) == [memory.file(path)]
    assert stat.S_ISREG((tmp_path / "m").stat().st_mode)


@pytest.mark.parametrize(("code", "stays"), [(errno.EACCES, True), (errno.EROFS, True), (errno.EIO, False)])
def test_an_entry_that_cannot_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int, stays: bool
) -> None:
    cache = Cache(tmp_path)
    entry = build(cache)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code), str(entry))

    monkeypatch.setattr("dq_lightning.cache.entries.check_entry", refuse)
    if stays:
        with pytest.raises(CacheError, match=r"repair its permissions, or pass another folder as cache_dir="):
            cache.find("2-bins", PARTS)
    else:
        assert cache.find("2-bins", PARTS) is None
        assert "it cannot be read" in caplog.text
    assert entry.exists() == stays
