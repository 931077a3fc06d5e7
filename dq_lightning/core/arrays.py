"""Dtypes and shapes of arrays and tensors, as the files of packed sets describe them, and pixels of images as tensors."""

import math
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dq_lightning.core.errors import StoreError

MAX_DIMENSIONS = 32
MAX_ELEMENTS = 1 << 48
TENSOR_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
        *(torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    )
}


def plain_shape(value: Any) -> tuple[int, ...]:
    """Return the shape that a stored description, read from JSON, holds as a list of integers.

    Raises:
        StoreError: `value` is not a list of at most 32 sizes whose product is below 2**48.
    """
    sizes_fit = (
        isinstance(value, list)
        and len(value) <= MAX_DIMENSIONS
        and all(type(n) is int and 0 <= n < MAX_ELEMENTS for n in value)
        # A size of 0 counts as 1 here, because the other sizes are still multiplied to compute byte offsets.
        and math.prod(max(n, 1) for n in value) < MAX_ELEMENTS
    )
    if not sizes_fit:
        raise StoreError(f"{value!r:.80} is not the shape of an array that can be stored")
    return tuple(value)


def as_numpy(value: Any) -> NDArray[Any]:
    """Return an array, tensor, image or list as an array; NumPy has no bfloat16, so such a tensor becomes float32."""
    if not isinstance(value, Tensor):
        return np.asarray(value)
    plain = value.detach().cpu().as_subclass(Tensor)
    return (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()


def as_tensor(array: NDArray[Any]) -> Tensor:
    """Return an array as a tensor, which must not be written to: it shares the memory where torch can read that.

    Torch reads no other byte order than that of the machine, no negative strides (`array[::-1]`) and no floats of more
    than 64 bits; such arrays are copied.
    """
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 for stride in array.strides):
        array = np.ascontiguousarray(array)
    # torch warns that it cannot protect read-only arrays.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.as_tensor(array)


def as_image(value: Any) -> Image.Image:
    """Return a Pillow image as it is, or make one of a uint8 array [H, W] or [H, W, C] or tensor [H, W] or [C, H, W].

    Raises:
        StoreError: the value is of another type.
    """
    if isinstance(value, Image.Image):
        return value
    pixels = value.cpu().numpy() if isinstance(value, Tensor) else value
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        seen = f"{getattr(value, 'dtype', '')} {tuple(getattr(value, 'shape', ()))}".strip()
        raise StoreError(
            f"the image is a {type(value).__name__} {seen}: only Pillow images and uint8 arrays can be written as files; "
            "convert it in the dataset"
        )
    if isinstance(value, Tensor) and pixels.ndim == 3:
        pixels = pixels.transpose(1, 2, 0)
    flat = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    return Image.fromarray(np.ascontiguousarray(flat))


def image_to_uint8(image: Image.Image) -> Tensor:
    """Return an RGB image as a tensor uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
