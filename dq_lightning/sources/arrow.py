"""Content digests of Arrow columns, which do not change when a table is chunked, sliced, or saved and loaded again."""

import hashlib
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from dq_lightning.cache.digests import DigestMemory
from dq_lightning.core.errors import SourceError


class _ColumnDigest:
    """Digest of one column, which is passed one array after another.

    A column is split into streams (which values are null, lengths, values), and each stream is hashed separately with
    SHA-256. Therefore the digest depends neither on the boundaries of the arrays, nor on data under nulls or outside of
    a slice. Images that are stored as paths count by the digests of their files, see `DigestMemory.files`; `saw_files`
    tells whether there were any.
    """

    def __init__(self, memory: DigestMemory, *, skips: bool = False) -> None:
        self._memory, self._skips = memory, skips
        self._streams: dict[str, Any] = {}
        self.saw_files = False
        self._rows = 0

    def hexdigest(self) -> str:
        """Hexadecimal digest of all streams together."""
        whole = hashlib.sha256()
        for name in sorted(self._streams):
            whole.update(f"{name}={self._streams[name].hexdigest()};".encode())
        return whole.hexdigest()

    def _feed(self, name: str, data: Any) -> None:
        if len(data):  # An empty piece must not change the digest.
            self._streams.setdefault(name, hashlib.sha256()).update(data)

    def add(self, array: Any, name: str = "") -> None:
        """Add the next Arrow array of the column, or of the nested part of the column called `name`.

        SourceError if an image file that the array names cannot be read, or lies in an archive or at an address.
        """
        if isinstance(array, pa.ChunkedArray):
            for chunk in array.chunks:
                self.add(chunk, name)
            return
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if pa.types.is_string_view(array.type) or pa.types.is_binary_view(array.type):
            array = array.cast(pa.large_string() if pa.types.is_string_view(array.type) else pa.large_binary())
        kind = array.type
        self._feed(f"{name}/valid", _bytes(array.is_valid()))
        if pa.types.is_struct(kind):
            self._struct(array, name)
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            self._feed(f"{name}/lengths", _numbers(pc.list_value_length(array).fill_null(0)))
            self.add(array.flatten(), f"{name}[]")
        elif any(test(kind) for test in (pa.types.is_string, pa.types.is_binary, *_LARGE)):
            self._feed(f"{name}/lengths", _numbers(pc.binary_length(array).fill_null(0)))
            self._feed(f"{name}/bytes", _characters(array.drop_null()))
        elif not pa.types.is_null(kind):
            self._fixed(array.drop_null(), name)
        if not name:
            self._rows += len(array)

    def _struct(self, array: Any, name: str) -> None:
        fields = {array.type.field(i).name: part for i, part in enumerate(array.flatten())}
        if set(fields) == {"bytes", "path"} and pa.types.is_string(fields["path"].type):
            self._media(fields["bytes"], fields["path"], name)
            return
        for key in sorted(fields):
            self.add(fields[key], f"{name}.{key}")

    def _media(self, data: Any, path: Any, name: str) -> None:
        """Add images: their bytes, or the content of the file at their path where there are no bytes."""
        self.add(data, f"{name}.bytes")
        only_path = pc.and_(data.is_null(), path.is_valid())
        paths = path.filter(only_path).to_pylist()
        if inside := next((one for one in paths if "://" in one), None):
            raise SourceError(
                f"A Hugging Face dataset names images inside of an archive or at an address ({inside}), whose content is not "
                "looked up for its identity: pass fingerprint= with a name of your own for this version of the data, or put "
                "the images' bytes into the table"
            )
        if paths:
            self.saw_files = True
            try:
                digests = self._memory.files(paths, skips=self._skips)
            except OSError as error:
                raise self._unreadable(only_path, paths, name) from error
            for digest in digests:
                self._feed(f"{name}.files", f"{digest};".encode())

    def _unreadable(self, only_path: Any, paths: list[str], name: str) -> SourceError:
        bad = next((place for place, path in enumerate(paths) if not os.access(path, os.R_OK)), 0)
        # For images inside of lists the row is not known.
        row = self._rows + int(np.flatnonzero(only_path.to_numpy(zero_copy_only=False))[bad]) if not name else None
        return SourceError(
            f"Item{'' if row is None else f' {row}'} of a Hugging Face dataset names the image file {paths[bad]}, which "
            "can't be read. Put the file back, or leave the item out with dataset.select."
        )

    def _fixed(self, array: Any, name: str) -> None:
        if pa.types.is_boolean(array.type):
            self._feed(f"{name}/values", _bytes(array))
            return
        try:
            width = array.type.bit_width // 8
        except ValueError:  # Maps and unions are rare, so they are hashed value by value.
            self._feed(f"{name}/values", "".join(f"{value!r};" for value in array.to_pylist()).encode())
            return
        buffer = array.buffers()[1]
        if buffer is not None:
            self._feed(f"{name}/values", memoryview(buffer)[array.offset * width : (array.offset + len(array)) * width])


_LARGE = (pa.types.is_large_string, pa.types.is_large_binary)


def _bytes(booleans: Any) -> Any:
    return memoryview(booleans.cast(pa.uint8()).to_numpy(zero_copy_only=False).tobytes())


def _numbers(lengths: Any) -> Any:
    return lengths.cast(pa.int64()).to_numpy(zero_copy_only=False).astype(np.int64, copy=False).tobytes()


def _characters(array: Any) -> Any:
    """The bytes of all values of a string or binary array without nulls, one after another."""
    _, offsets, data = array.buffers()
    if len(array) == 0 or data is None:
        return b""
    wide = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    ends = np.frombuffer(offsets, dtype=np.int64 if wide else np.int32)
    return memoryview(data)[int(ends[array.offset]) : int(ends[array.offset + len(array)])]


def digest_tables(
    tables: Iterable[Any], columns: list[str], memory: DigestMemory, *, skips: bool = False
) -> tuple[str, bool]:
    """Digest of some columns of a table that comes in pieces, in whatever order the columns are.

    Whether the content of files outside the table is part of the hexadecimal digest is returned, too. Their digests
    come from the memory; see `DigestMemory.files` for `skips`.
    """
    digests = {name: _ColumnDigest(memory, skips=skips) for name in columns}
    for table in tables:
        # A table that is read through a list of rows comes in chunks of one row each.
        whole_columns = table.combine_chunks()
        for name, digest in digests.items():
            digest.add(whole_columns.column(name))
    whole = hashlib.sha256()
    for name in sorted(digests):
        whole.update(f"{name!r}:{digests[name].hexdigest()};".encode())
    return whole.hexdigest(), any(digest.saw_files for digest in digests.values())
