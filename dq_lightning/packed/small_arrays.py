"""The small arrays of a store of few bytes, in one file: where a sample may take 200 bytes, they would take 50 more.

    checksums uint32 [M] | zlib stream of: index, bin, lengths of the values, [lengths of the ids, ids,] narrow columns

The numbers are little-endian and lie byte plane by byte plane (first the lowest byte of all of them), and of the index,
which ascends, the differences are stored. They take 6 to 8 bytes a sample. Checksums cannot be compressed, so the size
of the file bounds the number of samples, and with it the memory that reading takes.

The code is pure: it reads and writes no files.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_lightning.core.errors import StoreError

Bytes = NDArray[np.uint8]
# So many columns of at most so many bytes a row are held with the small arrays.
MAX_COLUMNS, MAX_ROW_BYTES = 8, 8
CHECKSUM_BYTES = 4


@dataclass(frozen=True)
class SmallArrays:
    """The small arrays of M samples.

    Attributes:
        index: int64 [M], positions in the source.
        bin: int16 [M].
        offsets: int64 [M + 1], where the bytes of each sample start in values.bin, and its size.
        checksums: uint32 [M].
        columns: for each narrow column its rows, uint8 [M, bytes per row].
        id_offsets: int64 [M + 1], where each id starts in `ids`, and the size of that; None for ids that are the
            positions in the source as decimal numbers.
        ids: the ids in UTF-8, uint8.
    """

    index: NDArray[np.int64]
    bin: NDArray[np.int16]
    offsets: NDArray[np.int64]
    checksums: NDArray[np.uint32]
    columns: tuple[Bytes, ...] = ()
    id_offsets: NDArray[np.int64] | None = None
    ids: Bytes | None = None

    def to_bytes(self) -> bytes:
        """Encode the arrays."""
        parts = [_planes(np.diff(self.index, prepend=0), "<i8"), _planes(self.bin, "<i2")]
        parts.append(_planes(np.diff(self.offsets), "<i8"))
        if self.id_offsets is not None and self.ids is not None:
            parts += [_planes(np.diff(self.id_offsets), "<i8"), self.ids.tobytes()]
        parts += [np.ascontiguousarray(column.T).tobytes() for column in self.columns]
        return self.checksums.astype("<u4").tobytes() + zlib.compress(b"".join(parts), 9)


def small_from_bytes(data: Any, count: int, ids_bytes: int | None, row_bytes: Sequence[int]) -> SmallArrays:
    """Decode what `SmallArrays.to_bytes` returned for `count` samples.

    `ids_bytes` is the number of bytes of all ids, or None where none are stored; `row_bytes` holds that of a row in
    each column.

    Raises:
        StoreError: if the bytes do not give these arrays.
    """
    view = memoryview(data)
    if len(view) < CHECKSUM_BYTES * count:
        raise StoreError(f"{len(view):,} bytes cannot hold the checksums of {count:,} samples")
    sizes = [8 * count, 2 * count, 8 * count]
    sizes += [] if ids_bytes is None else [8 * count, ids_bytes]
    sizes += [count * width for width in row_bytes]
    expander = zlib.decompressobj()
    try:
        # One byte more than there may be, so that a longer stream shows.
        whole = expander.decompress(view[CHECKSUM_BYTES * count :], sum(sizes) + 1)
    except zlib.error as error:
        raise StoreError(f"it is damaged ({error})") from error
    if len(whole) != sum(sizes) or not expander.eof or expander.unused_data:
        raise StoreError("its size does not fit the number of its samples")
    parts = np.split(np.frombuffer(whole, np.uint8), np.cumsum(sizes)[:-1])
    named = parts[3:5] if ids_bytes is not None else []
    columns = parts[3 + len(named) :]
    return SmallArrays(
        index=np.cumsum(_numbers(parts[0], "<i8"), dtype=np.int64),
        bin=_numbers(parts[1], "<i2"),
        offsets=_offsets(parts[2]),
        checksums=np.frombuffer(view[: CHECKSUM_BYTES * count], "<u4").copy(),
        columns=tuple(
            np.ascontiguousarray(part.reshape(width, count).T) for part, width in zip(columns, row_bytes, strict=True)
        ),
        id_offsets=_offsets(named[0]) if named else None,
        ids=named[1] if named else None,
    )


def _planes(values: Any, dtype: str) -> bytes:
    numbers = np.ascontiguousarray(values, dtype)
    return np.ascontiguousarray(numbers.view(np.uint8).reshape(len(numbers), numbers.itemsize).T).tobytes()


def _numbers(planes: Bytes, dtype: str) -> Any:
    width = np.dtype(dtype).itemsize
    return np.array(planes.reshape(width, len(planes) // width).T, order="C").reshape(-1).view(dtype)


def _offsets(planes: Bytes) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(_numbers(planes, "<i8"), dtype=np.int64)])
