"""Saves packed samples in shards while a store is written, so that a killed run can continue."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dq_lightning.cache import files
from dq_lightning.core.resuming import Array, Shards

Buffer = bytes | memoryview
# The row of a sample in each column, and the encoding of everything that is in no column.
EncodedSample = tuple[Sequence[Buffer], Buffer]

# A shard is held in memory until it is saved, so its size is limited.
MAX_BYTES = 256 << 20


class UnsavedSamples:
    """Samples that are written to the store but not yet saved in a shard.

    Args:
        shards: where shards are saved; None saves nothing.
        grain: the number of samples in each shard is a multiple of this number. So whatever is computed in batches is
            computed in the same batches when a run continues.
    """

    def __init__(self, shards: Shards | None, grain: int = 1) -> None:
        self._shards, self._grain = shards, grain
        self._clear()

    def _clear(self) -> None:
        self._columns: dict[int, bytearray] = {}
        self._values = bytearray()
        self._lengths: list[int] = []
        self._size = 0

    def add(self, columns: dict[int, bytes], values: bytes, lengths: list[int]) -> None:
        """Add samples: their bytes in each column, in order, and those in values.bin with the length of each."""
        if self._shards is None:
            return
        for number, rows in columns.items():
            self._columns.setdefault(number, bytearray()).extend(rows)
        self._values += values
        self._lengths += lengths
        self._size += len(values) + sum(map(len, columns.values()))

    def is_due(self, more: int) -> bool:
        """Return whether a shard is to be saved once so many more samples are added. This call is cheap."""
        if self._shards is None or (len(self._lengths) + more) % self._grain:
            return False
        return self._size >= MAX_BYTES or self._shards.is_due()

    def keep(self, facts: dict[str, Any]) -> None:
        """Save the samples in a shard; `facts` is the layout of all samples so far, as plain JSON."""
        assert self._shards is not None
        arrays = {
            "facts": np.frombuffer(files.canonical_json(facts).encode(), np.uint8),
            "lengths": np.array(self._lengths, "<i8"),
            "values": np.frombuffer(self._values, np.uint8),
        }
        arrays |= {f"column-{number}": np.frombuffer(rows, np.uint8) for number, rows in self._columns.items()}
        self._shards.keep(len(self._lengths), arrays)
        self._clear()


def facts_of(piece: dict[str, Array]) -> dict[str, Any]:
    """Return the layout that was saved in a shard."""
    found: dict[str, Any] = json.loads(piece["facts"].tobytes())
    return found


def arrays_of(samples: Sequence[EncodedSample]) -> dict[str, Array]:
    """Return the arrays of which `samples_of` makes the same samples again."""
    arrays: dict[str, Array] = {
        "lengths": np.array([len(value) for _, value in samples], "<i8"),
        "values": np.frombuffer(b"".join(value for _, value in samples), np.uint8),
    }
    for number, rows in enumerate(zip(*(rows for rows, _ in samples), strict=True)):
        arrays[f"column-{number}"] = np.frombuffer(b"".join(rows), np.uint8)
    return arrays


def samples_of(piece: dict[str, Array], row_bytes: Sequence[int]) -> Iterator[EncodedSample]:
    """Yield the rows and the value of each sample in a shard; `row_bytes` is 0 where a leaf has no column."""
    columns = [piece[f"column-{number}"].data if width else memoryview(b"") for number, width in enumerate(row_bytes)]
    values, end = piece["values"].data, 0
    for number, length in enumerate(piece["lengths"].tolist()):
        start, end = end, end + length
        rows = [column[number * width : (number + 1) * width] for column, width in zip(columns, row_bytes, strict=True)]
        yield rows, values[start:end]
