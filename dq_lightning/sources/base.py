"""What every dataset looks like to the other stations."""

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
    """Turns a plain item into what the dataset delivers; small and picklable, holds transforms but no data."""

    def __call__(self, position: int, plain_item: Any) -> Any:
        """Finish the plain item at a position of the index that the finisher was made for."""
        ...


@runtime_checkable
class Source(Protocol):
    """Any dataset of images or text rows, seen the one way the stations need. Positions run from 0 to `len(source) - 1`.

    Attributes:
        modality: `"image"`, or `"text"`: then there is `texts(positions)` in place of `image(i)`; see `text.TextRows`.
        identity_is_certain: False when the dataset holds state that can't be looked into, so that `quick_digest` may
            recall the digest of older content.
    """

    modality: str

    @property
    def identity_is_certain(self) -> bool: ...

    def __len__(self) -> int: ...

    def describe(self) -> str:
        """One line for messages: `CIFAR10 with 50,000 samples`."""
        ...

    def image(self, index: int) -> Image.Image:
        """The image as the encoder sees it: mode RGB, uint8, without the user's transforms."""
        ...

    def decode_warning(self, index: int) -> str | None:
        """A decode known to be wrong for this sample, naming index and path, from the file's header alone; or None."""
        ...

    def labels(self) -> Labels | None:
        """The class of every sample, or None when the targets are no classes."""
        ...

    def plain(self, index: int) -> Any:
        """The item in the dataset's own structure, without the user's transforms."""
        ...

    def encoded(self, index: int) -> EncodedImage | None:
        """The image's encoded bytes as the dataset holds them, or None."""
        ...

    def sample_id(self, index: int) -> str:
        """Relative path for file datasets, else the position."""
        ...

    def delivered(self, index: int) -> Any:
        """Exactly what the wrapped dataset gives, transforms included."""
        ...

    def subset(self, index: Tensor) -> Dataset[Any]:
        """Map-style dataset that delivers the samples at `index` (int64 [M]) as the wrapped dataset would."""
        ...

    def finisher(self, index: Tensor) -> Finisher:
        """What makes delivered items of plain ones for the samples at `index` (int64 [M])."""
        ...

    def digest(self, memory: DigestMemory) -> str:
        """Identity by content: hexadecimal, independent of where the data lies and of the user's transforms."""
        ...

    def quick_digest(self, memory: DigestMemory) -> str | None:
        """The same where it is cheap or remembered, else None."""
        ...

    def check_repeatable(self) -> None:
        """Raise SourceError when two reads of the same plain item differ."""
        ...


class Positions(Sequence[int]):
    """Positions in one int64 array: worker processes share its pages, where a list would be copied."""

    def __init__(self, index: Tensor | NDArray[np.int64] | Sequence[int]) -> None:
        self.array: NDArray[np.int64] = np.asarray(index, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return Positions(self.array[place])
        return int(self.array[place])


def dataset_length(dataset: Any) -> int:
    """Number of samples.

    Raises:
        SourceError: the dataset is a stream, has no length, or is empty.
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
    """Why samples cannot be read by position, and what to pass."""
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
    """Paths below the root (or below their common folder when some lie elsewhere), with forward slashes."""
    prefix = root.rstrip(os.sep) + os.sep if root else ""
    # a million paths: the usual case must not take each of them apart
    if not prefix or not all(path.startswith(prefix) for path in paths):
        paths = [os.path.abspath(path) for path in paths]  # noqa: PTH100
        prefix = os.path.commonpath([os.path.dirname(path) for path in paths]).rstrip(os.sep) + os.sep  # noqa: PTH120
    cut = [path[len(prefix) :] for path in paths]
    return cut if os.sep == "/" else [PurePath(path).as_posix() for path in cut]
