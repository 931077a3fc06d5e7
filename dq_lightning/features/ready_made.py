"""Ready-made embeddings, given as an array or a `.npy` file instead of an encoder."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from dq_lightning.cache.digests import DigestMemory
from dq_lightning.core.arrays import as_numpy
from dq_lightning.core.config import Precision
from dq_lightning.core.errors import FeatureError
from dq_lightning.features.collect import Rows
from dq_lightning.features.origins import EncoderSpec
from dq_lightning.features.samples import SampleSource

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class ReadyOrigin(EncoderSpec):
    """Ready-made embeddings, floating [N, D], as an array in memory or as a `.npy` file; the other of both is None."""

    path: Path | None = None
    array: Any = field(default=None, repr=False, compare=False)
    reads_samples: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False

    def identity(self, memory: DigestMemory) -> str | None:
        """Return a digest of the content; an array has the digest of the file that `numpy.save` would write of it."""
        return f"ready-made:{memory.file(self.path) if self.path is not None else digest_of_npy(self._open())}"

    def _load(self, device: torch.device, precision: Precision) -> "ReadyRows":
        return ReadyRows(self._open(), self.description)

    def _open(self) -> np.ndarray[Any, Any]:
        """Return the embeddings as a NumPy array, a file memory-mapped; FeatureError if they are not floating [N, D]."""
        if self.path is None:
            array = as_numpy(self.array)
        else:
            try:
                array = np.load(self.path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise FeatureError(
                    f"{self.path} can't be read as a numpy array: {error}; write it with numpy.save"
                ) from error
        if array.ndim != 2 or array.dtype.kind != "f" or 0 in array.shape:
            raise FeatureError(
                f"{self.description} must be floating numbers [N, D], one row a sample, got {array.dtype} "
                f"{list(array.shape)}; convert them first"
            )
        return array


class ReadyRows:
    """An encoder that returns the rows of ready-made embeddings; see `encoders.RowEncoder`."""

    num_classes: None = None

    def __init__(self, array: np.ndarray[Any, Any], name: str) -> None:
        self._array, self._name = array, name
        self.advice = f"Repair these rows of {name}, or leave the samples out"

    def rows(
        self,
        source: SampleSource,
        batch_size: int,
        num_workers: int | Literal["auto"],
        api_embeddings: Path | None,
        positions: Tensor,
    ) -> Iterator[Rows]:
        """Yield the rows in order, 4096 at a time.

        Raises:
            FeatureError: the number of rows is not the number of samples.
        """
        if len(self._array) != len(source):
            raise FeatureError(
                f"{self._name} has {len(self._array):,} rows, but the dataset has {len(source):,} samples: pass the embeddings "
                "of exactly these samples, in their order"
            )
        for some in torch.split(positions, ROWS_AT_ONCE):
            # float64 numbers beyond the range of float32 become infinite, which `collect` reports.
            with np.errstate(over="ignore"):
                block = self._array[some.numpy()].astype(np.float32)
            yield Rows(some, torch.from_numpy(block))


def is_ready_made(encoder: Any) -> bool:
    """Return whether `encoder` is an array, a tensor, or the name of a `.npy` file."""
    if isinstance(encoder, str | Path):
        return str(encoder).lower().endswith(".npy")
    return isinstance(encoder, np.ndarray | Tensor)


def ready_origin(encoder: Any) -> ReadyOrigin:
    """Return the origin of an `encoder` argument that `is_ready_made` accepts.

    Raises:
        FeatureError: the file does not exist or cannot be read, or the array is not floating [N, D].
    """
    if not isinstance(encoder, str | Path):
        origin = ReadyOrigin("ready-made", "the given embeddings", array=encoder)
    else:
        path = Path(encoder).expanduser().absolute()
        if not path.is_file():
            raise FeatureError(f"encoder={str(encoder)!r}: there is no such file")
        origin = ReadyOrigin("ready-made", f"ready-made embeddings in {path}", path)
    origin._open()
    return origin


def digest_of_npy(array: np.ndarray[Any, Any]) -> str:
    """Return the hexadecimal SHA-256 of the bytes that `numpy.save` would write of the array."""
    digest = hashlib.sha256()
    file: Any = SimpleNamespace(write=digest.update)
    np.lib.format.write_array(file, array, allow_pickle=False)
    return digest.hexdigest()
