"""Encoding of whole image files of one column, in which the beginnings that they share are stored only once.

    uvarint number | if 0: uvarint length | properties | uvarint length | beginning | rest of the file

The beginning of a JPEG is its head up to the scan, and the two bytes at its end are left out. Of a lossy WebP with
nothing but its frame, the beginning is what names format and size, and the two lengths of the container are left out,
since they follow from the rest. Any other file has no beginning and is stored as it is. A positive number n stands for
the n-th of the beginnings (with properties) that store.json holds; others are compressed with DEFLATE, with those as
dictionary. Of a JPEG of 32 x 32 pixels at quality 75, 922 bytes on average, 300 remain.

The code is pure: it reads and writes no files.
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from dq_lightning.core.errors import StoreError
from dq_lightning.core.records import StoredImage
from dq_lightning.packed.patch_stream import (
    MAX_HEAD_BYTES,
    MAX_PROPERTIES_BYTES,
    compress,
    jpeg_head,
    read_compressed,
    read_uvarint,
    uvarint,
)

# Each start holds the properties of an image and the beginning of its file.
Start = tuple[bytes, bytes]
MAX_STARTS = 8
MAX_START_BYTES = 1 << 14
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_WEBP_FORMAT, _WEBP_FRAME = b"WEBPVP8 ", b"\x9d\x01\x2a"
_WEBP_START = b"RIFF" + _WEBP_FORMAT + _WEBP_FRAME
_WEBP_CONTAINER, _WEBP_TAG, _WEBP_FRAME_HEAD = 20, 3, 10


def split_file(data: bytes) -> tuple[bytes, bytes]:
    """Split an image file into its beginning and the rest; `join_file` gives the file again.

    >>> split_file(b"no image")
    (b'', b'no image')
    """
    if data.startswith(_JPEG_START) and data.endswith(_JPEG_END):
        length = jpeg_head(data)[0]
        return (data[:length], data[length:-2]) if 0 < length <= len(data) - 2 else (b"", data)
    if data.startswith(b"RIFF") and data[8:16] == _WEBP_FORMAT:
        frame = data[_WEBP_CONTAINER : _WEBP_CONTAINER + int.from_bytes(data[16:20], "little")]
        beginning, rest = _WEBP_START + frame[6:_WEBP_FRAME_HEAD], frame[:_WEBP_TAG] + frame[_WEBP_FRAME_HEAD:]
        if len(frame) >= _WEBP_FRAME_HEAD and join_file(beginning, rest) == data:
            return beginning, rest
    return b"", data


def split_like(data: bytes, starts: tuple[Start, ...]) -> tuple[bytes, bytes]:
    """Do what `split_file` does, without parsing a JPEG that has the beginning of one of the starts.

    A file that begins with the whole head of another JPEG has the same head.
    """
    if data.startswith(_JPEG_START) and data.endswith(_JPEG_END):
        for _, beginning in starts:
            if beginning and data.startswith(beginning) and len(data) >= len(beginning) + len(_JPEG_END):
                return beginning, data[len(beginning) : -len(_JPEG_END)]
    return split_file(data)


def join_file(beginning: bytes, rest: bytes) -> bytes:
    """Put the two parts of a file together that `split_file` returned."""
    if beginning.startswith(_JPEG_START):
        return beginning + rest + _JPEG_END
    if beginning.startswith(_WEBP_START):
        size = len(rest) + len(beginning) - len(_WEBP_START) + len(_WEBP_FRAME)
        padding = bytes(size % 2)
        whole = _WEBP_CONTAINER - 8 + size + len(padding)
        container = b"RIFF" + whole.to_bytes(4, "little") + _WEBP_FORMAT + size.to_bytes(4, "little")
        frame_head = _WEBP_FRAME + beginning[len(_WEBP_START) :]
        return container + rest[:_WEBP_TAG] + frame_head + rest[_WEBP_TAG:] + padding
    return beginning + rest


def shared_starts(images: Sequence[StoredImage]) -> tuple[Start, ...]:
    """Return the starts that are most frequent among images like those of the column, the most frequent first."""
    found = Counter((image.properties or b"", split_file(image.data)[0]) for image in images)
    small = [start for start, _ in found.most_common() if sum(map(len, start)) <= MAX_START_BYTES]
    return tuple(small[:MAX_STARTS])


def write_file(image: StoredImage, starts: tuple[Start, ...]) -> bytes:
    """Encode the file and the properties of an image; store.json holds everything else about it."""
    return write_parts(image.properties or b"", *split_like(image.data, starts), starts)


def write_parts(properties: bytes, beginning: bytes, rest: bytes, starts: tuple[Start, ...]) -> bytes:
    """Do what `write_file` does, for the properties and the two parts of a file."""
    number = _numbers(starts).get((properties, beginning), 0)
    if number:
        return uvarint(number) + rest
    pieces = [compress(piece, _dictionary(starts)) for piece in (properties, beginning)]
    return b"".join([b"\0", *(part for piece in pieces for part in (uvarint(len(piece)), piece)), rest])


def read_file(data: bytes, starts: tuple[Start, ...]) -> tuple[bytes, bytes, bytes]:
    """Decode what `write_file` returned.

    Returns:
        The encoded properties, and the beginning and the rest of the file.

    Raises:
        StoreError: if the bytes do not give a file.
    """
    number, at = read_uvarint(data, 0)
    if number > len(starts):
        raise StoreError(f"a stored image begins like number {number} of {len(starts)} beginnings")
    if number:
        return *starts[number - 1], data[at:]
    shared = _dictionary(starts)
    properties, at = read_compressed(data, at, shared, MAX_PROPERTIES_BYTES, "properties")
    beginning, at = read_compressed(data, at, shared, MAX_HEAD_BYTES, "head")
    return properties, beginning, data[at:]


@lru_cache(maxsize=64)
def _numbers(starts: tuple[Start, ...]) -> dict[Start, int]:
    return {start: number for number, start in enumerate(starts, start=1)}


@lru_cache(maxsize=64)
def _dictionary(starts: tuple[Start, ...]) -> bytes:
    return b"".join(properties + beginning for properties, beginning in starts[::-1])
