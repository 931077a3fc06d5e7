"""Decodes raw patches of a whole batch at once, because for small images the number of calls takes most of the time.

The code is pure: it reads and writes no files.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dq_lightning.core.records import PatchedImage, unpack_mask
from dq_lightning.packed.columns import Leaf, leaf_reader
from dq_lightning.packed.images import images_from_raw
from dq_lightning.packed.layouts import leaf_of
from dq_lightning.packed.patch_layout import Layout, Pixels
from dq_lightning.packed.patches import layout_of
from dq_lightning.packed.values import properties_setter


class BatchDecoder:
    """Decodes rows of one column of patches to the same values as `patches.mean_filled`.

    Args:
        leaf: description of the column, which `fits` has accepted.
    """

    def __init__(self, leaf: Leaf) -> None:
        self.whole: PatchedImage = leaf_reader(leaf)(bytes(leaf.row_bytes))
        self.mask_bytes = len(self.whole.mask)
        bare = layout_of(self.whole)
        count = leaf.shape[3] // (bare.patch_size**2 * bare.channels)
        self.layout = replace(bare, count=count)
        self.give_properties = properties_setter(leaf.properties)

    @staticmethod
    def fits(leaf: Leaf) -> bool:
        """Return whether all rows of a column keep equally many patches, and none of them is partial."""
        if leaf.kind != "patches":
            return False
        height, width, patch_size, _ = leaf.shape
        return height % patch_size == 0 == width % patch_size and leaf.shape[3] > 0

    def __call__(self, rows: Sequence[bytes | memoryview]) -> list[Any]:
        """Decode rows of the column to images; the result is None for a row whose mask does not fit its pixels."""
        if not rows:
            return []
        taken = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)
        # This is a contiguous copy, because its memory is viewed in other shapes below.
        data = np.ascontiguousarray(taken[:, self.mask_bytes :])
        layout, count = self.layout, self.layout.count
        masks = unpack_mask(taken[:, : self.mask_bytes], 8 * self.mask_bytes)
        good = masks.sum(1) == count
        masks = masks[:, : self.whole.num_patches]
        good &= masks.sum(1) == count
        if data.shape[1] != count * layout.patch_size**2 * layout.channels or not good.any():
            return [None] * len(rows)
        if good.all():
            return self._values(_place_all(data, masks, layout))
        values = iter(self._values(_place_all(data[good], masks[good], layout)))
        return [next(values) if fine else None for fine in good.tolist()]

    def _values(self, pixels: Pixels) -> list[Any]:
        """Convert pixels [B, H, W, C] to the type of image that the dataset delivered."""
        facts = self.whole
        if facts.layout == "pil":
            images = images_from_raw(facts.mode, (facts.width, facts.height), pixels)
            for image in images if facts.properties else ():
                self.give_properties(image)
            return images
        # Each image is copied, because a view would keep the memory of the whole batch for one of its images.
        return [leaf_of(facts.layout, facts.mode, image.copy()) for image in pixels]


def _place_all(data: Pixels, masks: np.ndarray[Any, np.dtype[np.bool_]], layout: Layout) -> Pixels:
    """Arrange pixels [B, k * P * P * C] with masks [B, L], which keep k patches each, as filled images [B, H, W, C]."""
    rows, columns = layout.rows, layout.columns
    patch, channels, batch = layout.patch_size, layout.channels, len(data)
    run = np.dtype((np.void, patch * channels))
    whole = np.empty((batch, layout.height, layout.width, channels), np.uint8)
    cells = whole.reshape(batch, rows, patch, columns, patch * channels).view(run)[..., 0].swapaxes(2, 3)
    shaped = masks.reshape(batch, rows, columns)
    cells[shaped] = data.reshape(-1, patch, patch * channels).view(run)[..., 0]
    holes = masks.shape[1] - layout.count
    if holes:
        # The sum of 257 bytes fits into 16 bits.
        narrow = np.uint16 if layout.count <= 257 else np.uint32
        sums = np.add.reduce(data.reshape(batch, layout.count, -1), 1, narrow)
        total = np.add.reduce(sums.reshape(batch, patch**2, channels), 1, np.int64)
        number = layout.count * patch**2
        colours = ((2 * total + number) // (2 * number)).astype(np.uint8)
        runs = np.tile(colours, patch).view(run)[..., 0]
        cells[~shaped] = np.repeat(runs, holes)[:, None]
    return whole
