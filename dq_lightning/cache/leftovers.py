"""What killed processes left in the cache, and when it may go. Touches the disk."""

import contextlib
import math
from collections.abc import Iterable
from pathlib import Path

from dq_lightning.cache import files
from dq_lightning.cache.lock import UNKNOWN, host_name, process_alive
from dq_lightning.cache.shards import remove_abandoned

# its process is gone; whoever it started may still be about to end
STALE_SECONDS = 60.0
# perhaps of another machine of that name
UNSURE_STALE_SECONDS = 24 * 3600.0
# of another host, container or boot, whose processes cannot be asked about
FOREIGN_STALE_SECONDS = 7 * 24 * 3600.0


def remove_stale(folder: Path, now: float) -> None:
    """Remove temp folders and files that nobody works on any more, and the shards of entries that nobody goes on with.

    Args:
        folder: of a station.
        now: seconds since 1970 by the clock that stamps the folder's files.
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
    """Remove what killed processes and damage left in some folders: stale temp folders, and entries that were moved aside."""
    for folder in folders:
        if folder.is_dir():
            with contextlib.suppress(OSError):
                remove_stale(folder, files.clock_of(folder))
            for damaged in folder.glob(".damaged-*"):
                files.remove(damaged)
