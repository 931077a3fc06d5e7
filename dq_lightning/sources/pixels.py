"""Any image leaf -> RGB uint8 PIL image, what the encoder sees."""

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

from dq_lightning.core.errors import SourceError
from dq_lightning.sources.items import may_be_image

Array = NDArray[Any]
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


@dataclass(frozen=True)
class Scale:
    """Linear map of pixel values without a fixed range: `low` becomes 0 and `high` becomes 255."""

    low: float
    high: float

    def __call__(self, array: Array) -> Array:
        """Map to uint8, rounded to nearest; what lies outside is clipped."""
        span = self.high - self.low
        factor = 255.0 / span if span > 0 else 0.0
        scaled: Array = np.rint((array.astype(np.float64) - self.low) * factor)
        return scaled.clip(0, 255).astype(np.uint8)


def check_pixels(value: Any) -> Any:
    """The leaf itself; SourceError unless it is a PIL image or an array, with pixels."""
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
    """Whether the range of a leaf's values is not told by its type (floats and wide integers)."""
    if isinstance(value, Image.Image):
        return value.mode in ("I", "F")
    known = (torch.uint8, torch.bool, torch.uint16) if isinstance(value, Tensor) else (np.uint8, np.bool_, np.uint16)
    return value.dtype not in known


def decide_scale(values: list[Any]) -> Scale:
    """One scale for a whole source, from a sample of its images.

    Floats inside [0, 1] are stretched by 255, values inside [0, 255] stay, integers inside [0, 65535] are divided by 257;
    anything else is stretched from its smallest to its largest value, with a warning.
    """
    arrays = [_as_array(value) for value in values]
    finite = [array[np.isfinite(array)] for array in arrays]  # the others are errors of their own images
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


def _as_array(value: Any) -> Array:
    if isinstance(value, Image.Image):
        return np.asarray(value)
    if isinstance(value, Tensor):
        plain = value.detach().cpu().as_subclass(torch.Tensor)
        array: Array = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
        return array
    return np.asarray(value)


def _channels_last(array: Array, *, channels_first: bool) -> Array:
    if array.ndim == 2:
        return array
    first, last = array.shape[0] <= 4, array.shape[-1] <= 4
    if first and (channels_first or not last):
        array = array.transpose(1, 2, 0)
    return array[..., 0] if array.shape[-1] <= 2 else array[..., :3]


def to_rgb(value: Any, scale: Scale | None = None) -> Image.Image:
    """An image leaf as RGB uint8: alpha is dropped, 16 bits are divided by 257, the rest goes through `scale`.

    Args:
        value: PIL image of any mode, tensor [H, W] or [C, H, W], or array [H, W], [H, W, C] or [C, H, W]; where both ends
            could be the channels, tensors are read as [C, H, W] and arrays as [H, W, C].
        scale: of the source; needed when `needs_scale(value)`.

    Raises:
        SourceError: values are not finite.
    """
    if isinstance(value, Image.Image):
        if value.mode == "RGB":
            value.load()
            return value
        if value.mode not in (*_SIXTEEN_BIT, "I", "F"):
            # by way of RGBA Pillow does not warn of transparency; the pixels are the same
            return (value.convert("RGBA") if "transparency" in value.info else value).convert("RGB")
    array = _as_array(value)
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
    """What Pillow's plain RGB conversion is known to get wrong for an encoded image, from its header alone; or None.

    Args:
        data: the encoded image, or its file.
        turned: whether an orientation in the header is a problem; False where the decoder follows it.
    """
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            if image.mode in (*_SIXTEEN_BIT, "I"):
                return f"{image.mode} pixels of 16 bits or more are clipped at 255, which is nearly white"
            if image.mode == "F":
                return "float pixels are clipped to 0..255, so that values in [0, 1] turn black"
            if not turned:
                return None
            # the subclass for PNG would decode the whole image to look for a trailing chunk
            orientation = Image.Image.getexif(image).get(0x0112)
            if orientation not in (None, 1):
                return f"the EXIF orientation {orientation} is ignored: the image is seen rotated or mirrored"
    except Exception:
        return None  # an unreadable file (or a bomb) is an error when it is read, not a wrong decode
    return None
