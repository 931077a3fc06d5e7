"""The grid of patches over an image, and the kept patches of one image as they travel between the stations."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from dq_lightning.errors import PatchError, StoreError
from dq_lightning.records import unpack_mask

ImageCodec = Literal["raw", "png", "jpeg", "webp"]
# what the dataset delivered: Pillow, numpy [H, W] or [H, W, C], torch [H, W] or [C, H, W]; with one explicit channel
ImageLayout = Literal["pil", "array", "tensor", "array_hw1", "tensor_1hw"]
CHANNELS = {"L": 1, "RGB": 3}
# of a whole image: one may claim any size while it keeps few patches, and this bounds the memory it takes
MAX_PIXELS = 1 << 27


@dataclass(frozen=True)
class Grid:
    """The patches of an image.

    Attributes:
        height: of the image, in pixels.
        width: of the image, in pixels.
        patch_size: P, side of a patch in pixels.
    """

    height: int
    width: int
    patch_size: int

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.patch_size) < 1:
            raise PatchError(f"an image and its patches need at least one pixel, got {self}")

    @property
    def rows(self) -> int:
        """Patches from top to bottom, ceil(H / P)."""
        return -(-self.height // self.patch_size)

    @property
    def columns(self) -> int:
        """Patches from left to right, ceil(W / P)."""
        return -(-self.width // self.patch_size)

    @property
    def num_patches(self) -> int:
        """L."""
        return self.rows * self.columns


@dataclass(frozen=True)
class PatchedImage:
    """An 8-bit image of which some patches are kept. The grid is that of `records.PatchChoice`.

    Attributes:
        height: of the whole image in pixels.
        width: likewise.
        mode: `"RGB"` or `"L"`.
        layout: what the dataset's own image was, so that decoding gives the same type, shape and dtype.
        patch_size: P, side of a patch in pixels.
        mask: ceil(L / 8) bytes as `records.pack_mask` gives them: patch j is bit j % 8 of byte j // 8.
        codec: how `data` is encoded.
        data: the kept patches; empty when none is kept.
        properties: format and info of a Pillow image, see `store.values.encode_properties`.
    """

    height: int
    width: int
    mode: str
    layout: str
    patch_size: int
    mask: bytes
    codec: str
    data: bytes
    properties: bytes = b""

    def __post_init__(self) -> None:
        numbers = (self.height, self.width, self.patch_size)
        if not all(type(n) is int and n >= 1 for n in numbers) or self.height * self.width > MAX_PIXELS:
            raise StoreError(
                f"a patched image has 1 to {MAX_PIXELS} pixels and patches of at least one, got {self.height!r:.20} x "
                f"{self.width!r:.20} in patches of {self.patch_size!r:.20}: resize it, or leave its patches whole"
            )
        known = self.mode in CHANNELS and self.layout in get_args(ImageLayout) and self.codec in get_args(ImageCodec)
        if not known or (self.mode == "RGB" and self.layout in ("array_hw1", "tensor_1hw")):
            raise StoreError(
                f"a patched image cannot be {self.mode!r:.20}, {self.layout!r:.20}, {self.codec!r:.20}: the modes are "
                f"{', '.join(CHANNELS)}, the layouts {', '.join(get_args(ImageLayout))}, "
                f"the codecs {', '.join(get_args(ImageCodec))}"
            )
        bits = int.from_bytes(self.mask, "little")
        if len(self.mask) != -(-self.num_patches // 8) or bits >> self.num_patches:
            raise StoreError(
                f"a mask of {len(self.mask)} bytes does not fit the {self.num_patches} patches of its image"
            )

    @property
    def grid(self) -> Grid:
        """The patches of the whole image."""
        return Grid(self.height, self.width, self.patch_size)

    @property
    def num_patches(self) -> int:
        """L."""
        return self.grid.num_patches

    @cached_property
    def num_kept(self) -> int:
        """Patches that are kept, k."""
        return int.from_bytes(self.mask, "little").bit_count()

    def mask_tensor(self) -> Tensor:
        """Mask bool [L], True where a patch is kept."""
        packed = torch.tensor(list(self.mask), dtype=torch.uint8)
        return unpack_mask(packed, self.num_patches)
