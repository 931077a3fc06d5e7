"""Harmonic filling: Laplace's equation in the dropped patches, with the kept pixels as boundary values. PURE.

Only dropped patches are unknown, so only they are held: [n, C, P, P] over all images, each with the places of its four
neighbours. Conjugate gradients are preconditioned by solving every patch exactly, as if its neighbours were known: on a
square the sine transform does that by four small products (Buzbee, Golub and Nielson 1970). A hole of one patch inside of
the image takes one step, and a large one several times fewer than without.
"""

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from dq_lightning.core.grid import grid_of, patchify, pixel_mask, unpatchify
from dq_lightning.core.records import Grid
from dq_lightning.core.workers import one_thread

# float32 resolves a residual to about 1e-6 of its first size
SINGLE_PRECISION_TOLERANCE = 1e-5
# asking whether all is solved costs a wait for the device
STEPS_PER_QUESTION = 4
# what is worked on stays in the processor's cache
VALUES_AT_ONCE = 1 << 18


def fill_harmonically(
    images: Tensor, mask: Tensor, patch_size: int, tolerance: float = SINGLE_PRECISION_TOLERANCE
) -> Tensor:
    """Solve Laplace's equation for the pixels of the dropped patches.

    Each of these pixels is the mean of its two to four neighbours; nothing flows across the image's border (Neumann).

    Args:
        images: floating [B, C, H, W]; what is in dropped patches is never seen.
        mask: bool [B, L], the kept patches of the grid of `patch_size` pixels.
        patch_size: P in pixels.
        tolerance: on the residual, relative to its size for the mean colour. Below 1e-5 all is done in float64.

    Returns:
        As `images`; kept pixels are untouched, and an image that keeps none is 0.

    Complexity: each step is linear in the dropped pixels, times P, and the number of steps grows with the diameter of the
    holes.
    """
    single = images.device.type == "mps" or tolerance >= SINGLE_PRECISION_TOLERANCE
    step = len(images) if images.device.type != "cpu" else max(1, VALUES_AT_ONCE // max(1, images[:1].numel()))
    filled = images.clone()
    with one_thread():
        for start in range(0, len(images), step):
            some = slice(start, start + step)
            part = images[some], mask[some].to(images.device)
            filled[some] = _fill(*part, patch_size, tolerance, torch.float32 if single else torch.float64)
    return filled


def fill_with_mean(images: Tensor, stays: Tensor) -> Tensor:
    """Give all pixels of [B, C, H, W] outside of `stays`, bool [B, 1, H, W], the mean colour of those inside."""
    total = torch.where(stays, images, 0).sum((2, 3), keepdim=True)
    return torch.where(stays, images, total / stays.sum((2, 3), keepdim=True).clamp(min=1))


def _fill(images: Tensor, mask: Tensor, patch_size: int, tolerance: float, dtype: torch.dtype) -> Tensor:
    grid = grid_of(images, patch_size)
    stays = pixel_mask(mask, grid)
    start = fill_with_mean(torch.where(stays, images, 0).to(dtype), stays)
    change = torch.zeros(*mask.shape, images.shape[1], patch_size, patch_size, dtype=dtype, device=images.device)
    change[~mask] = _solve(_Patches.dropped(mask, grid, dtype), _laplacian(start), tolerance)
    return torch.where(stays, images, (start + unpatchify(change, grid)).to(images))


def _laplacian(images: Tensor) -> Tensor:
    """Sum of the differences to the two to four neighbours of every pixel of [B, C, H, W]."""
    return _sum_of_neighbours(images) - _sum_of_neighbours(torch.ones_like(images[:1, :1])) * images


def _sum_of_neighbours(values: Tensor) -> Tensor:
    """Sum of the upper, lower, left and right neighbour in [B, C, H, W]; outside of the image is 0."""
    return _inner_sums(F.pad(values, (1, 1, 1, 1)))


def _inner_sums(wide: Tensor) -> Tensor:
    return wide[..., :-2, 1:-1] + wide[..., 2:, 1:-1] + wide[..., 1:-1, :-2] + wide[..., 1:-1, 2:]


class _Patches(NamedTuple):
    """The n dropped patches of all images, and the equations between their pixels.

    Attributes:
        mask: bool [B, L], the kept patches.
        grid: of the images.
        owner: int64 [n], the image of each.
        neighbours: int64 [4, n], the patch above, below, left and right; n where there is none or a kept one.
        degree: floating [n, 1, P, P], neighbours of each pixel inside of its image; 0 outside.
        inside: floating [n, 1, P, P], 1 inside of the image; None when no patch is partial.
        sines: floating [P, P], symmetric and orthogonal.
        inverse: floating [P, P], one over the eigenvalues of a patch among known ones.
    """

    mask: Tensor
    grid: Grid
    owner: Tensor
    neighbours: Tensor
    degree: Tensor
    inside: Tensor | None
    sines: Tensor
    inverse: Tensor

    @classmethod
    def dropped(cls, mask: Tensor, grid: Grid, dtype: torch.dtype) -> Self:
        owner, place = (~mask).nonzero(as_tuple=True)
        row, column, device = place // grid.columns, place % grid.columns, mask.device
        number = torch.full((len(mask), grid.rows + 2, grid.columns + 2), len(owner), device=device)
        number[owner, row + 1, column + 1] = torch.arange(len(owner), device=device)
        sides = ((0, 1), (2, 1), (1, 0), (1, 2))
        neighbours = torch.stack([number[owner, row + down, column + right] for down, right in sides])
        size = grid.patch_size
        bounds = (0, grid.columns * size - grid.width, 0, grid.rows * size - grid.height)
        ones = torch.ones(1, 1, grid.height, grid.width, dtype=dtype, device=device)
        degree, inside = (patchify(F.pad(x, bounds), size)[0, place] for x in (_sum_of_neighbours(ones), ones))
        # eigenvectors and eigenvalues of the second difference with zeros at both ends
        waves = torch.arange(1, size + 1, dtype=torch.float64) * math.pi / (size + 1)
        sines = math.sqrt(2 / (size + 1)) * torch.sin(torch.outer(waves, torch.arange(1, size + 1).double()))
        values = 2 - 2 * torch.cos(waves)
        inverse = 1 / (values[:, None] + values)
        partial = inside if any(bounds) else None
        return cls(mask, grid, owner, neighbours, degree, partial, sines.to(ones), inverse.to(ones))

    def cut(self, images: Tensor) -> Tensor:
        """Dropped patches [n, C, P, P] of images [B, C, H, W]; 0 outside of the image."""
        cells = patchify(images, self.grid.patch_size)[~self.mask]
        return self._bounded(cells)

    def stiffness(self, values: Tensor) -> Tensor:
        """Degree times each value less the sum of its neighbours; kept pixels count as 0."""
        number, channels, size, _ = values.shape
        wide = values.new_zeros(number, channels, size + 2, size + 2)
        wide[..., 1:-1, 1:-1] = values
        above, below, left, right = self.neighbours
        wide[..., 0, 1:-1] = _with_none(values[..., -1, :])[above]
        wide[..., -1, 1:-1] = _with_none(values[..., 0, :])[below]
        wide[..., 1:-1, 0] = _with_none(values[..., -1])[left]
        wide[..., 1:-1, -1] = _with_none(values[..., 0])[right]
        return self._bounded(self.degree * values - _inner_sums(wide))

    def precondition(self, values: Tensor) -> Tensor:
        """Every patch solved for these values [n, C, P, P], as if all around it were known and inside of the image."""
        spectrum = (values @ self.sines).mT @ self.sines * self.inverse
        return self._bounded((spectrum @ self.sines).mT @ self.sines)

    def dot(self, one: Tensor, other: Tensor) -> Tensor:
        """Inner products [B] over all that belongs to an image."""
        sums = (one * other).sum((1, 2, 3))
        return sums.new_zeros(len(self.mask)).index_add_(0, self.owner, sums)

    def scale(self, factors: Tensor, values: Tensor) -> Tensor:
        """Values [n, C, P, P] times the factor of their image, [B]."""
        return factors[self.owner][:, None, None, None] * values

    def _bounded(self, values: Tensor) -> Tensor:
        return values if self.inside is None else values * self.inside


def _with_none(values: Tensor) -> Tensor:
    return torch.cat([values, torch.zeros_like(values[:1])])


def _solve(patches: _Patches, laplacian: Tensor, tolerance: float) -> Tensor:
    """What is to be added in the dropped patches, [n, C, P, P], so that the Laplacian [B, C, H, W] of the start vanishes."""
    residual = patches.cut(laplacian)
    solution, direction = torch.zeros_like(residual), torch.zeros_like(residual)
    if not len(residual):
        return solution
    wanted = tolerance**2 * patches.dot(residual, residual)
    energy = torch.zeros_like(wanted)
    # in exact arithmetic as many steps as unknowns are enough
    for step in range(patches.grid.height * patches.grid.width):
        running = patches.dot(residual, residual) > wanted
        if step % STEPS_PER_QUESTION == 0 and not bool(running.any()):
            break
        scaled = patches.precondition(residual)
        new_energy = patches.dot(residual, scaled)
        direction = scaled + patches.scale(new_energy / torch.where(energy > 0, energy, torch.inf), direction)
        energy = new_energy
        moved = patches.stiffness(direction)
        curvature = patches.dot(direction, moved)
        length = torch.where(running, energy / torch.where(running, curvature, 1), 0)
        solution += patches.scale(length, direction)
        residual -= patches.scale(length, moved)
    return solution
