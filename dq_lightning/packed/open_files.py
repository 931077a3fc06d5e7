"""The files of an open packed store: small files are held in memory, and large ones are read by position.

Nothing is memory-mapped: if somebody writes over a mapped file, its readers see other data, and if somebody truncates
it, its readers are killed.
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

# Columns are held in memory as long as all of them together take no more than this.
HELD_BYTES = 32 << 20
# A row of at least this size is read into memory of its own, which a tensor can take over without a copy.
OWN_MEMORY_BYTES = 4096
# Linux reads at most 2 GiB in one call.
MAX_BYTES_PER_READ = 1 << 30

Row = bytes | memoryview


class OpenFiles:
    """Plain files of one folder, open for reading."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptors: list[int] = []
        self._held = 0

    def open(self, name: str, size: int) -> int:
        """Open a file of a known size in bytes; its descriptor stays open as long as this object exists.

        Raises:
            Damage: if the file has another size, or is no plain file.
            OSError: if the file cannot be opened.
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
        if seen.st_size != size:
            raise Damage(f"{name} does not have the {size} bytes of its content")
        return descriptor

    def read(self, name: str, size: int, header: bytes = b"", sha256: str | None = None) -> NDArray[np.uint8]:
        """Read the `size` bytes of a file that follow its header into memory, uint8 [size], and close the file.

        `sha256` is the hexadecimal digest that the whole file must have; None compares nothing.

        Raises:
            Damage: if the file has another size, beginning or content.
            OSError: if the file cannot be read.
        """
        descriptor = self.open(name, len(header) + size)
        try:
            whole = _read_exactly(descriptor, len(header) + size, 0, name)
        finally:
            self._descriptors.remove(descriptor)
            os.close(descriptor)
        if sha256 is not None and hashlib.sha256(whole.data).hexdigest() != sha256:
            raise Damage(f"{name} has another content than was written")
        if whole[: len(header)].tobytes() != header:
            raise Damage(f"{name} does not start with the header of its content")
        return whole[len(header) :]

    def rows(self, name: str, count: int, row_bytes: int, header: bytes) -> Callable[[int], Row]:
        """Return a function that gives the bytes of a row, from its position.

        Columns that are small enough are read now and held in memory. Of other columns each row is read when the
        function is called. The caller has to verify what the function returns. The bytes are read-only unless they are
        in memory that belongs to the caller alone.

        Raises:
            Damage: if the file has another size or beginning.
            OSError: if the file cannot be read.
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
        # os.close is bound as a default argument, since modules are emptied before the last objects when Python exits.
        for descriptor in self.__dict__.pop("_descriptors", ()):
            _close(descriptor)


def read_piece(descriptor: int, size: int, at: int, name: str) -> Row:
    """Read exactly `size` bytes at a position of an open file, which `name` stands for in messages.

    Raises:
        Damage: if the file ends before.
        OSError: if the file cannot be read.
    """
    data = os.pread(descriptor, size, at) if size <= MAX_BYTES_PER_READ else b""
    if len(data) == size:
        return data
    return _read_exactly(descriptor, size, at, name).data.toreadonly()


def _read_exactly(descriptor: int, size: int, at: int, name: str) -> NDArray[np.uint8]:
    whole = np.empty(size, np.uint8)
    view: Any = whole.data
    done = 0
    while done < size:
        step = os.preadv(descriptor, [view[done : done + MAX_BYTES_PER_READ]], at + done)
        if not step:
            raise Damage(f"{name} ends at {os.fstat(descriptor).st_size} bytes, it was cut while it was open")
        done += step
    return whole
