"""Filling by the mean colour and harmonically."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_lightning.core.grid import pixel_mask
from dq_lightning.core.records import Grid
from dq_lightning.patches.choose import choose_kept, mask_of
from dq_lightning.patches.fill import fill_by_mask
from dq_lightning.patches.harmonic import fill_harmonically, fill_with_mean
from tests.full_count import examples
from tests.reference import patch_twin


@settings(deadline=None, max_examples=examples(40))
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    patch=st.integers(1, 5),
    seed=st.integers(0, 999),
    share=st.floats(0.02, 1),
)
def test_harmonic_filling_is_the_solution_of_the_dense_system(height, width, patch, seed, share):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 2, height, width, generator=generator, dtype=torch.float64)
    grid = Grid(height, width, patch)
    kept = torch.rand(2, grid.num_patches, generator=generator) < share
    kept[:, 0] = True
    filled = fill_harmonically(images, kept, patch, tolerance=1e-12)
    for image, mask, ours in zip(images, pixel_mask(kept, grid), filled, strict=True):
        for plane, solved in zip(image.numpy(), ours.numpy(), strict=True):
            np.testing.assert_allclose(solved, patch_twin.harmonic(plane, mask[0].numpy()), atol=1e-8)


def mean_fill(images, mask, patch_size):
    return fill_with_mean(images, pixel_mask(mask, Grid(*images.shape[2:], patch_size)))


class Harmonic:
    """A reconstructor that fills harmonically."""

    def reconstruct(self, images, kept, patch_size=4):
        mask = mask_of(kept, Grid(*images.shape[2:], patch_size).num_patches)
        return fill_harmonically(images, mask, patch_size)


@pytest.mark.parametrize("fill", [mean_fill, fill_harmonically])
def test_kept_pixels_are_untouched_and_dropped_ones_are_never_seen(fill):
    images = torch.rand(3, 3, 30, 22)
    grid = Grid(30, 22, 4)
    kept = choose_kept(torch.rand(3, grid.num_patches), 17)
    mask = mask_of(kept, grid.num_patches)
    stays = pixel_mask(mask, grid).expand_as(images)
    filled = fill(images, mask, 4)
    assert torch.equal(filled[stays], images[stays])
    spoiled = torch.where(stays, images, torch.nan)
    assert torch.equal(fill(spoiled, mask, 4), filled)
    # both stay between the darkest and the brightest kept pixel
    assert float(filled[~stays].min()) >= float(images[stays].min()) - 1e-6
    assert float(filled[~stays].max()) <= float(images[stays].max()) + 1e-6


def test_the_mean_is_that_of_the_kept_pixels_of_the_same_image():
    images = torch.rand(2, 3, 8, 8)
    stays = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    stays[:, :, :4] = True
    filled = fill_with_mean(images, stays)
    wanted = images[:, :, :4].mean((2, 3))[..., None, None].expand(2, 3, 4, 8)
    torch.testing.assert_close(filled[:, :, 4:], wanted)


def test_images_that_keep_nothing_or_everything():
    images = torch.rand(2, 3, 8, 8)
    for mask in (torch.ones(2, 4, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)):
        wanted = images if bool(mask.all()) else torch.zeros_like(images)
        assert torch.equal(fill_with_mean(images, pixel_mask(mask, Grid(8, 8, 4))), wanted)
        assert torch.equal(fill_harmonically(images, mask, 4), wanted)


def test_images_with_unequal_counts_are_filled_as_each_alone():
    images = torch.rand(5, 3, 16, 16)
    mask = torch.rand(5, 16) < torch.tensor([0.0, 0.3, 0.6, 0.6, 1.0])[:, None]
    filled = fill_by_mask(Harmonic(), images, mask, 4)
    for position in range(5):
        alone = Harmonic().reconstruct(images[position][None], mask[position].nonzero().T)
        torch.testing.assert_close(filled[position], alone[0])


def test_a_large_hole_converges():
    ramp = torch.linspace(0, 1, 96)[:, None].expand(96, 96)[None, None].double()
    stays = torch.zeros(1, 1, 96, 96, dtype=torch.bool)
    stays[..., 0, :] = stays[..., -1, :] = True
    # between two constant edges the solution is the ramp
    torch.testing.assert_close(fill_harmonically(ramp, stays.flatten(1), 1), ramp, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("size", "patch"), [((32, 32), 4), ((75, 66), 16)])
def test_single_precision_is_within_a_tenth_of_a_grey_level(size, patch):
    images = torch.rand(9, 3, *size)
    mask = torch.rand(9, Grid(*size, patch).num_patches) < torch.linspace(0.1, 0.9, 9)[:, None]
    exact = fill_harmonically(images.double(), mask, patch, tolerance=1e-12)
    assert float((fill_harmonically(images, mask, patch) - exact).abs().max()) * 255 < 0.1
