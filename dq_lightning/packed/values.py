"""A safe encoding for any value that a dataset may deliver: JSON for the structure, raw bytes for the content.

Decoding builds only None, bool, int, float, complex, str, bytes, tuple, list, dict, numpy arrays and scalars, torch
tensors, Pillow images and patched images, and two types that Pillow puts into an image's `info`. All sizes are compared
with the number of available bytes before memory is allocated. Nothing here touches the disk, except that images are
encoded from the files that they were opened from.

    uint32 length of the JSON | JSON | buffers, one after the other

The memory that a decoded value may take is bounded by the number of its stored bytes, see `most_decoded_bytes`. The
writer refuses whatever the reader would refuse.
"""

import copy
import json
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from dq_lightning.core.arrays import TENSOR_DTYPES, plain_shape
from dq_lightning.core.errors import StoreError
from dq_lightning.core.records import CHANNELS, EncodedImage, PatchedImage, StoredImage
from dq_lightning.packed.images import (
    MAX_PIXELS,
    decode_node,
    encode_image,
    exif_beside,
    is_plain,
    memory_bytes,
    raw_image,
)

MAX_DEPTH = 64
# Most bytes of JSON for one value. This is a list of two million numbers, which should be stored as an array instead.
MAX_STRUCTURE_BYTES = 16 << 20
# Pillow holds a colour image with four bytes per pixel.
BYTES_PER_PIXEL = 4
# The constant part admits any one image of a size that Pillow opens by default. The factor admits the compression that
# pictures with some content reach.
ALWAYS_DECODED_BYTES, DECODED_PER_STORED = 1 << 30, 64
NUMPY_KINDS = "biufcSUMm"


def is_plain_array(value: Any) -> bool:
    """Return whether a value is a numpy array that its bytes, dtype and shape describe completely."""
    return type(value) in (np.ndarray, np.memmap) and value.dtype.kind in NUMPY_KINDS


def is_plain_tensor(value: Any) -> bool:
    """Return whether a value is a torch tensor that its bytes, dtype and shape describe completely."""
    plain = type(value) is torch.Tensor and value.layout == torch.strided and value.device.type == "cpu"
    return plain and str(value.dtype).removeprefix("torch.") in TENSOR_DTYPES


def array_bytes(value: Any) -> bytes:
    """Return the bytes of a numpy array or scalar in C order."""
    return np.asarray(value).tobytes()


def tensor_bytes(value: torch.Tensor) -> bytes:
    """Return the bytes of a tensor in C order."""
    flat = value.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def array_from(data: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
    """Return a writable array with memory of its own, copied from the bytes `data`."""
    return np.frombuffer(data, dtype).reshape(shape).copy()


def tensor_from(data: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor over the memory of `data` if that is writable, and else over a copy of it."""
    if not len(data):
        return torch.empty(shape, dtype=dtype)
    own = bytearray(data) if memoryview(data).readonly else data
    return torch.frombuffer(own, dtype=dtype).reshape(shape)


def most_decoded_bytes(stored_bytes: int) -> int:
    """Return how many bytes of memory the images of one sample may take when `stored_bytes` bytes are stored of it."""
    return ALWAYS_DECODED_BYTES + DECODED_PER_STORED * stored_bytes


def patched_bytes(images: Sequence[PatchedImage]) -> int:
    """Return how many bytes of memory the pixels of patched images take."""
    return sum(image.height * image.width * CHANNELS[image.mode] for image in images)


def check_decoded_size(size: int, stored_bytes: int) -> None:
    """Check that the images of one sample take no more memory than its stored bytes allow.

    Raises:
        StoreError: if `size`, the bytes of the decoded images, is more than `most_decoded_bytes(stored_bytes)`.
    """
    if size > most_decoded_bytes(stored_bytes):
        raise _too_large(size, stored_bytes)


def _too_large(size: int, stored_bytes: int) -> StoreError:
    return StoreError(
        f"the images of one sample take {size:,} bytes in memory and {stored_bytes:,} in the store; a sample may take "
        f"{most_decoded_bytes(stored_bytes):,}: divide it into several samples, or resize its images"
    )


def encode_value(
    value: Any, encoded: EncodedImage | None = None, raw_images: bool = False, place: str = "item"
) -> bytes:
    """Encode a value as bytes.

    Args:
        value: any value that this module can store.
        encoded: original file bytes; the first image is stored as these bytes if they decode to exactly this image.
        raw_images: whether to write the pixels of every image that is a plain Pillow image without an open file.
        place: name of the value in error messages.

    Raises:
        StoreError: if a value cannot be stored; the message names its place and type.
    """
    encoder = _Encoder(encoded, raw_images)
    text = json.dumps(encoder.node(value, place, 0), separators=(",", ":")).encode()
    if len(text) > MAX_STRUCTURE_BYTES:
        raise StoreError(
            f"its lists, dicts and texts take {len(text):,} bytes, the most is {MAX_STRUCTURE_BYTES:,}: deliver numbers as "
            "arrays or tensors"
        )
    whole = b"".join([struct.pack("<I", len(text)), text, *encoder.buffers])
    if encoder.image_bytes > most_decoded_bytes(len(whole)):
        raise _too_large(encoder.image_bytes, len(whole))
    return whole


def decode_value(data: Any, images: bool = True) -> Any:
    """Decode what `encode_value` returned. With `images=False`, a value that holds an image is refused.

    Raises:
        StoreError: if the bytes are not an encoding made by `encode_value`.
    """
    view = memoryview(data)
    try:
        (length,) = struct.unpack_from("<I", view)
        if length > len(view) - 4:
            raise StoreError(f"{length} bytes of structure are claimed, {len(view) - 4} are there")
        if length > MAX_STRUCTURE_BYTES:
            raise StoreError(f"{length:,} bytes of structure are more than {MAX_STRUCTURE_BYTES:,}")
        decoder = _Decoder(view[4 + length :], most_decoded_bytes(len(view)) if images else 0)
        value = decoder.value(json.loads(bytes(view[4 : 4 + length])), 0)
    except StoreError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, struct.error, RecursionError, MemoryError) as error:
        raise StoreError(f"a stored value cannot be decoded ({type(error).__name__}: {error})") from error
    if decoder.at != len(decoder.view):
        raise StoreError(f"{len(decoder.view) - decoder.at} bytes are left over after a stored value")
    return value


def encode_properties(image: Image.Image, place: str = "the image") -> bytes:
    """Encode `format`, `info` and those EXIF tags of an image that are not in its `info`; empty if it has none of them.

    Raises:
        StoreError: if the info holds a value that cannot be stored; the message names its key.
    """
    exif = exif_beside(image)
    if image.format is None and not image.info and exif is None:
        return b""
    return encode_value((image.format, dict(image.info), exif), place=f"(format, info, EXIF) of {place}")


def properties_setter(data: bytes) -> Callable[[Image.Image], None]:
    """Return a function that sets encoded properties on an image; each image gets its own copy of the info.

    Raises:
        StoreError: if the bytes are not an encoding of properties.
    """
    if not data:
        return lambda image: None
    value = decode_value(data, images=False)
    kinds = tuple(map(type, value)) if type(value) is tuple else ()
    if len(kinds) != 3 or kinds[0] not in (str, _NONE) or kinds[1] is not dict or kinds[2] not in (bytes, _NONE):
        raise StoreError(f"the properties of a stored image are {value!r:.80}")
    image_format, info, exif = value

    def give(image: Image.Image) -> None:
        if image_format is not None:
            image.format = image_format
        image.info = copy.deepcopy(info)
        if exif is None:
            return
        try:
            image.getexif().load(exif)
        except Exception as error:
            # Pillow raises many types of errors for damaged tags, among them SyntaxError.
            raise StoreError(f"stored EXIF tags cannot be read ({type(error).__name__}: {error})") from error

    return give


_NONE = type(None)


class _Encoder:
    """Converts values into JSON nodes and collects their raw buffers."""

    def __init__(self, encoded: EncodedImage | None, raw_images: bool) -> None:
        self.encoded = encoded
        self.raw_images = raw_images
        self.buffers: list[bytes] = []
        # Memory in bytes that all images take once they are decoded.
        self.image_bytes = 0

    def _keep(self, data: bytes) -> int:
        self.buffers.append(data)
        return len(data)

    def node(self, value: Any, place: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise StoreError(f"{place}: more than {MAX_DEPTH} levels of nesting cannot be stored")
        if value is None or type(value) in (bool, str):
            return value
        if type(value) is int:
            return ["i", hex(value)]
        if type(value) is float:
            return ["f", self._keep(struct.pack("<d", value))]
        if type(value) is complex:
            return ["c", self._keep(struct.pack("<dd", value.real, value.imag))]
        if type(value) is bytes:
            return ["y", self._keep(value)]
        if type(value) is tuple:
            return ["t", *(self.node(inner, f"{place}[{i}]", depth + 1) for i, inner in enumerate(value))]
        if type(value) is list:
            return ["l", *(self.node(inner, f"{place}[{i}]", depth + 1) for i, inner in enumerate(value))]
        if isinstance(value, dict):
            nodes = ["d"]
            for key, inner in value.items():
                nodes.append(self.node(key, f"key of {place}", depth + 1))
                nodes.append(self.node(inner, f"{place}[{key!r:.40}]", depth + 1))
            return nodes
        return self._leaf(value, place)

    def _leaf(self, value: Any, place: str) -> Any:
        if isinstance(value, np.generic) and value.dtype.kind in NUMPY_KINDS:
            return ["g", value.dtype.str, self._keep(array_bytes(value))]
        if is_plain_array(value):
            return ["a", value.dtype.str, list(value.shape), self._keep(array_bytes(value))]
        if is_plain_tensor(value):
            name = str(value.dtype).removeprefix("torch.")
            return ["T", name, list(value.shape), self._keep(tensor_bytes(value))]
        if isinstance(value, Image.Image):
            raw = self.raw_images and is_plain(value)
            facts, data = raw_image(value) if raw else encode_image(value, self.encoded)
            self.encoded = None
            self.image_bytes += value.size[0] * value.size[1] * BYTES_PER_PIXEL
            # A complete file already holds the format, info and EXIF tags of its image.
            properties = b"" if facts[0] == "e" else encode_properties(value, place)
            return ["p", facts, self._keep(data), self._keep(properties)]
        if isinstance(value, StoredImage) and value.layout == "pil":
            self.encoded = None
            facts = ["e" if value.properties is None else "f", value.decoder]
            self.image_bytes += memory_bytes(value.data)
            return ["p", facts, self._keep(value.data), self._keep(value.properties or b"")]
        if isinstance(value, PatchedImage):
            facts = [value.height, value.width, value.mode, value.layout, value.patch_size, value.codec]
            self.image_bytes += value.height * value.width * BYTES_PER_PIXEL
            return ["q", facts, self._keep(value.mask), self._keep(value.data), self._keep(value.properties)]
        if type(value).__module__.startswith("PIL."):
            return self._of_info(value, place)
        raise _cannot_hold(value, place)

    def _of_info(self, value: Any, place: str) -> Any:
        """Encode a value of a type that only Pillow makes: a fraction of two numbers, or a text with its language."""
        from PIL.PngImagePlugin import iTXt
        from PIL.TiffImagePlugin import IFDRational

        parts: tuple[Any, ...]
        if type(value) is IFDRational:
            tag, parts = "R", (value.numerator, value.denominator)
        elif type(value) is iTXt:
            tag, parts = "x", (str(value), value.lang, value.tkey)
        else:
            raise _cannot_hold(value, place)
        return [tag, *(self.node(part, place, MAX_DEPTH) for part in parts)]


def _cannot_hold(value: Any, place: str) -> StoreError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return StoreError(
        f"{place} is a {kind}, which a packed store cannot hold unchanged: deliver plain numbers, text, arrays, tensors "
        'or Pillow images, or use store="indices", which keeps the dataset itself'
    )


class _Decoder:
    """Converts JSON nodes into values and takes the raw buffers one after the other."""

    def __init__(self, view: memoryview, image_bytes: int) -> None:
        self.view = view
        self.at = 0
        # Memory in bytes that further images may take.
        self.image_bytes = image_bytes

    def _take(self, length: Any) -> memoryview:
        if type(length) is not int or not 0 <= length <= len(self.view) - self.at:
            raise StoreError(f"a stored value claims {length!r} bytes, {len(self.view) - self.at} are there")
        self.at += length
        return self.view[self.at - length : self.at]

    def value(self, node: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise StoreError(f"a stored value is nested deeper than {MAX_DEPTH} levels")
        if node is None or type(node) in (bool, str):
            return node
        match node:
            case ["i", text]:
                return int(text, 16)
            case ["f", length]:
                return float(struct.unpack("<d", self._take(length))[0])
            case ["c", length]:
                return complex(*struct.unpack("<dd", self._take(length)))
            case ["y", length]:
                return bytes(self._take(length))
            case ["t", *inner]:
                return tuple(self.value(part, depth + 1) for part in inner)
            case ["l", *inner]:
                return [self.value(part, depth + 1) for part in inner]
            case ["d", *inner]:
                pairs = zip(inner[::2], inner[1::2], strict=True)
                return {self.value(key, depth + 1): self.value(part, depth + 1) for key, part in pairs}
            case ["g", dtype, length]:
                return array_from(self._take(length), numpy_dtype(dtype), ())[()]
            case ["a", dtype, shape, length]:
                return array_from(self._take(length), numpy_dtype(dtype), plain_shape(shape))
            case ["T", dtype, shape, length]:
                return self._tensor(dtype, plain_shape(shape), self._take(length))
            case ["p", facts, length, properties_length]:
                return self._image(facts, self._take(length), properties_length)
            case ["q", facts, *lengths]:
                mask, data, properties = (bytes(self._take(length)) for length in lengths)
                height, width, mode, layout, patch_size, codec = facts
                patched = PatchedImage(height, width, mode, layout, patch_size, mask, codec, data, properties)
                self._count(height * width)
                return patched
            case ["R", numerator, denominator]:
                from PIL.TiffImagePlugin import IFDRational

                return IFDRational(self.value(numerator, depth + 1), self.value(denominator, depth + 1))
            case ["x", *parts]:
                from PIL.PngImagePlugin import iTXt

                return iTXt(*(self.value(part, depth + 1) for part in parts))
        raise StoreError(f"a stored value has an unknown node {node!r:.80}")

    def _tensor(self, name: str, shape: tuple[int, ...], data: memoryview) -> torch.Tensor:
        dtype = TENSOR_DTYPES[name]
        if math.prod(shape) * dtype.itemsize != len(data):
            raise StoreError(f"a stored tensor {name} {shape} claims {len(data)} bytes")
        return tensor_from(data, dtype, shape)

    def _image(self, facts: Any, data: memoryview, properties_length: Any) -> Image.Image:
        image = decode_node(facts, data, min(MAX_PIXELS, self.image_bytes // BYTES_PER_PIXEL))
        self._count(image.size[0] * image.size[1])
        properties_setter(bytes(self._take(properties_length)))(image)
        return image

    def _count(self, pixels: int) -> None:
        self.image_bytes -= pixels * BYTES_PER_PIXEL
        if self.image_bytes < 0:
            raise StoreError("the images of one sample take far more memory than what is stored of them can explain")


def numpy_dtype(text: Any) -> np.dtype[Any]:
    """Return the dtype for a stored description; only plain kinds with at most 1 MiB per element are allowed.

    Raises:
        StoreError: if the description is no dtype, or one that a store may not hold.
    """
    try:
        dtype: np.dtype[Any] = np.dtype(text) if isinstance(text, str) and len(text) < 32 else np.dtype("V")
    except (TypeError, ValueError, SyntaxError) as error:
        raise StoreError(f"{text!r} is no dtype") from error
    if dtype.kind not in NUMPY_KINDS or not 0 <= dtype.itemsize <= 1 << 20:
        raise StoreError(f"dtype {text!r:.40} is not one that a store may hold")
    return dtype
