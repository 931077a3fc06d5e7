"""Pipes, holes, compressed tables and absurd numbers in a cache: an error or nothing, at once and in little memory."""

import io
import json
import os
import random
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dq_lightning.cache import files, lock
from dq_lightning.cache.api_embeddings import StoredEmbeddings
from dq_lightning.cache.digests import DigestMemory
from dq_lightning.cache.entries import Cache
from dq_lightning.cache.leftovers import remove_stale
from dq_lightning.cache.manifest import MANIFEST
from dq_lightning.cache.shards import KeptShards, partial_folder
from dq_lightning.cache.tensor_files import read_tensor_file, write_tensor_file
from dq_lightning.core.errors import StoreError
from dq_lightning.pipeline.compact import open_compact
from tests.full_count import FULL
from tests.robustness.worlds import ended, forked

LIMIT = 1 << 22


def in_time_and_memory(act) -> None:
    """In a child: what hangs or takes much fails."""

    def limited() -> None:
        tracemalloc.start()
        act()
        assert tracemalloc.get_traced_memory()[1] < LIMIT

    assert ended(forked(limited), 20) == 0


def pipe(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


def hole(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(1 << 40)


def hole_with_a_header(path: Path) -> None:
    """It claims to hold all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"dtype": "U8", "shape": [(1 << 40) - 512], "data_offsets": [0, (1 << 40) - 512]}
    header = json.dumps({"key": facts}).encode().ljust(504)
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 1 << 40)


ODD = {"pipe": pipe, "hole": hole, "hole with a header": hole_with_a_header}


@pytest.mark.parametrize("kind", ODD)
def test_in_place_of_shards_and_paid_rows(kind: str, tmp_path: Path) -> None:
    entry = tmp_path / "1-features" / ("ab" * 16)
    ODD[kind](partial_folder(entry) / "000000000000-000000000005-ab.shard")
    ODD[kind](tmp_path / "paid" / "model" / "x-1.rows")

    def read() -> None:
        assert list(KeptShards(entry, "features").restore(5)) == []
        assert b"" not in StoredEmbeddings(tmp_path / "paid" / "model")
        assert not list(partial_folder(entry).iterdir())

    in_time_and_memory(read)


@pytest.mark.parametrize("kind", ["pipe", "hole"])
def test_in_place_of_a_manifest(kind: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    place = cache.place("2-bins", {"a": 1})
    ODD[kind](place / MANIFEST)
    ODD[kind](tmp_path / "copied" / MANIFEST)

    def read() -> None:
        assert cache.find("2-bins", {"a": 1}) is None
        with pytest.raises(StoreError):
            open_compact(tmp_path / "copied")

    assert ended(forked(read), 20) == 0


def test_in_place_of_remembered_digests(tmp_path: Path) -> None:
    memory = DigestMemory(tmp_path / "memory")
    memory.remember("key", "digest")
    data = [tmp_path / name for name in ("a", "b")]
    for path in data:
        path.write_bytes(b"content")
    expected = memory.files([str(path) for path in data])
    known = list((tmp_path / "memory").iterdir())
    assert len(known) == 2
    for path in known:
        path.unlink()
        pipe(path)

    def read() -> None:
        assert memory.recall("key") is None
        assert memory.files([str(path) for path in data]) == expected

    assert ended(forked(read), 20) == 0


def test_a_table_of_digests_that_grows_when_it_is_read(tmp_path: Path) -> None:
    memory = DigestMemory(tmp_path / "memory")
    (tmp_path / "a").write_bytes(b"content")
    expected = memory.files([str(tmp_path / "a")])
    (table,) = (tmp_path / "memory").iterdir()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, names=np.zeros(1 << 27, np.uint8), stamps=np.zeros(1), digests=np.zeros(1))
    assert len(buffer.getvalue()) < 1 << 18
    table.write_bytes(buffer.getvalue())
    del buffer

    def read() -> None:
        assert memory.files([str(tmp_path / "a")]) == expected

    in_time_and_memory(read)


def test_absurd_numbers_of_processes(tmp_path: Path) -> None:
    owner = tmp_path / "lock.owner"
    owner.write_text('{"host": "x", "pid": Infinity, "beat": 1}')
    assert lock._read_beat(owner) is None
    assert not lock.process_alive(10**30)
    for pid in (str(10**30), "\u00b2", "\u0661"):
        (tmp_path / f".tmp-{lock.host_name()}-{pid}-x").mkdir()
    remove_stale(tmp_path, files.clock_of(tmp_path) + 100)


def test_tensors_of_another_length_than_their_header_says(tmp_path: Path) -> None:
    path = tmp_path / "tensors"
    written = {"a": torch.arange(3), "b": torch.zeros(2, 0), "c": torch.tensor(True), "d": torch.arange(5).bfloat16()}
    write_tensor_file(path, written, {"of": "x"})
    for found in (read_tensor_file(path)[0], load_file(path)):
        assert all(
            torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in written.items()
        )
    whole = path.read_bytes()
    for content in (whole + b"\0", whole[:-1], whole[:8], b""):
        path.write_bytes(content)
        with pytest.raises(StoreError):
            read_tensor_file(path)
    path.write_bytes(whole)
    with pytest.raises(StoreError, match="belongs to other work"):
        read_tensor_file(path, attributes={"of": "y"})
    assert read_tensor_file(path, attributes={"of": "x"})[1] == {"of": "x"}
    for tensor in (torch.zeros(1, dtype=torch.complex64), torch.zeros(1, dtype=torch.uint16)):
        with pytest.raises(StoreError, match="cannot be stored"):
            write_tensor_file(tmp_path / "other", {"a": tensor}, {})
    save_file(written, path)
    with pytest.raises(StoreError):
        read_tensor_file(path)


def test_who_may_only_read_still_sees_that_a_file_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "values.bin"
    path.write_bytes(b"x")
    really = os.open

    def refuse_to_write(place, flags, *more):
        if flags & os.O_RDWR:
            raise PermissionError
        return really(place, flags, *more)

    monkeypatch.setattr(os, "open", refuse_to_write)
    assert not files.is_shared(path)
    with path.open("rb") as file:
        files.share(file.fileno())
        assert files.is_shared(path)

    def refuse(place, flags, *more):
        raise PermissionError

    monkeypatch.setattr(os, "open", refuse)
    assert files.is_shared(path)


def test_any_changed_bit_of_remembered_digests_is_made_good(tmp_path: Path) -> None:
    memory = DigestMemory(tmp_path / "memory")
    data = [tmp_path / name for name in ("a", "b")]
    for path in data:
        path.write_bytes(path.name.encode())
        os.utime(path, ns=(0, 0))
    paths = [str(path) for path in data]
    expected = memory.files(paths)
    memory.remember("key", "digest")
    table, remembered = sorted((tmp_path / "memory").iterdir())
    assert (table.suffix, remembered.suffix) == (".npz", ".json")
    draw = random.Random(0)
    for path in (table, remembered):
        content = path.read_bytes()
        for at in range(0, len(content), 1 if FULL else 3):
            damaged = bytearray(content)
            damaged[at] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            assert memory.files(paths) == expected
            assert memory.recall("key") in (None, "digest")
        path.write_bytes(content)
    table.write_bytes(b"PK")
    assert memory.files(paths) == expected


def test_a_pipe_in_place_of_the_beat_of_a_lock(tmp_path: Path) -> None:
    pipe(tmp_path / "lock.owner")
    assert ended(forked(lambda: lock._read_beat(tmp_path / "lock.owner")), 20) == 0


def test_shards_that_a_killed_builder_left_beside_its_entry(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    entry = cache.build("2-bins", {"a": 1}, lambda folder: (folder / "x").write_bytes(b"x") and None)
    shards = partial_folder(entry)
    shards.mkdir(parents=True)
    (shards / "000000000000-000000000005-ab.shard").write_bytes(b"x")
    # of a builder that makes the entry anew
    assert cache.find("2-bins", {"a": 1}) == entry
    later = time.time() + 100
    os.utime(shards, (later, later))
    assert cache.find("2-bins", {"a": 1}) == entry
    assert shards.exists()
    for path in (*shards.iterdir(), shards):
        os.utime(path, (1e9, 1e9))
    assert cache.find("2-bins", {"a": 1}) == entry
    assert not shards.exists()
