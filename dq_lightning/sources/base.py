"""The one form in which the other packages see every dataset (`Source`), and helpers that all adapters share."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from types import MethodType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from dq_lightning.cache.digests import DigestMemory
from dq_lightning.core.errors import PatchError, SourceError
from dq_lightning.core.handles import Items
from dq_lightning.core.records import EncodedImage, Labels
from dq_lightning.sources.items import Leaf, evenly_spaced


class Finisher(Protocol):
    """Turns a plain item into the item that the dataset delivers.

    A finisher is small and picklable: it holds the user's transforms, but no data.
    """

    def __call__(self, position: int, plain_item: Any) -> Any:
        """Turn a plain item into the item as the dataset delivers it.

        `position` is that of the sample in the index that the finisher was made for.
        """


class Source(ABC):
    """Any dataset of images or text rows, in the one form that the other packages use.

    The abstract methods are the contract: they must be defined, and everything else has a default here. A class that
    defines `modality` and the abstract methods without inheriting from this class is a source, too; `as_source` adds
    the defaults to it. Positions run from 0 to `len(source) - 1`.

    Attributes:
        modality: `"image"` or `"text"`. A source of text also defines `texts`, and its `image` is never called.
        image_column: column, key or position of the image in an item, if it was named; else None.
        label_column: column, key or position of the class in an item, if it was named; else None.
        grouping: classes that replace the dataset's own, a rule such as `"dominant"`, False for no groups, or None.
        by_items: whether the identity is a digest of all plain items, so that every item must be read to compute it.
        in_order: whether the samples are those of a stream: reading them in ascending order takes one pass, and going
            back to an earlier one starts another. The length is found by the first pass.
    """

    modality: str = "image"
    image_column: str | None = None
    label_column: str | None = None
    grouping: Any = None
    by_items: bool = True
    in_order: bool = False

    @property
    @abstractmethod
    def identity_is_certain(self) -> bool:
        """False when the dataset holds state that cannot be inspected.

        `quick_digest` may then return the digest of older content.
        """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def describe(self) -> str:
        """One line that names the dataset in messages, for instance `CIFAR10 with 50,000 samples`."""

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """The image as the encoder sees it: a PIL image of mode RGB (uint8), without the user's transforms."""

    @abstractmethod
    def decode_warning(self, index: int) -> str | None:
        """Warn of an image that is known to be decoded wrongly, judged from the file's header alone.

        Returns:
            A message that names the index and, where there is one, the path; None when no problem is known.
        """

    @abstractmethod
    def labels(self) -> Labels | None:
        """The class of every sample, or None when the targets are not classes."""

    @abstractmethod
    def plain(self, index: int) -> Any:
        """The item in the dataset's own structure, without the user's transforms."""

    @abstractmethod
    def encoded(self, index: int) -> EncodedImage | None:
        """The encoded bytes of the image file as the dataset holds them, or None when it holds none."""

    @abstractmethod
    def sample_id(self, index: int) -> str:
        """Name of the sample: its relative path in a dataset of files, else its position as a decimal number."""

    @abstractmethod
    def delivered(self, index: int) -> Any:
        """The item exactly as the wrapped dataset gives it, transforms included."""

    @abstractmethod
    def subset(self, index: Tensor) -> Dataset[Any]:
        """A map-style dataset that delivers the samples at `index` (int64 [M]) as the wrapped dataset would."""

    @abstractmethod
    def finisher(self, index: Tensor) -> Finisher:
        """The finisher that turns plain items of the samples at `index` (int64 [M]) into delivered items."""

    @abstractmethod
    def digest(self, memory: DigestMemory) -> str:
        """Hexadecimal digest of the content, independent of where the data lie and of the user's transforms.

        Args:
            memory: digests that were computed earlier, which this method uses and adds to.
        """

    @abstractmethod
    def quick_digest(self, memory: DigestMemory) -> str | None:
        """The result of `digest` where it is cheap to compute or remembered, else None."""

    @abstractmethod
    def check_repeatable(self) -> None:
        """Check that reading a plain item twice gives the same content.

        Raises:
            SourceError: two reads of the same plain item differ.
        """

    # The following methods have defaults.

    def texts(self, positions: Sequence[int]) -> list[str]:
        """The texts that are embedded of the samples at the given positions, in the same order.

        Raises:
            SourceError: the source holds images, or a sample has no such text.
        """
        raise SourceError(f"{self.describe()} holds images, which have no text: pass an encoder of images")

    def text_identity(self) -> dict[str, Any]:
        """Everything that decides, in addition to the rows, which text is embedded; a part of cache keys."""
        return {}

    def image_leaf(self) -> Leaf:
        """The path of keys and positions that leads to the image inside an item.

        Raises:
            SourceError: no single image is found in an item.
            PatchError: the source does not define this method, which is needed to drop patches.
        """
        raise PatchError(f"{self.describe()} does not tell where in its samples the image is (image_leaf)")

    def spread(self, count: int) -> list[int]:
        """At most `count` positions that show what the samples are like: evenly spaced, or the first ones of a stream."""
        return evenly_spaced(len(self), count)

    def head(self) -> "Source":
        """The first samples of a stream as a source of known length, to try them before a long pass; else this source."""
        return self

    def expect(self, digest: str, length: int) -> None:  # noqa: B027 (only a stream has to be told)
        """Take over digest and length of a stream that another process has read."""

    def forget(self) -> None:  # noqa: B027 (only a stream remembers)
        """Forget what `expect` took over, so that a stream is read again to find out what it holds."""

    def know_length(self, memory: DigestMemory, key: str) -> None:  # noqa: B027 (only a stream has to find it out)
        """Find out the length of a stream: from the memory under a key, else by reading it."""

    def path(self, index: int) -> str | None:
        """Path of the file that holds the sample, or None when there is no such file."""
        return None

    def check(self, index: int) -> None:
        """Check that everything of a sample that is used later can be read.

        Raises:
            SourceError: the sample cannot be read.
        """
        if self.modality == "text":
            self.texts([index])
        else:
            self.image(index)

    def check_columns(self) -> None:  # noqa: B027 (the default checks nothing)
        """Check before any work that the columns in use hold what an encoder can read.

        Raises:
            SourceError: they hold something else.
        """

    def plain_items(self) -> Any:
        """A map-style dataset of the plain items; Hugging Face data stay a Hugging Face `Dataset`."""
        return Items(len(self), self.plain)

    def marks(self, *, fresh: bool) -> str:
        """A text by which a change of the data while they are processed is noticed, without reading them all.

        Args:
            fresh: if True, the text for the data at present; if False, for the data when the identity was determined.
        """
        return ""

    def sample_digest(self) -> str:
        """Digest of a few plain items, by which another process checks that its dataset is the same; else empty."""
        return ""


class CompletedSource:
    """A source whose class does not inherit from `Source`, together with the defaults of `Source`.

    What the given object defines of `Source` besides `modality` and the abstract methods replaces the default.
    """

    def __init__(self, given: Any) -> None:
        self.given = given

    def __len__(self) -> int:
        return len(self.given)

    def __getattr__(self, name: str) -> Any:
        default = getattr(Source, name)
        if hasattr(self.given, name):
            return getattr(self.given, name)
        return MethodType(default, self) if callable(default) else default


def is_source(dataset: Any) -> bool:
    """Whether a dataset is a source, of this package or of the user's own."""
    # An object whose `__getattr__` returns something for every name has all methods, so the type of its modality is
    # checked too.
    return isinstance(dataset, Source) or (
        isinstance(getattr(dataset, "modality", None), str)
        and all(hasattr(dataset, name) for name in Source.__abstractmethods__)
    )


# Attributes of datasets that do not depend on which samples there are.
_OF_NO_SAMPLE = ("transform", "target_transform", "transforms", "classes", "class_to_idx", "features", "column_names")


class Positions(Sequence[int]):
    """Positions stored in one int64 array [N].

    Forked worker processes share the memory pages of such an array, whereas they would copy those of a list.
    """

    def __init__(self, index: Tensor | NDArray[np.int64] | Sequence[int]) -> None:
        # The memory of a tensor is moved when it is sent to another process, which an array over it would not notice.
        self.array: NDArray[np.int64] = np.array(index, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return Positions(self.array[place])
        return int(self.array[place])


def positions_of(subset: Subset[Any]) -> NDArray[np.int64]:
    """Return the indices of a `Subset`, integers of any kind, as int64 [M]."""
    indices = subset.indices
    return (indices if isinstance(indices, np.ndarray) else torch.as_tensor(indices).numpy()).astype(np.int64)


class KeptSamples(Subset[Any]):
    """A `Subset` of a dataset that passes settings on to it, so that scripts may treat it as the dataset.

    Setting an attribute that the dataset has sets it there: `loader.dataset.transform = other` would have no effect on a
    plain `Subset`. Transforms, classes and `set_...` methods can be read; an attribute that describes all samples of the
    dataset, such as its targets, cannot, because it does not fit these. Of a plain `Subset`, it is a smaller one of the
    same dataset.

    Args:
        whole: the dataset.
        positions: int64 [M], positions of the samples in it.
    """

    def __init__(self, whole: Any, positions: Tensor | NDArray[np.int64]) -> None:
        self._whole = whole
        if type(whole) is Subset:
            within = positions_of(whole)
            super().__init__(whole.dataset, Positions(within[np.asarray(positions)]))
        else:
            super().__init__(whole, Positions(np.asarray(positions)))

    @property
    def whole(self) -> Any:
        """The dataset that holds these samples."""
        return self._whole

    def __getattr__(self, name: str) -> Any:
        whole = self.__dict__.get("_whole")
        if whole is None or name.startswith("_") or not hasattr(whole, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        if name in _OF_NO_SAMPLE or name.startswith("set_"):
            return getattr(whole, name)
        raise AttributeError(
            f"these are {len(self):,} of the {len(whole):,} samples of a {type(whole).__name__}, and its {name!r} may describe "
            f"all of them: read .dataset.{name}, and .indices for the positions of these"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("dataset", "indices") and not name.startswith("_") and hasattr(self._whole, name):
            setattr(self._whole, name, value)
        else:
            super().__setattr__(name, value)


def dataset_length(dataset: Any) -> int:
    """Number of samples of a dataset that is read by position, whatever its base class is.

    Raises:
        SourceError: the dataset is a stream, has no `__getitem__` or no length, or is empty.
    """
    name = type(dataset).__name__
    if name == "DataFrame" or (isinstance(dataset, Mapping) and len(dataset) and 0 not in dataset):
        made = "pandas(frame)" if name == "DataFrame" else "dict(columns)"
        raise SourceError(
            f"a {name} holds columns, which are no samples: pass datasets.Dataset.from_{made}, or a list with one dict a sample"
        )
    try:
        # The `__getitem__` of torch's own `Dataset` only raises an error.
        length = None if getter_owner(dataset) in (None, Dataset) else _whole_length(dataset)
    except (TypeError, NotImplementedError):
        length = None
    if length is None:
        raise SourceError(_why_unordered(dataset, name))
    if length == 0:
        raise SourceError(f"{name} is empty: there is nothing to choose from. Check its folder, split or filter.")
    return length


def getter_owner(dataset: Any) -> type | None:
    """The class that defines the dataset's `__getitem__`, which may be a base class; None where no class does."""
    return next((owner for owner in type(dataset).__mro__ if "__getitem__" in vars(owner)), None)


def _whole_length(dataset: Any) -> int:
    """Number of samples of all ranks, also for classes whose `len` is the share of this rank, as DataLoaders want it."""
    homes = {
        owner.__module__.partition(".")[0] for owner in type(dataset).__mro__ if owner.__name__ == "StreamingDataset"
    }
    if "litdata" in homes:
        return sum(end - begin for begin, end in dataset.region_of_interest)
    return int(dataset.size) if "streaming" in homes else len(dataset)


def _why_unordered(dataset: Any, name: str) -> str:
    """The error message for a dataset that cannot be read by position, with the advice what to pass instead."""
    if isinstance(dataset, DataLoader) or (hasattr(dataset, "dataset") and hasattr(dataset, "batch_size")):
        return (
            f"{name} is a loader, which gives batches of a dataset: pass the dataset itself (loader.dataset) with batch_size= "
            "and the like, or the data module that makes the loader"
        )
    return (
        f"{name} can't be read by position (no __getitem__ and __len__), and is no stream that can be read twice: collect it "
        "into a list, or make it a torch IterableDataset, whose __iter__ starts at the beginning each time"
    )


def relative_paths(paths: list[str], root: str | None) -> list[str]:
    """Make paths of files relative to the root, with forward slashes; there must be at least one.

    When the root is None or a file lies outside of it, the deepest folder that holds all the files takes its place.

    Example:
        >>> relative_paths(["/data/cat/1.png", "/data/dog/2.png"], "/data")
        ['cat/1.png', 'dog/2.png']
    """
    prefix = root.rstrip(os.sep) + os.sep if root else ""
    # There may be a million paths, so the usual case avoids splitting each of them into its parts.
    if not prefix or not all(path.startswith(prefix) for path in paths):
        paths = [os.path.abspath(path) for path in paths]  # noqa: PTH100
        prefix = os.path.commonpath([os.path.dirname(path) for path in paths]).rstrip(os.sep) + os.sep  # noqa: PTH120
    cut = [path[len(prefix) :] for path in paths]
    return cut if os.sep == "/" else [PurePath(path).as_posix() for path in cut]
