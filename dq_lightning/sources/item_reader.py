"""Reads the items of a dataset. An unreadable item raises an error that names it, or is replaced by an `Unreadable`."""

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from dq_lightning.core.errors import ChangedError, SourceError, may_pass
from dq_lightning.identity.values import digest_of
from dq_lightning.sources.base import Source, dataset_length
from dq_lightning.sources.items import at, evenly_spaced, image_leaves
from dq_lightning.sources.skipping import Unreadable

SAMPLED_ITEMS = 16
# Most positions that are tried to find a few readable items.
_MAX_TRIED = 256


class ItemReader(Source):
    """Reads items by position, and explains failures.

    Args:
        dataset: the dataset that the user passed.

    Attributes:
        given: the dataset that the user passed.
        dataset: the dataset that items are delivered from; it may have other transforms.
        first: position of a readable item that shows the structure of all items.
    """

    skips = False
    """Whether unreadable items are left out, so that they do not stop a pass over the whole dataset."""

    def __init__(self, dataset: Any) -> None:
        self.given = self.dataset = dataset
        self.first = 0
        self._length = dataset_length(dataset)

    def __len__(self) -> int:
        return self._length

    def describe(self) -> str:
        return f"{type(self.dataset).__name__} with {len(self):,} samples"

    @abstractmethod
    def read_plain(self, index: int) -> Any:
        """Read the plain item. The method may raise any exception."""

    @contextmanager
    def explaining(self, index: int) -> Iterator[None]:
        """Convert exceptions raised inside to errors that name the item and say what to do.

        Raises:
            SourceError: any exception other than `ChangedError` was raised inside.
        """
        try:
            yield
        except ChangedError:
            raise
        except Exception as error:
            place = self.path(index)
            skipping = "" if self.skips else ', or pass on_error="skip", which leaves out and counts all such items'
            raise SourceError(
                f"Item {index} of {self.describe()}{f' ({place})' if place else ''} can't be read: "
                f"{type(error).__name__}: {error}. Repair it, or leave it out with torch.utils.data.Subset{skipping}."
            ) from error

    def plain(self, index: int) -> Any:
        with self.explaining(index):
            item = self.read_plain(index)
            # Pillow opens files without decoding them. Decoding here reports damage while the item is known.
            for leaf in image_leaves(item):
                image = at(item, leaf)
                if isinstance(image, Image.Image):
                    stream = getattr(image, "fp", None)
                    image.load()
                    # `load` drops the reference to a file that the dataset opened, but packing needs its bytes.
                    if not getattr(stream, "closed", True):
                        image.fp = stream  # type: ignore[attr-defined]
            return item

    def _or_unreadable(self, error: SourceError) -> Unreadable:
        """The placeholder for an unreadable item; without `skips`, or if the failure may be temporary, raise it."""
        if not self.skips or may_pass(error):
            raise error
        return Unreadable(type(error.__cause__ or error).__name__)

    def plain_or_unreadable(self, index: int) -> Any:
        """The plain item, or with `skips` an `Unreadable` in place of an item that cannot be read.

        Raises:
            SourceError: the item cannot be read, and `skips` is not set or the failure may be temporary.
        """
        try:
            return self.plain(index)
        except SourceError as error:
            return self._or_unreadable(error)

    def plain_and_digest(self, index: int) -> tuple[Any, str]:
        """The plain item and its digest; with `skips`, an `Unreadable` takes the place of an unreadable item.

        Raises:
            SourceError: the item cannot be read, and `skips` is not set or the failure may be temporary; or the item
                holds a value of which no digest can be made.
        """
        item = self.plain_or_unreadable(index)
        try:
            return item, digest_of(item)
        except SourceError:
            raise  # No digest can be made of this type of value, which is no fault of this one item.
        except Exception as error:
            failure = error
        try:
            with self.explaining(index):
                raise failure
        except SourceError as error:
            missing = self._or_unreadable(error)
            return missing, digest_of(missing)

    def readable(self, index: Any, count: int) -> list[int]:
        """At most `count` evenly spaced positions out of `index`; with `skips`, only positions of readable items."""
        spread = [int(index[place]) for place in evenly_spaced(len(index), count)]
        if not self.skips:
            return spread
        more = [int(index[place]) for place in evenly_spaced(len(index), _MAX_TRIED)]
        candidates = dict.fromkeys([*spread, *more])
        found = (place for place in candidates if not isinstance(self.plain_or_unreadable(place), Unreadable))
        return list(itertools.islice(found, count))

    def first_item(self, fits: Callable[[Any], object] = id) -> Any:
        """A plain item that shows the structure of all items; other unreadable items are reported when they are read.

        Args:
            fits: function that raises `SourceError` for an item that does not have the structure.

        Raises:
            SourceError: none of the items that were tried can be read and fits.
        """
        problems = []
        for index in (self.first, *evenly_spaced(len(self), SAMPLED_ITEMS)):
            try:
                item = self.plain(index)
                fits(item)
            except SourceError as error:
                problems.append(error)
            else:
                self.first = index
                return item
        raise problems[0]
