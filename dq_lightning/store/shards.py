"""Finished work of an entry that is not finished: a killed run goes on where its last shard ends. Touches the disk.

A shard is one file under ROOT/0-partial/STATION/KEY/, written beside, synced and renamed. It holds the arrays that the work
on some consecutive samples gave, in the order of the work: samples START to STOP.

    START-STOP-RANDOM.shard    uint64 length of the header | header (JSON) | arrays, each padded to 8 bytes | sha256 of all that

Shards are cut by time, not by count: nothing is written by work that is soon done, and a killed run loses `LEAST_SECONDS` of
work, or up to `MOST_SECONDS` where the disk is so slow that shorter shards would cost over 2 %. Where a shard ends depends on
the clock, what is in it does not: loops cut between their batches, and go on with the batches of an undisturbed run.

Shards only save work. Builders of one key side by side write files of their own names and may read each other's. One that is
damaged, of another key or made from something else is dropped; its samples are done again, and so is what follows, unless
another builder's shards lead there. When none can be written (on a full disk, say), a warning says so and the stage goes on.
"""

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_lightning.errors import StoreError
from dq_lightning.resuming import Array
from dq_lightning.store import files
from dq_lightning.store.lock import host_name
from dq_lightning.store.values import plain_shape

logger = logging.getLogger("dq_lightning")

PARTIAL_FOLDER = "0-partial"
FORMAT = "dq_lightning shard 1"
LEAST_SECONDS, MOST_SECONDS = 20.0, 60.0
# the work between two shards takes at least so many times as long as writing one
WORK_PER_COST = 50.0
ABANDONED_SECONDS = 14 * 24 * 3600.0
DTYPES = ("|u1", "<i4", "<i8", "<f4")
DIGEST_BYTES, ALIGNMENT, CHUNK_BYTES, MAX_HEADER_BYTES = 32, 8, 16 << 20, 1 << 20


def partial_folder(entry: Path) -> Path:
    """Where the shards of an entry are, which itself is or will be at ROOT/STATION/KEY."""
    return entry.parent.parent / PARTIAL_FOLDER / entry.parent.name / entry.name


def remove_shards(entry: Path) -> None:
    """Take the shards of an entry away, as far as possible."""
    if (folder := partial_folder(entry)).exists():
        files.remove_folder(folder)


def remove_abandoned(station: Path, now: float) -> None:
    """Remove shards of a station's entries to which nothing was added for two weeks.

    Args:
        station: its folder, ROOT/STATION.
        now: seconds since 1970 by the clock that stamps its files.
    """
    for folder in (station.parent / PARTIAL_FOLDER / station.name).glob("*"):
        if now - files.last_change(folder) > ABANDONED_SECONDS:
            files.remove(folder)


class KeptShards:
    """The shards of one entry that is being made; implements `resuming.Shards`.

    Args:
        entry: where the entry will be.
        noun: what the work is called in messages.
        fresh: remove what is there.

    Attributes:
        reserve_bytes: what the entry itself needs on the disk: no shard is written that would leave less room.
        made_from: what the work depends on in its last bits and the key does not tell, such as the entries it reads.
    """

    def __init__(self, entry: Path, noun: str, *, fresh: bool = False) -> None:
        if fresh:
            remove_shards(entry)
        self.reserve_bytes = 0
        self.made_from = ""
        self._folder, self._noun = partial_folder(entry), noun
        self._loop_made_from = ""
        self._key = f"{entry.parent.name} {entry.name}"
        self._done = 0
        self._since: float | None = None
        self._interval = LEAST_SECONDS
        self._given_up = False

    def restore(self, total: int, made_from: str = "") -> Iterator[dict[str, Array]]:
        """See `resuming.Shards`. Each shard is read when its turn comes; memory holds one at a time."""
        self._loop_made_from, self._done = made_from, 0
        listed = sorted(self._folder.glob("*.shard"), key=_stop, reverse=True)
        while found := next((path for path in listed if path.name.startswith(f"{self._done:012}-")), None):
            listed.remove(found)
            stop = _stop(found)
            try:
                arrays = self._read(found, self._done, stop)
            except FileNotFoundError:
                # another builder has finished the entry
                continue
            except (OSError, StoreError) as error:
                logger.warning("%s: dropping a shard of finished work (%s: %s)", self._noun, found, error)
                files.remove(found)
                continue
            yield arrays
            self._done = stop
        if self._done:
            logger.info("resuming %s: %s of %s samples are there", self._noun, f"{self._done:,}", f"{total:,}")

    def is_due(self) -> bool:
        """See `resuming.Shards`."""
        if self._since is None:
            self._since = time.monotonic()
        return not self._given_up and time.monotonic() - self._since >= self._interval

    def keep(self, count: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """See `resuming.Shards`. Arrays of other dtypes than `DTYPES` are a programming error."""
        started = time.monotonic()
        if count and not self._given_up:
            try:
                self._write(self._done, self._done + count, arrays)
            except OSError as error:
                self._given_up = True
                logger.warning(
                    "%s: finished work cannot be kept (%s); if this run is killed, the next begins after %s samples",
                    *(self._noun, error, f"{self._done:,}"),
                )
            self._done += count
        self._since = time.monotonic()
        self._interval = min(max(LEAST_SECONDS, WORK_PER_COST * (self._since - started)), MOST_SECONDS)

    def _write(self, start: int, stop: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        header = _header(self._identity(start, stop), arrays)
        size = len(header) + sum(array.nbytes for array in arrays.values())
        files.make_folder(self._folder)
        if shutil.disk_usage(self._folder).free < size + self.reserve_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))
        name = os.urandom(4).hex()
        beside = self._folder / f".tmp-{host_name()}-{os.getpid()}-{name}"
        try:
            with files.Writer(beside) as file:
                file.write(header)
                for array in arrays.values():
                    data = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                    for at in range(0, len(data), CHUNK_BYTES):
                        file.write(data[at : at + CHUNK_BYTES])
                    file.write(bytes(-len(data) % ALIGNMENT))
                file.write(bytes.fromhex(file.sha256()))
            files.fsync_file(beside)
            files.rename(beside, self._folder / f"{start:012}-{stop:012}-{name}.shard")
        except BaseException:
            files.remove(beside)
            raise

    def _identity(self, start: int, stop: int) -> list[Any]:
        made_from = hashlib.sha256(f"{self.made_from} {self._loop_made_from}".encode()).hexdigest()
        return [FORMAT, self._key, made_from, start, stop]

    def _read(self, path: Path, start: int, stop: int) -> dict[str, Array]:
        """The arrays of a shard.

        Raises:
            StoreError: it is damaged, or not what its place and name say.
            OSError: it cannot be read.
        """
        data = np.fromfile(path, np.uint8)
        body = data[:-DIGEST_BYTES]
        if hashlib.sha256(body.data).digest() != data[-DIGEST_BYTES:].tobytes():
            raise StoreError("its content is not what was written")
        length = int.from_bytes(body[:ALIGNMENT].tobytes(), "little")
        if not 0 < length <= min(MAX_HEADER_BYTES, len(body) - ALIGNMENT):
            raise StoreError("it has no header")
        try:
            values = json.loads(body[ALIGNMENT : ALIGNMENT + length].tobytes())
            seen, listed = values["identity"], values["arrays"]
            if seen != self._identity(start, stop) or stop <= start:
                raise StoreError("it belongs to another entry, or was made from something else")
            return _arrays(body[ALIGNMENT + length :], listed)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise StoreError(f"its header cannot be read ({type(error).__name__})") from error


def _stop(path: Path) -> int:
    parts = path.name.split("-")
    return int(parts[1]) if len(parts) > 1 and parts[1].isdecimal() else 0


def _header(identity: list[Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    listed = []
    for name, array in arrays.items():
        if array.dtype.str not in DTYPES:
            raise StoreError(f"a shard holds arrays of {', '.join(DTYPES)}, and {name} is {array.dtype.str}")
        listed.append([name, array.dtype.str, list(array.shape)])
    values = {"identity": identity, "arrays": listed}
    text = files.canonical_json(values).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(ALIGNMENT, "little") + text


def _arrays(data: NDArray[np.uint8], listed: list[Any]) -> dict[str, Array]:
    found: dict[str, Array] = {}
    at = 0
    for name, dtype, shape in listed:
        if dtype not in DTYPES:
            raise StoreError(f"it holds an array of {dtype!r:.40}")
        size = math.prod(plain_shape(shape)) * np.dtype(dtype).itemsize
        if size > len(data) - at:
            raise StoreError("its arrays are cut")
        found[str(name)] = data[at : at + size].view(dtype).reshape(plain_shape(shape))
        at += size + -size % ALIGNMENT
    return found
