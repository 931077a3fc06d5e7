"""From packed patches to whole images: the reconstructor over the samples of a store."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dq_lightning.errors import PatchError
from dq_lightning.features.encoders import resolve_device
from dq_lightning.features.isolation import isolated, release_memory
from dq_lightning.patch_plan import PatchPlan
from dq_lightning.patch_records import PatchedImage
from dq_lightning.patches.fill import fill_pixels
from dq_lightning.progress import progress_bar
from dq_lightning.sources.items import at, with_value
from dq_lightning.store.cache import require_space
from dq_lightning.store.files import file_digest
from dq_lightning.store.packed import STORE_FILE, Item, write_packed
from dq_lightning.store.patched import image_leaf, unpack_image
from dq_lightning.store.reader import PackedDataset
from dq_lightning.store.shards import KeptShards

# images of different sizes and numbers of patches that wait for their batch, in batches
WINDOW = 8
MEASURED_SAMPLES = 64


def write_filled(
    folder: Path, store: Path, patches: PatchPlan, *, device: str, progress: bool, shards: KeptShards
) -> None:
    """Write the samples of a store of patches as a plain packed store, with the dropped patches filled.

    The images are written as raw pixels: what they cost on the disk buys the speed of the loader, and this folder can be
    removed and made again.

    Args:
        folder: empty.
        store: folder of the store.
        patches: names the reconstructor.
        device: where it runs.
        progress: show a bar.
        shards: finished samples.
    """
    samples = PackedDataset(store, patches="packed")
    place = tuple(samples.attributes["image_place"])
    require_space(
        folder, sum(image.height * image.width * len(image.mode) for image in map(samples.patched, range(len(samples))))
    )
    shards.made_from = file_digest(store / STORE_FILE)
    write_packed(
        folder,
        lambda start: filled_items(samples, place, patches, device=device, progress=progress, start=start),
        ids=samples.ids,
        index=samples.index,
        bins=samples.bin,
        attributes=samples.attributes,
        raw_images=True,
        shards=shards,
        grain=WINDOW * patches.config.batch_size,
    )


def filled_items(
    samples: PackedDataset,
    place: tuple[str | int, ...],
    patches: PatchPlan,
    *,
    device: str,
    progress: bool,
    start: int = 0,
) -> Iterator[Item]:
    """The samples of a packed store, in order, with the dropped patches filled.

    Args:
        samples: delivers packed images.
        place: of the image in a sample.
        patches: names the reconstructor.
        device: where it runs.
        progress: show a bar.
        start: number of the first sample to be filled; a multiple of a window changes no batch.
    """
    target = resolve_device(device)
    try:
        with isolated():
            filler = Filler(patches, str(target))
            window: list[Any] = []
            with progress_bar(progress, total=len(samples), unit="img", description="filling") as bar:
                bar.update(start)
                for sample in samples if start == 0 else map(samples.__getitem__, range(start, len(samples))):
                    window.append(sample)
                    if len(window) == WINDOW * patches.config.batch_size:
                        yield from filler.samples(window, place)
                        bar.update(len(window))
                        window = []
                yield from filler.samples(window, place)
                bar.update(len(window))
            del filler
    finally:
        release_memory()


class Filler:
    """A reconstructor on its device, over images as they are stored.

    Args:
        patches: names the reconstructor.
        device: where it runs.
    """

    def __init__(self, patches: PatchPlan, device: str) -> None:
        if patches.reconstructor is None:
            raise PatchError('reconstruct="off" fills nothing')
        self._plan = patches
        self._model = patches.reconstructor.load(device)

    def fill(self, images: Tensor, mask: Tensor) -> Tensor:
        """Images uint8 [B, C, H, W] with patches `mask` bool [B, L] kept, filled; on the reconstructor's device."""
        model = self._model
        moved, kept = images.to(model.device), mask.to(model.device)
        return fill_pixels(model, moved, kept, self._plan.patch_size, model.mean, model.std)

    def samples(self, window: list[Any], place: tuple[str | int, ...]) -> Iterator[Item]:
        """The same samples with their images filled; images of one shape and number of patches share a batch."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, sample in enumerate(window):
            image: PatchedImage = at(sample, place)
            groups.setdefault((image.height, image.width, len(image.mode), image.num_kept), []).append(number)
        filled: dict[int, np.ndarray[Any, Any]] = {}
        for members in groups.values():
            size = self._plan.config.batch_size
            for start in range(0, len(members), size):
                chosen = members[start : start + size]
                pixels, masks = zip(*(unpack_image(at(window[number], place)) for number in chosen), strict=True)
                images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
                whole = self.fill(images, torch.from_numpy(np.stack(masks))).permute(0, 2, 3, 1).cpu().numpy()
                filled.update(zip(chosen, whole, strict=True))
        for number, sample in enumerate(window):
            yield with_value(sample, place, image_leaf(at(sample, place), filled[number])), None
