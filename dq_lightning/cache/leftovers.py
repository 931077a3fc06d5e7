"""Removal of what killed processes left in the cache, once it is old enough."""

import contextlib
import math
from collections.abc import Iterable
from pathlib import Path

from dq_lightning.cache import files
from dq_lightning.cache.lock import UNKNOWN, host_name, process_alive
from dq_lightning.cache.shards import remove_abandoned

# The process is gone, but processes that it started may still be about to end.
STALE_SECONDS = 60.0
# The leftover may come from another machine with the same name, because boot and container are unknown.
UNSURE_STALE_SECONDS = 24 * 3600.0
# The leftover comes from another host, container or boot, whose processes cannot be checked.
FOREIGN_STALE_SECONDS = 7 * 24 * 3600.0


def remove_stale(folder: Path, now: float) -> None:
    """Remove temporary folders and files of a station that no process works on, and the shards of abandoned entries.

    `now` is the current time in seconds since 1970, by the clock that stamps the folder's files.
    """
    for leftover in [*folder.glob(".tmp-*"), *folder.glob(".old-*")]:
        _, host, pid, *_ = [*leftover.name.split("-"), "", ""]
        age = now - files.last_change(leftover)
        limit = FOREIGN_STALE_SECONDS
        if host == host_name() and pid.isdecimal():
            limit = UNSURE_STALE_SECONDS if host.endswith(UNKNOWN) else STALE_SECONDS
            limit = math.inf if process_alive(int(pid)) else limit
        if age > limit:
            files.remove(leftover)
    remove_abandoned(folder, now)


def clean(folders: Iterable[Path]) -> None:
    """Remove stale temporary folders, and damaged entries that were moved aside; missing folders are skipped."""
    for folder in folders:
        if folder.is_dir():
            with contextlib.suppress(OSError):
                remove_stale(folder, files.clock_of(folder))
            for damaged in folder.glob(".damaged-*"):
                files.remove(damaged)
