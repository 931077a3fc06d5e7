"""The cache on disk, in which every entry is either complete and correct, or absent.

An entry is made in a temporary folder beside its place, synced, sealed with a manifest and renamed. Readers open only
entries that have a manifest; a damaged entry is moved aside, reported with the reason, and made again.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import platformdirs

from dq_lightning.cache import files
from dq_lightning.cache.digests import DigestMemory
from dq_lightning.cache.leftovers import remove_stale
from dq_lightning.cache.lock import host_name, work_lock
from dq_lightning.cache.manifest import MANIFEST, Damage, check_entry, read_manifest, write_manifest
from dq_lightning.cache.misses import describe_change
from dq_lightning.cache.shards import remove_shards
from dq_lightning.core.config import VerifyPolicy
from dq_lightning.core.errors import CacheError, StoreError
from dq_lightning.core.fields import check_choice, check_local

logger = logging.getLogger("dq_lightning")

Read = TypeVar("Read")
STATIONS = ("1-features", "2-bins", "3-selection", "4-patches", "5-store", "6-filled")
COMMIT_ATTEMPTS = 10


@dataclass(frozen=True)
class EntryInfo:
    """One entry of the cache.

    Attributes:
        station: name of the station's folder, such as "2-bins".
        key: key of the entry, 32 hexadecimal digits.
        path: folder of the entry.
        bytes: total size of its files in bytes.
        created: time when it was made, ISO 8601 in UTC.
        parts: parts that the key was made from.
    """

    station: str
    key: str
    path: Path
    bytes: int
    created: str
    parts: dict[str, Any]


def default_cache_dir() -> Path:
    """Return the folder named by `DQ_LIGHTNING_CACHE`, or else the platform's cache folder."""
    chosen = os.environ.get("DQ_LIGHTNING_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("dq_lightning"))


def require_space(path: str | Path, needed: int) -> None:
    """Check that the file system of a path, which may not exist yet, has enough free space, in bytes.

    Raises:
        CacheError: fewer bytes are free.
    """
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CacheError(
            f"{needed:,} bytes are needed under {path}, but only {free:,} are free: make room, or pass another cache_dir="
        )


class Cache:
    """Entries, found by station and key, under one root folder that is created at the first write.

    Args:
        root: root folder of the cache.
        verify: how an entry is checked before use: "size" compares names and sizes of the files (and the content of
            small ones), "hash" the content of all files, "off" only reads the manifest.

    Attributes:
        root: absolute path of the root folder.
        verify: the policy that was passed.
        memory: remembered digests of files and tables.

    Raises:
        ConfigError: `verify` is none of the above, or `root` is the address of a remote place.
    """

    def __init__(self, root: str | Path, *, verify: VerifyPolicy = "size") -> None:
        check_choice("Cache", "verify", verify, VerifyPolicy)
        check_local("cache_dir", root)
        self.root = Path(root).expanduser().absolute()
        self.verify: VerifyPolicy = verify
        self.memory = DigestMemory(self.root / "0-digests")
        self._reported: set[Path] = set()

    def key(self, station: str, parts: dict[str, Any]) -> str:
        """Return the key: 32 hexadecimal digits of the SHA-256 of the station and the canonical JSON of `parts`.

        Raises:
            CacheError: `parts` is not plain JSON.
        """
        return hashlib.sha256(f"{station}\n{_canonical_parts(station, parts)}".encode()).hexdigest()[:32]

    def place(self, station: str, parts: dict[str, Any]) -> Path:
        """Return the folder where the entry is or would be.

        Raises:
            CacheError: the station is unknown, or `parts` is not plain JSON.
        """
        if station not in STATIONS:
            raise CacheError(f"{station!r} is not a station: the stations are {', '.join(STATIONS)}")
        return self.root / station / self.key(station, parts)

    def find(self, station: str, parts: dict[str, Any]) -> Path | None:
        """Return the folder of a complete and verified entry, or None. A damaged entry is moved aside and reported.

        Raises:
            CacheError: the entry exists, but this process has no permission to read it.
        """
        return self._find(self.place(station, parts))

    def _find(self, target: Path) -> Path | None:
        try:
            # exists() would report "absent" where permission is denied, so the entry is looked at with lstat().
            target.lstat()
            check_entry(target, self.verify, station=target.parent.name, key=target.name)
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            # The folder of the station or that of the entry is not a folder.
            if os.path.lexists(target):
                self._move_aside(target, "it is not a folder")
            return None
        except Damage as damage:
            if not os.path.lexists(target):
                return None
            self._move_aside(target, str(damage))
            return None
        except OSError as error:
            if error.errno in files.READ_ONLY_ERRORS:
                raise CacheError(
                    f"{target} cannot be read ({error}): repair its permissions, or pass another folder as cache_dir="
                ) from error
            self._move_aside(target, f"it cannot be read ({error})")
            return None
        with contextlib.suppress(OSError):
            # A builder that was killed after it had put its entry in place left the shards; newer ones belong to
            # another.
            remove_shards(target, before=target.stat().st_mtime)
            # prune goes by this modification time, because few file systems record when a file was read.
            os.utime(target / MANIFEST)
        return target

    def _move_aside(self, target: Path, reason: str) -> None:
        """Rename a damaged entry to `.damaged-...`, unless another process has replaced it by a good one meanwhile."""
        aside = target.with_name(f".damaged-{target.name}-{os.urandom(4).hex()}")
        try:
            files.rename(target, aside)
        except FileNotFoundError:
            return
        except OSError as error:
            if target not in self._reported:
                self._reported.add(target)
                logger.warning(
                    "%s is damaged and not used: %s. It cannot be renamed (%s): remove it by hand.",
                    target,
                    reason,
                    error,
                )
            return
        try:
            check_entry(aside, self.verify, station=target.parent.name, key=target.name)
        except (Damage, OSError):
            logger.warning("%s is damaged: %s. It was moved to %s and will be made again.", target, reason, aside.name)
            return
        # Another process repaired the entry between our check and our rename: put it back, or drop it if there is
        # another.
        try:
            files.rename(aside, target)
        except OSError:
            files.remove_folder(aside)

    def build(self, station: str, parts: dict[str, Any], write: Callable[[Path], None], *, force: bool = False) -> Path:
        """Find an entry, or make it.

        Args:
            station: one of STATIONS.
            parts: plain JSON that the key is made from.
            write: function that fills the empty folder it is given with plain files.
            force: make the entry even if it exists; the old one is removed once the new one is complete.

        Returns:
            Folder of the entry.

        Raises:
            CacheError: the cache cannot be written, or the disk is full.
        """
        target = self.place(station, parts)
        if not force and (found := self._find(target)):
            return found
        with files.explained(target):
            files.make_folder(target.parent)
        locks = self.root / ".locks"
        with contextlib.suppress(OSError):
            locks.mkdir(exist_ok=True)

        def finished() -> bool:
            return not force and (target / MANIFEST).exists()

        with work_lock(locks / f"{station}-{target.name}", finished):
            if not force and (found := self._find(target)):
                return found
            return self._make(target, parts, write, force)

    def read(self, station: str, parts: dict[str, Any], read: Callable[[Path], Read]) -> Read | None:
        """Find an entry and read it; None if it is not there, or proves damaged while it is read.

        `read` is a function that reads the entry from its folder; it raises StoreError if the entry cannot be used.

        Raises:
            CacheError: the entry exists, but this process has no permission to read it.
            StoreError: the entry cannot be used although its files are those that were written.
        """
        path = self.find(station, parts)
        try:
            return None if path is None else read(path)
        except StoreError:
            # The reader requested a full check, or the entry was removed meanwhile, so this call compares all files.
            path = self.find(station, parts)
            return None if path is None else read(path)

    def load(
        self,
        station: str,
        parts: dict[str, Any],
        write: Callable[[Path], None],
        read: Callable[[Path], Read],
        *,
        force: bool = False,
    ) -> Read:
        """Find an entry or make it, and read it. An entry that proves damaged while it is read is made again, once.

        The arguments are those of `build` and of `read`, whose value is returned.

        Raises:
            CacheError: the cache cannot be written, or the disk is full.
            StoreError: the entry cannot be used even after it was made again.
        """
        path = self.build(station, parts, write, force=force)
        try:
            return read(path)
        except StoreError:
            # The reader requested a full check, or the entry was removed meanwhile, so this call compares all files.
            return read(self.build(station, parts, write))

    def _make(self, target: Path, parts: dict[str, Any], write: Callable[[Path], None], force: bool) -> Path:
        temp = target.with_name(f".tmp-{host_name()}-{os.getpid()}-{target.name}-{os.urandom(4).hex()}")
        try:
            with files.explained(target, temp):
                files.make_folder(temp, new=True)
                # The age of leftovers is measured by the clock that stamped them, which may differ from this process's
                # clock.
                remove_stale(target.parent, temp.stat().st_mtime)
                write(temp)
            with files.explained(target):
                write_manifest(
                    temp, station=target.parent.name, key=target.name, parts=json.loads(files.canonical_json(parts))
                )
                self._commit(temp, target, force)
        finally:
            files.remove_folder(temp)
        remove_shards(target)
        return target

    def _commit(self, temp: Path, target: Path, force: bool) -> None:
        """Rename our folder to the entry's place. The first good entry wins, except that `force` replaces it."""
        for _ in range(COMMIT_ATTEMPTS):
            try:
                files.rename(temp, target)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
                    raise
                if force:
                    self.retire(target)
                elif self._find(target):
                    return
                elif os.path.lexists(target):
                    raise CacheError(f"{target} is damaged and cannot be renamed: remove it by hand") from error
            else:
                files.fsync_folder(target.parent)
                return
        raise CacheError(f"{target} could not be put in place, because other processes keep replacing it: start again")

    def retire(self, target: Path) -> None:
        """Remove an entry. Open files of it stay readable, because files are never rewritten in place."""
        old = target.with_name(f".old-{host_name()}-{os.getpid()}-{target.name}-{os.urandom(4).hex()}")
        with contextlib.suppress(FileNotFoundError):
            files.rename(target, old)
        files.remove_folder(old)

    def explain_miss(self, station: str, parts: dict[str, Any], *, maybe_split: bool = False) -> str:
        """Return one line that says how the nearest entry of the station differs from `parts`, or that none exists.

        `maybe_split` is as in `describe_change`.
        """
        wanted = json.loads(_canonical_parts(station, parts))
        existing = [entry.parts for entry in self._entries(station)]
        return describe_change(station, wanted, existing, maybe_split=maybe_split)

    def entries(self) -> list[EntryInfo]:
        """Return all entries with a readable manifest, sorted by station and key."""
        return [entry for station in STATIONS for entry in self._entries(station)]

    def _entries(self, station: str) -> Iterator[EntryInfo]:
        folder = self.root / station
        if not folder.is_dir():
            return
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            try:
                values = read_manifest(path)
            except (Damage, OSError):
                continue
            size = sum(facts["size"] for facts in values["files"].values())
            yield EntryInfo(station, path.name, path, size, str(values.get("created")), values["parts"])


def _canonical_parts(station: str, parts: dict[str, Any]) -> str:
    """Return the canonical JSON of a key's parts; CacheError if they are not plain JSON with text as dict keys."""
    try:
        text = files.canonical_json(parts)
    except (TypeError, ValueError, RecursionError) as error:
        raise CacheError(f"the key of {station} needs plain JSON values, got {parts!r:.200}: {error}") from error
    # json converts other dict keys to text, so two different parts could have the same key.
    if _has_other_keys(parts):
        raise CacheError(f"the key of {station} needs text as dict keys: {parts!r:.200}")
    return text


def _has_other_keys(value: Any) -> bool:
    if isinstance(value, dict):
        return any(not isinstance(key, str) or _has_other_keys(inner) for key, inner in value.items())
    return isinstance(value, list | tuple) and any(map(_has_other_keys, value))
