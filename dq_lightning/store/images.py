"""Pillow images as bytes: the owner's encoded file, PNG, or raw pixels, each checked to give the same image. PURE.

Only decoders of plain raster formats are allowed: some others of Pillow's start programs (EPS) or have no fixed cost.
"""

import io
from typing import Any

from PIL import Image, ImageOps, ImagePalette

from dq_lightning.errors import StoreError
from dq_lightning.records import EncodedImage

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF", "JPEG2000", "MPO", "AVIF")
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
MAX_PIXELS = 1 << 30
# of images that are made together: they stay in the processor's cache
TALL_PIXELS = 1 << 17
# bits of a pixel as `tobytes` gives them
MODE_BITS = {
    "1": 1,
    "L": 8,
    "P": 8,
    "LA": 16,
    "PA": 16,
    "La": 16,
    "RGB": 24,
    "YCbCr": 24,
    "LAB": 24,
    "HSV": 24,
    "RGBA": 32,
}
MODE_BITS |= {"RGBX": 32, "RGBa": 32, "CMYK": 32, "I": 32, "F": 32, "I;16": 16, "I;16L": 16, "I;16B": 16, "I;16N": 16}
_EXIF_ORIENTATION = 0x0112


def raw_bytes_of(mode: str, size: tuple[int, int]) -> int:
    """Bytes that `tobytes` gives for an image of this mode and size."""
    return (size[0] * MODE_BITS[mode] + 7) // 8 * size[1]


def has_palette(image: Image.Image) -> bool:
    """Whether the pixels alone do not say what the image shows."""
    return image.mode in ("P", "PA") or "transparency" in image.info


def same_image(one: Image.Image, other: Image.Image) -> bool:
    """Whether two images agree in mode, size, palette, transparency and every pixel."""
    if (one.mode, one.size) != (other.mode, other.size):
        return False
    if one.info.get("transparency") != other.info.get("transparency") or _palette(one) != _palette(other):
        return False
    return one.tobytes() == other.tobytes()


def _palette(image: Image.Image) -> tuple[str, bytes] | None:
    if image.mode not in ("P", "PA") or image.palette is None:
        return None
    mode = "RGBA" if "A" in image.palette.mode else "RGB"
    return mode, bytes(image.getpalette(mode) or [])


def decode_image(data: Any, decoder: str, most_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode as `records.EncodedImage.decoder` says; nothing is decoded of an image that claims more than `most_pixels`.

    Raises:
        StoreError: no image of an allowed format, or too large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.size[0] * image.size[1] > most_pixels:
                raise StoreError(f"an image claims {image.size[0]} x {image.size[1]} pixels")
            if decoder == "pil_rgb":
                image.load()
                # what convert() gives, without its copy of pixels that nobody else holds
                return image._new(image.im) if image.mode == "RGB" else image.convert("RGB")
            image.load()
            return _as_hub(image, decoder)
    except StoreError:
        raise
    except Exception as error:
        # Pillow's format plugins raise all sorts of errors on damaged files
        raise StoreError(f"a stored image cannot be decoded ({type(error).__name__}: {error})") from error


def _as_hub(image: Image.Image, decoder: str) -> Image.Image:
    family, _, mode = decoder.partition(":")
    if family != "hf":
        raise StoreError(f"unknown image decoder {decoder!r:.40}")
    if image.getexif().get(_EXIF_ORIENTATION) is not None:
        image = ImageOps.exif_transpose(image)
    return image.convert(mode) if mode and mode != image.mode else image


def encode_image(image: Image.Image, encoded: EncodedImage | None) -> tuple[list[Any], bytes]:
    """Facts (plain JSON) and bytes of an image: the owner's bytes if they decode to just this image, else PNG, else raw.

    Raises:
        StoreError: a mode that Pillow itself cannot give bytes of.
    """
    if encoded is not None and _decodes_to(image, encoded.data, encoded.decoder):
        return ["e", encoded.decoder], encoded.data
    if image.mode in PNG_MODES and 0 not in image.size:
        buffer = io.BytesIO()
        # profiles and texts are no pixels
        bare = image.copy()
        bare.info = {k: v for k, v in image.info.items() if k == "transparency"}
        try:
            bare.save(buffer, "PNG")
        except (OSError, ValueError, TypeError):
            return raw_image(image)
        if _decodes_to(image, buffer.getvalue(), "hf"):
            return ["e", "hf"], buffer.getvalue()
    return raw_image(image)


def _decodes_to(image: Image.Image, data: bytes, decoder: str) -> bool:
    try:
        return same_image(decode_image(data, decoder), image)
    except StoreError:
        return False


def raw_image(image: Image.Image) -> tuple[list[Any], bytes]:
    """Facts and bytes of an image as its pixels.

    Raises:
        StoreError: a mode that Pillow itself cannot give bytes of.
    """
    if image.mode not in MODE_BITS:
        raise StoreError(f'a Pillow image of mode {image.mode!r} cannot be stored: convert it, or use store="indices"')
    palette = _palette(image)
    transparency = image.info.get("transparency")
    kept: Any = ["y", transparency.hex()] if isinstance(transparency, bytes) else transparency
    if isinstance(transparency, tuple):
        kept = ["t", *transparency]
    colours = [palette[0], palette[1].hex()] if palette else None
    return ["r", image.mode, *image.size, colours, kept], image.tobytes()


def image_from_raw(mode: str, size: tuple[int, int], data: Any) -> Image.Image:
    """An image of its own memory from what `tobytes` gave."""
    return Image.frombytes(mode, size, data) if 0 not in size else Image.new(mode, size)


def images_from_raw(mode: str, size: tuple[int, int], rows: Any) -> list[Image.Image]:
    """Images of one mode and size, each of its own memory, from uint8 [B, bytes of an image].

    Several times faster than one by one: a tall image holds them all, and Pillow cuts it without a decoder for each.
    """
    width, height = size
    made: list[Image.Image] = []
    step = max(1, TALL_PIXELS // max(1, width * height))
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        tall = image_from_raw(mode, (width, height * len(some)), some)
        pixels, image = tall.im, tall._new
        made += [image(pixels.crop((0, top, width, top + height))) for top in range(0, height * len(some), height)]
    return made


def decode_node(facts: Any, data: memoryview, most_pixels: int = MAX_PIXELS) -> Image.Image:
    """The inverse of `encode_image`.

    Raises:
        StoreError: facts and bytes do not describe an image.
    """
    if not isinstance(facts, list) or not facts:
        raise StoreError("a stored image has no facts")
    if facts[0] == "e" and len(facts) == 2 and isinstance(facts[1], str):
        return decode_image(data, facts[1], most_pixels)
    if facts[0] != "r" or len(facts) != 6:
        raise StoreError(f"a stored image has unknown facts {facts!r:.80}")
    _, mode, width, height, palette, transparency = facts
    sizes_fit = type(width) is int and type(height) is int and min(width, height) >= 0
    if (
        mode not in MODE_BITS
        or not sizes_fit
        or raw_bytes_of(mode, (width, height)) != len(data)
        or max(width, height) > MAX_PIXELS
    ):
        raise StoreError(
            f"a stored image of mode {mode!r:.20} and {len(data)} bytes claims {width!r:.20} x {height!r:.20} pixels"
        )
    image = image_from_raw(mode, (width, height), bytes(data))
    if palette is not None:
        image.palette = ImagePalette.ImagePalette(palette[0], bytes.fromhex(palette[1]))
        image.putpalette(bytes.fromhex(palette[1]), palette[0])
    if transparency is not None:
        image.info["transparency"] = _transparency(transparency)
    return image


def _transparency(kept: Any) -> Any:
    if isinstance(kept, list):
        return bytes.fromhex(kept[1]) if kept[0] == "y" else tuple(kept[1:])
    return kept
