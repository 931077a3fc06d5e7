"""Converts images of any type to the RGB uint8 PIL images that encoders see."""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dq_lightning.core.arrays import as_numpy
from dq_lightning.core.errors import SourceError
from dq_lightning.sources.items import may_be_image

Array = NDArray[Any]
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


@dataclass(frozen=True)
class Scale:
    """Linear map of pixel values from `low`, which becomes 0, to `high`, which becomes 255.

    It is for values whose type does not define their range.
    """

    low: float
    high: float

    def __call__(self, array: Array) -> Array:
        """Map an array to uint8, rounded to the nearest integer; values outside of the range are clipped."""
        span = self.high - self.low
        factor = 255.0 / span if span > 0 else 0.0
        scaled: Array = np.rint((array.astype(np.float64) - self.low) * factor)
        return scaled.clip(0, 255).astype(np.uint8)


def check_pixels(value: Any) -> Any:
    """Return the value after checking that it can be an image.

    Raises:
        SourceError: the value is no PIL image and no array, has no pixels, or has a shape that images do not have.
    """
    if not isinstance(value, Image.Image | Tensor | np.ndarray):
        raise SourceError(f"in place of the image there is a {type(value).__name__}")
    shape = value.size if isinstance(value, Image.Image) else tuple(value.shape)
    if 0 in shape:
        raise SourceError(f"the image has no pixels: {list(shape)}")
    if not may_be_image(value):
        kind = "" if isinstance(value, Image.Image) else f"{value.dtype} "
        raise SourceError(f"{kind}{list(shape)} is no image: arrays are [H, W], or have 1 to 4 channels first or last")
    return value


def needs_scale(value: Any) -> bool:
    """Whether the type of an image does not define the range of its values (floats and wide integers)."""
    if isinstance(value, Image.Image):
        return value.mode in ("I", "F")
    known = (torch.uint8, torch.bool, torch.uint16) if isinstance(value, Tensor) else (np.uint8, np.bool_, np.uint16)
    return value.dtype not in known


def decide_scale(values: list[Any]) -> Scale:
    """Decide the one scale of a whole source from a sample of its images.

    Floats in [0, 1] are multiplied by 255, values in [0, 255] stay, and integers in [0, 65535] are divided by 257.
    Other ranges are stretched so that the smallest value becomes 0 and the largest 255, with a warning.
    """
    arrays = [as_numpy(value) for value in values]
    # Values that are not finite are left out here; they are reported when their own image is converted.
    finite = [array[np.isfinite(array)] for array in arrays]
    low = min((float(array.min()) for array in finite if array.size), default=0.0)
    high = max((float(array.max()) for array in finite if array.size), default=1.0)
    floating = any(array.dtype.kind == "f" for array in arrays)
    if floating and low >= 0 and high <= 1:
        return Scale(0.0, 1.0)
    if low >= 0 and high <= 255:
        return Scale(0.0, 255.0)
    if not floating and low >= 0 and high <= 65535:
        return Scale(0.0, 65535.0)
    warnings.warn(
        f"Image values lie in [{low:.6g}, {high:.6g}], neither in [0, 1] nor in [0, 255]: for the encoder alone they are "
        "stretched to 0..255. If a transform inside the dataset normalises them, pass it as the dataset's `transform` instead.",
        stacklevel=2,
    )
    return Scale(low, high)


def _channels_last(array: Array, *, channels_first: bool) -> Array:
    if array.ndim == 2:
        return array
    first, last = array.shape[0] <= 4, array.shape[-1] <= 4
    if first and (channels_first or not last):
        array = array.transpose(1, 2, 0)
    return array[..., 0] if array.shape[-1] <= 2 else array[..., :3]


def to_rgb(value: Any, scale: Scale | None = None) -> Image.Image:
    """Convert an image to RGB uint8.

    An alpha channel is dropped, unsigned 16-bit values are divided by 257, and values without a defined range are
    mapped by `scale`.

    Args:
        value: PIL image of any mode, tensor [H, W] or [C, H, W], or array [H, W], [H, W, C] or [C, H, W]. Where the
            first and the last axis could both be the channels, tensors are read as [C, H, W] and arrays as [H, W, C].
        scale: scale of the source, for images for which `needs_scale(value)` holds; None decides it from this image.

    Raises:
        SourceError: some pixel values are not finite.
    """
    if isinstance(value, Image.Image):
        if value.mode == "RGB":
            value.load()
            return value
        if value.mode not in (*_SIXTEEN_BIT, "I", "F"):
            # Pillow does not warn of transparency when the image is converted to RGBA first; the pixels are the same.
            return (value.convert("RGBA") if "transparency" in value.info else value).convert("RGB")
    array = as_numpy(value)
    if array.dtype == np.dtype(bool):
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif array.dtype != np.uint8:
        if not np.isfinite(array).all():
            raise SourceError("the image has values that are not finite (NaN or infinite)")
        array = (scale or decide_scale([value]))(array)
    array = _channels_last(array, channels_first=isinstance(value, Tensor))
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def header_problem(data: str | Path | bytes, *, turned: bool = True) -> str | None:
    """Describe what Pillow's RGB conversion is known to get wrong for an encoded image or image file, or return None.

    Only the header is read. An EXIF orientation is no problem if `turned` is False, because the decoder applies it.
    """
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            if image.mode in (*_SIXTEEN_BIT, "I"):
                return f"{image.mode} pixels of 16 bits or more are clipped at 255, which is nearly white"
            if image.mode == "F":
                return "float pixels are clipped to 0..255, so that values in [0, 1] turn black"
            if not turned:
                return None
            # `getexif` of the subclass for PNG would decode the whole image to look for a trailing chunk.
            orientation = Image.Image.getexif(image).get(0x0112)
            if orientation not in (None, 1):
                return f"the EXIF orientation {orientation} is ignored: the image is seen rotated or mirrored"
    except Exception:
        return None  # An unreadable file (or a decompression bomb) is reported when it is read.
    return None
