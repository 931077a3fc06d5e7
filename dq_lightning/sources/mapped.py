"""Adapters for map-style datasets: any class with `__getitem__` and `__len__`, with its transforms as attributes."""

import copy
from dataclasses import replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dq_lightning.cache.digests import DigestMemory
from dq_lightning.core.errors import ChangedError, SourceError
from dq_lightning.core.libraries import is_library
from dq_lightning.identity.callables import is_untouched, patches_of
from dq_lightning.identity.values import digest_of
from dq_lightning.sources.base import Finisher, getter_owner
from dq_lightning.sources.finish import TransformFinisher
from dq_lightning.sources.items import plain_parts
from dq_lightning.sources.reading import ItemSource
from dq_lightning.sources.strip import (
    KEEP,
    copy_of_attributes,
    own_transforms,
    with_attributes,
    with_transforms,
    without_transforms,
)
from dq_lightning.sources.targets import Targets, as_targets
from dq_lightning.sources.traced import TRACED_SAMPLES, Trace, explain, same, trace


def getter_module(dataset: Any) -> str:
    """Name of the module that defines the dataset's `__getitem__`, which may be that of a base class."""
    owner = getter_owner(dataset)
    return "" if owner is None else owner.__module__


_DIGEST_BYTES = 8
CHANGED = "changed while it was read: start again when nothing writes to it any more. What was made of it was not kept"


def reads_as_installed(dataset: Any) -> bool:
    """Whether a dataset's class comes from a library, and neither the class nor Pillow was modified at run time."""
    opening: tuple[Any, ...] = (Image.open, Image.fromarray)
    return is_untouched(type(dataset)) and not patches_of(Image.Image) and all(map(is_library, opening))


class MapSource(ItemSource):
    """Adapter for any map-style dataset. Its identity is the digest of all plain items. The dataset is not changed.

    The columns and transforms are as in `as_source`; columns are keys or positions in an item.

    Raises:
        SourceError: the dataset is empty, or cannot be read without its transforms.
    """

    by_items = True

    def __init__(
        self,
        dataset: Any,
        image_column: str | None = None,
        label_column: str | None = None,
        transform: Any = KEEP,
        target_transform: Any = KEEP,
    ) -> None:
        super().__init__(dataset, image_column, label_column)
        self._read_digests: NDArray[np.uint8] | None = None
        self._name = type(dataset).__name__
        self._unread_dataset = copy_of_attributes(dataset)
        self.plain_dataset = without_transforms(dataset)
        self.dataset = with_transforms(dataset, self.plain_dataset, transform, target_transform, self._leaf_finisher)

    def describe(self) -> str:
        return f"{self._name} with {len(self):,} samples"

    def read_plain(self, index: int) -> Any:
        item = self.plain_dataset[index]
        noted = None if self._read_digests is None else self._read_digests[index]
        if noted is not None and noted.any() and noted.tobytes().hex() != digest_of(item)[: 2 * _DIGEST_BYTES]:
            raise ChangedError(f"item {index} of {self.describe()} {CHANGED}")
        return item

    def remember_digest(self, index: int, digest: str) -> None:
        if self._read_digests is None:
            self._read_digests = np.zeros((len(self), _DIGEST_BYTES), np.uint8)
        self._read_digests[index] = np.frombuffer(bytes.fromhex(digest)[:_DIGEST_BYTES], np.uint8)

    def unread(self) -> Self:
        if self._unread_dataset is None:
            return self
        fresh = copy.copy(self)
        fresh.given = fresh.dataset = self._unread_dataset
        fresh.plain_dataset = with_attributes(self._unread_dataset, own_transforms(self.plain_dataset))
        return fresh

    # The following methods apply the user's transforms.

    def _leaf_finisher(self, transform: Any, target_transform: Any) -> TransformFinisher:
        return TransformFinisher(transform, target_transform, self.image_leaf(), self.target_leaf())

    def finisher(self, index: Tensor) -> Finisher:
        added = getattr(self.dataset, "finisher", None)
        added = added if isinstance(added, TransformFinisher) else None
        now, neutral = own_transforms(self.dataset), own_transforms(self.plain_dataset)
        used = {name: value for name, value in now.items() if value is not None and value is not neutral.get(name)}
        calls_transforms = added is None and bool(used)
        traces = []
        for seed, position in enumerate(self.readable(index, TRACED_SAMPLES)):
            plain = self.plain(position)
            stored = plain_parts(plain)
            if not calls_transforms:
                traces.append(Trace(stored, delivered=plain))
                continue
            with self.explaining(position):
                traces.append(trace(self.dataset, used, position, stored, seed))
        if not calls_transforms and all(same(one.plain, one.delivered) for one in traces):
            return added or TransformFinisher()
        names = ", ".join(used) or "parts"
        try:
            found = explain(traces, [leaf for leaf in (self.image_place(), self.target_leaf()) if leaf is not None])
            return replace(found, added=added)
        except SourceError as error:
            raise SourceError(
                f"What {self.describe()} delivers can't be made from its plain items by its {names}: {error}. Use "
                "store='indices' (without drop_ratio), which reads through the dataset itself. Or let its __getitem__ put the "
                "item together, call its transform with parts of it, and deliver what comes out as it is"
            ) from error

    # The following methods give the targets and the identity.

    def listed_targets(self) -> Targets | None:
        names = getattr(self.plain_dataset, "classes", None)
        class_names = names if isinstance(names, list | tuple) and all(isinstance(one, str) for one in names) else None
        for attribute in ("targets", "labels", "_labels"):
            values = getattr(self.plain_dataset, attribute, None)
            if isinstance(values, list | tuple | np.ndarray | Tensor) and len(values) == len(self):
                targets = as_targets(values, class_names)
                if targets is not None:
                    return targets
        return None

    def plain_view(self) -> Any:
        return self.plain_dataset


class ArraySource(MapSource):
    """Adapter for datasets whose items are rows of arrays in memory (CIFAR, MNIST, TensorDataset).

    The identity is a digest of these arrays and of 16 items.
    """

    by_items = False

    def digest(self, memory: DigestMemory) -> str:
        # Classes and settings may read the same arrays differently, which the digest of a few items distinguishes.
        return digest_of("arrays", self.image_place(), arrays_of(self.plain_dataset), self.sample_digest())


def arrays_of(dataset: Any) -> list[Any] | None:
    """The arrays (data and targets) whose rows are the dataset's items; None where this is not certain."""
    module = getter_module(dataset)
    if module == "torch.utils.data.dataset" and type(getattr(dataset, "tensors", None)) is tuple:
        return list(dataset.tensors)
    data = getattr(dataset, "data", None)
    if not module.startswith("torchvision.datasets.") or not isinstance(data, np.ndarray | Tensor):
        return None
    if len(data) != len(dataset) or (isinstance(data, np.ndarray) and data.dtype.hasobject):
        return None
    targets = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if isinstance(targets, list):
        column = np.asarray(targets)
        targets = targets if column.dtype.hasobject else column
    return [data, targets]
