"""Remembered content digests, so that an unchanged file is read only once.

A digest is trusted while path, size, modification time, change time and inode of the file are the same. The change time
cannot be set by `touch` or kept by `cp -p`, so other content under an old date is noticed. A file that was modified
less than two seconds before it was hashed is hashed again next time, because it could change once more within the
resolution of the clock (git calls this "racy").
"""

import hashlib
import io
import logging
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dq_lightning.cache import files
from dq_lightning.core.errors import CacheError, DQError

logger = logging.getLogger("dq_lightning")

RACY_NANOSECONDS = 2_000_000_000
CHUNK_FILES = 512
ATTEMPTS = 3

Stamps = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]
Hashed = tuple[npt.NDArray[np.uint8], Stamps]
"""Digests uint8 [n, 32] of n files, and their stamps int64 [n, 4]."""
STAMP_SIZE = 4
UNKNOWN = (-1,) * STAMP_SIZE


def file_stamp(path: str) -> tuple[int, ...]:
    """Return the size, mtime_ns, ctime_ns and inode of a file."""
    seen = os.stat(path)  # noqa: PTH116 (a million of them: no Path objects)
    # The inode distinguishes two files of equal size and times to which a link may point in turn. The device is left
    # out, because network file systems number it anew at each mount, and everything would be read again.
    return seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino & (2**63 - 1)


def _hash_file(path: str) -> tuple[bytes, tuple[int, ...]]:
    """Return a file's digest and its stamp; all numbers of the stamp are -1 if the file is too young to be trusted."""
    for _ in range(ATTEMPTS):
        started = time.time_ns()
        before = file_stamp(path)
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (a million of them: no Path objects)
            digest = hashlib.file_digest(file, "sha256").digest()
        if file_stamp(path) == before:
            young = max(before[1], before[2]) > started - RACY_NANOSECONDS
            return digest, UNKNOWN if young else before
    raise CacheError(f"{path} changes while it is read: wait until it is written, then start again")


class DigestMemory:
    """Digests by file and by key in one folder, which let an unchanged file or table be read only once.

    A lost or damaged memory only costs time.

    Args:
        folder: folder of the memory, created at the first write.

    Attributes:
        spread: function that has files hashed by several processes, or None. It is called with the paths and stamps of
            all files, the numbers of those to hash, int64 [n], and a function that hashes some of these in this
            process (the digest of a file that cannot be read is 0); it returns what is hashed after the numbers.
    """

    spread: Callable[[list[str], Stamps, Rows, Callable[[Rows], Hashed]], Iterable[tuple[Rows, Hashed]]] | None = None

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def file(self, path: str | Path) -> str:
        """Return the hexadecimal sha256 of a file's content, from the memory if the file is unchanged.

        Raises:
            OSError: the file cannot be read.
            CacheError: the file changes while it is read.
        """
        return self.files([os.path.abspath(path)])[0]  # noqa: PTH100 (str in, str out)

    def files(self, paths: list[str], *, skips: bool = False) -> list[str]:
        """Return the hexadecimal sha256 of many files, in order; files are hashed in threads.

        The files of one common folder share one table, so looking up N unchanged files costs N stats and one read.

        Args:
            paths: paths of the files.
            skips: whether the name of an exception takes the place of the digest of a file that cannot be read.

        Raises:
            OSError: a file cannot be read, and `skips` is not set.
            CacheError: a file changes while it is read.
        """
        if not paths:
            return []
        here = os.getcwd()  # noqa: PTH109
        places = [path if os.path.isabs(path) else os.path.join(here, path) for path in map(os.fspath, paths)]  # noqa: PTH117, PTH118
        # commonpath splits every path, which is slow for many; the first and last path in order have the same common
        # prefix.
        folder = os.path.commonpath([os.path.dirname(one) for one in (min(places), max(places))])  # noqa: PTH120
        table = _Table(self.folder / f"files-{_name(folder)}.npz")
        unreadable: dict[int, str] = {}

        def tried(function: Callable[[str], Any], i: int, instead: Any) -> Any:
            try:
                return function(places[i])
            except OSError as error:
                if not skips:
                    raise
                unreadable[i] = f"unreadable: {type(error).__name__}"
                return instead

        stamps = np.array([tried(file_stamp, i, UNKNOWN) for i in range(len(places))], dtype=np.int64)
        known_stamps, digests = table.look_up(places)
        stale = np.flatnonzero((known_stamps != stamps).any(axis=1))
        if len(stale):
            known_stamps = known_stamps.copy()
            digests = digests.copy()

            def hashed(rows: Rows) -> Hashed:
                made = [tried(_hash_file, i, (bytes(32), UNKNOWN)) for i in rows.tolist()]
                content = b"".join(digest for digest, _ in made)
                return np.frombuffer(content, np.uint8).reshape(-1, 32), np.array(
                    [stamp for _, stamp in made], np.int64
                )

            spread = _in_threads if self.spread is None else self.spread
            for rows, (some_digests, some_stamps) in spread(places, stamps, stale, hashed):
                digests[rows], known_stamps[rows] = some_digests, some_stamps
            table.store(places, known_stamps, digests)
        text = digests.tobytes().hex()
        return [unreadable.get(i) or text[64 * i : 64 * (i + 1)] for i in range(len(places))]

    def recall(self, key: str) -> str | None:
        """Return the digest remembered under a key, or None."""
        try:
            known = files.read_sealed(self._place(key))
        except (OSError, DQError):
            return None
        value = known.get("value") if known.get("key") == key else None
        return value if isinstance(value, str) else None

    def remember(self, key: str, digest: str) -> None:
        """Remember a digest under a key; does nothing if the memory cannot be written."""
        _try_replace(self._place(key), files.seal({"key": key, "value": digest}))

    def _place(self, key: str) -> Path:
        return self.folder / f"key-{_name(key)}.json"


def _in_threads(
    places: list[str], stamps: Stamps, stale: Rows, hashed: Callable[[Rows], Hashed]
) -> Iterator[tuple[Rows, Hashed]]:
    chunks = [stale[start : start + CHUNK_FILES] for start in range(0, len(stale), CHUNK_FILES)]
    with ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 4)) as pool:
        yield from zip(chunks, pool.map(hashed, chunks), strict=True)


def _name(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def _try_replace(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_bytes(path, data)
    except OSError as error:
        logger.debug("digests cannot be stored in %s: %s", path, error)


class _Table:
    """Paths, stamps and digests of many files in one npz file, whose zip checksums detect damage."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = b""
        self.stamps: Stamps = np.empty((0, STAMP_SIZE), np.int64)
        self.digests: npt.NDArray[np.uint8] = np.empty((0, 32), np.uint8)
        try:
            with files.open_plain(path) as file:
                content = io.BytesIO(file.read())
            if any(member.compress_type != zipfile.ZIP_STORED for member in zipfile.ZipFile(content).infolist()):
                return  # Our tables are not compressed; a compressed file may unpack to far more than its size.
            with np.load(content, allow_pickle=False) as stored:
                names, stamps, digests = stored["names"].tobytes(), stored["stamps"], stored["digests"]
        except Exception as error:
            # zipfile and numpy raise many kinds of errors on damaged bytes; a table that cannot be read is made again.
            logger.debug(
                "digests in %s cannot be used and are computed again: %s: %s", path, type(error).__name__, error
            )
            return
        rows = names.count(b"\0") + 1 if names else 0
        shapes_fit = stamps.shape == (rows, STAMP_SIZE) and digests.shape == (rows, 32)
        if shapes_fit and stamps.dtype == np.int64 and digests.dtype == np.uint8:
            self.names, self.stamps, self.digests = names, stamps, digests

    def look_up(self, places: list[str]) -> tuple[Stamps, npt.NDArray[np.uint8]]:
        """Return stamps int64 [N, 4] and digests uint8 [N, 32] of the given paths; a stamp is -1 where unknown."""
        names = _join(places)
        if self.names == names or self.names.startswith(names + b"\0"):
            return self.stamps[: len(places)], self.digests[: len(places)]
        stamps = np.full((len(places), STAMP_SIZE), -1, np.int64)
        digests = np.zeros((len(places), 32), np.uint8)
        row_of = {name: row for row, name in enumerate(self.names.split(b"\0"))} if self.names else {}
        rows = np.array([row_of.get(os.fsencode(place), -1) for place in places], np.int64)
        known = rows >= 0
        stamps[known] = self.stamps[rows[known]]
        digests[known] = self.digests[rows[known]]
        return stamps, digests

    def store(self, places: list[str], stamps: Stamps, digests: npt.NDArray[np.uint8]) -> None:
        """Write the given rows first, then those of other files that were known before."""
        given = set(map(os.fsencode, places))
        old = self.names.split(b"\0") if self.names else []
        others = [row for row, name in enumerate(old) if name not in given]
        names = b"\0".join([_join(places), *(old[row] for row in others)])
        buffer = io.BytesIO()
        np.savez(
            buffer,
            names=np.frombuffer(names, np.uint8),
            stamps=np.concatenate([stamps, self.stamps[others]]),
            digests=np.concatenate([digests, self.digests[others]]),
        )
        _try_replace(self.path, buffer.getvalue())


def _join(places: list[str]) -> bytes:
    return os.fsencode("\0".join(places))
