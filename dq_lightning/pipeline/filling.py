"""The step "filling": run the reconstructor over the samples of a store, so that their dropped patches are filled."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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
from dq_lightning.core.sharing import Arrays, Job, Sharing, in_order
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
# A rank may fill so many windows before the leader has written the earlier ones, which it holds in memory meanwhile.
AHEAD = 2
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
        sharing=task.sharing,
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
    sharing: Sharing | None = None,
) -> None:
    """Write the samples of a store of patches as a packed store of whole images, with the dropped patches filled.

    The images are written as raw pixels. They take more space on the disk and are read faster by the loader, and the
    folder can be removed and made again. The digest of the store (`PackedDataset.digest`) is part of this entry's key.
    All files of the store are compared with it, so that no other store can be filled under this key. The shards keep
    finished samples, so that an interrupted run continues. `sharing` is how windows of samples are shared with other
    processes, which call `help_filling`.

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
            lambda start: filled_items(
                samples, place, patches, device=device, progress=progress, start=start, sharing=sharing
            ),
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
    sharing: Sharing | None = None,
) -> Iterator[Item]:
    """Yield the samples of a packed store, which delivers `PatchedImage` objects, with the dropped patches filled.

    The caller reads all of them inside `isolated`, so that random state and flags are those of other runs. This function
    cannot do so itself: a generator that is left unfinished would restore the random state whenever it is destroyed.

    `place` is the place of the image in a sample, and `start` the number of the first sample to fill. If it is a
    multiple of the window, `WINDOW * batch_size` samples, the batches are those of a run from the first sample.
    """
    try:
        windows = _Windows(samples, place, patches, resolve_devices(device), start)
        job = Job("filling", {"store": samples.digest, "start": start}, {}, len(windows), len(windows), ahead=AHEAD)
        filled_windows = (sharing or Sharing()).share(job, windows.filled, windows.unpacked, lambda _: 1)
        with progress_bar(progress, total=len(samples), unit="img", description="filling") as bar:
            bar.update(start)
            for window, filled in in_order(filled_windows):
                for number, sample in enumerate(window):
                    if number in filled:
                        sample = with_value(sample, place, image_leaf(at(sample, place), filled[number]))
                    yield sample, None
                bar.update(len(window))
        del windows, filled_windows
    finally:
        release_memory()


@contextmanager
def help_filling(
    patches: PatchPlan, find_store: Callable[[], Path | None], devices: list[str], job: Job, numbers: Iterator[int]
) -> Iterator[Iterator[Arrays]]:
    """Give some windows of filled images, in a `with` block, to a rank that fills the same store.

    `find_store` returns the folder of the store; None, and there are no windows, if it would come too late.
    """
    store = find_store()
    try:
        samples = None if store is None else PackedDataset(store, patches="packed")
        if samples is not None:
            samples.require(job.facts["store"])
    except StoreError:
        samples = None
    if samples is None:
        yield iter(())
        return
    try:
        with isolated():
            windows = _Windows(samples, stored_place(samples), patches, resolve_devices(devices), job.facts["start"])
            yield map(windows.packed, windows.filled(numbers))
            del windows
    finally:
        release_memory()


# A window, and the filled images of its samples by their number in it.
_Filled = tuple[list[Any], dict[int, np.ndarray[Any, Any]]]


class _Windows:
    """The samples of a store from number `start` on, in windows that are filled one by one."""

    def __init__(
        self,
        samples: PackedDataset,
        place: tuple[str | int, ...],
        patches: PatchPlan,
        devices: list[torch.device],
        start: int,
    ) -> None:
        self._samples, self._place, self._start = samples, place, start
        self._size = WINDOW * patches.config.batch_size
        filler = Filler(patches, str(devices[0]))
        fillers = [filler, *(filler.replica(device) for device in devices[1:])]
        self._replicas = [(one, partial(_fill_window, two, place)) for one, two in zip(devices, fillers, strict=True)]

    def __len__(self) -> int:
        return -(-(len(self._samples) - self._start) // self._size)

    def _window(self, number: int) -> list[Any]:
        first = self._start + number * self._size
        return [self._samples[i] for i in range(first, min(first + self._size, len(self._samples)))]

    def filled(self, numbers: Iterator[int]) -> Iterator[tuple[int, _Filled]]:
        """Yield the numbered windows with their filled images, after their numbers."""
        yield from run_in_order(self._replicas, ((number, self._window(number)) for number in numbers))

    def packed(self, result: tuple[int, _Filled]) -> Arrays:
        """Return the filled images as arrays, without the samples."""
        number, (_, filled) = result
        pixels = [image.reshape(-1) for image in filled.values()]
        return {
            "piece": np.array(number),
            "numbers": np.array(list(filled), np.int64),
            "pixels": np.concatenate([np.empty(0, np.uint8), *pixels]),
        }

    def unpacked(self, arrays: Arrays) -> tuple[int, _Filled]:
        """Return what `packed` made arrays of."""
        number, filled, end = int(arrays["piece"]), dict[int, np.ndarray[Any, Any]](), 0
        window = self._window(number)
        for one in arrays["numbers"].tolist():
            image = stored_image(window[one], self._place)
            assert isinstance(image, PatchedImage)
            shape = (image.height, image.width, len(image.mode))
            begin, end = end, end + math.prod(shape)
            filled[one] = arrays["pixels"][begin:end].reshape(shape)
        return number, (window, filled)


def _fill_window(
    filler: "Filler", place: tuple[str | int, ...], numbered: tuple[int, list[Any]]
) -> tuple[int, _Filled]:
    number, window = numbered
    return number, (window, filler.pixels(window, place))


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
