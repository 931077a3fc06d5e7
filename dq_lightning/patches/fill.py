"""Filling dropped patches without a network, by the mean colour or harmonically; images that keep unequal counts."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from dq_lightning.errors import PatchError
from dq_lightning.patch_records import Grid
from dq_lightning.patches.choose import mask_of
from dq_lightning.patches.grid import grid_of, pixel_mask


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
        return fill_with_mean(images, _kept_pixels(images, kept, patch_size or self.patch_size))


@dataclass(frozen=True)
class HarmonicFill:
    """Dropped pixels solve Laplace's equation with the kept ones as boundary values: the smoothest filling.

    Attributes:
        patch_size: P in pixels, when a call names none.
    """

    patch_size: int

    def reconstruct(self, images: Tensor, kept: Tensor, patch_size: int | None = None) -> Tensor:
        return fill_harmonically(images, _kept_pixels(images, kept, patch_size or self.patch_size))


def _kept_pixels(images: Tensor, kept: Tensor, patch_size: int) -> Tensor:
    grid: Grid = grid_of(images, patch_size)
    if kept.ndim != 2 or len(kept) != len(images):
        raise PatchError(f"kept must be int64 [{len(images)}, k], got {tuple(kept.shape)}")
    return pixel_mask(mask_of(kept, grid.num_patches), grid)


def fill_with_mean(images: Tensor, stays: Tensor) -> Tensor:
    """Give all pixels of [B, C, H, W] outside of `stays`, bool [B, 1, H, W], the mean colour of those inside."""
    total = torch.where(stays, images, 0).sum((2, 3), keepdim=True)
    return torch.where(stays, images, total / stays.sum((2, 3), keepdim=True).clamp(min=1))


def fill_harmonically(images: Tensor, stays: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Solve Laplace's equation for the pixels outside of `stays`.

    Each of these pixels is the mean of its two to four neighbours; nothing flows across the image's border (Neumann). Solved
    by conjugate gradients with the diagonal as preconditioner, all images and channels at once, in float64
    unless the tolerance is 1e-3 or larger.

    Args:
        images: floating [B, C, H, W].
        stays: bool [B, 1, H, W], pixels whose values are given.
        tolerance: on the residual, relative to its size for the mean colour.

    Returns:
        As `images`; given pixels are untouched, and an image without any is 0.

    Complexity: each step is linear in the pixels, and their number grows with the diameter of the holes.
    """
    # float32 resolves a residual to about 1e-5 of its first size
    kind = torch.float32 if images.device.type == "mps" or tolerance >= 1e-3 else torch.float64
    start = fill_with_mean(torch.where(stays, images, 0).to(kind), stays)
    dropped = (~stays).to(kind)
    degree = _sum_of_neighbours(torch.ones_like(start[:1, :1]))
    solution = start * dropped

    def stiffness(values: Tensor) -> Tensor:
        return (degree * values - _sum_of_neighbours(values)) * dropped

    residual = _sum_of_neighbours(start * ~dropped.bool()) * dropped - stiffness(solution)
    wanted = tolerance * residual.flatten(2).norm(dim=2)[..., None, None]
    direction = residual / degree
    energy = (residual * direction).sum((2, 3), keepdim=True)
    # in exact arithmetic as many steps as unknowns are enough
    for step in range(images.shape[2] * images.shape[3]):
        running = residual.flatten(2).norm(dim=2)[..., None, None] > wanted
        # asking costs a wait for the device, so not in every step
        if step % 8 == 0 and not bool(running.any()):
            break
        moved = stiffness(direction)
        curvature = (direction * moved).sum((2, 3), keepdim=True)
        length = torch.where(running, energy / torch.where(running, curvature, 1), 0)
        solution = solution + length * direction
        residual = residual - length * moved
        scaled = residual / degree
        new_energy = (residual * scaled).sum((2, 3), keepdim=True)
        direction = torch.where(running, scaled + new_energy / torch.where(running, energy, 1) * direction, direction)
        energy = torch.where(running, new_energy, energy)
    return torch.where(stays, images, solution.to(images))


def _sum_of_neighbours(values: Tensor) -> Tensor:
    """Sum of the upper, lower, left and right neighbour in [B, C, H, W]; outside of the image is 0."""
    wide = F.pad(values, (1, 1, 1, 1))
    return wide[..., :-2, 1:-1] + wide[..., 2:, 1:-1] + wide[..., 1:-1, :-2] + wide[..., 1:-1, 2:]
