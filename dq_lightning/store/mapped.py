"""Files of a store as memory, each of a known size and beginning. Touches the disk, read-only."""

import mmap
from pathlib import Path

from dq_lightning.store.manifest import Damage


class MappedFiles:
    """Private mappings of some files of a folder: what is written to them never reaches the disk.

    Args:
        folder: that they are in.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # name, mapping and size of the files that are read again and again
        self._watched: list[tuple[str, mmap.mmap, int]] = []

    def open(self, name: str, size: int, header: bytes = b"", *, watched: bool = True) -> memoryview:
        """A file's bytes after its header.

        Args:
            name: of the file.
            size: of what follows the header, in bytes.
            header: that it must begin with.
            watched: whether `check_uncut` looks at it.

        Raises:
            Damage: it has another size or beginning.
        """
        path = self._folder / name
        if path.stat().st_size != len(header) + size:
            raise Damage(f"{name} does not have the {len(header) + size} bytes of its content")
        if not len(header) + size:
            return memoryview(b"")
        with path.open("rb") as file:
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if watched:
            self._watched.append((name, whole, len(whole)))
        mapped = memoryview(whole)
        if mapped[: len(header)] != header:
            raise Damage(f"{name} does not start with the header of its content")
        return mapped[len(header) :]

    def check_uncut(self) -> None:
        """Look whether the files still have their sizes: reading where one has ended would kill the process.

        Raises:
            Damage: one was cut.
        """
        for name, mapped, size in self._watched:
            if mapped.size() < size:
                raise Damage(f"{name} was cut from {size} to {mapped.size()} bytes while it was open")
