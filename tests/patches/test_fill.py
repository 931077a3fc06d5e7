"""Filling by the mean colour and harmonically."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_lightning.patch_records import Grid
from dq_lightning.patches.choose import choose_kept
from dq_lightning.patches.fill import HarmonicFill, MeanFill, fill_by_mask, fill_harmonically, fill_with_mean
from dq_lightning.patches.grid import pixel_mask
from tests.reference import patch_twin


@settings(deadline=None, max_examples=40)
@given(height=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 999), share=st.floats(0.02, 1))
def test_harmonic_filling_is_the_solution_of_the_dense_system(height, width, seed, share):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 2, height, width, generator=generator, dtype=torch.float64)
    stays = torch.rand(2, 1, height, width, generator=generator) < share
    stays[:, 0, 0, 0] = True
    filled = fill_harmonically(images, stays, tolerance=1e-12)
    for image, mask, ours in zip(images, stays, filled, strict=True):
        for plane, solved in zip(image.numpy(), ours.numpy(), strict=True):
            np.testing.assert_allclose(solved, patch_twin.harmonic(plane, mask[0].numpy()), atol=1e-8)


@pytest.mark.parametrize("fill", [MeanFill(4), HarmonicFill(4)])
def test_kept_pixels_are_untouched_and_dropped_ones_are_never_seen(fill):
    images = torch.rand(3, 3, 30, 22)
    grid = Grid(30, 22, 4)
    kept = choose_kept(torch.rand(3, grid.num_patches), 17)
    stays = pixel_mask(torch.zeros(3, grid.num_patches).scatter(1, kept, 1).bool(), grid).expand_as(images)
    filled = fill.reconstruct(images, kept)
    assert torch.equal(filled[stays], images[stays])
    spoiled = torch.where(stays, images, torch.nan)
    assert torch.equal(fill.reconstruct(spoiled, kept), filled)
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
    for fill in (fill_with_mean, fill_harmonically):
        assert torch.equal(fill(images, torch.ones(2, 1, 8, 8, dtype=torch.bool)), images)
        assert torch.equal(fill(images, torch.zeros(2, 1, 8, 8, dtype=torch.bool)), torch.zeros_like(images))


def test_images_with_unequal_counts_are_filled_as_each_alone():
    images = torch.rand(5, 3, 16, 16)
    mask = torch.rand(5, 16) < torch.tensor([0.0, 0.3, 0.6, 0.6, 1.0])[:, None]
    filled = fill_by_mask(HarmonicFill(4), images, mask, 4)
    for position in range(5):
        alone = HarmonicFill(4).reconstruct(images[position][None], mask[position].nonzero().T)
        torch.testing.assert_close(filled[position], alone[0])


def test_a_large_hole_converges():
    ramp = torch.linspace(0, 1, 96)[:, None].expand(96, 96)[None, None].double()
    stays = torch.zeros(1, 1, 96, 96, dtype=torch.bool)
    stays[..., 0, :] = stays[..., -1, :] = True
    # between two constant edges the solution is the ramp
    torch.testing.assert_close(fill_harmonically(ramp, stays), ramp, atol=1e-4, rtol=0)
