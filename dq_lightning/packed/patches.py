"""The kept patches of an image as bytes, and back. PURE.

How they lie, and why. Figures are for photos of 224 x 224 pixels, P = 16, 20 % of the patches dropped by Grad-CAM, relative to
the plain file of equal quality; `benchmarks/patch_store.py` measures them again.

- JPEG: one row of patches, chroma 4:2:0 as in a plain file, Huffman tables of its own: 0.81 of the bytes at quality 75 and
  0.70 at 90 (4:4:4: 0.91 and 0.84). The coefficients are those of the whole image. Only the decoder's interpolation of the
  chroma looks one pixel over a patch's border; where another than the true neighbour stands there, the squared error on the
  kept pixels rises, by 3 % (quality 75) to 5 % (90) in all, on photos that were no JPEG of the same grid before (by
  0.5 grey levels squared on those that were; one step of quality more makes up for it from 90 on). Reflowed
  rows, a serpentine, columns, and a compacted grid are no smaller and up to 1.4 times worse in that error. Progressive files
  save nothing and take 2.5 times as long to decode. Where 16 does not divide the cell (P = 8), 4:4:4 is used: there, and in
  grey images, kept patches come out bit by bit as from the JPEG of the whole image.
- WebP predicts from the left and upper neighbours: in a row it has 0.87, in its place in the image 0.80 (quality 75) and
  0.83 (90). So patches stay in their place, and a dropped one is filled with the mean of the pixels above and left of it,
  which is what the codec predicts. Its own smoothing across borders raises the squared error by 7 to 11 %.
- PNG: a row, too; 0.84 in any order.
- raw: the pixels, for small images.

The tables at the head of a JPEG are alike in a store; `packed/patch_stream.py` keeps them once.
"""

import contextlib
import io
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dq_lightning.core.errors import StoreError
from dq_lightning.core.records import CHANNELS, PatchedImage, pack_mask
from dq_lightning.packed.patch_layout import (
    Layout,
    Mask,
    Pixels,
    cut,
    mask_array,
    patches_in,
    pixel_mask,
    place,
    place_raw,
    raw_bytes,
    refill,
    strip_of,
)
from dq_lightning.packed.patch_stream import jpeg_head
from dq_lightning.packed.values import encode_properties, is_plain_array, is_plain_tensor, properties_setter

FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
JPEG_BLOCK = 8
MAX_WEBP_SIDE = 16_383
_HALVED, _FULL = 2, 0


def pack_image(
    leaf: Any, mask: Tensor, patch_size: int, codec: str, quality: int = 90, *, subsampling: int | None = None
) -> PatchedImage:
    """Encode the kept patches of an image; format and info of a Pillow image are kept beside them.

    Args:
        leaf: Pillow image of mode RGB or L, uint8 array [H, W] or [H, W, C], or uint8 tensor [H, W] or [C, H, W], C 1 or 3.
        mask: bool [L], True where a patch is kept.
        patch_size: P in pixels.
        codec: `"raw"`, `"png"`, `"jpeg"` or `"webp"`.
        quality: of JPEG and WebP, 1 to 100.
        subsampling: of a JPEG's chroma, as Pillow counts: 0 is 4:4:4, 2 is 4:2:0; the best known for P when None.

    Raises:
        StoreError: another kind of image, a mask of another size, or a size that the codec cannot hold.
    """
    layout_name, mode, pixels = _pixels_of(leaf)
    height, width = pixels.shape[:2]
    packed = pack_mask(mask.cpu()).numpy().tobytes()
    properties = encode_properties(leaf) if isinstance(leaf, Image.Image) else b""
    patched = PatchedImage(height, width, mode, layout_name, patch_size, packed, codec, b"", properties)
    if mask.shape != (patched.num_patches,):
        raise StoreError(f"a mask {tuple(mask.shape)} does not fit the {patched.num_patches} patches of its image")
    if patched.num_kept == 0:
        return patched
    return replace(patched, data=_encode(pixels, mask.cpu().numpy(), patched, quality, subsampling))


def can_keep_patches(leaf: Any) -> bool:
    """Whether `pack_image` takes this kind of image."""
    try:
        _pixels_of(leaf)
    except StoreError:
        return False
    return True


def check_patches(leaf: Any) -> None:
    """Raise StoreError, with advice, for an image that `pack_image` does not take."""
    _pixels_of(leaf)


def image_size(leaf: Any) -> tuple[int, int]:
    """Height and width of an image that `pack_image` takes.

    Raises:
        StoreError: it takes no such image.
    """
    height, width = _pixels_of(leaf)[2].shape[:2]
    return height, width


def unpack_image(patched: PatchedImage) -> tuple[Pixels, Mask]:
    """Decode: pixels uint8 [H, W, C] with dropped patches in the mean colour of the kept pixels, and mask bool [L].

    The mean is rounded half up, and 0 when nothing is kept.

    Raises:
        StoreError: the data are not what the record says.
    """
    mask = mask_array(patched.mask, patched.num_patches)
    layout = layout_of(patched)
    if patched.num_kept == 0:
        if patched.data:
            raise StoreError(f"a patched image keeps nothing but has {len(patched.data)} bytes of pixels")
        return np.zeros((patched.height, patched.width, layout.channels), np.uint8), mask
    if patched.codec == "raw":
        return place_raw(patched.data, mask, layout), mask
    if patched.codec == "webp":
        whole = _decode(patched, (patched.height, patched.width))
        return refill(whole, mask, layout), mask
    strip = _decode(patched, layout.strip_size)
    return place(patches_in(strip, layout), mask, layout), mask


def image_leaf(patched: PatchedImage, pixels: Pixels) -> Any:
    """Pixels [H, W, C] in the type, shape and dtype that the dataset delivered; arrays and tensors may share their memory."""
    flat = pixels[..., 0] if patched.mode == "L" else pixels
    if patched.layout == "pil":
        image = Image.fromarray(flat)
        properties_setter(patched.properties)(image)
        return image
    if patched.layout in ("array", "tensor"):
        shaped = flat if patched.layout == "array" or patched.mode == "L" else flat.transpose(2, 0, 1)
    else:
        shaped = flat[..., None] if patched.layout == "array_hw1" else flat[None]
    shaped = np.ascontiguousarray(shaped)
    return torch.from_numpy(shaped) if patched.layout.startswith("tensor") else shaped


def mean_filled(patched: PatchedImage) -> Any:
    """The image as the dataset delivered it, with the mean colour in place of dropped patches."""
    return image_leaf(patched, unpack_image(patched)[0])


def layout_of(patched: PatchedImage) -> Layout:
    """The strip that holds a patched image.

    Raises:
        StoreError: it would be too large.
    """
    facts = (patched.height, patched.width, CHANNELS[patched.mode], patched.patch_size)
    return _layout(*facts, patched.codec == "jpeg", patched.num_kept)


@lru_cache(maxsize=1024)
def _layout(height: int, width: int, channels: int, patch_size: int, in_blocks: bool, count: int) -> Layout:
    # one patch that is larger than the image is the image
    patch = min(patch_size, max(height, width))
    side = -(-patch // JPEG_BLOCK) * JPEG_BLOCK if in_blocks else patch
    return Layout(height, width, channels, patch, side, count)


def map_patched(value: Any, change: Any) -> Any:
    """A sample with `change` applied to every patched image in its tuples, lists and dicts."""
    if isinstance(value, PatchedImage):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(map_patched(inner, change) for inner in value)
    if type(value) is dict:
        return {key: map_patched(inner, change) for key, inner in value.items()}
    return value


def patched_images(value: Any) -> list[PatchedImage]:
    """All patched images in a sample, in order."""
    found: list[PatchedImage] = []
    map_patched(value, found.append)
    return found


def _pixels_of(leaf: Any) -> tuple[str, str, Pixels]:
    """Layout, mode and pixels [H, W, C] of an image."""
    if isinstance(leaf, Image.Image) and leaf.mode in CHANNELS and 0 not in leaf.size:
        pixels = np.asarray(leaf)
        return "pil", leaf.mode, pixels if pixels.ndim == 3 else pixels[..., None]
    if is_plain_array(leaf) and leaf.dtype == np.uint8 and leaf.size:
        if leaf.ndim == 2:
            return "array", "L", leaf[..., None]
        if leaf.ndim == 3 and leaf.shape[2] in (1, 3):
            return ("array", "RGB", leaf) if leaf.shape[2] == 3 else ("array_hw1", "L", leaf)
    if is_plain_tensor(leaf) and leaf.dtype == torch.uint8 and leaf.numel():
        if leaf.ndim == 2:
            return "tensor", "L", leaf.numpy()[..., None]
        if leaf.ndim == 3 and leaf.shape[0] in (1, 3):
            pixels = leaf.permute(1, 2, 0).numpy()
            return ("tensor", "RGB", pixels) if leaf.shape[0] == 3 else ("tensor_1hw", "L", pixels)
    raise StoreError(
        f"patches cannot be kept of a {type(leaf).__module__}.{type(leaf).__qualname__}{_outline(leaf)}: deliver a Pillow "
        'image of mode RGB or L (image.convert("RGB"); for a column of Hugging Face datasets '
        'dataset.cast_column(name, datasets.Image(mode="RGB"))), a uint8 array [H, W, 3] or [H, W], or a uint8 tensor '
        "[3, H, W] or [H, W], before it is normalised; or leave out drop_ratio="
    )


def _outline(leaf: Any) -> str:
    """Mode, type and size of an image, for messages."""
    if isinstance(leaf, Image.Image):
        return f" (mode {leaf.mode}, {leaf.width} x {leaf.height} pixels)"
    if isinstance(leaf, Tensor | np.ndarray):
        return f" ({leaf.dtype} {list(leaf.shape)})"
    undecoded = isinstance(leaf, dict) and leaf.keys() == {"bytes", "path"}
    return " (an image of Hugging Face datasets that is not decoded)" if undecoded else ""


def _encode(pixels: Pixels, mask: Mask, patched: PatchedImage, quality: int, subsampling: int | None) -> bytes:
    layout = layout_of(patched)
    if patched.codec == "raw":
        return raw_bytes(pixels, mask, layout)
    options: dict[str, Any] = {"optimize": True}
    if patched.codec == "webp":
        if max(patched.height, patched.width) > MAX_WEBP_SIDE:
            raise StoreError(f"WebP holds at most {MAX_WEBP_SIDE} pixels a side: use codec='jpeg' or 'png'")
        laid = _with_predictions(pixels, mask, layout)
        options = {"quality": quality, "method": 6}
    else:
        laid = strip_of(cut(pixels, mask, layout), layout)
    if patched.codec == "jpeg":
        best = _HALVED if layout.side % (2 * JPEG_BLOCK) == 0 else _FULL
        options |= {"quality": quality, "subsampling": best if subsampling is None else subsampling}
    buffer = io.BytesIO()
    Image.fromarray(laid if layout.channels > 1 else laid[..., 0]).save(buffer, FORMATS[patched.codec], **options)
    return buffer.getvalue()


def _with_predictions(pixels: Pixels, mask: Mask, layout: Layout) -> Pixels:
    """The image with every dropped patch in the mean colour of the pixels above and left of it, one after the other."""
    out = pixels.copy()
    first = pixels[pixel_mask(mask, layout)].mean(0).round()
    patch, columns = layout.patch, layout.grid[1]
    for number in np.flatnonzero(~mask).tolist():
        top, left = number // columns * patch, number % columns * patch
        inside = np.s_[top : top + patch, left : left + patch]
        border = [out[top : top + patch, left - 1]] if left else []
        border += [out[top - 1, left : left + patch]] if top else []
        out[inside] = np.concatenate(border).mean(0).round() if border else first
    return out


def _decode(patched: PatchedImage, size: tuple[int, int]) -> Pixels:
    """Pixels [height, width, C] of just this size; nothing is decoded of an image that claims another."""
    channels = CHANNELS[patched.mode]
    if patched.codec == "jpeg" and jpeg_head(patched.data)[1] == (*size, channels):
        # Pillow's decoder alone; the file's facts, which it would read in Python, are known and compared. If it fails, Pillow's
        # whole reader finds the reason
        with contextlib.suppress(ValueError):
            decoded = np.asarray(
                Image.frombytes(patched.mode, size[::-1], patched.data, "jpeg", patched.mode, "", 1, 0)
            )
            return decoded.reshape(*size, channels)
    try:
        with Image.open(io.BytesIO(patched.data), formats=[FORMATS[patched.codec]]) as image:
            grey_webp = patched.codec == "webp" and patched.mode == "L" and image.mode == "RGB"
            if image.size != size[::-1] or (image.mode != patched.mode and not grey_webp):
                raise StoreError(
                    f"a patched image holds {image.mode} {image.size}, expected {patched.mode} {size[::-1]}"
                )
            decoded = np.asarray(image.convert("L") if grey_webp else image)
    except StoreError:
        raise
    except Exception as error:
        # Pillow's format plugins raise all sorts of errors on damaged files
        raise StoreError(f"kept patches cannot be decoded ({type(error).__name__}: {error})") from error
    return decoded.reshape(*size, channels)
