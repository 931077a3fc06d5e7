"""What encoders need of a dataset. The sources of the package have all of it, and parts of a source have some."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class SampleSource(Protocol):
    """A dataset of images or of texts, which can be encoded; only the methods of its kind are called."""

    def __len__(self) -> int: ...

    def image(self, index: int, /) -> Image.Image:
        """Return the RGB image of a sample."""

    def decode_warning(self, index: int, /) -> str | None:
        """Return a warning if the sample's pixels may have been decoded wrongly, or None."""

    def texts(self, positions: Sequence[int], /) -> list[str]:
        """Return the texts of the samples at `positions`, in this order."""


class CheckedSource(SampleSource, Protocol):
    """A dataset of the modality `"image"` or `"text"`, whose samples can be checked one by one."""

    modality: str

    def check(self, index: int, /) -> None:
        """Read a sample and ignore the result; a `SourceError` is raised if it cannot be read."""


class OrderedSource(SampleSource, Protocol):
    """A stream: its samples are read in ascending order, and how many there are is known at its end."""

    def has(self, index: int, /) -> bool:
        """Whether there is a sample at a position; the reading goes on to it."""

    def plain(self, index: int, /) -> Any:
        """Return a sample without the user's transforms."""

    def digests(self, start: int, stop: int, /) -> NDArray[np.uint8]:
        """Return the first bytes of the digests of samples that were read, [stop - start, 8]."""
