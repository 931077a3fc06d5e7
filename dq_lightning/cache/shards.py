"""Shards of an unfinished entry, with which a killed run continues where its last shard ends.

A shard is one file under ROOT/0-partial/STATION/KEY/ (for preparatory work under KEY/PART/). It holds the arrays that
the work on some consecutive samples gave, in the order of the work: samples START to STOP.

    START-STOP-RANDOM.shard    see `cache/tensor_files.py`

Shards are cut by time, not by count. Work that is soon done writes none, and a killed run loses `MIN_SECONDS` of
work, or up to `MAX_SECONDS` where the disk is so slow that shorter shards would cost over 2 %. Where a shard ends
depends on the clock, but its content does not: loops cut between their batches, and continue with the batches of an
undisturbed run.

Shards only save work. Builders of the same key that work side by side write files with different names, and may read
each other's. A shard that is damaged, of another key, or made from something else is dropped. Its samples are processed
again, and so are those after it, unless shards of another builder cover them. When no shard can be written (for
example, on a full disk), a warning says so and the stage continues.
"""

import errno
import hashlib
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from dq_lightning.cache import files
from dq_lightning.cache.tensor_files import MAX_HEADER_BYTES, read_tensor_file, replace_tensor_file
from dq_lightning.core.errors import StoreError
from dq_lightning.core.resuming import Array, Shards

logger = logging.getLogger("dq_lightning")

PARTIAL_FOLDER = "0-partial"
FORMAT = "dq_lightning shard 3"
MIN_SECONDS, MAX_SECONDS = 20.0, 60.0
# The work between two shards takes at least this many times as long as writing one.
WORK_PER_COST = 50.0
ABANDONED_SECONDS = 14 * 24 * 3600.0


def partial_folder(entry: Path) -> Path:
    """Return the folder of the shards of an entry, which is or will be at ROOT/STATION/KEY."""
    return entry.parent.parent / PARTIAL_FOLDER / entry.parent.name / entry.name


def remove_shards(entry: Path, before: float = math.inf) -> None:
    """Remove the shards of an entry as far as possible; all of them stay if any was written after the time `before`."""
    folder = partial_folder(entry)
    if folder.exists() and files.last_change(folder) <= before:
        files.remove_folder(folder)


def remove_abandoned(station: Path, now: float) -> None:
    """Remove the shards of a station's entries (ROOT/STATION) to which nothing was added for two weeks before `now`.

    Times are in seconds since 1970, by the clock that stamps the station's files.
    """
    for folder in (station.parent / PARTIAL_FOLDER / station.name).glob("*"):
        if now - files.last_change(folder) > ABANDONED_SECONDS:
            files.remove(folder)


class KeptShards(Shards):
    """The shards of one entry that is being made.

    Args:
        entry: folder where the entry will be.
        noun: name of the work in messages.
        part: name of preparatory work that has shards of its own; empty for the work on the entry itself.
        also: folder of another entry whose unfinished work can be used for this one as well.
        fresh: remove existing shards and use none.

    Attributes:
        reserve_bytes: free space in bytes that the entry itself needs; no shard is written that would leave less.
        made_from: text for what the last bits of the work depend on beside the key, such as the entries that it reads.
    """

    def __init__(
        self, entry: Path, noun: str, *, part: str = "", also: Path | None = None, fresh: bool = False
    ) -> None:
        if fresh:
            remove_shards(entry)
        self.reserve_bytes = 0
        self.made_from = ""
        self._folder, self._noun = partial_folder(entry) / part, noun
        others = [] if also is None or fresh else [also]
        self._keys = {partial_folder(e) / part: f"{e.parent.name} {e.name} {part}" for e in (entry, *others)}
        self._loop_made_from = ""
        self._done = 0
        self._since: float | None = None
        self._interval = MIN_SECONDS
        self._given_up = False

    def restore(self, total: int | None, made_from: str = "") -> Iterator[dict[str, Array]]:
        """Yield the arrays of earlier runs; only one shard at a time is in memory."""
        self._loop_made_from, self._done = made_from, 0
        listed = sorted((path for folder in self._keys for path in folder.glob("*.shard")), key=_stop, reverse=True)
        while found := next((path for path in listed if path.name.startswith(f"{self._done:012}-")), None):
            listed.remove(found)
            stop = _stop(found)
            try:
                tensors, _ = read_tensor_file(found, attributes=self._identity(found.parent, self._done, stop))
            except FileNotFoundError:
                # Another builder has finished the entry and removed its shards.
                continue
            except (OSError, StoreError) as error:
                logger.warning(
                    "%s: a file of finished work cannot be used and is removed (%s: %s), so this work is done again",
                    *(self._noun, found, error),
                )
                files.remove(found)
                continue
            # Another builder may remove the file at any time, and on a network its mapped pages would be gone with it.
            yield {name: tensor.clone().numpy() for name, tensor in tensors.items()}
            self._done = stop
        if self._done:
            of = "" if total is None else f"of {total:,} "
            logger.info("resuming %s: %s %ssamples are done already", self._noun, f"{self._done:,}", of)

    def is_due(self) -> bool:
        """Return whether enough time has passed to write a shard."""
        if self._since is None:
            self._since = time.monotonic()
        return not self._given_up and time.monotonic() - self._since >= self._interval

    def keep(self, count: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write a shard of the next `count` samples; a failure of the disk is only a warning.

        Raises:
            StoreError: an array has another dtype than `tensor_files.DTYPES`, which is a programming error.
        """
        started = time.monotonic()
        if count and not self._given_up:
            try:
                self._write(self._done, self._done + count, arrays)
            except OSError as error:
                self._given_up = True
                logger.warning(
                    "%s: finished work cannot be saved (%s), so if this run is killed, the next one continues after %s samples",
                    *(self._noun, error, f"{self._done:,}"),
                )
            self._done += count
        self._since = time.monotonic()
        self._interval = min(max(MIN_SECONDS, WORK_PER_COST * (self._since - started)), MAX_SECONDS)

    def _write(self, start: int, stop: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        size = MAX_HEADER_BYTES + sum(array.nbytes for array in arrays.values())
        files.make_folder(self._folder)
        if shutil.disk_usage(self._folder).free < size + self.reserve_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))
        name = f"{start:012}-{stop:012}-{os.urandom(4).hex()}.shard"
        # torch warns of arrays that cannot be written to.
        writable = {name: array if array.flags.writeable else array.copy() for name, array in arrays.items()}
        tensors = {name: torch.from_numpy(array) for name, array in writable.items()}
        replace_tensor_file(self._folder / name, tensors, self._identity(self._folder, start, stop))

    def _identity(self, folder: Path, start: int, stop: int) -> dict[str, Any]:
        made_from = hashlib.sha256(f"{self.made_from} {self._loop_made_from}".encode()).hexdigest()
        return {"format": FORMAT, "key": self._keys[folder], "made_from": made_from, "samples": [start, stop]}


def _stop(path: Path) -> int:
    parts = path.name.split("-")
    return int(parts[1]) if len(parts) > 1 and parts[1].isdecimal() else 0
