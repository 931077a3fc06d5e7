"""Patches of images of any size: cut, laid back, pooled, spread over pixels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_lightning.core.errors import PatchError
from dq_lightning.core.grid import patchify, pixel_mask, pool_to_patches, unpatchify
from dq_lightning.core.records import Grid
from tests.reference import patch_twin

SIDES = st.integers(1, 37)
SIZES = st.integers(1, 12)


@settings(deadline=None)
@given(height=SIDES, width=SIDES, size=SIZES, channels=st.integers(1, 3))
def test_unpatchify_undoes_patchify_for_every_size(height, width, size, channels):
    images = torch.randint(0, 256, (2, channels, height, width), dtype=torch.uint8)
    patches = patchify(images, size)
    assert patches.shape == (2, Grid(height, width, size).num_patches, channels, size, size)
    assert torch.equal(unpatchify(patches, Grid(height, width, size)), images)


@settings(deadline=None)
@given(height=SIDES, width=SIDES, size=SIZES)
def test_patches_are_those_of_the_twin_and_their_padding_repeats_the_edge(height, width, size):
    image = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
    expected = patch_twin.cut(image[0].numpy(), size)
    patches = patchify(image, size)[0]
    assert len(patches) == len(expected)
    for patch, wanted in zip(patches.numpy(), expected, strict=True):
        rows, columns = size - wanted.shape[1], size - wanted.shape[2]
        np.testing.assert_array_equal(patch, np.pad(wanted, ((0, 0), (0, rows), (0, columns)), mode="edge"))


@settings(deadline=None)
@given(height=SIDES, width=SIDES, size=SIZES)
def test_a_partial_patch_is_averaged_over_its_own_pixels(height, width, size):
    maps = torch.rand(2, height, width, dtype=torch.float64)
    expected = [[float(p.mean()) for p in patch_twin.cut(one[None].numpy(), size)] for one in maps]
    np.testing.assert_allclose(pool_to_patches(maps, size).numpy(), expected, rtol=1e-12)


@settings(deadline=None)
@given(height=SIDES, width=SIDES, size=SIZES, seed=st.integers(0, 99))
def test_a_pixel_stays_exactly_when_its_patch_does(height, width, size, seed):
    grid = Grid(height, width, size)
    mask = torch.rand(2, grid.num_patches, generator=torch.Generator().manual_seed(seed)) < 0.5
    spread = pixel_mask(mask, grid)
    assert spread.shape == (2, 1, height, width)
    for y in range(0, height, 3):
        for x in range(0, width, 2):
            patch = (y // size) * grid.columns + x // size
            assert torch.equal(spread[:, 0, y, x], mask[:, patch])


def test_what_does_not_fit_is_refused():
    with pytest.raises(PatchError, match="at least one pixel"):
        Grid(4, 0, 2)
    with pytest.raises(PatchError, match="which has 6"):
        unpatchify(torch.zeros(1, 5, 3, 2, 2), Grid(4, 6, 2))
    with pytest.raises(PatchError, match="a mask of 5"):
        pixel_mask(torch.zeros(1, 5, dtype=torch.bool), Grid(4, 6, 2))
