"""Filling dropped patches without a network, by the mean colour or harmonically; images that keep unequal counts."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dq_lightning.core.errors import PatchError
from dq_lightning.core.grid import grid_of, pixel_mask
from dq_lightning.patches.choose import mask_of
from dq_lightning.patches.harmonic import fill_harmonically, fill_with_mean


class Reconstructor(Protocol):
    """Fills the patches that are not kept and leaves the others as they are, bit by bit."""

    def reconstruct(self, images: Tensor, kept: Tensor, patch_size: int | None = None) -> Tensor:
        """Images floating [B, C, H, W] with patches `kept` int64 [B, k] of the grid of `patch_size` pixels."""
        ...


def fill_by_mask(reconstructor: Reconstructor, images: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """Fill images [B, C, H, W] of which each may keep another number of patches, bool [B, L]: one call for each number."""
    filled = images.clone()
    counts = mask.sum(1)
    for count in sorted(set(counts.tolist())):
        members = (counts == count).nonzero().flatten()
        kept = mask[members].nonzero()[:, 1].view(len(members), count)
        chosen = members.to(images.device)
        filled[chosen] = reconstructor.reconstruct(images[chosen], kept.to(images.device), patch_size)
    return filled


def fill_pixels(
    reconstructor: Reconstructor,
    images: Tensor,
    mask: Tensor,
    patch_size: int,
    mean: tuple[float, ...] = (0.0, 0.0, 0.0),
    std: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> Tensor:
    """Fill images as they are stored.

    Args:
        reconstructor: takes images in [0, 1], normalised with `mean` and `std`.
        images: uint8 [B, C, H, W]; of a single channel the reconstructor gets three copies and gives their mean.
        mask: bool [B, L], the kept patches.
        patch_size: P in pixels.
        mean: of the channels.
        std: likewise.

    Returns:
        uint8 [B, C, H, W]: kept pixels as they were, the others rounded to the nearest value in 0 ... 255.
    """
    means, stds = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (mean, std))
    wide = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    filled = fill_by_mask(reconstructor, (wide.float() / 255 - means) / stds, mask, patch_size)
    pixels = (filled.float() * stds + means) * 255
    if images.shape[1] == 1:
        pixels = pixels.mean(1, keepdim=True)
    stays = pixel_mask(mask.to(images.device), grid_of(images, patch_size))
    return torch.where(stays, images, pixels.round().clamp(0, 255).to(torch.uint8))


@dataclass(frozen=True)
class MeanFill:
    """Every dropped patch gets the mean colour of its image's kept pixels; 0 where nothing is kept.

    Attributes:
        patch_size: P in pixels, when a call names none.
    """

    patch_size: int

    def reconstruct(self, images: Tensor, kept: Tensor, patch_size: int | None = None) -> Tensor:
        size = patch_size or self.patch_size
        return fill_with_mean(images, pixel_mask(_kept_patches(images, kept, size), grid_of(images, size)))


@dataclass(frozen=True)
class HarmonicFill:
    """Dropped pixels solve Laplace's equation with the kept ones as boundary values: the smoothest filling.

    Attributes:
        patch_size: P in pixels, when a call names none.
    """

    patch_size: int

    def reconstruct(self, images: Tensor, kept: Tensor, patch_size: int | None = None) -> Tensor:
        size = patch_size or self.patch_size
        return fill_harmonically(images, _kept_patches(images, kept, size), size)


def _kept_patches(images: Tensor, kept: Tensor, patch_size: int) -> Tensor:
    if kept.ndim != 2 or len(kept) != len(images):
        raise PatchError(f"kept must be int64 [{len(images)}, k], got {tuple(kept.shape)}")
    return mask_of(kept, grid_of(images, patch_size).num_patches)
