"""Encodes whole images as JPEG or WebP.

Images of at most 64 pixels a side get the standard Huffman tables, which all of them share: tables of their own save 1
to 2 % of the coefficients' bytes there and take 100 bytes themselves. Larger images get their own. Chroma is halved
(4:2:0) as in most files.

Pillow's `save` takes about as long as the encoder itself for a JPEG of 32 pixels a side, so from the second small JPEG of a
quality on its encoder is called directly. What it is called with is what `save` called it with for the first, after
checking that both give the same bytes.

The code is pure: it reads and writes no files on a disk.
"""

import contextlib
import io
import os
from typing import Any, Literal, get_args

from PIL import Image

from dq_lightning.core.errors import StoreError
from dq_lightning.core.records import CHANNELS
from dq_lightning.packed.images import without_properties

LossyCodec = Literal["jpeg", "webp"]
SHARED_TABLES_SIDE = 64
MAX_SIDE = {"jpeg": 65_535, "webp": 16_383}
_CODECS = get_args(LossyCodec)
# What the encoder of small JPEGs is called with, by mode and quality; None where it cannot be called directly.
_arguments: dict[tuple[str, int], tuple[Any, ...] | None] = {}


def encode_lossy(image: Image.Image, codec: str, quality: int) -> bytes:
    """Encode the pixels of an image as a file.

    Args:
        image: Pillow image of mode RGB or L.
        codec: `"jpeg"` or `"webp"`.
        quality: 1 to 100, as in Pillow.

    Raises:
        StoreError: the codec is unknown, or cannot hold an image of this mode or size.
    """
    if codec not in _CODECS:
        raise StoreError(f"codec={codec!r:.40} is none of {', '.join(_CODECS)}")
    if image.mode not in CHANNELS or not 0 < min(image.size) <= max(image.size) <= MAX_SIDE[codec]:
        raise StoreError(
            f"an image of mode {image.mode} and {image.width} x {image.height} pixels cannot be encoded as {codec}: "
            f"the modes are {', '.join(CHANNELS)}, the longest side is {MAX_SIDE[codec]:,}"
        )
    if codec == "webp":
        image.load()
        return _saved(without_properties(image), "WEBP", quality=quality)
    if max(image.size) > SHARED_TABLES_SIDE:
        image.load()
        return _saved(without_properties(image), "JPEG", quality=quality, subsampling="4:2:0", optimize=True)
    key = image.mode, quality
    arguments = _arguments.get(key)
    if arguments is not None:
        return image.tobytes("jpeg", image.mode, *arguments)
    image.load()
    bare = without_properties(image)
    data = _saved(bare, "JPEG", quality=quality, subsampling="4:2:0", optimize=False)
    if key not in _arguments:
        _arguments[key] = _encoder_arguments(bare, data)
    return data


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    if kind == "JPEG" and max(image.size) > SHARED_TABLES_SIDE and hasattr(os, "memfd_create"):
        # Pillow's JPEG encoder holds the interpreter's lock unless it writes to a file of the system, as this one in memory.
        with contextlib.suppress(OSError), os.fdopen(os.memfd_create("dq_lightning"), "w+b") as file:
            image.save(file, kind, **options)
            file.seek(0)
            return file.read()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _encoder_arguments(saved: Image.Image, data: bytes) -> tuple[Any, ...] | None:
    """Return what Pillow's JPEG encoder was called with for an image that was saved as `data`.

    None if Pillow does not tell, or if its encoder gives other bytes with it.
    """
    arguments = getattr(saved, "encoderconfig", None)
    if not isinstance(arguments, tuple):
        return None
    try:
        return arguments if saved.tobytes("jpeg", saved.mode, *arguments) == data else None
    except (OSError, RuntimeError, TypeError, ValueError):
        return None
