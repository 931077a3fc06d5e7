"""Whole images as files of a store: which images become files, and how files become images again.

The code reads the disk only to take the file that an image was opened from, see `packed/images.py`.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from dq_lightning.core.errors import StoreError
from dq_lightning.core.records import CHANNELS, EncodedImage, StoredImage
from dq_lightning.packed.columns import VALUE_KIND, Leaf, describe_leaf, file_facts
from dq_lightning.packed.file_stream import Start, join_file, read_file, split_like, write_parts
from dq_lightning.packed.images import (
    MAX_PIXELS,
    decode_image,
    decode_plain_jpeg,
    encode_image,
    memory_bytes,
    without_properties,
)
from dq_lightning.packed.layouts import leaf_of
from dq_lightning.packed.patch_stream import jpeg_head
from dq_lightning.packed.trees import container, map_leaves
from dq_lightning.packed.values import BYTES_PER_PIXEL, MAX_DEPTH, encode_properties, properties_setter

SetProperties = Callable[[Image.Image], None]
_MAY_HOLD_IMAGES = (Image.Image, tuple, list, dict)


def with_files(sample: Any, encoded: EncodedImage | None, raw_images: bool = False, every: bool = False) -> Any:
    """Return a sample in which every image that a file can hold exactly is replaced by that file.

    Images of which no file gives the same pixels stay as they are. `encoded` holds the original file bytes of the first
    image. With `raw_images`, images of any size may be stored as raw pixels; with `every`, images are replaced, too,
    that are small and plain enough for a column of raw pixels.

    Raises:
        StoreError: an image cannot be stored unchanged; the message names its place.
    """
    if type(sample) is tuple and not any(isinstance(value, _MAY_HOLD_IMAGES) for value in sample):
        return sample
    # The original file belongs to the first image, whether that image needs it or not.
    originals = [encoded]

    def walk(value: Any, place: str, depth: int) -> Any:
        kind = container(value) if depth < MAX_DEPTH else None
        if kind == "dict":
            return {key: walk(inner, f"{place}[{key!r:.40}]", depth + 1) for key, inner in value.items()}
        if kind is not None:
            return type(value)(walk(inner, f"{place}[{i}]", depth + 1) for i, inner in enumerate(value))
        if isinstance(value, Image.Image | StoredImage):
            original = originals.pop() if originals else None
            if isinstance(value, Image.Image) and (every or describe_leaf(value, raw_images).kind == VALUE_KIND):
                facts, data = encode_image(value, original)
                properties = None if facts[0] == "e" else encode_properties(value, place)
                return value if facts[0] == "r" else StoredImage(data, facts[1], properties=properties)
        return value

    return walk(sample, "item", 0)


def without_array_files(sample: Any) -> Any:
    """Return a sample in which files of images that are no Pillow images are replaced by the decoded arrays."""

    def decoded(leaf: Any) -> Any:
        if not isinstance(leaf, StoredImage) or leaf.layout == "pil":
            return leaf
        give = None if leaf.properties is None else properties_setter(leaf.properties)
        return _decode(leaf.data, leaf.decoder, leaf.layout, give, MAX_PIXELS, jpeg_head(leaf.data)[1])

    return map_leaves(sample, decoded)


def write_image(image: StoredImage, starts: tuple[Start, ...]) -> tuple[bytes, int]:
    """Encode an image file for a column; return the bytes, and how many bytes of memory the decoded image takes.

    Raises:
        StoreError: if the file is no image of an allowed format.
    """
    beginning, rest = split_like(image.data, starts)
    height, width, _ = _frame(beginning)
    data = write_parts(image.properties or b"", beginning, rest, starts)
    return data, BYTES_PER_PIXEL * height * width or memory_bytes(image.data)


@lru_cache(maxsize=64)
def _frame(head: bytes) -> tuple[int, int, int]:
    """Return (height, width, components) of a JPEG from its head; all are 0 for the beginning of any other file."""
    return jpeg_head(head)[1]


def decode_file(image: StoredImage) -> Image.Image:
    """Decode an image file; format and info of the result are of no meaning.

    Raises:
        StoreError: if the file cannot be decoded.
    """
    plain = _decode_plain(image.data, image.decoder, MAX_PIXELS, jpeg_head(image.data)[1])
    return decode_image(image.data, image.decoder) if plain is None else plain


class FileReader:
    """Decodes the images of one column of files."""

    def __init__(self, leaf: Leaf) -> None:
        self.decoder, self.layout, self.has_properties = file_facts(leaf.dtype)
        self.starts: tuple[Start, ...] = leaf.starts
        self.give = {start[0]: properties_setter(start[0]) for start in leaf.starts}

    def __call__(self, data: bytes, max_pixels: int) -> tuple[Any, int]:
        """Decode what `file_stream.write_file` returned; return the image, and the number of its pixels.

        Raises:
            StoreError: if the bytes do not give an image of at most `max_pixels`; larger ones are refused undecoded.
        """
        properties, beginning, rest = read_file(data, self.starts)
        give: SetProperties | None = None
        if self.has_properties:
            give = self.give.get(properties) or properties_setter(properties)
        elif properties:
            raise StoreError("a stored image has format and info beside a file that holds them itself")
        image = _decode(join_file(beginning, rest), self.decoder, self.layout, give, max_pixels, _frame(beginning))
        size = image.size if self.layout == "pil" else image.shape
        return image, math.prod(size)


def _decode(
    data: bytes, decoder: str, layout: str, give: SetProperties | None, max_pixels: int, frame: tuple[int, int, int]
) -> Any:
    if give is None:
        return _shaped(decode_image(data, decoder, max_pixels), layout)
    image = _decode_plain(data, decoder, max_pixels, frame)
    if image is None:
        image = without_properties(decode_image(data, decoder, max_pixels))
    if layout != "pil":
        return _shaped(image, layout)
    give(image)
    return image


def _decode_plain(data: bytes, decoder: str, max_pixels: int, frame: tuple[int, int, int]) -> Image.Image | None:
    """Decode the pixels of a plain JPEG of a frame without Pillow's parsing of its head; None for any other file.

    Where the decoder fails, `decode_image` finds the reason.
    """
    if decoder not in ("pil", "pil_rgb"):
        return None
    height, width, channels = frame
    mode = {3: "RGB", 1: "L"}.get(channels)
    if mode is None or not 0 < width * height <= max_pixels or (mode == "L" and decoder == "pil_rgb"):
        return None
    return decode_plain_jpeg(data, mode, (width, height))


def _shaped(image: Image.Image, layout: str) -> Any:
    if layout == "pil":
        return image
    if image.mode not in CHANNELS:
        raise StoreError(f"a stored image of mode {image.mode!r:.20} cannot be an {layout}")
    pixels = np.array(image)
    return leaf_of(layout, image.mode, pixels if pixels.ndim == 3 else pixels[..., None])
