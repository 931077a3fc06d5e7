"""All operations of the cache that change the disk: write, fsync, rename and remove.

Operations report to `observer` before they act, so that a test can count them, kill the process, or raise an error at
any one of them.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from dq_lightning.core.errors import CacheError, DQError

# Only tests set this function; it is called with the operation's name and the path before each operation.
observer: Callable[[str, Path], None] | None = None

BUFFER_BYTES = 1 << 20
MAX_JSON_BYTES = 64 << 20
# This bound is large enough for half a million class names, or for the files of 30,000 columns.
MAX_JSON_VALUES = 1 << 20
READ_ONLY_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)


def _observe(operation: str, path: Path) -> None:
    if observer is not None:
        observer(operation, path)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the path to an OSError that lacks it, because `write` and `fsync` only know a file descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise


@contextlib.contextmanager
def explained(target: Path, only_under: Path | None = None) -> Iterator[None]:
    """Turn an OSError in the block into a CacheError that names the file or folder that is being written.

    Errors about paths outside of the folder `only_under` are raised unchanged, unless a disk is full.

    Raises:
        CacheError: the block raised an OSError that is translated.
    """
    try:
        yield
    except OSError as error:
        seen = str(error.filename or "")
        ours = only_under is None or seen.startswith(str(only_under)) or error.errno in FULL_ERRORS
        if not ours:
            raise
        advice = f"cannot write {target} ({error})"
        if error.errno in READ_ONLY_ERRORS:
            advice += ": pass cache_dir= (or set DQ_LIGHTNING_CACHE) to a folder that you may write"
        elif error.errno in FULL_ERRORS:
            advice += ": make room, or pass cache_dir= on another disk"
        raise CacheError(advice) from error


class _ObservedFile(io.FileIO):
    """A new file that reports every write to `observer`."""

    def __init__(self, path: Path) -> None:
        _observe("create", path)
        super().__init__(path, "xb")
        self.path = path

    def write(self, data: Any) -> int:
        with _named(self.path):
            _observe("write", self.path)
            return super().write(data)


class Writer(io.BufferedWriter):
    """Writer of a new file at `path`, from start to end, that counts the bytes in `size` and makes their sha256.

    Raises:
        OSError: the file exists or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(_ObservedFile(path), BUFFER_BYTES)
        self.path, self.size = path, 0
        self._digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Append bytes, a memoryview, or any other object with a buffer; they are durable only after `fsync_file`."""
        self._digest.update(data)
        count = super().write(data)
        self.size += count
        return count

    def sha256(self) -> str:
        """Return the hexadecimal digest of all bytes written so far."""
        return self._digest.hexdigest()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the rest is not written.
        (self if kind is None else self.raw).close()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a new file; OSError if it exists."""
    with Writer(path) as file:
        file.write(data)


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file beside `path` and rename it, so that readers see either the old or the new content.

    The file is not made durable, so use this function only for data whose loss costs nothing but time.
    """
    beside = path.with_name(f".tmp-{os.getpid()}-{os.urandom(8).hex()}")
    try:
        write_bytes(beside, data)
        replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def fsync_file(path: Path) -> None:
    """Make a file's content durable. Never retry after a failure, because the kernel may have dropped the pages."""
    _observe("fsync", path)
    _fsync(path)


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable, where the file system supports this."""
    _observe("fsync", path)
    try:
        _fsync(path)
    except OSError as error:
        # Some network file systems refuse to sync a folder, and they offer no better way.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise


def _fsync(path: Path) -> None:
    with _named(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """Rename a folder; OSError if a folder with content exists at `new`."""
    _observe("rename", new)
    old.rename(new)


def replace(old: Path, new: Path) -> None:
    """Rename a file, and replace the file at `new` if there is one."""
    _observe("replace", new)
    old.replace(new)


def make_folder(path: Path, *, new: bool = False) -> None:
    """Create a folder and its parents; with `new`, OSError if it exists."""
    _observe("mkdir", path)
    path.mkdir(parents=True, exist_ok=not new)


def remove_folder(path: Path) -> None:
    """Remove a folder as far as possible; whatever cannot be removed only costs disk space."""
    shutil.rmtree(path, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a folder, a file or anything else as far as possible."""
    # rmtree opens its argument, and opening a pipe may wait forever, so only folders are given to it.
    if path.is_dir() and not path.is_symlink():
        remove_folder(path)
        return
    with contextlib.suppress(OSError):
        path.unlink()


def share(descriptor: int) -> None:
    """Mark an open file as in use until it is closed, where platform and file system support it; see `is_shared`."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _descriptor_to_lock(path: Path) -> int:
    try:
        # Network file systems grant an exclusive lock only to processes that may write.
        return os.open(path, os.O_RDWR)
    except PermissionError:
        return os.open(path, os.O_RDONLY)


def is_shared(path: Path) -> bool:
    """Return whether a process of this host (any host, if locks are shared) marked a file as in use; see `share`."""
    try:
        import fcntl

        descriptor = _descriptor_to_lock(path)
    except (ImportError, FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        # A process that may not open the file must not remove it either.
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def clock_of(folder: Path) -> float:
    """Return the seconds since 1970 by the clock that stamps a folder's files, which may be of another machine."""
    probe = folder / f".tmp-{os.getpid()}-{os.urandom(8).hex()}"
    write_bytes(probe, b"")
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def last_change(path: Path) -> float:
    """Return when a file, or anything directly in a folder, was last written: seconds since 1970, or 0 if gone."""
    times = [0.0]
    with contextlib.suppress(OSError):
        times.append(path.lstat().st_mtime)
        times += [inside.lstat().st_mtime for inside in path.iterdir()]
    return max(times)


def open_plain(path: Path) -> io.BufferedReader:
    """Open a plain file for reading; OSError for anything else (such as a pipe), which might block forever."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def file_digest(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's content, which is read in pieces."""
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """Return JSON text that is the same for equal values on every machine; ValueError for NaN and infinity.

    Example:
        >>> canonical_json({"b": 1, "a": [True, None]})
        '{"a":[true,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sealed_digest(values: dict[str, Any]) -> str:
    """Return the digest that `seal` writes beside the values, as hexadecimal text."""
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()


def seal(values: dict[str, Any]) -> bytes:
    """Return JSON that contains a digest of itself, so that any changed byte is detected."""
    return (
        json.dumps({**values, "digest": sealed_digest(values)}, sort_keys=True, indent=1, allow_nan=False) + "\n"
    ).encode()


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a file that was made by `seal`.

    Raises:
        DQError: the content differs from what `seal` writes for its values, or the file is too large.
        OSError: the file cannot be read.
    """
    with open_plain(path) as file:
        return unseal(file.read(MAX_JSON_BYTES + 1), path.name)


def unseal(text: bytes, name: str) -> dict[str, Any]:
    """Return the values that `seal` made a text of; `name` says in messages what holds the text.

    Raises:
        DQError: the text differs from what `seal` writes for its values, or is too large.
    """
    if len(text) > MAX_JSON_BYTES:
        raise DQError(f"{name} is larger than {MAX_JSON_BYTES} bytes")
    # The values are counted before they are parsed, because millions of empty lists take thirty times the memory of
    # their text.
    if sum(map(text.count, (b",", b":", b"[", b"{"))) > MAX_JSON_VALUES:
        raise DQError(f"{name} holds more than {MAX_JSON_VALUES:,} values")
    try:
        values = json.loads(text)
        # A foreign JSON file may hold anything, including nesting that exhausts the stack.
        whole = isinstance(values, dict) and values.pop("digest", None) is not None and seal(values) == text
    except (ValueError, RecursionError) as error:
        raise DQError(f"{name} is not JSON that this package wrote ({type(error).__name__})") from error
    if not whole:
        raise DQError(f"{name} does not match the digest that it holds")
    assert isinstance(values, dict)
    return values
