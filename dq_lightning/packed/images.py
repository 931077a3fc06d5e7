"""Pillow images as bytes: the original encoded file, PNG, or raw pixels, each checked to give the same image again.

"The same image" covers everything that a user's transform can ask of it: its class, pixels, mode and palette, `format`,
and `info` with the EXIF orientation, resolution, colour profile and texts. An image that Pillow has opened from a file
(a GIF with its frames, a PNG with its texts) comes back as an opened file, and every other image as a plain one with
its `info`.

Only decoders of common raster formats are allowed, because some of Pillow's other decoders start programs (EPS) or take
unbounded time or memory. The disk is touched only to read the file that an image was opened from.
"""

import contextlib
import io
import os
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile, ImageOps, ImagePalette

from dq_lightning.core.errors import StoreError
from dq_lightning.core.records import EncodedImage
from dq_lightning.packed.patch_stream import jpeg_head

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF", "JPEG2000", "MPO", "AVIF")
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
MAX_PIXELS = 1 << 30
# A larger file usually holds many frames, and isn't copied for one of them.
MAX_OWN_FILE_BYTES = 64 << 20
# A frame of lossy WebP begins with three bytes of flags and this code; then come its width and height of 14 bits each.
WEBP_FRAME, WEBP_SIDE_BITS = b"\x9d\x01\x2a", (1 << 14) - 1
# Most pixels of the images that are made together, so that they stay in the processor's cache.
TALL_PIXELS = 1 << 17
# Bits per pixel in the bytes that `Image.tobytes` returns.
MODE_BITS = {"1": 1} | dict.fromkeys(("L", "P"), 8) | dict.fromkeys(("RGB", "YCbCr", "LAB", "HSV"), 24)
MODE_BITS |= dict.fromkeys(("LA", "PA", "La", "I;16", "I;16L", "I;16B", "I;16N"), 16)
MODE_BITS |= dict.fromkeys(("RGBA", "RGBX", "RGBa", "CMYK", "I", "F"), 32)
_EXIF_ORIENTATION = 0x0112
# TIFF tags that hold the positions of strips and tiles in the file.
_PLACES_IN_FILE = (273, 279, 324, 325)


def raw_bytes_of(mode: str, size: tuple[int, int]) -> int:
    """Return how many bytes `Image.tobytes` gives for an image of this mode and size (width, height)."""
    return (size[0] * MODE_BITS[mode] + 7) // 8 * size[1]


def same_image(one: Image.Image, other: Image.Image) -> bool:
    """Return whether two images agree in class, format, frame, mode, size, palette, info and pixels."""
    return (
        type(one) is type(other)
        and (one.format, _frame_of(one)) == (other.format, _frame_of(other))
        and same_info(one.info, other.info)
        and _same_pixels(one, other)
    )


def _frame_of(image: Image.Image) -> int:
    try:
        return image.tell()
    except (AttributeError, ValueError):
        return 0  # The image was unpickled, or its file is closed.


def _same_pixels(one: Image.Image, other: Image.Image) -> bool:
    if (one.mode, one.size) != (other.mode, other.size) or _palette(one) != _palette(other):
        return False
    return one.tobytes() == other.tobytes()


def same_info(one: Any, other: Any) -> bool:
    """Return whether two values of an image's `info` agree in type, order and content; NaN equals NaN here."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same_info(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same_info, one, other))
    try:
        # The texts of a PNG are strings with additional attributes.
        same = one == other and getattr(one, "__dict__", None) == getattr(other, "__dict__", None)
        return bool(same or (one != one and other != other))  # The second part compares NaN with NaN.
    except Exception:
        return False  # Comparing arrays, for example, gives no single truth value.


def is_plain(image: Image.Image) -> bool:
    """Return whether an image is only pixels and `info`: no open file, no format, no EXIF tags changed in memory."""
    return type(image) is Image.Image and image.format is None and exif_beside(image) is None


def exif_beside(image: Image.Image) -> bytes | None:
    """Return the EXIF tags of an image that its info does not hold, or None if there are none.

    These are the tags of a TIFF file, and tags that were changed in memory.

    Raises:
        StoreError: if the tags cannot be written as bytes that give the same tags again.
    """
    if getattr(image, "_exif", None) is None:
        return None  # The tags were not read yet, so whoever reads them gets them from the info.
    bare = Image.new("1", (1, 1))
    bare.info = image.info
    tags = _tags(image)
    if tags == _tags(bare):
        return None
    try:
        data = image.getexif().tobytes()
        bare.getexif().load(data)
        same = tags == _tags(bare)
    except Exception as error:
        raise _exif_error(f"{type(error).__name__}: {error}") from error
    if not same:
        raise _exif_error("they change when they are written and read back")
    return data


def _tags(image: Image.Image) -> dict[int, Any]:
    return {tag: value for tag, value in image.getexif().items() if tag not in _PLACES_IN_FILE}


def _exif_error(reason: str) -> StoreError:
    return StoreError(
        f"the EXIF tags of an image cannot be stored ({reason}): deliver a copy without them (image.copy()), or use "
        'store="indices", which keeps the dataset itself'
    )


def file_of(image: Image.Image) -> bytes | None:
    """Return the bytes of the file that an image was opened from.

    The result is None if the file cannot be read or is large, and for later frames of a file.
    """
    if not isinstance(image, ImageFile.ImageFile) or _frame_of(image) != 0:
        return None
    try:
        stream: Any = getattr(image, "fp", None) or getattr(image, "_fp", None)
        if stream is not None and not stream.closed:
            at = stream.tell()
            stream.seek(0)
            data = bytes(stream.read(MAX_OWN_FILE_BYTES + 1))
            stream.seek(at)
            return data if len(data) <= MAX_OWN_FILE_BYTES else None
        name = getattr(image, "filename", None) or getattr(stream, "name", None)
        # A number is a file descriptor, which may belong to another file by now.
        path = Path(os.fsdecode(name)) if isinstance(name, str | bytes) and name else None
        return path.read_bytes() if path is not None and path.stat().st_size <= MAX_OWN_FILE_BYTES else None
    except (OSError, ValueError, AttributeError):
        return None


def _palette(image: Image.Image) -> tuple[str, bytes] | None:
    if image.mode not in ("P", "PA") or image.palette is None:
        return None
    mode = "RGBA" if "A" in image.palette.mode else "RGB"
    return mode, bytes(image.getpalette(mode) or [])


def decode_image(data: Any, decoder: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file by a decoder of `records.EncodedImage`.

    Raises:
        StoreError: if the bytes are no image of an allowed format, or the image has more than `max_pixels` pixels; it is
            then refused before they are decoded.
    """
    try:
        # The stream stays open, because a transform may read other frames, as it may in the dataset.
        stream = io.BytesIO(data)
        image = Image.open(stream, formats=FORMATS)
        if image.size[0] * image.size[1] > max_pixels:
            raise StoreError(f"an image claims {image.size[0]} x {image.size[1]} pixels")
        image.load()
        # Pillow drops its stream after loading. It is put back, so that packing this image again can reuse its bytes.
        image.fp = image.fp or stream
        if decoder == "pil":
            return image
        if decoder == "pil_rgb":
            # This gives what convert() gives, but without a copy, because nobody else holds these pixels.
            return image._new(image.im) if image.mode == "RGB" else image.convert("RGB")
        return _as_hub(image, decoder)
    except StoreError:
        raise
    except Exception as error:
        # Pillow's format plugins raise many types of errors for damaged files.
        raise StoreError(f"a stored image cannot be decoded ({type(error).__name__}: {error})") from error


def _as_hub(image: Image.Image, decoder: str) -> Image.Image:
    family, _, mode = decoder.partition(":")
    if family != "hf":
        raise StoreError(f"unknown image decoder {decoder!r:.40}")
    if image.getexif().get(_EXIF_ORIENTATION) is not None:
        image = ImageOps.exif_transpose(image)
    return image.convert(mode) if mode and mode != image.mode else image


def decode_plain_jpeg(data: bytes, mode: str, size: tuple[int, int]) -> Image.Image | None:
    """Decode a JPEG of known mode and size (width, height) without Pillow's slow parsing of its head.

    The result is None if that fails.
    """
    with contextlib.suppress(ValueError):
        return Image.frombytes(mode, size, data, "jpeg", mode, "", 1, 0)
    return None


def memory_bytes(data: bytes) -> int:
    """Return how many bytes of memory the image in a file takes, with four bytes for each pixel.

    Raises:
        StoreError: if the bytes are no image of an allowed format.
    """
    height, width, _ = jpeg_head(data)[1]
    if height * width:
        return 4 * height * width
    if data.startswith(b"RIFF") and data[8:16] == b"WEBPVP8 " and data[23:26] == WEBP_FRAME:
        width, height = (int.from_bytes(data[at : at + 2], "little") & WEBP_SIDE_BITS for at in (26, 28))
        return 4 * height * width
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return 4 * image.size[0] * image.size[1]
    except Exception as error:
        # Pillow's format plugins raise many types of errors for damaged files.
        raise StoreError(f"an image file cannot be opened ({type(error).__name__}: {error})") from error


def encode_image(image: Image.Image, encoded: EncodedImage | None) -> tuple[list[Any], bytes]:
    """Encode an image as the original file if that gives its pixels, else as PNG, else as raw pixels.

    Args:
        image: Pillow image.
        encoded: original file bytes of the image, which are tried first, or None.

    Returns:
        The description of the encoding (plain JSON), and the bytes. The description is `["e", decoder]` if the file
        gives the whole image. It is `["f", decoder]` for a file, and `["r", ...]` for raw bytes, that give only the
        pixels: then format and info have to be stored separately, see `values.encode_properties`.

    Raises:
        StoreError: if Pillow gives no bytes for the image's mode, or if the image is more than pixels, info and format.
    """
    # This comes before load(), after which Pillow drops the file. Some entries of info are there only after load().
    own = file_of(image)
    image.load()
    candidates = [] if encoded is None else [encoded]
    candidates += [] if own is None else [EncodedImage(own, "pil")]
    pixels = None
    for file in candidates:
        decoded = _decoded(file)
        if decoded is not None and same_image(decoded, image):
            return ["e", file.decoder], file.data
        if decoded is not None and pixels is None and _same_pixels(decoded, image):
            pixels = file
    _check_kind(image)
    pixels = pixels or _as_png(image)
    return raw_image(image) if pixels is None else (["f", pixels.decoder], pixels.data)


def gives_pixels(file: EncodedImage, image: Image.Image) -> bool:
    """Return whether a file can be decoded and has the mode, size, palette and pixels of an image."""
    decoded = _decoded(file)
    return decoded is not None and _same_pixels(decoded, image)


def _decoded(file: EncodedImage) -> Image.Image | None:
    try:
        return decode_image(file.data, file.decoder)
    except StoreError:
        return None


def _as_png(image: Image.Image) -> EncodedImage | None:
    """Return the pixels of an image as PNG, or None if a PNG does not hold them exactly."""
    if image.mode not in PNG_MODES or 0 in image.size:
        return None
    buffer = io.BytesIO()
    bare = image.copy()
    bare.info = {}
    try:
        bare.save(buffer, "PNG")
    except (OSError, ValueError, TypeError):
        return None
    file = EncodedImage(buffer.getvalue(), "pil")
    return file if gives_pixels(file, image) else None


def _check_kind(image: Image.Image) -> None:
    """Refuse an image that its pixels, info and format do not describe completely."""
    kind = f"{type(image).__module__}.{type(image).__qualname__}"
    if type(image) is not Image.Image and not isinstance(image, ImageFile.ImageFile):
        raise StoreError(
            f"an image is a {kind}, which a packed store cannot hold unchanged: deliver a plain Pillow image "
            '(image.copy() gives one for most classes), or use store="indices", which keeps the dataset itself'
        )


def without_properties(image: Image.Image) -> Image.Image:
    """Return the pixels of a decoded file as a plain image without info and format."""
    bare = image._new(image.im)
    bare.info = {}
    return bare


def raw_image(image: Image.Image) -> tuple[list[Any], bytes]:
    """Return the description (plain JSON) and the raw pixel bytes of an image.

    Raises:
        StoreError: if Pillow gives no bytes for the image's mode.
    """
    if image.mode not in MODE_BITS:
        raise StoreError(f'a Pillow image of mode {image.mode!r} cannot be stored: convert it, or use store="indices"')
    palette = _palette(image)
    colours = [palette[0], palette[1].hex()] if palette else None
    return ["r", image.mode, *image.size, colours], image.tobytes()


def image_from_raw(mode: str, size: tuple[int, int], data: Any) -> Image.Image:
    """Return an image of `size` (width, height), with memory of its own, from bytes that `Image.tobytes` returned."""
    return Image.frombytes(mode, size, data) if 0 not in size else Image.new(mode, size)


def images_from_raw(mode: str, size: tuple[int, int], rows: Any) -> list[Image.Image]:
    """Return images of one mode and size (width, height), each with memory of its own, from raw pixels.

    This is several times faster than one image after the other: one tall image holds many of them, and cropping it
    needs no decoder for each. `rows` is uint8 [B, bytes per image].
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


def decode_node(facts: Any, data: memoryview, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode what `encode_image` or `raw_image` returned, without the properties that are stored separately.

    Raises:
        StoreError: if description and bytes do not give an image of at most `max_pixels` pixels.
    """
    if not isinstance(facts, list) or not facts:
        raise StoreError("a stored image lacks its description")
    if facts[0] == "e" and len(facts) == 2 and isinstance(facts[1], str):
        return decode_image(data, facts[1], max_pixels)
    if facts[0] == "f" and len(facts) == 2 and isinstance(facts[1], str):
        return without_properties(decode_image(data, facts[1], max_pixels))
    if facts[0] != "r" or len(facts) != 5:
        raise StoreError(f"a stored image has an unknown description {facts!r:.80}")
    _, mode, width, height, palette = facts
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
    return image
