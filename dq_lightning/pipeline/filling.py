"""The step "filling": run the reconstructor over the samples of a store, so that their dropped patches are filled."""

import copy
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dq_lightning.cache.entries import require_space
from dq_lightning.cache.shards import KeptShards
from dq_lightning.core.batching import HalvedBatches
from dq_lightning.core.console import progress_bar
from dq_lightning.core.devices import DeviceNames, resolve_devices
from dq_lightning.core.errors import PatchError, StoreError
from dq_lightning.core.isolation import isolated, release_memory
from dq_lightning.core.records import PatchedImage
from dq_lightning.core.replicas import run_in_order
from dq_lightning.packed.patches import image_leaf, unpack_image
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.packed.writer import Item, write_packed
from dq_lightning.patches.fill import fill_pixels
from dq_lightning.pipeline.compact import Compact
from dq_lightning.pipeline.patch_plan import PatchPlan
from dq_lightning.pipeline.step import Task
from dq_lightning.sources.items import at, with_value

# Number of batches of samples that are read before they are grouped: images of one size and number of patches share a
# batch.
WINDOW = 8
MEASURED_SAMPLES = 64


def make_filled(task: Task, compact: Compact) -> None:
    """Write the entry of the filled images of a store of patches; errors are those of `write_filled`."""
    assert task.plan.patches is not None
    write_filled(
        task.folder,
        Path(compact.info.path),
        task.parts["store"],
        task.plan.patches,
        device=list(task.devices),
        progress=task.progress,
        shards=task.shards("filling"),
    )


def write_filled(
    folder: Path,
    store: Path,
    digest: str,
    patches: PatchPlan,
    *,
    device: DeviceNames,
    progress: bool,
    shards: KeptShards,
) -> None:
    """Write the samples of a store of patches as a packed store of whole images, with the dropped patches filled.

    The images are written as raw pixels. They take more space on the disk and are read faster by the loader, and the
    folder can be removed and made again. The digest of the store (`PackedDataset.digest`) is part of this entry's key.
    All files of the store are compared with it, so that no other store can be filled under this key. The shards keep
    finished samples, so that an interrupted run continues.

    Raises:
        StoreError: the store is damaged, or its digest is another one.
        CacheError: the disk has too little space.
    """
    samples = PackedDataset(store, patches="packed", verify="hash")
    samples.require(digest)
    place = stored_place(samples)
    require_space(folder, sum(_filled_bytes(stored_image(sample, place)) for sample in samples))
    shards.made_from = digest
    with isolated():
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
    device: DeviceNames,
    progress: bool,
    start: int = 0,
) -> Iterator[Item]:
    """Yield the samples of a packed store, which delivers `PatchedImage` objects, with the dropped patches filled.

    The caller reads all of them inside `isolated`, so that random state and flags are those of other runs. This function
    cannot do so itself: a generator that is left unfinished would restore the random state whenever it is destroyed.

    `place` is the place of the image in a sample, and `start` the number of the first sample to fill. If it is a
    multiple of the window, `WINDOW * batch_size` samples, the batches are those of a run from the first sample.
    """
    devices = resolve_devices(device)
    try:
        filler = Filler(patches, str(devices[0]))
        fillers = [filler, *(filler.replica(device) for device in devices[1:])]
        replicas = [(one, partial(_fill_window, two, place)) for one, two in zip(devices, fillers, strict=True)]
        rest = samples if start == 0 else map(samples.__getitem__, range(start, len(samples)))
        with progress_bar(progress, total=len(samples), unit="img", description="filling") as bar:
            bar.update(start)
            for window, filled in run_in_order(replicas, _windows(rest, WINDOW * patches.config.batch_size)):
                for number, sample in enumerate(window):
                    if number in filled:
                        sample = with_value(sample, place, image_leaf(at(sample, place), filled[number]))
                    yield sample, None
                bar.update(len(window))
        del filler, fillers, replicas
    finally:
        release_memory()


def _windows(samples: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(samples)
    while window := list(islice(rest, size)):
        yield window


def _fill_window(
    filler: "Filler", place: tuple[str | int, ...], window: list[Any]
) -> tuple[list[Any], dict[int, np.ndarray[Any, Any]]]:
    return window, filler.pixels(window, place)


def stored_place(samples: PackedDataset) -> tuple[str | int, ...]:
    """Return the place of the image in the samples of a store of patches: the keys and positions that lead to it.

    Raises:
        StoreError: the store does not say where its images are.
    """
    place = samples.attributes.get("image_place")
    if not isinstance(place, list) or not all(type(part) in (str, int) for part in place):
        raise StoreError(f"{samples.path} does not say where its images are ({place!r:.80}): copy it again")
    return tuple(place)


def stored_image(
    sample: Any, place: tuple[str | int, ...]
) -> PatchedImage | Image.Image | Tensor | np.ndarray[Any, Any]:
    """Return the stored image of a sample: its patches, or the whole image if it could not be cut into patches.

    Raises:
        StoreError: there is no image at this place.
    """
    try:
        image = at(sample, place)
    except (LookupError, TypeError) as error:
        raise StoreError(f"a sample has no image at {place!r:.80}, where its store says it is") from error
    if not isinstance(image, PatchedImage | Image.Image | Tensor | np.ndarray):
        raise StoreError(f"a sample holds a {type(image).__name__} at {place!r:.80}, where its store says the image is")
    return image


class Filler:
    """Fills the dropped patches of stored images with the reconstructor of a patch plan, loaded on a device.

    Raises:
        PatchError: the plan has no reconstructor, because its setting is `reconstruct="off"`.
    """

    def __init__(self, patches: PatchPlan, device: str) -> None:
        if patches.reconstructor is None:
            raise PatchError('reconstruct="off" fills nothing')
        self._plan = patches
        self._model = patches.reconstructor.load(device)
        self._halved = HalvedBatches("filling", PatchError)

    def fill(self, images: Tensor, mask: Tensor, patch_size: int | None = None) -> Tensor:
        """Fill the dropped patches of a batch of images.

        Args:
            images: uint8 [B, C, H, W]; the content of the dropped patches does not matter.
            mask: bool [B, L], True where a patch is kept.
            patch_size: side of a patch in pixels; None uses the patch size of the plan.

        Returns:
            The filled images, uint8 [B, C, H, W], on the reconstructor's device.

        Raises:
            PatchError: one image alone exceeds the GPU's memory.
        """
        model, size = self._model, patch_size or self._plan.patch_size
        fill = partial(fill_pixels, model, patch_size=size, mean=model.mean, std=model.std)
        return self._halved.run(fill, images.to(model.device), mask.to(model.device))

    def replica(self, device: torch.device) -> "Filler":
        """Return a filler with a reconstructor of its own on another device."""
        twin = copy.copy(self)
        twin._model = copy.deepcopy(self._model).to(device)
        twin._halved = HalvedBatches("filling", PatchError)
        return twin

    def pixels(self, window: list[Any], place: tuple[str | int, ...]) -> dict[int, np.ndarray[Any, Any]]:
        """Return the filled images of some samples, uint8 [H, W, C], by the number of the sample among them.

        Images of one shape and number of kept patches share a batch. An image that was stored whole is not among them.

        Args:
            window: samples with packed images.
            place: place of the image in a sample.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, sample in enumerate(window):
            image = stored_image(sample, place)
            if isinstance(image, PatchedImage):
                facts = (image.height, image.width, len(image.mode), image.num_kept, image.patch_size)
                groups.setdefault(facts, []).append(number)
        filled: dict[int, np.ndarray[Any, Any]] = {}
        for (*_, patch_size), members in groups.items():
            size = self._plan.config.batch_size
            for start in range(0, len(members), size):
                chosen = members[start : start + size]
                pixels, masks = zip(*(unpack_image(at(window[number], place)) for number in chosen), strict=True)
                images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
                whole = self.fill(images, torch.from_numpy(np.stack(masks)), patch_size)
                filled.update(zip(chosen, whole.permute(0, 2, 3, 1).cpu().numpy(), strict=True))
        return filled


def _filled_bytes(image: Any) -> int:
    if isinstance(image, PatchedImage):
        return image.height * image.width * len(image.mode)
    return int(np.asarray(image).nbytes)
