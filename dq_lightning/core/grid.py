"""Cuts images of any size into patches on a grid and puts patches together again. All functions are pure.

The grid starts in the upper left corner and has ceil(H / P) x ceil(W / P) patches, numbered row by row. If P does not
divide the size, the patches at the right and lower edge hold fewer pixels (partial patches): no image is cropped or
enlarged, and every pixel belongs to exactly one patch. Partial patches are padded only where tensors of one shape are
needed. The padding repeats their last row and column, so that a codec sees no artificial edge, and it is cut off when
images are restored.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dq_lightning.core.errors import PatchError
from dq_lightning.core.records import Grid


def grid_of(images: Tensor, patch_size: int) -> Grid:
    """Return the grid over images [..., H, W] with patches of `patch_size` pixels a side."""
    return Grid(images.shape[-2], images.shape[-1], patch_size)


def pad_to_grid(images: Tensor, grid: Grid) -> Tensor:
    """Pad images [B, C, H, W] of any dtype by repeating their last row and column until P divides height and width."""
    rows = torch.arange(grid.rows * grid.patch_size, device=images.device).clamp(max=grid.height - 1)
    columns = torch.arange(grid.columns * grid.patch_size, device=images.device).clamp(max=grid.width - 1)
    if len(rows) > grid.height:
        images = images[..., rows, :]
    return images[..., columns] if len(columns) > grid.width else images


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images [B, C, H, W] of any dtype into patches [B, L, C, P, P]; partial patches are padded as above."""
    grid = grid_of(images, patch_size)
    padded = pad_to_grid(images, grid)
    batch, channels = images.shape[:2]
    cut = padded.reshape(batch, channels, grid.rows, patch_size, grid.columns, patch_size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, grid.num_patches, channels, patch_size, patch_size)


def unpatchify(patches: Tensor, grid: Grid) -> Tensor:
    """Put patches [B, L, C, P, P], in the order of the grid, together to images [B, C, H, W]; this inverts `patchify`.

    Raises:
        PatchError: the shape of the patches does not fit the grid.
    """
    size = grid.patch_size
    if patches.ndim != 5 or patches.shape[1] != grid.num_patches or patches.shape[3:] != (size, size):
        raise PatchError(
            f"patches of shape {tuple(patches.shape)} do not fit {grid}, which has {grid.num_patches} patches"
        )
    batch, _, channels = patches.shape[:3]
    laid = patches.reshape(batch, grid.rows, grid.columns, channels, size, size).permute(0, 3, 1, 4, 2, 5)
    return laid.reshape(batch, channels, grid.rows * size, grid.columns * size)[..., : grid.height, : grid.width]


def pixel_mask(mask: Tensor, grid: Grid) -> Tensor:
    """Spread a mask of patches, bool [B, L], over their pixels: bool [B, 1, H, W].

    Raises:
        PatchError: L is not the number of patches of the grid.
    """
    if mask.shape[-1] != grid.num_patches:
        raise PatchError(
            f"a mask of {mask.shape[-1]} patches does not fit {grid}, which has {grid.num_patches} patches"
        )
    wide = mask.view(-1, 1, grid.rows, grid.columns).repeat_interleave(grid.patch_size, 2)
    return wide.repeat_interleave(grid.patch_size, 3)[..., : grid.height, : grid.width]


def pool_to_patches(maps: Tensor, patch_size: int) -> Tensor:
    """Average a pixel map [B, H, W] over every patch, [B, L]; a partial patch is averaged over its own pixels."""
    pooled = F.avg_pool2d(maps[:, None], patch_size, ceil_mode=True, count_include_pad=False)
    return pooled.flatten(1)
