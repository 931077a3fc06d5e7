"""Adapters for torch's `Subset` and `ConcatDataset`, which contain other datasets."""

import copy
from abc import abstractmethod
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from dq_lightning.cache.digests import DigestMemory
from dq_lightning.core.records import EncodedImage
from dq_lightning.identity.datasets import Parts
from dq_lightning.identity.values import digest_of
from dq_lightning.sources.base import Finisher, Positions, positions_of
from dq_lightning.sources.finish import ConcatFinisher
from dq_lightning.sources.items import Leaf
from dq_lightning.sources.pixels import needs_scale, to_rgb
from dq_lightning.sources.reading import ItemSource
from dq_lightning.sources.targets import Targets, join


class NestedSource(ItemSource):
    """Base class of sources whose items are those of other sources."""

    @abstractmethod
    def place(self, index: int) -> tuple[ItemSource, int]:
        """The source that holds a sample, and the position of the sample in it."""

    def read_plain(self, index: int) -> Any:
        source, position = self.place(index)
        return source.read_plain(position)

    def read_image(self, index: int) -> Any:
        source, position = self.place(index)
        return source.read_image(position)

    def read_target(self, index: int) -> Any:
        source, position = self.place(index)
        return source.read_target(position)

    def target_names(self) -> tuple[str, ...] | None:
        return self.place(0)[0].target_names()

    def path(self, index: int) -> str | None:
        source, position = self.place(index)
        return source.path(position)

    def decode_problem(self, index: int) -> str | None:
        source, position = self.place(index)
        return source.decode_problem(position)

    def encoded(self, index: int) -> EncodedImage | None:
        source, position = self.place(index)
        return source.encoded(position)

    def sample_id(self, index: int) -> str:
        source, position = self.place(index)
        return source.sample_id(position)

    def remember_digest(self, index: int, digest: str) -> None:
        source, position = self.place(index)
        source.remember_digest(position, digest)


class SubsetSource(NestedSource):
    """Adapter for a `Subset`: some samples of the source of another dataset, in the order of its indices."""

    def __init__(self, dataset: Any, inner: ItemSource) -> None:
        index = positions_of(dataset)
        # Negative indices count from the end, as they do in the inner dataset.
        self.positions = Positions(np.where(index < 0, index + len(dataset.dataset), index))
        same = inner.dataset is dataset.dataset
        super().__init__(
            dataset if same else Subset(inner.dataset, self.positions), inner.image_column, inner.label_column
        )
        self.inner = inner
        inner.first = self.positions[0]
        self.trusts_list = inner.trusts_list

    def describe(self) -> str:
        return f"{len(self):,} samples of {self.inner.describe()}"

    def unread(self) -> Self:
        fresh = copy.copy(self)
        fresh.inner = self.inner.unread()
        fresh.given = fresh.dataset = Subset(fresh.inner.dataset, self.positions)
        return fresh

    def place(self, index: int) -> tuple[ItemSource, int]:
        return self.inner, self.positions[index]

    def image_leaf(self) -> Leaf:
        return self.inner.image_leaf()

    def target_leaf(self) -> Leaf | None:
        return self.inner.target_leaf()

    def finisher(self, index: Tensor) -> Finisher:
        return self.inner.finisher(torch.from_numpy(self.positions.array[np.asarray(index, dtype=np.int64)]))

    def believe_list(self) -> None:
        self.inner.believe_list()

    def listed_targets(self) -> Targets | None:
        listed = self.inner.listed_targets()
        return listed.take(self.positions.array) if listed is not None else None

    @property
    def by_items(self) -> bool:  # type: ignore[override]
        return self.inner.by_items

    def plain_view(self) -> Any:
        return Parts([self.inner.plain_view(), self.positions.array])

    def marks(self, *, fresh: bool) -> str:
        return super().marks(fresh=fresh) or self.inner.marks(fresh=fresh)

    def digest(self, memory: DigestMemory) -> str:
        if self.by_items:
            return super().digest(memory)  # Items outside of the subset need not be readable.
        return digest_of("subset", self.inner.digest(memory), self.positions.array)


def filled_parts(dataset: Any) -> list[Any]:
    """The datasets of a concatenation that are not empty."""
    return [part for part in dataset.datasets if len(part)]


class ConcatSource(NestedSource):
    """Adapter for a `ConcatDataset`: the sources of its datasets that are not empty, one after the other."""

    def __init__(self, dataset: Any, parts: list[ItemSource]) -> None:
        self.parts = parts
        same = all(part.dataset is given for part, given in zip(parts, filled_parts(dataset), strict=True))
        whole = dataset if same else ConcatDataset([part.dataset for part in parts])
        super().__init__(whole, parts[0].image_column, parts[0].label_column)
        self._ends = np.cumsum([len(part) for part in parts])
        self.trusts_list = all(part.trusts_list for part in parts)

    def describe(self) -> str:
        return f"{len(self):,} samples of " + " + ".join(part.describe() for part in self.parts)

    def unread(self) -> Self:
        fresh = copy.copy(self)
        fresh.parts = [part.unread() for part in self.parts]
        fresh.given = fresh.dataset = ConcatDataset([part.dataset for part in fresh.parts])
        return fresh

    def place(self, index: int) -> tuple[ItemSource, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part], index - (int(self._ends[part - 1]) if part else 0)

    def read_image(self, index: int) -> Any:
        part, place = self.place(index)
        part.image_leaf()
        leaf = part.read_image(place)
        # The parts may differ in the range of their pixel values, so each uses its own scale.
        return to_rgb(leaf, part.scale()) if needs_scale(leaf) else leaf

    def sample_id(self, index: int) -> str:
        part, place = self.place(index)
        # The number of the part is included, because two folders may hold the same relative path.
        return f"{self.parts.index(part)}/{part.sample_id(place)}"

    def finisher(self, index: Tensor) -> Finisher:
        positions = np.asarray(index, dtype=np.int64)
        part = np.searchsorted(self._ends, positions, side="right").astype(np.int64)
        starts = np.concatenate([[0], self._ends[:-1]])
        place = np.zeros(len(positions), np.int64)
        finishers: list[Finisher | None] = []
        for number, source in enumerate(self.parts):
            mine = np.flatnonzero(part == number)
            place[mine] = np.arange(len(mine))
            inside = torch.from_numpy(positions[mine] - starts[number])
            finishers.append(source.finisher(inside) if len(mine) else None)
        return ConcatFinisher(tuple(finishers), part, place)

    def listed_targets(self) -> Targets | None:
        return join([part.listed_targets() for part in self.parts])

    def targets(self) -> Targets | None:
        return join([part.targets() for part in self.parts])

    @property
    def by_items(self) -> bool:  # type: ignore[override]
        return any(part.by_items for part in self.parts)

    def plain_view(self) -> Any:
        return Parts([part.plain_view() for part in self.parts])

    def marks(self, *, fresh: bool) -> str:
        return " ".join(part.marks(fresh=fresh) for part in self.parts)

    def digest(self, memory: DigestMemory) -> str:
        return digest_of("concat", [part.digest(memory) for part in self.parts])

    def quick_digest(self, memory: DigestMemory) -> str | None:
        known = [part.quick_digest(memory) for part in self.parts]
        return None if None in known else digest_of("concat", known)

    @property
    def identity_is_certain(self) -> bool:
        return all(part.identity_is_certain for part in self.parts)
