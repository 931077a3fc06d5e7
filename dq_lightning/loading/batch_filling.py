"""Fill dropped patches during training, batch by batch, on the device of the training (`reconstruct="batch"`).

Loaders deliver images with dropped patches together with their masks, and the batch-transfer hook fills the images.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dq_lightning.core.errors import ConfigError, PatchError
from dq_lightning.core.records import PatchedImage
from dq_lightning.packed.patches import unpack_image
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.pipeline.filling import Filler, stored_image
from dq_lightning.pipeline.patch_plan import PatchPlan
from dq_lightning.sources.items import at, parts, with_value
from dq_lightning.sources.strip import KEEP

# Keys of the dict that a loader process sends to the hook.
BATCH, MASKS = "dq_lightning_batch", "dq_lightning_masks"

Place = tuple[str | int, ...]


class UnfilledDataset(Dataset[Any]):
    """The samples of a store of patches, whose images are not filled: uint8 tensors [C, H, W].

    Dropped patches are in the mean colour. Each item is a dict with the sample under `BATCH` and the mask of its
    patches under `MASKS`: bool [L], True where a patch is kept. The samples are those of a packed store that delivers
    `PatchedImage` objects, and `place` leads to the image in each. The finisher, called with (position, sample),
    applies the user's target transform; it must not change the image.

    Raises:
        PatchError: the images differ in size.
    """

    def __init__(self, samples: PackedDataset, place: Place, finisher: Callable[[int, Any], Any] | None = None) -> None:
        if not samples.attributes.get("one_size"):
            raise PatchError(
                'reconstruct="batch" needs images of one size, because a batch is filled before any transform: use '
                'reconstruct="prepare", or let the dataset give images of one size'
            )
        self.samples, self.place, self.finisher = samples, place, finisher

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> dict[str, Any]:
        sample = self.samples[position]
        packed = stored_image(sample, self.place)
        if not isinstance(packed, PatchedImage):
            raise PatchError(
                f"sample {position} of {self.samples.path} was stored whole, because its image has another mode than RGB or L: "
                'use reconstruct="prepare", or let the dataset give all images as RGB (image.convert("RGB"))'
            )
        pixels, mask = unpack_image(packed)
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        sample = with_value(sample, self.place, image)
        if self.finisher is not None:
            sample = self.finisher(position, sample)
        return {BATCH: sample, MASKS: torch.from_numpy(mask)}


class UnfilledCollate:
    """Collate function for items of `UnfilledDataset`: it collates the samples inside the items and stacks their masks.

    Other items, such as those of a validation set, are collated as usual: by the given function, or by torch's own.
    `place` leads to the image in a sample.

    Raises:
        PatchError: the function changes the images or their order, so the masks would not fit them.
    """

    def __init__(self, place: Place, collate_fn: Callable[[list[Any]], Any] | None = None) -> None:
        self.place, self.collate_fn = place, collate_fn or default_collate

    def __call__(self, items: list[Any]) -> Any:
        if not is_unfilled(items[0]):
            return self.collate_fn(items)
        samples = [item[BATCH] for item in items]
        # The function may change its list.
        given = [at(sample, self.place) for sample in samples]
        collated = self.collate_fn(samples)
        if self.collate_fn is not default_collate:
            images = at(collated, find_images(collated, self.place))
            if len(images) != len(given) or not all(map(torch.equal, images, given)):
                raise PatchError(
                    "collate_fn= changes the images or their order, as MixUp, CutMix and sorting do, and with "
                    'reconstruct="batch" the dropped patches are filled after it, in the places that each image had before: '
                    'use reconstruct="prepare", or change the filled images in batch_transform='
                )
        return {BATCH: collated, MASKS: torch.stack([item[MASKS] for item in items])}


class BatchFiller:
    """Fills the images of a batch on their device, and then applies the user's batch transform to them.

    The reconstructor is loaded at the first batch, once in each process, and is left out when this object is pickled.

    Args:
        patches: patch plan that names the reconstructor.
        place: place of the image in a sample.
        batch_transform: function from filled uint8 images [B, C, H, W] on the device to the input of the training.
    """

    def __init__(self, patches: PatchPlan, place: Place, batch_transform: Callable[[Tensor], Any]) -> None:
        self.patches, self.place, self.batch_transform = patches, place, batch_transform
        self._filler: tuple[str, Filler] | None = None

    def __call__(self, batch: dict[str, Any]) -> Any:
        """Return the user's batch with its images filled and transformed.

        The batch, made by `UnfilledCollate`, is on the device: `BATCH` holds the collated samples, `MASKS` bool [B, L].

        Raises:
            PatchError: the images are not found in the batch.
        """
        inside = batch[BATCH]
        place = find_images(inside, self.place)
        images = at(inside, place)
        device = str(images.device)
        if self._filler is None or self._filler[0] != device:
            self._filler = device, Filler(self.patches, device)
        filled = self._filler[1].fill(images, batch[MASKS])
        return with_value(inside, place, self.batch_transform(filled))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_filler": None}


def check_batch_transform(batch_transform: Any, transform: Any, fills_late: bool) -> None:
    """Check that a batch transform is given if and only if images are filled by the batch (`fills_late`).

    Raises:
        ConfigError: the batch transform is missing, or it is given where it is not used, or there is a transform of
            single images, which could only run before the filling.
    """
    if fills_late and transform is not None and not (isinstance(transform, str) and transform == KEEP):
        raise ConfigError(
            'with reconstruct="batch" images are filled after the loader, and transform= would run before that: pass it as '
            "batch_transform="
        )
    if fills_late and batch_transform is None:
        raise ConfigError(
            'reconstruct="batch" fills the images on the device, after the loader, so the dataset\'s own transform cannot run '
            "before it: pass batch_transform=, a function of uint8 images [B, C, H, W] as of torchvision.transforms.v2, "
            'or use reconstruct="prepare"'
        )
    if batch_transform is not None and not fills_late:
        raise ConfigError(
            "batch_transform= is used only where dropped patches are filled during training (drop_ratio= and "
            'reconstruct="batch"): pass transform= in its place, or let the dataset transform its images'
        )


def is_unfilled(batch: Any) -> bool:
    """Whether an item or a batch comes from an `UnfilledDataset`."""
    return isinstance(batch, dict) and batch.keys() == {BATCH, MASKS}


def find_images(batch: Any, place: Place) -> Place:
    """Return the place of the images, uint8 [B, C, H, W], in a batch of collated samples.

    The place of the image in a sample is tried first. If the collate function changed the structure, the whole batch is
    searched.

    Raises:
        PatchError: the batch holds no such tensor, or several.
    """
    try:
        if _is_images(at(batch, place)):
            return place
    except (KeyError, IndexError, TypeError):
        pass  # The collate function changed the structure, so the images are searched below.
    found = [there for there, part in parts(batch) if _is_images(part)]
    if len(found) != 1:
        raise PatchError(
            f"the collate function gives {len(found)} tensors uint8 [B, C, H, W], so the images to fill are not known: let "
            "it stack the images of the samples and leave them uint8"
        )
    return found[0]


def _is_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 4
