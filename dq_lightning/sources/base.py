"""The protocol through which the other packages see every dataset (`Source`), and helpers that all adapters share."""

import os
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dq_lightning.core.errors import SourceError
from dq_lightning.core.records import DigestMemory, EncodedImage, Labels


class Finisher(Protocol):
    """Turns a plain item into the item that the dataset delivers.

    A finisher is small and picklable: it holds the user's transforms, but no data.
    """

    def __call__(self, position: int, plain_item: Any) -> Any:
        """Finish one plain item.

        Args:
            position: position of the sample in the index that the finisher was made for.
            plain_item: the item without the user's transforms.

        Returns:
            The item as the dataset delivers it.
        """
        ...


@runtime_checkable
class Source(Protocol):
    """Any dataset of images or text rows, in the one form that the other packages use.

    Positions run from 0 to `len(source) - 1`.

    Attributes:
        modality: `"image"` or `"text"`. A source of text has `texts(positions)` in place of `image(i)`; see
            `text.TextRows`.
        identity_is_certain: False when the dataset holds state that cannot be inspected. `quick_digest` may then return
            the digest of older content.
    """

    modality: str

    @property
    def identity_is_certain(self) -> bool: ...

    def __len__(self) -> int: ...

    def describe(self) -> str:
        """One line that names the dataset in messages, for instance `CIFAR10 with 50,000 samples`."""
        ...

    def image(self, index: int) -> Image.Image:
        """The image as the encoder sees it: a PIL image of mode RGB (uint8), without the user's transforms."""
        ...

    def decode_warning(self, index: int) -> str | None:
        """Warn of an image that is known to be decoded wrongly, judged from the file's header alone.

        Returns:
            A message that names the index and, where there is one, the path; None when no problem is known.
        """
        ...

    def labels(self) -> Labels | None:
        """The class of every sample, or None when the targets are not classes."""
        ...

    def plain(self, index: int) -> Any:
        """The item in the dataset's own structure, without the user's transforms."""
        ...

    def encoded(self, index: int) -> EncodedImage | None:
        """The encoded bytes of the image file as the dataset holds them, or None when it holds none."""
        ...

    def sample_id(self, index: int) -> str:
        """Name of the sample: its relative path in a dataset of files, else its position as a decimal number."""
        ...

    def delivered(self, index: int) -> Any:
        """The item exactly as the wrapped dataset gives it, transforms included."""
        ...

    def subset(self, index: Tensor) -> Dataset[Any]:
        """A map-style dataset that delivers the samples at `index` (int64 [M]) as the wrapped dataset would."""
        ...

    def finisher(self, index: Tensor) -> Finisher:
        """The finisher that turns plain items of the samples at `index` (int64 [M]) into delivered items."""
        ...

    def digest(self, memory: DigestMemory) -> str:
        """Hexadecimal digest of the content, independent of where the data lie and of the user's transforms.

        Args:
            memory: digests that were computed earlier, which this method uses and adds to.
        """
        ...

    def quick_digest(self, memory: DigestMemory) -> str | None:
        """The result of `digest` where it is cheap to compute or remembered, else None."""
        ...

    def check_repeatable(self) -> None:
        """Check that reading a plain item twice gives the same content.

        Raises:
            SourceError: two reads of the same plain item differ.
        """
        ...


class Positions(Sequence[int]):
    """Positions stored in one int64 array.

    Forked worker processes share the memory pages of such an array, whereas they would copy those of a list.

    Args:
        index: the positions, int64 [N].
    """

    def __init__(self, index: Tensor | NDArray[np.int64] | Sequence[int]) -> None:
        self.array: NDArray[np.int64] = np.asarray(index, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return Positions(self.array[place])
        return int(self.array[place])


def dataset_length(dataset: Any) -> int:
    """Number of samples of a map-style dataset.

    Raises:
        SourceError: the dataset is a stream, has no `__getitem__` or no length, or is empty.
    """
    name = type(dataset).__name__
    streaming = isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__getitem__")
    try:
        length = None if streaming else len(dataset)
    except (TypeError, NotImplementedError):
        length = None
    if length is None:
        raise SourceError(_why_unordered(dataset, name))
    if length == 0:
        raise SourceError(f"{name} is empty: there is nothing to choose from. Check its folder, split or filter.")
    return length


def _why_unordered(dataset: Any, name: str) -> str:
    """The error message for a dataset that cannot be read by position, with the advice what to pass instead."""
    if isinstance(dataset, DataLoader) or (hasattr(dataset, "dataset") and hasattr(dataset, "batch_size")):
        return (
            f"{name} is a loader, which gives batches of a dataset: pass the dataset itself (loader.dataset) with batch_size= "
            "and the like, or the data module that makes the loader"
        )
    if type(dataset).__module__.startswith("litdata"):
        return (
            f"{name} of litdata is read as a stream, but every sample must be compared with every other: pass the dataset that "
            "it was made from, or collect its samples into a list, if they fit into memory"
        )
    return (
        f"{name} can't be read by position (a stream, or no __getitem__ and __len__), but every sample must be compared "
        "with every other. Load it as a map-style dataset: streaming=False for Hugging Face, or collect it into a list."
    )


def relative_paths(paths: list[str], root: str | None) -> list[str]:
    """Make paths relative to the root, with forward slashes.

    Example:
        >>> relative_paths(["/data/cat/1.png", "/data/dog/2.png"], "/data")
        ['cat/1.png', 'dog/2.png']

    Args:
        paths: paths of files; there must be at least one.
        root: folder that the results are relative to. When it is None or a file lies outside of it, the deepest folder
            that holds all the files takes its place.
    """
    prefix = root.rstrip(os.sep) + os.sep if root else ""
    # There may be a million paths, so the usual case avoids splitting each of them into its parts.
    if not prefix or not all(path.startswith(prefix) for path in paths):
        paths = [os.path.abspath(path) for path in paths]  # noqa: PTH100
        prefix = os.path.commonpath([os.path.dirname(path) for path in paths]).rstrip(os.sep) + os.sep  # noqa: PTH120
    cut = [path[len(prefix) :] for path in paths]
    return cut if os.sep == "/" else [PurePath(path).as_posix() for path in cut]
