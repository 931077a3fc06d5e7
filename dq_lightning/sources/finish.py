"""From the plain item to what the dataset delivers: the user's transforms alone, without the data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_lightning.core.errors import SourceError
from dq_lightning.core.isolation import isolated_random_state
from dq_lightning.identity.values import digest_of
from dq_lightning.sources.hub_formats import tensor_format
from dq_lightning.sources.items import Leaf, at, with_value


@dataclass(frozen=True)
class TransformFinisher:
    """Applies transforms to the leaves of a plain item.

    Attributes:
        transform: of the image leaf, or of the whole item when `image` is empty.
        target_transform: of the target leaf.
        image: leaf of the image.
        target: leaf of the target.
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
class BatchFinisher:
    """Applies a Hugging Face `set_transform` function, which takes and gives a dict of lists.

    Attributes:
        transform: the function.
        columns: the columns it sees; None for all.
        others: whether the other columns are delivered too.
    """

    transform: Callable[[dict[str, list[Any]]], Mapping[str, Sequence[Any]]]
    columns: tuple[str, ...] | None = None
    others: bool = False

    def __call__(self, position: int, plain_item: Any) -> Any:
        seen = {k: [v] for k, v in plain_item.items() if self.columns is None or k in self.columns}
        made = {key: values[0] for key, values in self.transform(seen).items()}
        if self.others:
            made |= {k: v for k, v in plain_item.items() if k not in (self.columns or plain_item)}
        return made


@dataclass(frozen=True)
class FormatFinisher:
    """Applies a Hugging Face `set_format` (torch, numpy, ...) to one row.

    Attributes:
        kind: the format's name.
        settings: its keyword arguments, sorted pairs.
        columns: the columns that are formatted; None for all.
        others: whether the other columns are delivered too, unformatted.
    """

    kind: str
    settings: tuple[tuple[str, Any], ...] = ()
    columns: tuple[str, ...] | None = None
    others: bool = False

    def __call__(self, position: int, plain_item: Any) -> Any:
        seen = {k: v for k, v in plain_item.items() if self.columns is None or k in self.columns}
        made = tensor_format(self.kind, dict(self.settings))(seen)
        if self.others:
            made |= {k: v for k, v in plain_item.items() if k not in (self.columns or plain_item)}
        return made


@dataclass(frozen=True)
class ConcatFinisher:
    """One finisher for each part of a concatenation.

    Attributes:
        finishers: of the parts.
        part: int64 [M], the part that each position of the index comes from.
        place: int64 [M], the position in that part's own index.
    """

    finishers: tuple[Any, ...]
    part: NDArray[np.int64]
    place: NDArray[np.int64]

    def __call__(self, position: int, plain_item: Any) -> Any:
        return self.finishers[int(self.part[position])](int(self.place[position]), plain_item)


def check_finisher(
    finisher: Any,
    plain: Callable[[int], Any],
    delivered: Callable[[int], Any],
    indices: Sequence[int],
    name: str,
) -> None:
    """Compare what a finisher makes of plain items with what the dataset delivers, under the same seeds.

    For finishers whose place is known from the library that applies the transform. A transform that does not repeat under
    equal seeds (it has a generator of its own) can't be compared, and need not.

    Raises:
        SourceError: they differ.
    """

    def seeded(call: Callable[[], Any], seed: int) -> str:
        with isolated_random_state(seed):
            return digest_of(call())

    for seed, index in enumerate(indices):
        wanted = {seeded(partial(delivered, index), seed) for _ in range(2)}
        if len(wanted) == 1 and seeded(lambda index=index: finisher(0, plain(index)), seed) not in wanted:  # type: ignore[misc]
            raise SourceError(
                f"What {name} delivers can't be made from its plain items by its format or transform, so a self-contained copy "
                "would give other items. Use store='indices', which reads through the dataset itself."
            )
