"""The base class of all adapters: it reads items, finds images and targets in them, and computes identities of datasets."""

import contextlib
import hashlib
import itertools
import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dq_lightning.cache.digests import DigestMemory
from dq_lightning.core.console import progress_bar
from dq_lightning.core.errors import ChangedError, SourceError, may_pass
from dq_lightning.core.isolation import isolated_random_state
from dq_lightning.core.records import EncodedImage, Labels
from dq_lightning.identity.datasets import State, find_state
from dq_lightning.identity.values import digest_of
from dq_lightning.sources.base import KeptSamples, Source, dataset_length
from dq_lightning.sources.groups import (
    DOMINANT,
    dominant_class,
    dominant_labels,
    given_labels,
    listed_sets,
    looks_like_set,
    num_quantiles,
    number_of,
    quantile_labels,
)
from dq_lightning.sources.items import (
    MANY_CHANNELS,
    Leaf,
    at,
    evenly_spaced,
    find_image,
    find_target,
    image_leaves,
    may_be_image,
    outline,
    pillow_images,
)
from dq_lightning.sources.pixels import Scale, check_pixels, decide_scale, needs_scale, to_rgb
from dq_lightning.sources.skipping import Unreadable
from dq_lightning.sources.streams import generators_in, random_states
from dq_lightning.sources.strip import TRANSFORM_NAMES
from dq_lightning.sources.targets import (
    Targets,
    as_targets,
    target_of,
    targets_from_json,
    targets_key,
    targets_to_json,
    to_labels,
)

logger = logging.getLogger("dq_lightning")

SAMPLED_ITEMS = 16
OTHER_ITEMS = 4
# Most positions that are tried to find a few readable items.
_MAX_TRIED = 256
_SCALE_SAMPLES = 64
_MIN_SAMPLES_FOR_BAR = 1000
# In a dataset of fewer samples, many different classes are no sign of a mistake.
_MIN_SAMPLES_TO_JUDGE = 20
# If random numbers are drawn while plain items are read, `_REREAD_POSITIONS` positions are read again, each `_REREADS` times.
_REREAD_POSITIONS = 4
_REREADS = 64


def load_images(item: Any) -> Any:
    """Decode the Pillow images inside an item, and return the item.

    Pillow opens files without decoding them. Decoding reports damage while the item is known.
    """
    for image in pillow_images(item):
        if type(image) is not Image.Image:  # Images of this very class are in memory.
            stream = getattr(image, "fp", None)
            image.load()
            # `load` drops the reference to a file that the dataset opened, but packing needs its bytes.
            if not getattr(stream, "closed", True):
                image.fp = stream  # type: ignore[attr-defined]
    return item


class ItemSource(Source):
    """The base class of all adapters. A subclass defines how an item is read, finished and identified.

    A leaf is the path of keys and positions that leads from an item to a value inside it; see `items.Leaf`.

    Args:
        dataset: dataset that items are delivered from, with the transforms that were asked for.
        image_column: key or position of the image in an item; it is looked for when None.
        label_column: key or position of the target in an item; it is looked for when None.

    Attributes:
        given: the dataset that the user passed.
        dataset: the dataset that items are delivered from; it may have other transforms.
        first: position of a readable item that shows the structure of all items.
    """

    skips = False
    """Whether unreadable items are left out, so that they do not stop a pass over the whole dataset."""
    shows_progress = True
    """Whether a pass over all items shows a progress bar (on a terminal)."""
    needs_images = True
    """Whether an item without an image is an error; False where features are given and images are not looked at."""
    trusts_list = False
    """Whether `listed_targets` is known to agree with the targets inside the items, so that no items are compared."""

    def __init__(self, dataset: Any, image_column: str | None, label_column: str | None) -> None:
        self.given = self.dataset = dataset
        self.first = 0
        self._length = self.count(dataset)
        self.image_column = image_column
        self.label_column = label_column
        self._leaf: Leaf | None = None
        self._has_no_image = False
        self._scale: Scale | None = None
        self._several_images: bool | None = None
        self._targets: tuple[Targets | None] | None = None
        self._scan: tuple[str, Targets | None] | None = None
        # Whether the list of targets was compared with all items, and the list that each item is still compared with.
        self._compared = False
        self._believed: Targets | None = None
        self._state: State | None = None
        self._ruled: tuple[str, Labels | None] | None = None
        self._logged_no_classes = False
        self._repeatable = False

    def __len__(self) -> int:
        return self._length

    def describe(self) -> str:
        return f"{type(self.dataset).__name__} with {len(self):,} samples"

    @property
    def identity_is_certain(self) -> bool:
        return not self.by_items or not self.state().unknown

    # A subclass defines the abstract methods below and may override the others of this part.

    @staticmethod
    def count(dataset: Any) -> int:
        """Number of samples of the dataset; SourceError if it can't be read by position or is empty."""
        return dataset_length(dataset)

    @abstractmethod
    def read_plain(self, index: int) -> Any:
        """Read the plain item. The method may raise any exception."""

    @abstractmethod
    def listed_targets(self) -> Targets | None:
        """The classes that the dataset lists, found without reading items; None where it lists none."""

    @abstractmethod
    def plain_view(self) -> Any:
        """The dataset without transforms, or `Parts` of several; its attributes are the state of the source."""

    def read_image(self, index: int) -> Any:
        """The image in the plain item, of any type that `pixels.to_rgb` takes. Reading may raise any exception."""
        item = self.read_plain(index)
        if self._believed is not None:
            self._check_believed(index, item)
        return at(item, self.image_leaf())

    def believe_list(self) -> None:
        """Have the list of targets, which was compared with a few items alone, compared with each item that is read."""
        self._believed = self.listed_targets()

    def _check_believed(self, index: int, item: Any) -> None:
        leaf, listed = self.target_leaf(), self._believed
        if leaf is None or listed is None:
            return
        value, wanted = target_of(item, leaf), listed.values[index]
        if value is None:
            is_number = listed.values.dtype.kind == "i"
            agrees = wanted < 0 if is_number else listed.missing is not None and bool(listed.missing[index])
        else:
            read = as_targets([value])
            agrees = read is not None and read.values[0] == wanted
        if not agrees:
            raise SourceError(
                f"its target is {value!r}, but the dataset's list of targets says {wanted.item()!r}: samples are grouped by "
                "this list, because it agrees with the first items that were compared. Make it say what the items hold, or "
                "pass labels= with the classes"
            )

    def decode_problem(self, index: int) -> str | None:
        """A description of what the dataset's decoder gets wrong for this sample, or None when nothing is known."""
        return None

    def unread(self) -> Self:
        """The same source over its dataset in the state before any item was read.

        Processes that are started with it open files of their own, instead of sharing files that reading has opened.
        """
        return self

    # The methods below use those above. The following read items.

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
            leaving = "" if self.in_order else " with torch.utils.data.Subset"
            skipping = "" if self.skips else ', or pass on_error="skip", which leaves out and counts all such items'
            raise SourceError(
                f"Item {index} of {self.describe()}{f' ({place})' if place else ''} can't be read: "
                f"{type(error).__name__}: {error}. Repair it, or leave it out{leaving}{skipping}."
            ) from error

    def plain(self, index: int) -> Any:
        try:
            return load_images(self.read_plain(index))
        except Exception as error:
            with self.explaining(index):
                raise error

    def _or_unreadable(self, error: SourceError) -> Unreadable:
        """The placeholder for an unreadable item; without `skips`, or if the failure may be temporary, raise it."""
        if not self.skips or may_pass(error):
            raise error
        return Unreadable(type(error.__cause__ or error).__name__)

    def _plain_or_unreadable(self, index: int) -> Any:
        """The plain item, or with `skips` an `Unreadable` in place of an item that cannot be read."""
        try:
            return self.plain(index)
        except SourceError as error:
            return self._or_unreadable(error)

    def _plain_and_digest(self, index: int) -> tuple[Any, str]:
        """The plain item and its digest; with `skips`, an `Unreadable` takes the place of an unreadable item.

        SourceError also if the item holds a value of which no digest can be made.
        """
        item = self._plain_or_unreadable(index)
        try:
            return item, digest_of(item)
        except SourceError:
            raise  # No digest can be made of this type of value, which is no fault of this one item.
        except Exception as failure:
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
        found = (place for place in candidates if not isinstance(self._plain_or_unreadable(place), Unreadable))
        return list(itertools.islice(found, count))

    def first_item(self, fits: Callable[[Any], object] = id) -> Any:
        """A plain item that shows the structure of all items; other unreadable items are reported when they are read.

        `fits` is a function that raises `SourceError` for an item that does not have the structure.

        Raises:
            SourceError: none of the items that were tried can be read and fits.
        """
        problems = []
        for index in (self.first, *self.spread(SAMPLED_ITEMS)):
            try:
                item = self.plain(index)
                fits(item)
            except SourceError as error:
                problems.append(error)
            else:
                self.first = index
                return item
        raise problems[0]

    # images

    def image_leaf(self) -> Leaf:
        if self._leaf is None:
            find = partial(find_image, wanted=self.image_column)
            self._leaf = find(self.first_item(find))
        return self._leaf

    def image_place(self) -> Leaf | None:
        """The path to the image inside an item, or None where there is no image and none is needed.

        Raises:
            SourceError: no single image is found, and `needs_images` is set.
        """
        if self._has_no_image and not self.needs_images:
            return None
        try:
            return self.image_leaf()
        except SourceError:
            if self.needs_images:
                raise
            self._has_no_image = True
            return None

    def check_one_image(self) -> None:
        """Check that it is clear which image of an item is meant; items without any image pass where none is needed.

        Raises:
            SourceError: items hold several images, or none where one is needed.
        """
        if self.modality == "image" and (self.needs_images or image_leaves(self.first_item())):
            self.image_leaf()

    def check_columns(self) -> None:
        if self.image_column is None:
            return  # An image that was looked for and found is one.
        value = at(self.first_item(), self.image_leaf())
        if isinstance(value, Tensor | np.ndarray) and not may_be_image(value):
            advice = MANY_CHANNELS if value.ndim == 3 else "Images are [H, W], [C, H, W] or [H, W, C] of real numbers."
            raise SourceError(f"image_column={self.image_column!r} of {self.describe()} is {outline(value)}. {advice}")

    def image(self, index: int) -> Image.Image:
        self.image_leaf()
        try:
            leaf = check_pixels(self.read_image(index))
            return to_rgb(leaf, self.scale() if needs_scale(leaf) else None)
        except Exception as error:
            with self.explaining(index):
                raise error

    def check(self, index: int) -> None:
        if self.image_place() is None:
            self.plain(index)
            return
        self.image(index)
        if self._several_images is None:
            self._several_images = len(image_leaves(self.first_item())) > 1
        if self._several_images:
            self.plain(index)

    def scale(self) -> Scale:
        """The map to uint8 of all images whose dtype does not define the value range, decided from 64 spread items."""
        if self._scale is None:
            spread = []
            for index in self.spread(_SCALE_SAMPLES):
                with contextlib.suppress(Exception):  # An unreadable item is reported when its turn comes.
                    spread.append(self.read_image(index))
            self._scale = decide_scale([leaf for leaf in spread if needs_scale(leaf)] or spread[:1])
        return self._scale

    def decode_warning(self, index: int) -> str | None:
        problem = self.decode_problem(index)
        if problem is None:
            return None
        place = self.path(index)
        return f"Item {index}{f' ({place})' if place else ''}: {problem}"

    def labels(self) -> Labels | None:
        if self.grouping is False:
            return None
        if isinstance(self.grouping, str):
            return self._labels_by_rule(self.grouping)
        if self.grouping is not None:
            return given_labels(self.grouping, len(self))
        targets = self.targets()
        labels = to_labels(targets) if targets is not None else None
        if labels is None and self.label_column is not None:
            labels = self._label_sets()
        if self.modality == "image":
            self._check_classes(labels, has_names=targets is not None and targets.names is not None)
        if labels is None and not self._logged_no_classes:
            self._logged_no_classes = True
            logger.info("%s: no classes found, so bins are made over the whole set", self.describe())
        return labels

    def _labels_by_rule(self, rule: str) -> Labels | None:
        """The groups that a rule such as `"quantiles:5"` makes of the targets; every target is read once."""
        if self._ruled is None or self._ruled[0] != rule:
            if rule == DOMINANT:
                made = dominant_labels(self.target_values(dominant_class), self.target_names())
            else:
                made = quantile_labels(self.target_values(number_of), num_quantiles(rule))
            self._ruled = rule, made
        return self._ruled[1]

    def _label_sets(self) -> Labels | None:
        """Labels of samples that have several, from the named target; None if it holds something else."""
        sampled = [self.read_target(index) for index in self.readable(range(len(self)), SAMPLED_ITEMS)]
        if not any(map(looks_like_set, sampled)):
            return None
        if self._ruled is None or self._ruled[0] != "sets":
            self._ruled = "sets", listed_sets(self.target_values(_as_set), self.target_names())
        return self._ruled[1]

    def _check_classes(self, labels: Labels | None, *, has_names: bool) -> None:
        """Raise a SourceError that asks the user for the classes if those that were found are not plausible.

        That is: the column that was named holds no classes; or none was named, there are at least 20 samples, and the
        classes have no names and more different values than half of the samples.
        """
        named = self.label_column is not None
        if named is (labels is not None):
            return
        different = 0 if labels is None else len(np.unique(labels.values.numpy()))
        if labels is not None and (has_names or len(self) < _MIN_SAMPLES_TO_JUDGE or different <= len(self) / 2):
            return
        item, leaf = self.first_item(), self.target_leaf()
        place = leaf[-1] if leaf else None
        seen = f"{outline(at(item, leaf)) if leaf else 'nothing'} in {outline(item)}"
        if labels is None:
            raise SourceError(
                f"labels={self.label_column!r} of {self.describe()} are no classes ({seen}): whole numbers or strings are. "
                "Name another key or position, or pass labels= with one class for each sample, labels=False for bins over the "
                f'whole set, or labels="quantiles" with label_column={self.label_column!r} for groups of numbers'
            )
        raise SourceError(
            f"The classes of {self.describe()} were looked for at {place!r} ({seen}), which has {different:,} different "
            f"values: rather a name, a number or a measurement. Pass labels='{place}' if these are the classes after all, "
            "labels= with another key or position or with one class for each sample, or labels=False for bins over the "
            "whole set"
        )

    def encoded(self, index: int) -> EncodedImage | None:
        return None

    def sample_id(self, index: int) -> str:
        return str(index)

    def delivered(self, index: int) -> Any:
        return self.dataset[index]

    def subset(self, index: Tensor) -> Dataset[Any]:
        return KeptSamples(self.dataset, index)

    # targets

    def target_leaf(self) -> Leaf | None:
        """The path of keys and positions that leads to the target inside an item, or None without a target."""
        return find_target(self.first_item(), self.image_place(), self.label_column)

    def read_target(self, index: int) -> Any:
        """The target in the plain item. Reading may raise any exception."""
        return at(self.read_plain(index), self._named_target())

    def _named_target(self) -> Leaf:
        leaf = self.target_leaf()
        if leaf is None:
            raise SourceError(
                f"labels= groups {self.describe()} by its targets, and none is found in {outline(self.first_item())}: name it "
                "with label_column="
            )
        return leaf

    def target_names(self) -> tuple[str, ...] | None:
        """Names of the class numbers inside the targets, where the dataset tells them."""
        return None

    def target_values(self, read: Callable[[Any], Any]) -> list[Any]:
        """What a function makes of every target, in order; None for items that are skipped because they are unreadable.

        Raises:
            SourceError: an item cannot be read, or the function raises it, or there is no target.
        """
        self._named_target()
        values: list[Any] = []
        show = self.shows_progress and len(self) >= _MIN_SAMPLES_FOR_BAR
        with progress_bar(show, total=len(self), unit="item", description="reading targets") as bar:
            for index in range(len(self)):
                try:
                    with self.explaining(index):
                        target = self.read_target(index)
                except SourceError as error:
                    self._or_unreadable(error)
                    target = None
                values.append(None if target is None else read(target))
                bar.update()
        return values

    def targets(self) -> Targets | None:
        """The dataset's own classes, or None when it has none.

        They are taken from the dataset's list where it agrees with a few items, else from one pass over all items. Where
        such a pass is made for the identity of the data, the list is compared with all items.
        """
        if self._targets is None:
            self._targets = (self.listed_targets() if self.trusts_list else self._found_targets(),)
        return self._targets[0]

    def _found_targets(self) -> Targets | None:
        leaf = self.target_leaf()
        if leaf is None:
            return None
        items = {index: self._plain_or_unreadable(index) for index in self.spread(SAMPLED_ITEMS)}
        sampled = {i: target_of(item, leaf) for i, item in items.items() if not isinstance(item, Unreadable)}
        seen = as_targets(list(sampled.values()))
        if seen is None and any(value is not None for value in sampled.values()):
            return None
        listed = self.listed_targets()
        if listed is not None and seen is not None:
            there = listed.values[list(sampled)]
            if there.dtype.kind == seen.values.dtype.kind and np.array_equal(there, seen.values):
                if not self._compared:
                    self.believe_list()
                return listed
        return self.scan()[1]

    # identity

    def scan(self) -> tuple[str, Targets | None]:
        """Read all plain items once for their digest, a SHA-256, and their targets (None if they are no classes).

        The result is kept, since the pass may decode the whole dataset.

        Raises:
            SourceError: an item cannot be read, or two reads of the same item differ.
        """
        if self._scan is None:
            self._check_same_reads()  # Randomness inside the dataset is found before the long pass, not after it.
            leaf = self.target_leaf()
            content = hashlib.sha256(repr(self.image_place()).encode())
            values: list[Any] = []
            started = time.perf_counter()
            logger.info(
                "%s: reading every item once, to find out whether the cache has results for these data", self.describe()
            )
            show = self.shows_progress and len(self) >= _MIN_SAMPLES_FOR_BAR
            with progress_bar(show, total=len(self), unit="item", description="reading items") as bar:
                for index in range(len(self)):
                    item, digest = self._plain_and_digest(index)
                    content.update(bytes.fromhex(digest))
                    if not isinstance(item, Unreadable):
                        self.remember_digest(index, digest)
                    values.append(item if isinstance(item, Unreadable) else target_of(item, leaf))
                    bar.update()
            if self.state().unknown:
                logger.info(
                    "%s: reading took %.1f s and is repeated at every start, because a change of the data could go unnoticed "
                    "otherwise (%s). To skip it, pass fingerprint= with a name of your own for this version of the data",
                    self.describe(),
                    time.perf_counter() - started,
                    "; ".join(self.state().unknown[:3]),
                )
            listed = self.listed_targets()
            names = listed.names if listed is not None else None
            # Unreadable items are put into no bin, so they take the class of the first readable item: this neither adds
            # a class nor turns the targets into something that is no class.
            known = next((value for value in values if not isinstance(value, Unreadable)), None)
            values = [known if isinstance(value, Unreadable) else value for value in values]
            self._scan = content.hexdigest(), as_targets(values, names)
        return self._scan

    def remember_digest(self, index: int, digest: str) -> None:
        """Remember the digest of an item, so that a later read of other content raises `ChangedError`.

        This base class remembers nothing.
        """

    def state(self, *, fresh: bool = False) -> State:
        """What can be seen of the dataset without reading all items, when this was first called or, if `fresh`, now."""
        if self._state is None or fresh:
            found = find_state(
                self.plain_view(),
                self.given,
                lambda others: digest_of(len(self), self.image_place(), self.sample_digest(others)),
                without=TRANSFORM_NAMES,
            )
            if self._state is not None:
                return found
            self._state = found
        return self._state

    def marks(self, *, fresh: bool) -> str:
        # Adapters of files use times, so that a change that was undone is noticed too.
        return self.state(fresh=fresh).digest if self.by_items else ""

    def state_key(self) -> str:
        """The key under which the digest of all items is remembered."""
        state = self.state()
        return f"{'opaque:' if state.unknown else ''}dataset-state:{state.digest}"

    def digest(self, memory: DigestMemory) -> str:
        # The key is computed before the items are read, because reading may fill a cache inside the dataset.
        key = self.state_key()
        digest, read = self.scan()
        differ = self._has_own_list() and self._differ(read)
        self._compared, self._believed = True, None
        if differ:
            self._targets = (read,)
        if self.state(fresh=True).digest == self.state().digest:
            memory.remember(key, digest)
            memory.remember(targets_key(key), targets_to_json(read) if differ else "")
        return digest

    def quick_digest(self, memory: DigestMemory) -> str | None:
        if not self.by_items:
            return self.digest(memory)
        if self._scan is not None:
            return self._scan[0]
        key = self.state_key()
        if self._has_own_list():
            read = memory.recall(targets_key(key))
            if read is None:
                return None  # The list was not compared with all items yet.
            self._compared, self._believed = True, None
            if read:
                self._targets = (targets_from_json(read),)
        return memory.recall(key)

    def _has_own_list(self) -> bool:
        """Whether the dataset lists targets that its items may contradict."""
        return not self.trusts_list and self.listed_targets() is not None

    def _differ(self, read: Targets | None) -> bool:
        """Whether the targets in the items are not those of the dataset's list; a warning counts those that differ."""
        listed = self.listed_targets()
        if listed is None or self.target_leaf() is None:
            return False
        alike = read is not None and read.values.dtype.kind == listed.values.dtype.kind
        others = int(np.count_nonzero(read.values != listed.values)) if read is not None and alike else len(self)
        if others and not self.skips:
            logger.warning(
                "%s: %d of its items hold another target than its list of targets says; those of the items, which are "
                "trained on, are used",
                self.describe(),
                others,
            )
        return others > 0

    def sample_digest(self, others: bool = False) -> str:
        """Digest of 16 evenly spaced plain items, or with `others` of up to 4 items at other positions."""
        sampled = self.spread(SAMPLED_ITEMS)
        if others:
            sampled = sorted(set(self.spread(2 * SAMPLED_ITEMS)).difference(sampled))[:OTHER_ITEMS]
        return digest_of([self._plain_and_digest(index)[1] for index in sampled])

    def check_repeatable(self) -> None:
        self._check_same_reads()
        if self.grouping is None and self._has_own_list():
            with contextlib.suppress(SourceError):
                self.targets()  # A list that is believed is compared with the items in loader processes, too.
        with contextlib.suppress(SourceError):  # An unreadable item is reported when its turn comes.
            self.image(self.first)  # This decides the scale before worker processes are started.

    def _check_same_reads(self) -> None:
        if self._repeatable:
            return
        generators, sampled = generators_in(self.plain_view()), evenly_spaced(len(self), SAMPLED_ITEMS)
        with isolated_random_state():
            before = random_states(generators)
            first = {index: self._plain_and_digest(index)[1] for index in sampled}
            self._compare_reads(first, sampled)
            if random_states(generators) != before:
                # The numbers drawn may change an item only rarely, so a few items are read many times.
                self._compare_reads(first, evenly_spaced(len(self), _REREAD_POSITIONS) * _REREADS)
        self._repeatable = True

    def _compare_reads(self, first: dict[int, str], again: list[int]) -> None:
        for index in again:
            if first.setdefault(index, self._plain_and_digest(index)[1]) != self._plain_and_digest(index)[1]:
                raise SourceError(
                    f"Two reads of item {index} of {self.describe()} differ, though its transforms were taken off: "
                    "something random is hidden inside. Features are made once from the plain image, so give the "
                    "dataset its augmentation as an attribute named `transform`, or pass transform= here instead."
                )


def _as_set(target: Any) -> Any:
    """The labels of a sample as an array or list; other targets unchanged."""
    return target.detach().cpu().numpy() if isinstance(target, Tensor) and target.ndim == 1 else target
