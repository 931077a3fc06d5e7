"""Fills the dropped patches of a batch with any reconstructor."""

from typing import Protocol

import torch
from torch import Tensor

from dq_lightning.core.grid import grid_of, pixel_mask


class Reconstructor(Protocol):
    """Fills the patches that are not kept, and leaves the pixels of the others unchanged bit by bit."""

    def reconstruct(self, images: Tensor, kept: Tensor, patch_size: int | None = None) -> Tensor:
        """Fill the patches of floating images [B, C, H, W] that are not kept.

        `kept`, int64 [B, k], has the numbers of the kept patches of each image on the grid of patches of `patch_size`
        pixels a side; None takes the default.
        """


def fill_by_mask(reconstructor: Reconstructor, images: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """Fill floating images [B, C, H, W] that keep different numbers of patches, those in the mask bool [B, L].

    The reconstructor is called once for each number.
    """
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
    """Fill images uint8 [B, C, H, W] where the mask, bool [B, L], is not True; kept pixels are unchanged.

    The reconstructor takes images in [0, 1], normalised with `mean` and `std` of each channel. An image with one
    channel is passed to it as three equal channels, and the result is averaged. Filled pixels are rounded to the
    nearest value in 0 ... 255.
    """
    means, stds = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (mean, std))
    wide = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    filled = fill_by_mask(reconstructor, (wide.float() / 255 - means) / stds, mask, patch_size)
    pixels = (filled.float() * stds + means) * 255
    if images.shape[1] == 1:
        pixels = pixels.mean(1, keepdim=True)
    stays = pixel_mask(mask.to(images.device), grid_of(images, patch_size))
    return torch.where(stays, images, pixels.round().clamp(0, 255).to(torch.uint8))
