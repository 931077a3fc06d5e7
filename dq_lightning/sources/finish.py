"""Finishers, which turn plain items into delivered items. They hold the user's transforms, but no data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_lightning.sources.items import Leaf, at, with_value


@dataclass(frozen=True)
class TransformFinisher:
    """Applies transforms to the image and the target of a plain item.

    Attributes:
        transform: transform of the image, or of the whole item when `image` is empty; None for no transform.
        target_transform: transform of the target; None for no transform.
        image: path to the image inside the item.
        target: path to the target inside the item; None when there is no target.
    """

    transform: Callable[[Any], Any] | None = None
    target_transform: Callable[[Any], Any] | None = None
    image: Leaf = ()
    target: Leaf | None = None

    def __call__(self, position: int, plain_item: Any) -> Any:
        item = plain_item
        if self.transform is not None:
            item = with_value(item, self.image, self.transform(at(item, self.image)))
        if self.target_transform is not None and self.target is not None:
            item = with_value(item, self.target, self.target_transform(at(item, self.target)))
        return item


@dataclass(frozen=True)
class HubFinisher:
    """Applies the format of a Hugging Face dataset to one row.

    Attributes:
        kind: name of the format (torch, numpy, ...), `"custom"` for a function of `set_transform`, or None for a choice
            of columns alone.
        settings: keyword arguments of the format; for `"custom"` the function, which takes and returns a dict of lists.
        columns: names of the columns that the format applies to; None for all.
        others: whether the other columns are delivered too, unchanged.
    """

    kind: str | None
    settings: Mapping[str, Any]
    columns: tuple[str, ...] | None = None
    others: bool = False

    def __call__(self, position: int, plain_item: Any) -> Any:
        columns = tuple(plain_item) if self.columns is None else self.columns
        row = {name: value for name, value in plain_item.items() if name in columns}
        if self.kind == "custom":
            batch = self.settings["transform"]({name: [value] for name, value in row.items()})
            row = {name: values[0] for name, values in batch.items()}
        elif self.kind is not None:
            from datasets.formatting import get_formatter

            formatter: Any = get_formatter(self.kind, **self.settings)
            row = formatter.recursive_tensorize(row)
        if self.others:
            row |= {name: value for name, value in plain_item.items() if name not in columns}
        return row


@dataclass(frozen=True)
class ConcatFinisher:
    """Applies to each sample of a concatenation the finisher of the part that the sample comes from.

    Attributes:
        finishers: one finisher for each part; None for parts without a sample in the index.
        part: int64 [M], number of the part that each sample of the index comes from.
        place: int64 [M], position of each sample in the index of its part.
    """

    finishers: tuple[Any, ...]
    part: NDArray[np.int64]
    place: NDArray[np.int64]

    def __call__(self, position: int, plain_item: Any) -> Any:
        return self.finishers[int(self.part[position])](int(self.place[position]), plain_item)
