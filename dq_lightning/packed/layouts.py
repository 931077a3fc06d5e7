"""The types of image that a dataset may deliver, and the pixels in them.

The code is pure: it reads and writes no files.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dq_lightning.core.errors import StoreError
from dq_lightning.core.records import CHANNELS
from dq_lightning.packed.patch_layout import Pixels
from dq_lightning.packed.values import is_plain_array, is_plain_tensor


def leaf_of(layout: str, mode: str, pixels: Pixels) -> Any:
    """Convert pixels uint8 [H, W, C] to an image of a layout of `records.ImageLayout`, without info.

    C is 3 for the mode `"RGB"` and 1 for `"L"`. The image may share the memory.
    """
    flat = pixels[..., 0] if mode == "L" else pixels
    if layout == "pil":
        return Image.fromarray(flat)
    if layout in ("array", "tensor"):
        shaped = flat if layout == "array" or mode == "L" else flat.transpose(2, 0, 1)
    else:
        shaped = flat[..., None] if layout == "array_hw1" else flat[None]
    shaped = np.ascontiguousarray(shaped)
    return torch.from_numpy(shaped) if layout.startswith("tensor") else shaped


def pixels_of(leaf: Any) -> tuple[str, str, Pixels]:
    """Return the layout name, the mode and the pixels uint8 [H, W, C] of an image.

    Raises:
        StoreError: if patches of this kind of image cannot be stored; the message says what to deliver instead.
    """
    layout, mode = layout_of_image(leaf)
    if layout.startswith("tensor"):
        leaf = (leaf.permute(1, 2, 0) if leaf.ndim == 3 else leaf).numpy()
    pixels = np.asarray(leaf)
    return layout, mode, pixels if pixels.ndim == 3 else pixels[..., None]


def layout_of_image(leaf: Any) -> tuple[str, str]:
    """Return the layout name and the mode of an image, as `pixels_of` does, without touching its pixels.

    Raises:
        StoreError: if patches of this kind of image cannot be stored; the message says what to deliver instead.
    """
    if isinstance(leaf, Image.Image) and leaf.mode in CHANNELS and 0 not in leaf.size:
        return "pil", leaf.mode
    if is_plain_array(leaf) and leaf.dtype == np.uint8 and leaf.size:
        if leaf.ndim == 2:
            return "array", "L"
        if leaf.ndim == 3 and leaf.shape[2] in (1, 3):
            return ("array", "RGB") if leaf.shape[2] == 3 else ("array_hw1", "L")
    if is_plain_tensor(leaf) and leaf.dtype == torch.uint8 and leaf.numel():
        if leaf.ndim == 2:
            return "tensor", "L"
        if leaf.ndim == 3 and leaf.shape[0] in (1, 3):
            return ("tensor", "RGB") if leaf.shape[0] == 3 else ("tensor_1hw", "L")
    raise StoreError(
        f"patches cannot be kept of a {told_image(leaf)}: deliver a Pillow "
        'image of mode RGB or L (image.convert("RGB"); for a column of Hugging Face datasets '
        'dataset.cast_column(name, datasets.Image(mode="RGB"))), a uint8 array [H, W, 3] or [H, W], or a uint8 tensor '
        "[3, H, W] or [H, W], before it is normalised; or leave out drop_ratio="
    )


def is_grey_or_rgb(leaf: Any) -> bool:
    """Return whether an image is of 8 bits, grey or RGB, so that codecs can hold it and its patches can be kept."""
    try:
        layout_of_image(leaf)
    except StoreError:
        return False
    return True


def told_image(leaf: Any) -> str:
    """Return class, mode, type and size of an image as text for messages."""
    kind = f"{type(leaf).__module__}.{type(leaf).__qualname__}"
    if isinstance(leaf, Image.Image):
        return f"{kind} (mode {leaf.mode}, {leaf.width} x {leaf.height} pixels)"
    if isinstance(leaf, Tensor | np.ndarray):
        return f"{kind} ({leaf.dtype} {list(leaf.shape)})"
    undecoded = isinstance(leaf, dict) and leaf.keys() == {"bytes", "path"}
    return f"{kind} (an image of Hugging Face datasets that is not decoded)" if undecoded else kind
