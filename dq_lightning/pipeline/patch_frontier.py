"""What a few samples take and lose with dropped patches, in any codec; the counterpart of `frontier` for whole images."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from dq_lightning.core.records import PatchChoice, PatchedImage, Selection
from dq_lightning.packed.layouts import pixels_of
from dq_lightning.packed.patch_layout import pixel_mask
from dq_lightning.packed.patches import layout_of, unpack_image
from dq_lightning.packed.writer import Item
from dq_lightning.patches.harmonic import fill_harmonically
from dq_lightning.pipeline.budget import ByteSetting
from dq_lightning.pipeline.patching import choose, in_codec, packed_items
from dq_lightning.pipeline.plan import Plan
from dq_lightning.pipeline.scoring import score_selection
from dq_lightning.sources.items import at, plain_parts


@dataclass(frozen=True)
class PatchTrial:
    """A few samples without some of their patches.

    Attributes:
        plan: plan that drops patches.
        positions: positions of the samples in the source; all of them can be read.
        device: device that the classifier runs on.
        fills: whether the error counts the dropped patches too, filled harmonically; else it is that of the kept pixels
            alone, because which patches are dropped is then no question.
    """

    plan: Plan
    positions: list[int]
    device: str
    fills: bool = False

    @cached_property
    def selection(self) -> Selection:
        """The samples as a selection."""
        index = torch.tensor(self.positions, dtype=torch.int64)
        return Selection(index, torch.zeros(len(index), dtype=torch.int16))

    @cached_property
    def choice(self) -> PatchChoice:
        """The patches that are kept."""
        return choose(
            self.plan, self.selection, *score_selection(self.plan, self.selection, device=self.device, progress=False)
        )

    def items(self, setting: ByteSetting) -> list[Item]:
        """Return the samples with their kept patches as a setting stores them."""
        return list(packed_items(in_codec(self.plan, setting), self.selection.index, self.choice, warns=False))

    def errors(self, items: list[Item]) -> list[float]:
        """Return the mean squared error of each image that is stored as patches, on the scale of 0 to 255."""
        place, groups, errors = self.plan.source.image_leaf(), dict[Any, list[tuple[Any, Any, Any]]](), list[float]()
        for position, (sample, _) in zip(self.positions, items, strict=True):
            patched = at(sample, place)
            if isinstance(patched, PatchedImage):
                pixels = pixels_of(at(plain_parts(self.plan.source.plain(position)), place))[2]
                decoded, mask = unpack_image(patched)
                if self.fills:
                    groups.setdefault((pixels.shape, patched.patch_size), []).append((pixels, decoded, mask))
                else:
                    stays = pixel_mask(mask, layout_of(patched))
                    errors.append(_mean_square(decoded[stays].astype(np.float32) - pixels[stays]))
        # Images of one size are filled together.
        for (_, patch_size), found in groups.items():
            whole, kept, masks = (torch.from_numpy(np.stack(parts)) for parts in zip(*found, strict=True))
            filled = fill_harmonically(kept.permute(0, 3, 1, 2).float(), masks, patch_size).permute(0, 2, 3, 1)
            errors += [_mean_square(one) for one in (filled - whole).numpy()]
        return errors


def _mean_square(difference: Any) -> float:
    return float(np.mean(difference * difference)) if difference.size else 0.0
