"""Encodes whole images as JPEG or WebP.

Images of at most 64 pixels a side get the standard Huffman tables, which all of them share: tables of their own save 1
to 2 % of the coefficients' bytes there and take 100 bytes themselves. Larger images get their own. Chroma is halved
(4:2:0) as in most files.

The code is pure: it reads and writes no files.
"""

import io
from typing import Any, Literal, get_args

from PIL import Image

from dq_lightning.core.errors import StoreError
from dq_lightning.core.records import CHANNELS
from dq_lightning.packed.images import without_properties

LossyCodec = Literal["jpeg", "webp"]
SHARED_TABLES_SIDE = 64
MAX_SIDE = {"jpeg": 65_535, "webp": 16_383}


def encode_lossy(image: Image.Image, codec: str, quality: int) -> bytes:
    """Encode the pixels of an image as a file.

    Args:
        image: Pillow image of mode RGB or L.
        codec: `"jpeg"` or `"webp"`.
        quality: 1 to 100, as in Pillow.

    Raises:
        StoreError: the codec is unknown, or cannot hold an image of this mode or size.
    """
    if codec not in get_args(LossyCodec):
        raise StoreError(f"codec={codec!r:.40} is none of {', '.join(get_args(LossyCodec))}")
    if image.mode not in CHANNELS or not 0 < min(image.size) <= max(image.size) <= MAX_SIDE[codec]:
        raise StoreError(
            f"an image of mode {image.mode} and {image.width} x {image.height} pixels cannot be encoded as {codec}: "
            f"the modes are {', '.join(CHANNELS)}, the longest side is {MAX_SIDE[codec]:,}"
        )
    options: dict[str, Any] = {"quality": quality}
    if codec == "jpeg":
        options |= {"subsampling": "4:2:0", "optimize": max(image.size) > SHARED_TABLES_SIDE}
    image.load()
    buffer = io.BytesIO()
    without_properties(image).save(buffer, codec.upper(), **options)
    return buffer.getvalue()
