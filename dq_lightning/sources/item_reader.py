"""Reading the items of a dataset: what cannot be read is an error that names the item, or is stood for by its kind."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from dq_lightning.core.errors import ChangedError, SourceError, may_pass
from dq_lightning.identity.values import digest_of
from dq_lightning.sources.base import dataset_length
from dq_lightning.sources.items import at, evenly_spaced, image_leaves
from dq_lightning.sources.skipping import Unreadable

SPOT_CHECKS = 16
# positions among which a few that can be read are looked for
_SEARCHED = 256


class ItemReader(ABC):
    """Items by position, each read the one way.

    Args:
        dataset: what the user gave.

    Attributes:
        given: the same.
        dataset: what is delivered from.
        first: a sample that can be read, to learn the structure from.
    """

    skips = False
    """Whether items that can't be read are left out, so that they stop nothing that looks at the whole dataset."""

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
        """The plain item; any exception may leave it."""

    def path(self, index: int) -> str | None:
        """File that holds the sample, when there is one."""
        return None

    @contextmanager
    def explaining(self, index: int) -> Iterator[None]:
        """Give whatever is raised inside the name of the item, and the way out."""
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
            # Pillow opens files without decoding them: what is damaged shows here, where its name is known
            for leaf in image_leaves(item):
                image = at(item, leaf)
                if isinstance(image, Image.Image):
                    stream = getattr(image, "fp", None)
                    image.load()
                    # Pillow lets go of a file that the dataset opened, and with it of the bytes that packing keeps
                    if not getattr(stream, "closed", True):
                        image.fp = stream  # type: ignore[attr-defined]
            return item

    def _or_unreadable(self, error: SourceError) -> Unreadable:
        """What stands for an item that can't be read where those are left out."""
        if not self.skips or may_pass(error):
            raise error
        return Unreadable(type(error.__cause__ or error).__name__)

    def tried(self, index: int) -> Any:
        """The plain item, or what stands for one that can't be read where those are left out."""
        try:
            return self.plain(index)
        except SourceError as error:
            return self._or_unreadable(error)

    def digested(self, index: int) -> tuple[Any, str]:
        """The plain item and its digest, or what stands for one that can't be read."""
        try:
            item = self.plain(index)
        except SourceError as error:
            missing = self._or_unreadable(error)
            return missing, digest_of(missing)
        try:
            return item, digest_of(item)
        except SourceError:
            raise  # content that has no bytes: no fault of this one item
        except Exception as error:
            failure = error
        try:
            with self.explaining(index):
                raise failure
        except SourceError as error:
            missing = self._or_unreadable(error)
            return missing, digest_of(missing)

    def readable(self, index: Any, count: int) -> list[int]:
        """At most `count` evenly spaced ones of the positions `index`; only such as can be read where others are left out."""
        spread = [int(index[place]) for place in evenly_spaced(len(index), count)]
        if not self.skips:
            return spread
        more = [int(index[place]) for place in evenly_spaced(len(index), _SEARCHED)]
        found = (position for position in dict.fromkeys([*spread, *more]) if self._can_be_read(position))
        return list(itertools.islice(found, count))

    def _can_be_read(self, index: int) -> bool:
        return not isinstance(self.tried(index), Unreadable)

    def first_item(self, fits: Callable[[Any], object] = id) -> Any:
        """A plain item to learn the structure from: one for which `fits` raises nothing. Others are errors in their turn."""
        problems = []
        for index in (self.first, *evenly_spaced(len(self), SPOT_CHECKS)):
            try:
                item = self.plain(index)
                fits(item)
            except SourceError as error:
                problems.append(error)
            else:
                self.first = index
                return item
        raise problems[0]
