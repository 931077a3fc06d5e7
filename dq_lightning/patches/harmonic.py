"""Harmonic filling: solves Laplace's equation in the dropped patches, with the kept pixels as boundary values.

Only the dropped patches are unknown, so memory holds only them, as [n, C, P, P] over all images, together with the
numbers of their four neighbours. The equation is solved by conjugate gradients. The preconditioner solves every patch
exactly, as if its neighbours were known: on a square the sine transform does this by four small matrix products
(Buzbee, Golub and Nielson 1970). A hole of one patch inside of the image takes one step, and a large hole several times
fewer steps than without the preconditioner.

The code is pure: it reads and writes no files.
"""

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from dq_lightning.core.grid import grid_of, patchify, pixel_mask, unpatchify
from dq_lightning.core.records import Grid
from dq_lightning.core.workers import one_thread

# In float32 a residual can be reduced to about 1e-6 of its first size.
SINGLE_PRECISION_TOLERANCE = 1e-5
# Checking whether all images are solved makes the processor wait for the device, so it is done once in so many steps.
STEPS_PER_CHECK = 4
# Most values of the images that are solved together on a CPU, so that they stay in the processor's cache.
VALUES_AT_ONCE = 1 << 18


def fill_harmonically(
    images: Tensor, mask: Tensor, patch_size: int, tolerance: float = SINGLE_PRECISION_TOLERANCE
) -> Tensor:
    """Fill dropped patches of floating images [B, C, H, W] by solving Laplace's equation for their pixels.

    Each of these pixels becomes the mean of its two to four neighbours. The image's border is a Neumann boundary:
    pixels there have fewer neighbours. Kept pixels (mask bool [B, L]) are unchanged; an image that keeps no patch is 0.

    `tolerance` is the largest norm of the residual, relative to its norm when the dropped patches have the mean colour.
    Below 1e-5 the computation is done in float64, except on the device "mps", which lacks it.

    Complexity: the time of each step is proportional to the number of dropped pixels times P. The number of steps grows
    with the diameter of the holes.
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
    """Fill pixels of [B, C, H, W] outside of `stays`, bool [B, 1, H, W], with the mean colour of those inside."""
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
    """Return the sum of the differences to the two to four neighbours of every pixel of [B, C, H, W]."""
    return _sum_of_neighbours(images) - _sum_of_neighbours(torch.ones_like(images[:1, :1])) * images


def _sum_of_neighbours(values: Tensor) -> Tensor:
    """Return the sum of the upper, lower, left and right neighbour of every pixel; outside of the image is 0."""
    return _inner_sums(F.pad(values, (1, 1, 1, 1)))


def _inner_sums(wide: Tensor) -> Tensor:
    return wide[..., :-2, 1:-1] + wide[..., 2:, 1:-1] + wide[..., 1:-1, :-2] + wide[..., 1:-1, 2:]


class _Patches(NamedTuple):
    """The n dropped patches of all images, and the equations between their pixels.

    Attributes:
        mask: bool [B, L], True at the kept patches.
        grid: grid of the images.
        owner: int64 [n], number of the image that each dropped patch belongs to.
        neighbours: int64 [4, n], number of the dropped patch above, below, left and right; n if there is none.
        degree: floating [n, 1, P, P], number of neighbours of each pixel inside of its image; 0 outside of the image.
        inside: floating [n, 1, P, P], 1 inside of the image and 0 outside; None if no patch is partial.
        sines: floating [P, P], matrix of the sine transform; it is symmetric and orthogonal.
        inverse: floating [P, P], inverse eigenvalues of the equations of one patch whose neighbours are known.
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
        # These are eigenvectors and eigenvalues of the second difference with zeros at both ends.
        waves = torch.arange(1, size + 1, dtype=torch.float64) * math.pi / (size + 1)
        sines = math.sqrt(2 / (size + 1)) * torch.sin(torch.outer(waves, torch.arange(1, size + 1).double()))
        values = 2 - 2 * torch.cos(waves)
        inverse = 1 / (values[:, None] + values)
        partial = inside if any(bounds) else None
        return cls(mask, grid, owner, neighbours, degree, partial, sines.to(ones), inverse.to(ones))

    def cut(self, images: Tensor) -> Tensor:
        """Return the dropped patches [n, C, P, P] of images [B, C, H, W]; pixels outside of the image are 0."""
        cells = patchify(images, self.grid.patch_size)[~self.mask]
        return self._bounded(cells)

    def stiffness(self, values: Tensor) -> Tensor:
        """Return degree times value minus the sum of the neighbours, for [n, C, P, P]; kept pixels count as 0."""
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
        """Solve every patch for these values [n, C, P, P], as if it were whole and its neighbours known."""
        spectrum = (values @ self.sines).mT @ self.sines * self.inverse
        return self._bounded((spectrum @ self.sines).mT @ self.sines)

    def dot(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the inner product [B] over all dropped patches of each image."""
        sums = (one * other).sum((1, 2, 3))
        return sums.new_zeros(len(self.mask)).index_add_(0, self.owner, sums)

    def scale(self, factors: Tensor, values: Tensor) -> Tensor:
        """Multiply values [n, C, P, P] by the factor [B] of their image."""
        return factors[self.owner][:, None, None, None] * values

    def _bounded(self, values: Tensor) -> Tensor:
        return values if self.inside is None else values * self.inside


def _with_none(values: Tensor) -> Tensor:
    return torch.cat([values, torch.zeros_like(values[:1])])


def _solve(patches: _Patches, laplacian: Tensor, tolerance: float) -> Tensor:
    """Return the change [n, C, P, P] of the dropped patches that makes the start's Laplacian [B, C, H, W] vanish."""
    residual = patches.cut(laplacian)
    solution, direction = torch.zeros_like(residual), torch.zeros_like(residual)
    if not len(residual):
        return solution
    wanted = tolerance**2 * patches.dot(residual, residual)
    energy = torch.zeros_like(wanted)
    # In exact arithmetic, conjugate gradients need at most as many steps as there are unknowns.
    for step in range(patches.grid.height * patches.grid.width):
        running = patches.dot(residual, residual) > wanted
        if step % STEPS_PER_CHECK == 0 and not bool(running.any()):
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
