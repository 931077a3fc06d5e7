"""From the plain item to what the dataset delivers: the user's transforms alone, without the data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_lightning.errors import SourceError
from dq_lightning.randomness import isolated_random_state
from dq_lightning.sources.items import Leaf, at, digest_of, with_value

_SEED = 20260


def identity(value: Any) -> Any:
    """What stands where a class calls its transform even when there is none."""
    return value


def pair_identity(*values: Any) -> Any:
    """The same for joint transforms of image and target."""
    return values if len(values) != 1 else values[0]


@dataclass(frozen=True)
class TransformFinisher:
    """Applies transforms to the leaves of a plain item.

    Attributes:
        transform: of the image leaf, or of the whole item when `image` is empty.
        target_transform: of the target leaf.
        transforms: joint, called with the parts of the item; the two others are then not applied.
        image: leaf of the image.
        target: leaf of the target.
    """

    transform: Callable[[Any], Any] | None = None
    target_transform: Callable[[Any], Any] | None = None
    transforms: Callable[..., Any] | None = None
    image: Leaf = ()
    target: Leaf | None = None

    def __call__(self, position: int, plain_item: Any) -> Any:
        if self.transforms is not None:
            return self.transforms(*plain_item) if isinstance(plain_item, tuple) else self.transforms(plain_item)
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
        from dq_lightning.sources.hub import tensor_format

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


def _seeded(call: Callable[[], Any]) -> Any:
    with isolated_random_state(_SEED):
        return digest_of(call())


def choose_finisher(
    candidates: Sequence[Any],
    plain: Callable[[int], Any],
    delivered: Callable[[int], Any],
    indices: list[int],
    name: str,
) -> Any:
    """The first candidate that makes, from plain items, what the dataset delivers.

    Each is tried on a few items with the random state reset, so that random transforms draw alike. A dataset that delivers
    another item each time all the same can't be checked, and the first candidate is taken.

    Raises:
        SourceError: none does.
    """
    wanted = {index: _seeded(lambda index=index: delivered(index)) for index in indices}  # type: ignore[misc]
    if any(_seeded(lambda index=index: delivered(index)) != wanted[index] for index in indices):  # type: ignore[misc]
        return candidates[0]
    for candidate in candidates:
        try:
            same = (_seeded(lambda i=i: candidate(0, plain(i))) == digest for i, digest in wanted.items())  # type: ignore[misc] # noqa: B023
            if all(same):
                return candidate
        except Exception:
            continue  # a wrong guess of where the transform belongs may fail in any way
    raise SourceError(
        f"What {name} delivers can't be made from its plain items by its transform attributes, so a self-contained copy "
        "would give other items. Use store='indices', which reads through the dataset itself."
    )
