"""Pillow images as bytes: the owner's encoded file, PNG, or raw pixels, each checked to give the same image.

"The same image" is all that a user's transform may ask of it: its class, pixels, mode and palette, `format`, and `info` with
the EXIF orientation, resolution, colour profile and texts. A file that is still open as a Pillow image (a GIF with its
frames, a PNG with its texts) comes back as that open file; every other image as a plain one with its `info`.

Only decoders of plain raster formats are allowed: some others of Pillow's start programs (EPS) or have no fixed cost. The disk
is touched only to read the file that an image was opened from.
"""

import io
import os
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile, ImageOps, ImagePalette

from dq_lightning.core.errors import StoreError
from dq_lightning.core.records import EncodedImage

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF", "JPEG2000", "MPO", "AVIF")
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
MAX_PIXELS = 1 << 30
# a larger file that an image was opened from holds many frames, and is not copied for one of them
MAX_OWN_FILE_BYTES = 64 << 20
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
# tags of a TIFF that say where in the file its strips and tiles are
_PLACES_IN_FILE = (273, 279, 324, 325)


def raw_bytes_of(mode: str, size: tuple[int, int]) -> int:
    """Bytes that `tobytes` gives for an image of this mode and size."""
    return (size[0] * MODE_BITS[mode] + 7) // 8 * size[1]


def same_image(one: Image.Image, other: Image.Image) -> bool:
    """Whether two images are the same to whoever looks at them: class, format, frame, mode, size, palette, info, pixels."""
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
        return 0  # unpickled, or its file is closed


def _same_pixels(one: Image.Image, other: Image.Image) -> bool:
    if (one.mode, one.size) != (other.mode, other.size) or _palette(one) != _palette(other):
        return False
    return one.tobytes() == other.tobytes()


def same_info(one: Any, other: Any) -> bool:
    """Whether two values of an image's `info` agree in types, order and content; NaN is the same as NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same_info(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same_info, one, other))
    try:
        # the texts of a PNG are strings with attributes
        same = one == other and getattr(one, "__dict__", None) == getattr(other, "__dict__", None)
        return bool(same or (one != one and other != other))  # NaN
    except Exception:
        return False  # an array or another value that no single comparison answers


def is_plain(image: Image.Image) -> bool:
    """Whether pixels and `info` are all there is to an image: no open file, no format, no EXIF tags changed in memory."""
    return type(image) is Image.Image and image.format is None and exif_beside(image) is None


def exif_beside(image: Image.Image) -> bytes | None:
    """The EXIF tags of an image that its info does not tell: those of a TIFF, and those changed in memory; else None.

    Raises:
        StoreError: they cannot be written down.
    """
    if getattr(image, "_exif", None) is None:
        return None  # nobody has asked for them yet: whoever does gets them from the info
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
        raise _exif_error("they come back as others")
    return data


def _tags(image: Image.Image) -> dict[int, Any]:
    return {tag: value for tag, value in image.getexif().items() if tag not in _PLACES_IN_FILE}


def _exif_error(reason: str) -> StoreError:
    return StoreError(
        f"the EXIF tags of an image cannot be stored ({reason}): deliver a copy without them (image.copy()), or use "
        'store="indices", which keeps the dataset itself'
    )


def file_of(image: Image.Image) -> bytes | None:
    """Bytes of the file that an image was opened from, if it can still be read and is no huge one; None for later frames."""
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
        # numbers are descriptors of files that may be others by now
        path = Path(os.fsdecode(name)) if isinstance(name, str | bytes) and name else None
        return path.read_bytes() if path is not None and path.stat().st_size <= MAX_OWN_FILE_BYTES else None
    except (OSError, ValueError, AttributeError):
        return None


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
        # not closed: a transform may look at other frames, as in the dataset
        stream = io.BytesIO(data)
        image = Image.open(stream, formats=FORMATS)
        if image.size[0] * image.size[1] > most_pixels:
            raise StoreError(f"an image claims {image.size[0]} x {image.size[1]} pixels")
        image.load()
        # Pillow lets go of it, and with it of the bytes that a second packing of this image would keep
        image.fp = image.fp or stream
        if decoder == "pil":
            return image
        if decoder == "pil_rgb":
            # what convert() gives, without its copy of pixels that nobody else holds
            return image._new(image.im) if image.mode == "RGB" else image.convert("RGB")
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
    """Facts (plain JSON) and bytes of an image: the owner's file if that gives its pixels, else PNG, else raw.

    Facts are `["e", decoder]` where the file gives the whole image. Others give the pixels alone (`["f", decoder]`, and `["r",
    ...]` for raw ones): format and info have to be kept beside them, see `values.encode_properties`.

    Raises:
        StoreError: a mode that Pillow itself cannot give bytes of, or an image that is more than pixels, info and format.
    """
    # before it is loaded, when Pillow lets go of the file; some facts are in the info only afterwards
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


def _decoded(file: EncodedImage) -> Image.Image | None:
    try:
        return decode_image(file.data, file.decoder)
    except StoreError:
        return None


def _as_png(image: Image.Image) -> EncodedImage | None:
    """The pixels of an image as PNG, if that holds them exactly."""
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
    decoded = _decoded(file)
    return file if decoded is not None and _same_pixels(decoded, image) else None


def _check_kind(image: Image.Image) -> None:
    """Refuse an image that pixels, info and format do not describe."""
    kind = f"{type(image).__module__}.{type(image).__qualname__}"
    if type(image) is not Image.Image and not isinstance(image, ImageFile.ImageFile):
        raise StoreError(
            f"an image is a {kind}, which a packed store cannot hold unchanged: deliver a plain Pillow image "
            '(image.copy() gives one for most classes), or use store="indices", which keeps the dataset itself'
        )


def _without_properties(image: Image.Image) -> Image.Image:
    """The pixels of a decoded file as a plain image."""
    bare = image._new(image.im)
    bare.info = {}
    return bare


def raw_image(image: Image.Image) -> tuple[list[Any], bytes]:
    """Facts and bytes of an image as its pixels.

    Raises:
        StoreError: a mode that Pillow itself cannot give bytes of.
    """
    if image.mode not in MODE_BITS:
        raise StoreError(f'a Pillow image of mode {image.mode!r} cannot be stored: convert it, or use store="indices"')
    palette = _palette(image)
    colours = [palette[0], palette[1].hex()] if palette else None
    return ["r", image.mode, *image.size, colours], image.tobytes()


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
    """The inverse of `encode_image`, without the properties that are kept beside pixels.

    Raises:
        StoreError: facts and bytes do not describe an image.
    """
    if not isinstance(facts, list) or not facts:
        raise StoreError("a stored image has no facts")
    if facts[0] == "e" and len(facts) == 2 and isinstance(facts[1], str):
        return decode_image(data, facts[1], most_pixels)
    if facts[0] == "f" and len(facts) == 2 and isinstance(facts[1], str):
        return _without_properties(decode_image(data, facts[1], most_pixels))
    if facts[0] != "r" or len(facts) != 5:
        raise StoreError(f"a stored image has unknown facts {facts!r:.80}")
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
