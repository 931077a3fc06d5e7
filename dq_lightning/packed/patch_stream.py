"""Encoding of patched images of one kind as a stream, in which what they share is stored only once.

    uvarint height | uvarint width | mask | uvarint length | properties | [uvarint length | head] | rest of the data

The head of an encoded file (tables, sizes) is compressed with DEFLATE, with the heads of the first samples as
dictionary. Of the 350 bytes at the head of a JPEG with Huffman tables of its own, about 100 remain. Raw pixels have no
head. The properties (format and info of the image, such as EXIF tags and a colour profile) are compressed in the same
way; most images have none.

The code is pure: it reads and writes no files.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

from dq_lightning.core.errors import StoreError
from dq_lightning.core.records import MAX_PIXELS, Grid, PatchedImage

# Mode, layout, codec and patch size, which are the same for all images of a stream.
Facts = tuple[str, str, str, int]
MAX_HEAD_BYTES = 1 << 14
SHARED_HEADS = 8
MAX_SHARED_BYTES = 1 << 15
# An image with larger properties is stored as a value, outside of the stream.
MAX_PROPERTIES_BYTES = 1 << 20
# Bytes of signature, size and format. The head of a JPEG has no fixed length: it ends where the scan begins.
_HEAD_BYTES = {"raw": 0, "png": 41, "webp": 30}
_START_OF_SCAN = 0xDA
_ONE_BYTE = tuple(bytes((number,)) for number in range(0x80))
_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)
# The other markers from C0 to CF stand for tables, not for frames.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def head_bytes(codec: str, data: bytes) -> int:
    """Return the length of the head of an encoded file in bytes; 0 if there is no known head."""
    if codec != "jpeg":
        return min(_HEAD_BYTES[codec], len(data))
    return jpeg_head(data)[0]


def jpeg_head(data: bytes) -> tuple[int, tuple[int, int, int]]:
    """Parse the head of a JPEG.

    Only what every encoder writes is supported: segments without gaps, and one baseline or progressive frame before the
    scan.

    Returns:
        Length of the head in bytes, and (height, width, components) of its only 8-bit frame; all are 0 for any other
        file.
    """
    at, frame = 2, (0, 0, 0)
    end = min(len(data), MAX_HEAD_BYTES)
    while at + 4 <= end and data[at] == 0xFF:
        marker, start = data[at + 1], at + 4
        at = start - 2 + (data[at + 2] << 8) + data[at + 3]
        if marker in _FRAMES:
            if frame != (0, 0, 0) or at > end or at < start + 6 or marker not in _PLAIN_FRAMES or data[start] != 8:
                break
            frame = (
                (data[start + 1] << 8) + data[start + 2],
                (data[start + 3] << 8) + data[start + 4],
                data[start + 5],
            )
        if marker == _START_OF_SCAN:
            return (at, frame) if at <= end else (0, (0, 0, 0))
    return 0, (0, 0, 0)


def shared_heads(images: Sequence[PatchedImage]) -> bytes:
    """Return the dictionary for images like these: different properties, and heads, of the first few of them."""
    first = images[:SHARED_HEADS]
    heads = b"".join(image.data[: head_bytes(image.codec, image.data)] for image in first)[:MAX_SHARED_BYTES]
    properties = b"".join(dict.fromkeys(image.properties for image in images[:SHARED_HEADS]))
    return properties[: MAX_SHARED_BYTES - len(heads)] + heads


def check_facts(kind: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Check that a stored description of patched images, a leaf of kind "patches" or "stream", is possible.

    `dtype` is `mode/layout/codec` of the images, and `shape` is as in `columns.Leaf`.

    Raises:
        StoreError: if the mode, layout or codec is unknown, or the sizes are impossible.
    """
    facts = dtype.split("/")
    sizes = (1, 1, *shape) if kind == "stream" else shape
    fit = len(facts) == 3 and len(sizes) == (3 if kind == "stream" else 4) and 0 not in sizes[:3]
    if not fit or (kind == "patches" and (facts[2] != "raw" or sizes[3] > 3 * sizes[0] * sizes[1])):
        raise StoreError(f"store.json has an impossible column of patches: {dtype!r:.40} {shape!r:.80}")
    height, width, patch_size = sizes[:3]
    num_patches = Grid(height, width, patch_size).num_patches
    if num_patches > MAX_PIXELS:
        raise StoreError(f"store.json has an image of {num_patches} patches")
    PatchedImage(height, width, facts[0], facts[1], patch_size, bytes(-(-num_patches // 8)), facts[2], b"")


def write_stream(image: PatchedImage, shared: bytes) -> bytes:
    """Encode size, mask, properties and data of a patched image; store.json holds everything else about it."""
    properties = compress(image.properties, shared)
    parts = [uvarint(image.height), uvarint(image.width), image.mask, uvarint(len(properties)), properties]
    if image.codec != "raw":
        length = head_bytes(image.codec, image.data)
        head = compress(image.data[:length], shared)
        parts += [uvarint(len(head)), head, image.data[length:]]
    else:
        parts.append(image.data)
    return b"".join(parts)


def read_stream(data: bytes, facts: Facts, shared: bytes) -> PatchedImage:
    """Decode what `write_stream` returned with the same dictionary, for a stream of these facts.

    Raises:
        StoreError: if the bytes do not give a patched image.
    """
    mode, layout, codec, patch_size = facts
    height, at = read_uvarint(data, 0)
    width, at = read_uvarint(data, at)
    num_patches = -(-height // patch_size) * -(-width // patch_size)
    mask_end = at + -(-num_patches // 8)
    if mask_end > len(data):
        raise StoreError(f"a patched image claims {height} x {width} pixels, its mask is not there")
    mask, at = data[at:mask_end], mask_end
    properties, at = read_compressed(data, at, shared, MAX_PROPERTIES_BYTES, "properties")
    head = b""
    if codec != "raw":
        head, at = read_compressed(data, at, shared, MAX_HEAD_BYTES, "head")
    return PatchedImage(height, width, mode, layout, patch_size, mask, codec, head + data[at:], properties)


def read_compressed(data: bytes, at: int, shared: bytes, max_bytes: int, what: str) -> tuple[bytes, int]:
    """Decompress what is stored at a position; return it and the position after it.

    Raises:
        StoreError: if the bytes end too early, are damaged, or give more than `max_bytes`.
    """
    length, at = read_uvarint(data, at)
    if length > len(data) - at:
        raise StoreError(f"a stored image claims {what} of {length} bytes, {len(data) - at} are there")
    return _decompress(data[at : at + length], shared, max_bytes, what) if length else b"", at + length


def take_streams(
    streams: Sequence[tuple[int, Callable[[bytes, int], tuple[Any, int]]]],
    leaves: list[Any],
    value: bytes | memoryview,
    max_pixels: int,
) -> tuple[bytes | memoryview, set[int]]:
    """Decode the images at the start of a sample's value, and write them into their places among all its leaves.

    Each of the streams is the number of a leaf of kind "stream" or "file", and a function that is given the bytes and
    the number of pixels that it may decode, and returns the image and how many it did; `max_pixels` may be decoded of
    the sample. Returned are the rest of the value, and the numbers of the leaves whose images are stored in that rest.

    Raises:
        StoreError: if the bytes do not give these images.
    """
    missing, start = set(), 0
    for number, read in streams:
        length, start = read_uvarint(value, start)
        if length > len(value) - start:
            raise StoreError(f"a stored image claims {length} bytes, {len(value) - start} are there")
        if length:
            leaves[number], pixels = read(bytes(value[start : start + length]), max_pixels)
            max_pixels -= pixels
        else:
            missing.add(number)
        start += length
    return value[start:] if start else value, missing


def compress(data: bytes, shared: bytes) -> bytes:
    """Compress bytes with DEFLATE; empty input gives empty output."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_DEFAULT_STRATEGY, shared)
    return compressor.compress(data) + compressor.flush() if data else b""


def _decompress(data: bytes, shared: bytes, max_bytes: int, what: str) -> bytes:
    decompressor = zlib.decompressobj(-zlib.MAX_WBITS, zdict=shared)
    try:
        whole = decompressor.decompress(data, max_bytes)
    except zlib.error as error:
        raise StoreError(f"the {what} of a stored image is damaged ({error})") from error
    if not decompressor.eof or decompressor.unused_data:
        raise StoreError(f"the {what} of a stored image is damaged (it does not end where it should)")
    return whole


def uvarint(number: int) -> bytes:
    """Encode a number in as few bytes as it needs, seven bits in each, the lowest bits first.

    >>> list(uvarint(300))
    [172, 2]
    """
    if number < len(_ONE_BYTE):
        return _ONE_BYTE[number]
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def read_uvarint(data: Any, at: int) -> tuple[int, int]:
    """Decode a number that `uvarint` encoded, at a position of the data.

    Returns:
        The number, and the position after it.

    Raises:
        StoreError: if the number does not end within the data, or is longer than nine bytes.
    """
    number = 0
    for shift in range(0, 63, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
    raise StoreError("a stored number does not end where it should")
