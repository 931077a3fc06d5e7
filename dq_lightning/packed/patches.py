"""Converts the kept patches of an image to bytes and back; the text below says how each codec arranges them, and why.

The figures are for photos of 224 x 224 pixels, with P = 16 and 20 % of the patches dropped by Grad-CAM, relative to the
plain file of equal quality. `benchmarks/patch_store.py` measures them again.

- JPEG: The patches form one row, with chroma 4:2:0 as in a plain file and Huffman tables of its own. This takes 0.81 of
  the bytes at quality 75 and 0.70 at quality 90 (with 4:4:4: 0.91 and 0.84). The coefficients are those of the whole
  image. Only the decoder's interpolation of the chroma uses one pixel beyond a patch's border. Where another patch than
  the true neighbour stands there, the squared error on the kept pixels rises. On photos that were no JPEG of the same
  grid before, the total rise is 3 % (quality 75) to 5 % (quality 90). On photos that were, it is 0.5 grey levels
  squared; from quality 90 on, one step of quality more makes up for it. Reflowed rows, a serpentine, columns, and a
  compacted grid are no smaller, and up to 1.4 times worse in that error. Progressive files save nothing and take 2.5
  times as long to decode. Where 16 does not divide the side of a cell (P = 8), 4:4:4 is used. There, and in grey
  images, kept patches are bit by bit those that the JPEG of the whole image gives.
- WebP: The codec predicts a block from its left and upper neighbours. With the patches in a row, the file takes 0.87 of
  the bytes; with each patch in its place in the image, it takes 0.80 (quality 75) and 0.83 (quality 90). So patches
  stay in their place, and a dropped patch is filled with the mean of the pixels above and left of it, which is what the
  codec predicts. The codec's smoothing across block borders raises the squared error by 7 to 11 %.
- PNG: The patches form one row, too. The file takes 0.84 of the bytes in any order of the patches.
- raw: The pixels are stored as they are; this is meant for small images.

The tables at the head of a JPEG are almost the same throughout a store; `packed/patch_stream.py` stores what they share
once.

The code is pure: it reads and writes no files.
"""

import io
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dq_lightning.core.errors import StoreError
from dq_lightning.core.records import CHANNELS, PatchedImage, pack_mask, unpack_mask
from dq_lightning.packed.images import decode_plain_jpeg
from dq_lightning.packed.layouts import leaf_of, pixels_of
from dq_lightning.packed.patch_layout import (
    Layout,
    Mask,
    Pixels,
    cut,
    patches_in,
    pixel_mask,
    place,
    place_raw,
    raw_bytes,
    refill,
    strip_of,
)
from dq_lightning.packed.patch_stream import jpeg_head
from dq_lightning.packed.trees import map_leaves
from dq_lightning.packed.values import encode_properties, properties_setter

FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
JPEG_BLOCK = 8
MAX_WEBP_SIDE = 16_383
_HALVED, _FULL = 2, 0


def pack_image(
    leaf: Any, mask: Tensor, patch_size: int, codec: str, quality: int = 90, *, subsampling: int | None = None
) -> PatchedImage:
    """Encode the kept patches of an image, together with the format and info of a Pillow image.

    Args:
        leaf: Pillow image of mode RGB or L, uint8 array [H, W] or [H, W, C], or uint8 tensor [H, W] or [C, H, W]; C is
            1 or 3.
        mask: bool [L], True where a patch is kept.
        patch_size: P, side of a patch in pixels.
        codec: `"raw"`, `"png"`, `"jpeg"` or `"webp"`.
        quality: quality of JPEG and WebP, 1 to 100.
        subsampling: chroma subsampling of a JPEG as in Pillow: 0 is 4:4:4, 2 is 4:2:0; None chooses the best one for P.

    Returns:
        The patched image; its data are empty if no patch is kept.

    Raises:
        StoreError: if this kind of image is not supported, if the mask does not fit the image's grid, if the codec
            cannot hold an image of this size, or if the info of a Pillow image cannot be stored.
    """
    layout_name, mode, pixels = pixels_of(leaf)
    height, width = pixels.shape[:2]
    packed = pack_mask(mask)
    properties = encode_properties(leaf) if isinstance(leaf, Image.Image) else b""
    patched = PatchedImage(height, width, mode, layout_name, patch_size, packed, codec, b"", properties)
    if mask.shape != (patched.num_patches,):
        raise StoreError(f"a mask {tuple(mask.shape)} does not fit the {patched.num_patches} patches of its image")
    if patched.num_kept == 0:
        return patched
    return replace(patched, data=_encode(pixels, mask.cpu().numpy(), patched, quality, subsampling))


def unpack_image(patched: PatchedImage) -> tuple[Pixels, Mask]:
    """Decode a patched image and fill its dropped patches with the mean colour of its kept pixels.

    Returns:
        pixels uint8 [H, W, C] and mask bool [L], True where a patch is kept. The mean is rounded half up; it is 0 if no
        patch is kept.

    Raises:
        StoreError: if the data are damaged or do not fit the image's size and mask.
    """
    mask = unpack_mask(patched.mask, patched.num_patches)
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
    """Convert pixels [H, W, C] to the type, shape and dtype that the dataset delivered; the memory may be shared."""
    leaf = leaf_of(patched.layout, patched.mode, pixels)
    if patched.layout == "pil":
        properties_setter(patched.properties)(leaf)
    return leaf


def mean_filled(patched: PatchedImage) -> Any:
    """Return the image in the type that the dataset delivered, with the mean colour in place of dropped patches."""
    return image_leaf(patched, unpack_image(patched)[0])


def layout_of(patched: PatchedImage) -> Layout:
    """Return the grid of a patched image, and the sizes of the strip that holds its patches.

    Raises:
        StoreError: if the strip would be too large.
    """
    facts = (patched.height, patched.width, CHANNELS[patched.mode], patched.patch_size)
    return _layout(*facts, patched.codec == "jpeg", patched.num_kept)


@lru_cache(maxsize=1024)
def _layout(height: int, width: int, channels: int, patch_size: int, in_blocks: bool, count: int) -> Layout:
    # A patch that is larger than the image covers the whole image, so its side is limited to the image's longer side.
    patch = min(patch_size, max(height, width))
    side = -(-patch // JPEG_BLOCK) * JPEG_BLOCK if in_blocks else patch
    return Layout(height, width, patch, channels, side, count)


def map_patched(value: Any, change: Any) -> Any:
    """Return a sample with `change` applied to every patched image in its tuples, lists and dicts."""
    return map_leaves(value, lambda leaf: change(leaf) if isinstance(leaf, PatchedImage) else leaf)


def patched_images(value: Any) -> list[PatchedImage]:
    """Return all patched images of a sample in order."""
    found: list[PatchedImage] = []
    map_patched(value, found.append)
    return found


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
    """Return the image with its dropped patches filled by the mean colour of the pixels above and left of each.

    The patches are filled in the order of the grid, so a filled patch counts for those after it.
    """
    out = pixels.copy()
    first = pixels[pixel_mask(mask, layout)].mean(0).round()
    patch, columns = layout.patch_size, layout.columns
    for number in np.flatnonzero(~mask).tolist():
        top, left = number // columns * patch, number % columns * patch
        inside = np.s_[top : top + patch, left : left + patch]
        border = [out[top : top + patch, left - 1]] if left else []
        border += [out[top - 1, left : left + patch]] if top else []
        out[inside] = np.concatenate(border).mean(0).round() if border else first
    return out


def _decode(patched: PatchedImage, size: tuple[int, int]) -> Pixels:
    """Decode pixels [height, width, C] of exactly this size; other sizes are refused before the pixels are decoded."""
    channels = CHANNELS[patched.mode]
    if patched.codec == "jpeg" and jpeg_head(patched.data)[1] == (*size, channels):
        # If this fails, the call of Image.open below finds the reason.
        whole = decode_plain_jpeg(patched.data, patched.mode, size[::-1])
        if whole is not None:
            return np.asarray(whole).reshape(*size, channels)
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
        # Pillow's format plugins raise many types of errors for damaged files.
        raise StoreError(f"kept patches cannot be decoded ({type(error).__name__}: {error})") from error
    return decoded.reshape(*size, channels)
