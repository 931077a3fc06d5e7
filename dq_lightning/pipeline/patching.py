"""Choose among the scored patches of the kept samples, and cut the chosen ones out of the images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import PatchError, StoreError
from dq_lightning.core.records import Grid, PatchChoice, PatchedImage, Selection
from dq_lightning.core.replicas import in_threads
from dq_lightning.packed.layouts import layout_of_image, pixels_of
from dq_lightning.packed.patches import pack_image
from dq_lightning.packed.writer import Item
from dq_lightning.patches.choose import choose_patches, kept_count, make_choice, spread_budget
from dq_lightning.patches.score import split_scores
from dq_lightning.pipeline.budget import ByteSetting
from dq_lightning.pipeline.patch_plan import PatchPlan
from dq_lightning.pipeline.plan import Plan
from dq_lightning.sources.items import at, plain_parts, with_value

BUDGET_ROUNDS = 8
NAMED_SAMPLES = 5


def choose(plan: Plan, selection: Selection, scores: Tensor, sizes: Tensor) -> PatchChoice:
    """Choose the patches to keep: the share that the settings ask for, or as many as fit into `max_bytes`.

    `scores` (float32 [sum of L_i], image after image) and `sizes` (int32 [M, 2], height and width in pixels) are those
    of the M kept samples.

    Raises:
        PatchError: `max_bytes` is still exceeded when every image keeps only its least share of patches, or after
            `BUDGET_ROUNDS` rounds of choosing and measuring.
    """
    patches = patches_of(plan)
    config, size = patches.config, patches.patch_size
    rows = split_scores(scores, sizes, size)
    pairs = [(height, width) for height, width in sizes.tolist()]
    if config.max_bytes is None:
        return choose_patches(
            rows, pairs, size, config.drop_ratio, spread=config.spread, least_ratio=config.least_ratio
        )
    counts = [kept_count(len(row), config.drop_ratio) for row in rows]
    least = [min(count, kept_count(len(row), 1 - config.least_ratio)) for row, count in zip(rows, counts, strict=True)]
    total = sum(counts)
    for _ in range(BUDGET_ROUNDS):
        choice = make_choice(spread_budget(rows, total, least), pairs, size)
        seen = sum(packed.num_bytes(plan) for packed in _packed_images(plan, selection.index, choice))
        if seen <= config.max_bytes:
            return choice
        # The next total is 1 % less than in proportion, because the patches that stay take more bytes than the average.
        total = max(sum(least), min(total - 1, int(total * config.max_bytes / seen * 0.99)))
        if total == sum(least) == int(choice.counts.sum()):
            break
    raise PatchError(
        f"max_bytes={config.max_bytes:,} is too little: with {int(choice.counts.sum()):,} patches the {len(rows):,} images "
        f"take {seen:,} bytes. Raise it, or lower least_ratio, quality or keep_ratio"
    )


def packed_items(
    plan: Plan, index: Tensor, choice: PatchChoice, numbers: Iterator[int] | None = None, *, warns: bool = True
) -> Iterator[Item]:
    """Yield samples at some positions, those with the given numbers or all, with kept patches in place of their images.

    An image that cannot be cut into patches, because its mode is neither RGB nor L, stays whole; a warning at the end
    counts such images if `warns` is set.
    """
    place, whole = plan.source.image_leaf(), []
    for packed in _packed_images(plan, index, choice, numbers):
        if packed.image is None:
            whole.append(packed.position)
            yield packed.sample, plan.source.encoded(packed.position)
        else:
            yield with_value(packed.sample, place, packed.image), None
    if whole and warns:
        named = ", ".join(map(str, whole[:NAMED_SAMPLES])) + (", ..." if len(whole) > NAMED_SAMPLES else "")
        get_logger().warning(
            f"{len(whole):,} images are stored whole, because patches can only be kept of RGB and grey images (samples "
            f'{named}). To drop patches of them too, let the dataset give all images as RGB (image.convert("RGB"))'
        )


def with_all_patches(plan: Plan, sample: Any, place: tuple[str | int, ...]) -> Any:
    """Return a sample with all patches of its image kept and stored as raw pixels.

    This is what packing does to a sample, apart from dropping patches and from the codec.

    Raises:
        StoreError: the image is of a type or mode that cannot be cut into patches.
    """
    leaf, size = at(sample, place), patches_of(plan).patch_size
    height, width, _ = pixels_of(leaf)[2].shape
    count = Grid(height, width, size).num_patches
    return with_value(sample, place, pack_image(leaf, torch.ones(count, dtype=torch.bool), size, "raw"))


@dataclass(frozen=True)
class _Packed:
    """A sample and the kept patches of its image; the image is None where it stays whole."""

    position: int
    sample: Any
    image: PatchedImage | None

    def num_bytes(self, plan: Plan) -> int:
        """Return about how many bytes the image takes in the store."""
        if self.image is not None:
            return len(self.image.data) + len(self.image.mask)
        return whole_bytes(plan, self.position, at(self.sample, plan.source.image_leaf()))


def _packed_images(
    plan: Plan, index: Tensor, choice: PatchChoice, numbers: Iterator[int] | None = None
) -> Iterator[_Packed]:
    """Yield the samples with the given numbers, or all, with their packed images, in order.

    The samples are read in the calling thread, because few datasets are safe to read from several threads. The images
    are packed in other threads.
    """
    patches, place = patches_of(plan), plan.source.image_leaf()

    def pack(position: int, sample: Any, mask: Tensor) -> _Packed:
        leaf = at(sample, place)
        try:
            layout_of_image(leaf)
        except StoreError as error:
            if patches.config.reconstruct == "batch":
                raise PatchError(f'sample {position}, for reconstruct="batch": {error}') from error
            return _Packed(position, sample, None)
        image = pack_image(leaf, mask, patches.patch_size, patches.codec, patches.config.quality)
        return _Packed(position, sample, image)

    def calls() -> Iterator[Callable[[], _Packed]]:
        positions = index.tolist()
        for number in range(len(positions)) if numbers is None else numbers:
            position = positions[number]
            yield partial(pack, position, plain_parts(plan.source.plain(position)), choice.mask(number))

    yield from in_threads(calls())


def whole_bytes(plan: Plan, position: int, leaf: Any) -> int:
    """Return the bytes of a whole image: of its encoded form if the dataset holds one, else of its raw pixels."""
    encoded = plan.source.encoded(position)
    return int(np.asarray(leaf).nbytes) if encoded is None else len(encoded.data)


def patches_of(plan: Plan) -> PatchPlan:
    """Return the patch plan of a plan that drops patches."""
    assert plan.patches is not None
    return plan.patches


def in_codec(plan: Plan, setting: ByteSetting) -> Plan:
    """Return a plan that stores its kept patches in the codec and the quality of a setting."""
    patches = patches_of(plan)
    quality = patches.config.quality if setting.quality is None else setting.quality
    codec: Any = setting.codec
    config = replace(patches.config, codec=codec, quality=quality)
    return replace(plan, patches=replace(patches, config=config))
