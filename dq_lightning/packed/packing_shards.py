"""Samples of a packed store in the form that they are written in, kept for a run that goes on."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dq_lightning.cache import files
from dq_lightning.core.resuming import Array, Shards

# a shard is held in memory until it is kept
MOST_BYTES = 256 << 20


class Unkept:
    """Written samples that no shard holds yet.

    Args:
        shards: where they are kept; None keeps nothing.
        grain: shards end after multiples of so many samples, so that what is made by the batch is made in the same batches.
    """

    def __init__(self, shards: Shards | None, grain: int = 1) -> None:
        self._shards, self._grain = shards, grain
        self._clear()

    def _clear(self) -> None:
        self._columns: dict[int, bytearray] = {}
        self._values = bytearray()
        self._lengths: list[int] = []

    def add(self, rows: Sequence[bytes], value: bytes, facts: Callable[[], dict[str, Any]]) -> None:
        """Take a sample: its row in each column and its value; `facts` gives those that hold for all samples so far."""
        if self._shards is None:
            return
        for number, row in enumerate(rows):
            if row:
                self._columns.setdefault(number, bytearray()).extend(row)
        self._values += value
        self._lengths.append(len(value))
        if len(self._lengths) % self._grain:
            return
        size = len(self._values) + sum(map(len, self._columns.values()))
        if size >= MOST_BYTES or self._shards.is_due():
            arrays = {
                "facts": np.frombuffer(files.canonical_json(facts()).encode(), np.uint8),
                "lengths": np.array(self._lengths, "<i8"),
                "values": np.frombuffer(self._values, np.uint8),
            }
            arrays |= {f"column-{number}": np.frombuffer(rows, np.uint8) for number, rows in self._columns.items()}
            self._shards.keep(len(self._lengths), arrays)
            self._clear()


def facts_of(piece: dict[str, Array]) -> dict[str, Any]:
    """The facts in a shard."""
    found: dict[str, Any] = json.loads(piece["facts"].tobytes())
    return found


def samples_of(piece: dict[str, Array], row_bytes: Sequence[int]) -> Any:
    """For each sample in a shard its rows, one a column of the given widths (0: no column), and its value."""
    columns = [piece[f"column-{number}"].data if width else memoryview(b"") for number, width in enumerate(row_bytes)]
    values, end = piece["values"].data, 0
    for number, length in enumerate(piece["lengths"].tolist()):
        start, end = end, end + length
        rows = [column[number * width : (number + 1) * width] for column, width in zip(columns, row_bytes, strict=True)]
        yield rows, values[start:end]
