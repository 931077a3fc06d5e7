"""The files of a packed store while it is open: small ones in memory, large ones read by position. Touches the disk, read-only.

Nothing is mapped: who writes over a mapped file changes what its readers see, and who cuts it kills them.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_lightning.cache.manifest import Damage

# columns are held in memory as long as they take no more than this together
HELD_BYTES = 32 << 20
# rows from this size on are read into memory that a tensor can take over
OWN_MEMORY_BYTES = 4096
# the kernel gives at most 2 GiB a call
MOST_BYTES_PER_READ = 1 << 30

Row = bytes | memoryview


class OpenFiles:
    """Plain files of one folder.

    Args:
        folder: that they are in.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptors: list[int] = []
        self._held = 0

    def open(self, name: str, size: int | None = None) -> int:
        """A descriptor of a file, which stays open as long as this object.

        Args:
            name: of the file.
            size: that it must have.

        Raises:
            Damage: it has another size, or is no plain file.
            OSError: it cannot be read.
        """
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        try:
            descriptor = os.open(self._folder / name, flags)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise Damage(f"{name} is not a plain file") from error
            raise
        self._descriptors.append(descriptor)
        seen = os.fstat(descriptor)
        if not stat.S_ISREG(seen.st_mode):
            raise Damage(f"{name} is not a plain file")
        if size is not None and seen.st_size != size:
            raise Damage(f"{name} does not have the {size} bytes of its content")
        return descriptor

    def close(self, descriptor: int) -> None:
        """Close one file."""
        self._descriptors.remove(descriptor)
        os.close(descriptor)

    def read(self, name: str, size: int, header: bytes = b"", sha256: str | None = None) -> NDArray[np.uint8]:
        """The bytes of a file after its header, read into memory and closed.

        Args:
            name: of the file.
            size: of what follows the header.
            header: that it must begin with.
            sha256: of the whole file, compared with what was read; None compares nothing.

        Raises:
            Damage: it has another size, beginning or content.
            OSError: it cannot be read.
        """
        descriptor = self.open(name, len(header) + size)
        try:
            whole = _read_exactly(descriptor, len(header) + size, 0, name)
        finally:
            self.close(descriptor)
        if sha256 is not None and hashlib.sha256(whole.data).hexdigest() != sha256:
            raise Damage(f"{name} has another content than was written")
        if whole[: len(header)].tobytes() != header:
            raise Damage(f"{name} does not start with the header of its content")
        return whole[len(header) :]

    def rows(self, name: str, count: int, row_bytes: int, header: bytes) -> Callable[[int], Row]:
        """A function that gives the row at a position.

        Columns that are small enough are read now and held; of others each row is read when it is asked for. What it reads is
        for the caller to verify, and read-only unless it is the caller's own memory.

        Args:
            name: of the file.
            count: rows in it.
            row_bytes: bytes of one.
            header: that it must begin with.

        Raises:
            Damage: it has another size or beginning.
            OSError: it cannot be read.
        """
        size = count * row_bytes
        if self._held + size <= HELD_BYTES:
            self._held += size
            held = self.read(name, size, header).data.toreadonly()
            return lambda at: held[at * row_bytes : (at + 1) * row_bytes]
        descriptor, first = self.open(name, len(header) + size), len(header)
        if os.pread(descriptor, first, 0) != header:
            raise Damage(f"{name} does not start with the header of its content")
        if row_bytes < OWN_MEMORY_BYTES:
            return lambda at: read_piece(descriptor, row_bytes, first + at * row_bytes, name)
        return lambda at: _read_exactly(descriptor, row_bytes, first + at * row_bytes, name).data

    def __del__(self, _close: Callable[[int], None] = os.close) -> None:
        # bound above, since modules are emptied before the last objects at the end of the interpreter
        for descriptor in self.__dict__.pop("_descriptors", ()):
            _close(descriptor)


def read_piece(descriptor: int, size: int, at: int, name: str) -> Row:
    """Some bytes of an open file, all of them.

    Raises:
        Damage: the file ends before.
        OSError: it cannot be read.
    """
    data = os.pread(descriptor, size, at) if size <= MOST_BYTES_PER_READ else b""
    if len(data) == size:
        return data
    return _read_exactly(descriptor, size, at, name).data.toreadonly()


def _read_exactly(descriptor: int, size: int, at: int, name: str) -> NDArray[np.uint8]:
    whole = np.empty(size, np.uint8)
    view: Any = whole.data
    done = 0
    while done < size:
        step = os.preadv(descriptor, [view[done : done + MOST_BYTES_PER_READ]], at + done)
        if not step:
            raise Damage(f"{name} ends at {os.fstat(descriptor).st_size} bytes, it was cut while it was open")
        done += step
    return whole
