"""Maintenance of compact sets and caches: checking whole files, and removing entries by age or size."""

import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path

from filelock import FileLock, Timeout

from dq_lightning.cache import files
from dq_lightning.cache.api_embeddings import API_FOLDER
from dq_lightning.cache.entries import STATIONS, Cache, EntryInfo
from dq_lightning.cache.leftovers import clean
from dq_lightning.cache.manifest import MANIFEST, Damage, check_entry, read_manifest
from dq_lightning.core.errors import CacheError, ConfigError, StoreError

# An entry that was made or opened within this time may be about to be opened by the run that asked for it.
RECENT_SECONDS = 60.0
# Readers keep this file of an entry open.
VALUES_FILE = "values.bin"


def verify_folder(path: str | Path) -> dict[Path, str]:
    """Compare every file of one or many entries with the recorded size and SHA-256. Nothing is changed.

    Args:
        path: folder of a compact set, of any other entry, or of a whole cache.

    Returns:
        For each entry the reason why it cannot be used, by its folder; an empty text for one that is intact.

    Raises:
        StoreError: the folder holds no entry.
    """
    place = Path(path).expanduser()
    entries = [place]
    if not (place / MANIFEST).exists():
        found = (sorted((place / station).iterdir()) for station in STATIONS if (place / station).is_dir())
        entries = [path for path in chain.from_iterable(found) if path.is_dir() and not path.name.startswith(".")]
    if not entries:
        raise StoreError(
            f"{place} is neither a compact set nor a cache of this package (there is no {MANIFEST}): pass StoreInfo.path, a "
            "copy of that folder, or the folder of the cache"
        )
    return {entry: _problem(entry) for entry in entries}


def _problem(folder: Path) -> str:
    try:
        values = read_manifest(folder)
        check_entry(folder, "hash", station=str(values.get("station")), key=str(values.get("key")))
    except (Damage, OSError) as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Pruned:
    """The result of `prune`.

    Attributes:
        removed: entries that were removed, or would be in a dry run.
        busy: entries that were due for removal but stay, because they are in use or were made or used a moment ago.
        left_bytes: total size in bytes of the entries that stay.
    """

    removed: list[EntryInfo]
    busy: list[EntryInfo]
    left_bytes: int


def prune(
    root: str | Path, *, older_than_days: float | None = None, max_bytes: int | None = None, dry_run: bool = False
) -> Pruned:
    """Remove entries from a cache by age, then the longest unused ones until the rest is small enough.

    An entry was last used when a run last found it, and at the earliest when it was made. On file systems that record
    reading (many do so once a day), it also counts as used when one of its files was last read.

    An entry stays while it is being made, while a process of this host has its samples open, and for one minute after
    it was made or used. On POSIX systems, files that a training on another host has open stay readable: an entry is
    removed by a rename, and its space is freed when the last reader closes it. A training that opens its entry again
    after that (such as the workers of a later epoch) stops with an error that says so, and makes the entry again at its
    next start. What killed processes left behind, and damaged entries that were moved aside, are removed as well.

    The bounds are the days since an entry was last used, and the bytes of all entries that stay; None sets no bound. A
    dry run only reports what would be removed.

    Raises:
        ConfigError: neither bound is given, or one is negative.
        CacheError: there is no cache at `root`, or an entry cannot be removed.
    """
    if older_than_days is None and max_bytes is None:
        raise ConfigError(
            "prune has no limit to go by: pass older_than_days=, max_bytes= (on the command line --max_size), or both"
        )
    if (older_than_days or 0) < 0 or (max_bytes or 0) < 0:
        raise ConfigError(
            f"the limits of prune must not be negative, got older_than_days={older_than_days}, max_bytes={max_bytes}"
        )
    cache = Cache(root)
    if not cache.root.is_dir():
        raise CacheError(
            f"there is no cache at {cache.root}: pass the folder of the cache as cache_dir=, or set DQ_LIGHTNING_CACHE"
        )
    now = time.time()
    with suppress(OSError):
        # This is the clock that stamps the cache's files; by another clock everything could look old.
        now = files.clock_of(cache.root)
    entries = cache.entries()
    used = {entry.path: last_used(entry) for entry in entries}
    entries.sort(key=lambda entry: (used[entry.path], entry.path))
    total = sum(entry.bytes for entry in entries)
    removed, busy = [], []
    for entry in entries:
        old = older_than_days is not None and now - used[entry.path] > 86400 * older_than_days
        if not old and (max_bytes is None or total <= max_bytes):
            continue
        # The time of last use is read again, because a run may have found the entry in the meantime.
        if now - last_used(entry) > RECENT_SECONDS and _remove(cache, entry, dry_run):
            removed.append(entry)
            total -= entry.bytes
        else:
            busy.append(entry)
    if not dry_run:
        named = [cache.root / name for name in (*STATIONS, ".locks", cache.memory.folder.name)]
        clean([*named, *(cache.root / API_FOLDER).glob("*")])
    return Pruned(removed, busy, total)


def last_used(entry: EntryInfo) -> float:
    """Return when a run last found an entry, or one of its files was read or written, in seconds since 1970; or 0."""
    times = []
    with suppress(ValueError):
        times.append(datetime.fromisoformat(entry.created).timestamp())
    with suppress(OSError):
        for path in entry.path.iterdir():
            # Listing the cache reads the manifest, so its access time says nothing; a run that finds the entry renews
            # the manifest's modification time.
            seen = path.stat()
            times.append(seen.st_mtime if path.name == MANIFEST else max(seen.st_atime, seen.st_mtime))
    return max(times, default=0.0)


def _remove(cache: Cache, entry: EntryInfo, dry_run: bool) -> bool:
    """Remove an entry, and return whether it is gone; False while a process makes it or has its samples open."""
    if files.is_shared(entry.path / VALUES_FILE):
        return False
    lock = FileLock(cache.root / ".locks" / f"{entry.station}-{entry.key}", thread_local=False)
    try:
        files.make_folder(cache.root / ".locks")
        lock.acquire(timeout=0)
        held = True
    except Timeout:
        return False
    except (OSError, NotImplementedError):
        # Locks only save work, so without them the age alone decides.
        held = False
    try:
        if not dry_run:
            cache.retire(entry.path)
    except OSError as error:
        raise CacheError(
            f"{entry.path} cannot be removed ({error}): repair its permissions, or remove it by hand"
        ) from error
    finally:
        if held:
            lock.release()
    return True
