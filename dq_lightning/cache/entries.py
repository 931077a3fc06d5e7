"""The cache: every entry is either complete and right, or absent. Touches the disk.

An entry is made in a temp folder beside its place, synced, sealed with a manifest and renamed. Readers open manifested
entries only; a damaged one is moved aside, reported with the reason, and made again.
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
from dq_lightning.cache.digests import FileDigestMemory
from dq_lightning.cache.disk_errors import READ_ONLY_ERRORS, explained
from dq_lightning.cache.keys import canonical_parts
from dq_lightning.cache.leftovers import remove_stale
from dq_lightning.cache.lock import economy_lock, host_name
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
        station: its folder, such as "2-bins".
        key: 32 hexadecimal digits.
        path: folder of the entry.
        bytes: of all its files.
        created: ISO 8601, UTC.
        parts: what the key was made from.
    """

    station: str
    key: str
    path: Path
    bytes: int
    created: str
    parts: dict[str, Any]


def default_cache_dir() -> Path:
    """The folder in `DQ_LIGHTNING_CACHE`, or else the platform's cache folder."""
    chosen = os.environ.get("DQ_LIGHTNING_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("dq_lightning"))


def require_space(path: str | Path, needed: int) -> None:
    """Raise CacheError unless the file system of `path` has `needed` free bytes (`path` may not exist yet)."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CacheError(
            f"{needed:,} bytes are needed under {path}, {free:,} are free: make room, or pass another cache_dir="
        )


class Cache:
    """Entries by station and key under one root folder, which is made at the first write.

    Attributes:
        root: the folder.
        verify: "size" (names, sizes), "hash" (whole files too) or "off" (the manifest alone).
        memory: remembered digests of files and tables.
    """

    def __init__(self, root: str | Path, *, verify: VerifyPolicy = "size") -> None:
        check_choice("Cache", "verify", verify, VerifyPolicy)
        check_local("cache_dir", root)
        self.root = Path(root).expanduser().absolute()
        self.verify: VerifyPolicy = verify
        self.memory = FileDigestMemory(self.root / "0-digests")
        self._reported: set[Path] = set()

    def key(self, station: str, parts: dict[str, Any]) -> str:
        """32 hexadecimal digits of sha256 over the station and the canonical JSON of `parts`."""
        return hashlib.sha256(f"{station}\n{canonical_parts(station, parts)}".encode()).hexdigest()[:32]

    def place(self, station: str, parts: dict[str, Any]) -> Path:
        """Where the entry is, or would be."""
        if station not in STATIONS:
            raise CacheError(f"{station!r} is no station; they are {', '.join(STATIONS)}")
        return self.root / station / self.key(station, parts)

    def find(self, station: str, parts: dict[str, Any]) -> Path | None:
        """The complete and verified entry, or None. A damaged one is moved aside and reported.

        Raises:
            CacheError: the entry exists and may not be read.
        """
        return self._find(self.place(station, parts))

    def _find(self, target: Path) -> Path | None:
        try:
            # a plain exists() would take "permission denied" for "absent"
            target.lstat()
            check_entry(target, self.verify, station=target.parent.name, key=target.name)
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            # the station's own folder is no folder, or the entry's is not
            if os.path.lexists(target):
                self._move_aside(target, "it is no folder")
            return None
        except Damage as damage:
            if not os.path.lexists(target):
                return None
            self._move_aside(target, str(damage))
            return None
        except OSError as error:
            if error.errno in READ_ONLY_ERRORS:
                raise CacheError(
                    f"{target} cannot be read ({error}): repair its permissions, or pass cache_dir="
                ) from error
            self._move_aside(target, f"it cannot be read ({error})")
            return None
        with contextlib.suppress(OSError):
            # a builder that was killed right after its entry was in place left the shards; newer ones belong to another
            remove_shards(target, before=target.stat().st_mtime)
            # prune goes by this date; that of reading is noted by few file systems
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
                logger.warning("%s is not used: %s. It could not be moved aside (%s).", target, reason, error)
            return
        try:
            check_entry(aside, self.verify, station=target.parent.name, key=target.name)
        except (Damage, OSError):
            logger.warning("%s is damaged: %s. It was moved to %s and will be made again.", target, reason, aside.name)
            return
        # between our look and our rename somebody repaired it: put it back, or drop it when there is another already
        try:
            files.rename(aside, target)
        except OSError:
            files.remove_folder(aside)

    def build(self, station: str, parts: dict[str, Any], write: Callable[[Path], None], *, force: bool = False) -> Path:
        """Find the entry, or make it.

        Args:
            station: one of STATIONS.
            parts: what the key is made from; plain JSON.
            write: fills the empty folder it is given with plain files.
            force: make it even if it is there; the old one leaves once the new one is in place.

        Raises:
            CacheError: the cache cannot be written, or the disk is full.
        """
        target = self.place(station, parts)
        if not force and (found := self._find(target)):
            return found
        with explained(target):
            files.make_folder(target.parent)
        locks = self.root / ".locks"
        with contextlib.suppress(OSError):
            locks.mkdir(exist_ok=True)

        def finished() -> bool:
            return not force and (target / MANIFEST).exists()

        with economy_lock(locks / f"{station}-{target.name}", finished):
            if not force and (found := self._find(target)):
                return found
            return self._make(target, parts, write, force)

    def load(
        self,
        station: str,
        parts: dict[str, Any],
        write: Callable[[Path], None],
        read: Callable[[Path], Read],
        *,
        force: bool = False,
    ) -> Read:
        """What `read` makes of the entry, which is found or made; one that proves damaged in reading is made again, once.

        Args:
            station: as in `build`.
            parts: as in `build`.
            write: as in `build`.
            force: as in `build`.
            read: given the entry's folder; a StoreError says that it cannot be used.
        """
        path = self.build(station, parts, write, force=force)
        try:
            return read(path)
        except StoreError:
            # who read it has left a doubt, or it was removed meanwhile: this look compares all files
            return read(self.build(station, parts, write))

    def _make(self, target: Path, parts: dict[str, Any], write: Callable[[Path], None], force: bool) -> Path:
        temp = target.with_name(f".tmp-{host_name()}-{os.getpid()}-{target.name}-{os.urandom(4).hex()}")
        try:
            with explained(target, temp):
                files.make_folder(temp, new=True)
                # by the clock that stamped the others: that of this process may have jumped, or a server's differ
                remove_stale(target.parent, temp.stat().st_mtime)
                write(temp)
            with explained(target):
                write_manifest(
                    temp, station=target.parent.name, key=target.name, parts=json.loads(files.canonical_json(parts))
                )
                self._commit(temp, target, force)
        finally:
            files.remove_folder(temp)
        remove_shards(target)
        return target

    def _commit(self, temp: Path, target: Path, force: bool) -> None:
        """Rename our folder into place; the first good one wins, except that `force` replaces it."""
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
                    raise CacheError(f"{target} is damaged and cannot be moved aside: remove it") from error
            else:
                files.fsync_folder(target.parent)
                return
        raise CacheError(f"{target} could not be put in place: other processes keep replacing it")

    def retire(self, target: Path) -> None:
        """Take an entry away. Open files of it stay readable: nothing is ever rewritten in place."""
        old = target.with_name(f".old-{host_name()}-{os.getpid()}-{target.name}-{os.urandom(4).hex()}")
        with contextlib.suppress(FileNotFoundError):
            files.rename(target, old)
        files.remove_folder(old)

    def explain_miss(self, station: str, parts: dict[str, Any]) -> str:
        """One line: what differs from the nearest entry of this station, or that there is none."""
        wanted = json.loads(canonical_parts(station, parts))
        return describe_change(station, wanted, [entry.parts for entry in self._entries(station)])

    def entries(self) -> list[EntryInfo]:
        """All entries with a readable manifest, by station and key."""
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
