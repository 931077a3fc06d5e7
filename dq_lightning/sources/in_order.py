"""The adapter for streams: datasets that are read from front to back, and have neither positions nor a known length.

A stream is seen as a map-style dataset whose items are cheap to read in ascending order. Going back to an earlier item
starts a new pass. The first pass records a digest and the class of every item, and so finds the length and the identity
of the data; every later pass compares its items with these digests, because a stream that is shuffled, or changes, would
give other samples than those that were chosen.
"""

import contextlib
import copy
import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dq_lightning.cache.digests import DigestMemory
from dq_lightning.core.console import progress_bar
from dq_lightning.core.errors import ChangedError, SourceError
from dq_lightning.core.isolation import isolated_random_state
from dq_lightning.core.records import EncodedImage
from dq_lightning.identity.datasets import State, find_state
from dq_lightning.identity.values import digest_of
from dq_lightning.sources.items import Leaf, children, evenly_spaced
from dq_lightning.sources.mapped import MapSource
from dq_lightning.sources.reading import load_images
from dq_lightning.sources.skipping import Unreadable
from dq_lightning.sources.strip import KEEP, TRANSFORM_NAMES, own_transforms, with_attributes
from dq_lightning.sources.targets import Targets, as_targets, target_of
from dq_lightning.sources.text import TextRows

logger = logging.getLogger("dq_lightning")

# The first items stay in memory. All that has to be known before a long pass is found out from them.
HEAD_ITEMS, HEAD_BYTES = 64, 64 << 20
DIGEST_BYTES = 8
_REPEAT = (
    "A stream must give the same items in the same order in each pass: take shuffles out (no .shuffle(), shardshuffle=False), "
    "sort its list of files, and seed what is random anew in each __iter__. The loader of the compact set shuffles in "
    "training"
)


class _EndError(Exception):
    """The stream has no item at this position."""


class Rows:
    """How the rows of a stream are read, and what is made of one. This class is for torch's `IterableDataset`.

    A row is what the stream yields; an item is what the dataset delivers without the user's transforms.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def open(self, transforms: dict[str, Any]) -> Iterator[Any]:
        """Start a pass over the rows, with other values of the stream's attributes for transforms."""
        return iter(self.bare(transforms))

    def bare(self, transforms: dict[str, Any]) -> Any:
        """The stream with other transforms; the stream itself where they are its own."""
        own = own_transforms(self.stream)
        return self.stream if own == transforms else with_attributes(self.stream, transforms)

    def item(self, row: Any) -> Any:
        """The item of a row."""
        return row

    def content(self, row: Any) -> Any:
        """What the digest of a row covers."""
        return load_images(row)

    def digest(self, content: Any) -> bytes:
        """The digest of what a row holds, 32 bytes; that of the same item of a map-style dataset."""
        return bytes.fromhex(digest_of(content))

    def encoded(self, row: Any) -> EncodedImage | None:
        """The encoded bytes of the image of a row, or None."""
        return None


class Record:
    """What the first pass found.

    Attributes:
        length: number of items; None while the first pass has not come to its end.
        recalled: digest and length that are remembered from an earlier run, or None.
        remembered: keys under which this run has remembered them.
    """

    def __init__(self) -> None:
        self.length: int | None = None
        self.recalled: tuple[str, int] | None = None
        self.remembered: set[str] = set()
        self._short = bytearray()
        self._hash: Any = None
        self._first: list[bytes] = []
        self._leaf: Leaf | None = None
        self._values: list[Any] = []
        self._same: dict[Any, Any] = {}

    @property
    def count(self) -> int:
        """Number of items that the first pass has read so far."""
        return len(self._short) // DIGEST_BYTES

    @property
    def has_begun(self) -> bool:
        """Whether `begin` was called."""
        return self._hash is not None

    def begin(self, place: Leaf | None, leaf: Leaf | None, head: Iterable[Any]) -> None:
        """Say where image and target are; `head` are the first items, whose digests are recorded already."""
        self._hash = hashlib.sha256(repr(place).encode())
        for digest in self._first:
            self._hash.update(digest)
        self._leaf = leaf
        for item in head:
            self._add_value(item)

    def digests(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The first bytes of the digests of items that were read, uint8 [stop - start, 8]."""
        part = self._short[DIGEST_BYTES * start : DIGEST_BYTES * stop]
        return np.frombuffer(part, np.uint8).reshape(-1, DIGEST_BYTES)

    def note(self, position: int, digest: bytes, row: Any, name: str) -> None:
        """Record a row at the front of the first pass, or compare one of a later pass.

        Raises:
            ChangedError: the row is another one than in the first pass.
        """
        if position < self.count:
            place = DIGEST_BYTES * position
            if self._short[place : place + DIGEST_BYTES] != digest[:DIGEST_BYTES]:
                raise ChangedError(
                    f"item {position:,} of {name} is another one in this pass than in the first. {_REPEAT}"
                )
            return
        if self.length is not None:
            raise ChangedError(
                f"{name} had {self.length:,} items in the first pass and gives more in this one. {_REPEAT}"
            )
        self._short += digest[:DIGEST_BYTES]
        if self._hash is None:
            self._first.append(digest)
        else:
            self._hash.update(digest)
            self._add_value(row)

    def end(self, count: int, name: str) -> None:
        """Note that a pass has ended after so many items.

        Raises:
            ChangedError: the first pass gave more items.
        """
        if count < self.count:
            raise ChangedError(f"{name} ends after {count:,} items in this pass, and gave more before. {_REPEAT}")
        self.length = count

    def found(self, names: Any) -> tuple[str, Targets | None]:
        """The digest of all items and their targets, once the first pass has come to its end."""
        values = self._values
        known = next((value for value in values if not isinstance(value, Unreadable)), None)
        return self._hash.copy().hexdigest(), as_targets(
            [known if isinstance(value, Unreadable) else value for value in values], names
        )

    def _add_value(self, item: Any) -> None:
        value = item if isinstance(item, Unreadable) else target_of(item, self._leaf)
        # Equal strings are held once, because the targets of all items are held until the bins are made.
        self._values.append(self._same.setdefault(value, value) if isinstance(value, str) else value)


class InOrder(Dataset[Any]):
    """A stream as a map-style dataset: items in ascending order are read in one pass, an earlier one starts a new pass.

    It has the stream's attributes for transforms; a copy with other transforms makes passes of its own.
    """

    def __init__(self, rows: Rows, name: str) -> None:
        self.rows, self.name = rows, name
        self.record = Record()
        self.notes = False
        vars(self).update(own_transforms(rows.stream))

    def __getitem__(self, index: int) -> Any:
        try:
            return self.rows.item(self.row(index))
        except _EndError:
            raise IndexError(f"{self.name} has no item {index:,}") from None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_pass"}

    def row(self, index: int) -> Any:
        """The row at a position; `_EndError` is raised behind the last."""
        return self.cursor().take(index)

    def has(self, index: int) -> bool:
        """Whether there is an item at a position; the pass goes on to it."""
        try:
            self.row(index)
        except _EndError:
            return False
        return True

    def go_to(self, index: int) -> None:
        """Read the items before a position."""
        if index:
            self.row(index - 1)

    def cursor(self) -> "_Pass":
        """The pass of this view; a copy of the view makes one of its own."""
        own = vars(self).get("_pass")
        if own is None or own.view is not self:
            own = self._pass = _Pass(self)
        return own


class _Pass:
    """The present pass over a view of a stream, and the first rows."""

    def __init__(self, view: InOrder) -> None:
        self.view = view
        self.head: list[Any] = []
        self.is_broken = False
        self._room = HEAD_BYTES
        self._position, self._row = -1, None
        self._iterator: Iterator[Any] | None = None

    def take(self, index: int) -> Any:
        if index < len(self.head):
            return self.head[index]
        length = self.view.record.length
        if self._iterator is None and length is not None and index >= length:
            raise _EndError
        if self._iterator is None or index < self._position:
            self.start()
        while self._position < index:
            self._advance()
        return self._row

    def start(self) -> None:
        """Start a new pass."""
        self._iterator, self._position, self._row = self.view.rows.open(own_transforms(self.view)), -1, None

    @property
    def head_is_full(self) -> bool:
        """Whether the next rows are not held in memory."""
        return len(self.head) >= HEAD_ITEMS or (bool(self.head) and self._room <= 0)

    def _advance(self) -> None:
        view = self.view
        assert self._iterator is not None
        try:
            row = next(self._iterator)
        except StopIteration:
            self._iterator = None
            if view.notes:
                view.record.end(self._position + 1, view.name)
            raise _EndError from None
        except BaseException:
            # A generator that has raised an error gives nothing more.
            self._iterator, self.is_broken = None, True
            raise
        self._position, self._row = self._position + 1, row
        if view.notes:
            content, digest = _content_and_digest(view.rows, row)
            view.record.note(self._position, digest, content, view.name)
        if self._position == len(self.head) and not self.head_is_full:
            self.head.append(row)
            self._room -= _rough_bytes(row)


def _content_and_digest(rows: Rows, row: Any) -> tuple[Any, bytes]:
    """What a row holds and its digest, or a placeholder and its digest where the row can't be decoded."""
    try:
        content = rows.content(row)
        return content, rows.digest(content)
    except SourceError:
        raise  # No digest can be made of this type of value, which is no fault of this one item.
    except Exception as error:
        missing = Unreadable(type(error).__name__)
        return missing, bytes.fromhex(digest_of(missing))


class StreamSource(MapSource):
    """Adapter for a stream. The columns and transforms are as in `as_source`.

    Raises:
        SourceError: the stream is empty, is known to be shuffled, or cannot be read without its transforms.
    """

    in_order = True
    by_items = True
    dataset: Any
    plain_dataset: InOrder

    def __init__(
        self,
        rows: Rows,
        image_column: str | None = None,
        label_column: str | None = None,
        transform: Any = KEEP,
        target_transform: Any = KEEP,
        name: str | None = None,
    ) -> None:
        self._limit: int | None = None
        view = InOrder(rows, name or f"the stream {type(rows.stream).__name__}")
        super().__init__(view, image_column, label_column, transform, target_transform)
        self.given = rows.stream
        self._name = view.name
        vars(self.plain_dataset).pop("_pass", None)  # The record begins with the first row.
        self.plain_dataset.notes = True
        self._fill_head()

    @staticmethod
    def count(dataset: Any) -> int:
        return 0  # The length is found by the first pass.

    def _fill_head(self) -> None:
        view = self.plain_dataset
        place = 0
        with self.explaining(0):
            while not view.cursor().head_is_full and view.has(place):
                place += 1
        if not view.cursor().head:
            raise SourceError(f"{self._name} is empty: there is nothing to choose from. Check its files and filters")

    @property
    def record(self) -> Record:
        """What the first pass found."""
        return self.plain_dataset.record

    def __len__(self) -> int:
        if self._limit is not None:
            return self._limit
        if self.record.length is None and self.record.recalled is not None:
            return self.record.recalled[1]
        if self.record.length is None:
            self.scan()
        assert self.record.length is not None
        return self.record.length

    @property
    def is_read(self) -> bool:
        """Whether the length is known, from a whole pass or from an earlier run."""
        return self.record.length is not None or self.record.recalled is not None

    def describe(self) -> str:
        return f"{self._name} with {len(self):,} samples" if self.is_read or self._limit is not None else self._name

    def head(self) -> Self:
        short = copy.copy(self)
        short._limit = len(self.plain_dataset.cursor().head)
        return short

    def spread(self, count: int) -> list[int]:
        return evenly_spaced(len(self.plain_dataset.cursor().head), count)

    def readable(self, index: Any, count: int) -> list[int]:
        # What is found out from a few samples is found out from the first ones, whichever were chosen.
        found = (
            place
            for place in range(len(self.plain_dataset.cursor().head))
            if not self.skips or not isinstance(self._plain_or_unreadable(place), Unreadable)
        )
        return list(itertools.islice(found, count))

    def read_plain(self, index: int) -> Any:
        view = self.plain_dataset
        # What is read while this source is made is no part of the first pass.
        if view.notes and not self.record.has_begun and index >= len(view.cursor().head):
            self.begin()
        return view[index]

    def has(self, index: int) -> bool:
        """Whether the stream has an item at a position; the pass goes on to it.

        Raises:
            SourceError: the stream fails.
        """
        view = self.plain_dataset
        if not view.record.has_begun:
            self.begin()
        try:
            return view.has(index)
        except Exception as error:
            with self.explaining(index):
                raise error

    def digests(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The first bytes of the digests of items that were read, uint8 [stop - start, 8]."""
        return self.record.digests(start, stop)

    def begin(self) -> None:
        """Prepare the record of the first pass."""
        if not self.record.has_begun:
            place, leaf, view = self.image_place(), self.target_leaf(), self.plain_dataset
            head = [_content_and_digest(view.rows, row)[0] for row in view.cursor().head]
            self.record.begin(place, leaf, head)

    def encoded(self, index: int) -> EncodedImage | None:
        return self.plain_dataset.rows.encoded(self.plain_dataset.row(index))

    def _or_unreadable(self, error: SourceError) -> Unreadable:
        if self.plain_dataset.cursor().is_broken:
            raise error  # There is nothing behind this item.
        return super()._or_unreadable(error)

    def remember_digest(self, index: int, digest: str) -> None:
        """Do nothing: the record has the digest of every item."""

    # The following methods give the targets and the identity.

    def class_names(self) -> Any:
        """The names of the classes, if the stream knows them; else None."""
        return None

    def listed_targets(self) -> Targets | None:
        return None

    def scan(self) -> tuple[str, Targets | None]:
        if self.record.length is None:
            self._check_same_reads()
            self.begin()
            logger.info("%s: reading it once, to find out whether the cache has results for these data", self._name)
            with progress_bar(self.shows_progress, total=None, unit="item", description="reading items") as bar:
                for index in itertools.count(self.record.count):
                    if not self.has(index):
                        break
                    bar.update()
        self.begin()  # A stream that is shorter than its head was read whole before.
        return self.record.found(self.class_names())

    def plain_view(self) -> Any:
        return self.plain_dataset.rows.bare(own_transforms(self.plain_dataset))

    def state(self, *, fresh: bool = False) -> State:
        if self._state is None or fresh:

            def read(others: bool) -> str:
                # The stream itself is read, so that what changes in it by reading is seen.
                self._start_again()
                return digest_of(self.image_place(), self.sample_digest(others))

            found = find_state(self.plain_view(), self.given, read, without=TRANSFORM_NAMES)
            if self._state is not None:
                return found
            self._state = found
        return self._state

    def _start_again(self) -> None:
        """Read the first items in a new pass, which compares them with those of the first."""
        cursor = self.plain_dataset.cursor()
        with self.explaining(0):
            cursor.start()
            for _ in cursor.head:
                try:
                    cursor._advance()
                except _EndError:
                    break  # The record has raised an error, unless the stream ends there.

    def marks(self, *, fresh: bool) -> str:
        return ""  # Every item is compared as it passes.

    def quick_digest(self, memory: DigestMemory) -> str | None:
        if self.record.length is not None:
            return self.digest(memory)
        self.recall(memory, self.state_key())
        return None if self.record.recalled is None else self.record.recalled[0]

    def recall(self, memory: DigestMemory, key: str) -> None:
        """Take over digest and length that were remembered under a key, if there are any."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            known = json.loads(memory.recall(key) or "null")
            self.expect(str(known["digest"]), int(known["length"]))

    def forget(self) -> None:
        self.record.recalled = None

    def know_length(self, memory: DigestMemory, key: str) -> None:
        if self.record.length is None:
            self.recall(memory, key)
        if self.record.recalled is None:
            self.scan()
            self._remember(memory, key)

    def expect(self, digest: str, length: int) -> None:
        self.record.recalled = (digest, length)

    def digest(self, memory: DigestMemory) -> str:
        key = self.state_key()
        digest = self.scan()[0]
        if key not in self.record.remembered and self.is_unchanged():
            self._remember(memory, key)
        return digest

    def _remember(self, memory: DigestMemory, key: str) -> None:
        self.record.remembered.add(key)
        memory.remember(key, json.dumps({"digest": self.scan()[0], "length": len(self)}))

    def is_unchanged(self) -> bool:
        """Whether the state of the stream is that of the beginning, so that it may stand for what was read."""
        return self.state(fresh=True).digest == self.state().digest

    def _check_same_reads(self) -> None:
        if self._repeatable:
            return
        with isolated_random_state():
            self._start_again()
        self._repeatable = True


class TextStreamSource(TextRows, StreamSource):
    """Adapter for a stream of text rows."""


def _rough_bytes(value: Any, depth: int = 3) -> int:
    """About how many bytes of memory a row takes."""
    if isinstance(value, Image.Image):
        return 4 * value.size[0] * value.size[1]
    if isinstance(value, Tensor | np.ndarray):
        return int(value.nbytes)
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, Mapping | tuple | list):
        return sum(_rough_bytes(inner, depth - 1) for _, inner in children(value)) if depth else 0
    return 64
