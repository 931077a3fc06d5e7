"""Collect rows of features from any encoder, put each row at its position, and check that it is finite."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dq_lightning.core.console import progress_bar
from dq_lightning.core.errors import FeatureError
from dq_lightning.core.records import Features
from dq_lightning.core.resuming import Shards

Allocate = Callable[[str, tuple[int, int]], Tensor]
# Rows stay on the device until this many batches are done, because every copy to the host waits for the device.
BATCHES_PER_COPY = 16
NAMED_SAMPLES = 5


class Rows(NamedTuple):
    """Features of some samples, on any device.

    Attributes:
        positions: int64 [B] on the CPU, positions of the samples in the source.
        embedding: floating [B, D], embeddings of the samples.
        head_gradient: floating [B, C], loss gradients with respect to the logits, or None.
    """

    positions: Tensor
    embedding: Tensor
    head_gradient: Tensor | None = None


def allocate_in_memory(name: str, shape: tuple[int, int]) -> Tensor:
    """Return an uninitialized float32 tensor of the given shape in main memory."""
    return torch.empty(shape, dtype=torch.float32)


def collect(
    stream_of: Callable[[Tensor], Iterator[Rows]],
    num_samples: int,
    progress: bool,
    allocate: Allocate,
    advice: str,
    shards: Shards,
    made_from: str = "",
    left_out: Tensor | None = None,
) -> Features:
    """Copy the rows to the host, a block of batches at a time, and check that they are finite.

    `stream_of` is called with the positions of the missing samples, int64, ascending, and yields their rows, each once,
    in any order. `allocate` makes the float32 CPU tensor to fill, given its name and shape. The shards hold the rows of
    an earlier run, and the new ones are added to them; `made_from` is as in `Shards.restore`. The rows of the samples
    `left_out` (int64 [U], ascending) are zero. `advice` tells the user what to do about values that are not finite.

    Raises:
        FeatureError: a row is missing or not finite.
    """
    table = _Table(num_samples, allocate, shards)
    table.restore(made_from)
    skipped = torch.empty(0, dtype=torch.int64) if left_out is None else left_out
    table.seen[skipped] = True
    missing = (~table.seen).nonzero().flatten()
    with progress_bar(progress, total=num_samples, unit="sample", description="features") as bar:
        bar.update(num_samples - len(missing))
        for rows in stream_of(missing):
            table.add(rows)
            bar.update(len(rows.positions))
        table.copy()
    if not table.seen.all():
        raise FeatureError(f"the encoder gave no features for {int((~table.seen).sum())} of {num_samples} samples")
    check_finite(table.not_finite, num_samples, advice)
    for tensor in table.filled.values():
        tensor[skipped] = 0
    return Features(table.filled["embedding"], table.filled.get("head_gradient"), skipped)


def check_finite(not_finite: list[Tensor], num_samples: int, advice: str) -> None:
    """Check that no sample has features that are not finite; the tensors hold positions of such samples.

    Raises:
        FeatureError: there are such samples.
    """
    bad = torch.unique(torch.cat([torch.empty(0, dtype=torch.int64), *not_finite]))
    if len(bad):
        names = ", ".join(map(str, bad[:NAMED_SAMPLES].tolist()))
        raise FeatureError(
            f"{len(bad)} of {num_samples} samples have features that are NaN or infinite; the first are samples {names}. "
            f"{advice}"
        )


class _Table:
    """The rows that have been collected so far, tensors float32 [N, width] by name, and which are `seen`, bool [N].

    Samples whose rows are not finite are in no shard, because another run may make finite rows.
    """

    def __init__(self, num_samples: int, allocate: Allocate, shards: Shards) -> None:
        self.filled: dict[str, Tensor] = {}
        self.seen = torch.zeros(num_samples, dtype=torch.bool)
        self.not_finite: list[Tensor] = []
        self._allocate, self._shards = allocate, shards
        self._waiting: list[Rows] = []
        self._to_keep: list[Tensor] = []

    def restore(self, made_from: str) -> None:
        """Fill in the rows that an earlier run has stored."""
        for piece in self._shards.restore(len(self.seen), made_from):
            positions = torch.from_numpy(piece.pop("positions"))
            for name, rows in piece.items():
                self._fill(name, positions, torch.from_numpy(rows))
            self.seen[positions] = True

    def add(self, rows: Rows) -> None:
        """Add the rows of a batch; they are copied to the host after 16 batches or when a shard is due."""
        self._waiting.append(rows)
        due = self._shards.is_due()
        if due or len(self._waiting) == BATCHES_PER_COPY:
            self.copy()
        if due:
            positions = torch.cat(self._to_keep)
            arrays = {name: tensor[positions].numpy() for name, tensor in self.filled.items()}
            self._shards.keep(len(positions), {"positions": positions.numpy(), **arrays})
            self._to_keep.clear()

    def copy(self) -> None:
        """Copy the rows of the waiting batches to the host and fill them in."""
        by_device: dict[torch.device, list[Rows]] = {}
        for rows in self._waiting:
            by_device.setdefault(rows.embedding.device, []).append(rows)
        self._waiting.clear()
        for batches in by_device.values():
            self._copy(batches)

    def _copy(self, batches: list[Rows]) -> None:
        positions = torch.cat([rows.positions for rows in batches])
        finite = torch.ones(len(positions), dtype=torch.bool)
        for name in ("embedding", "head_gradient"):
            parts = [part for rows in batches if (part := getattr(rows, name)) is not None]
            if parts:
                block = torch.cat(parts).to("cpu", torch.float32)
                self._fill(name, positions, block)
                finite &= block.isfinite().all(dim=1)
        self.not_finite.append(positions[~finite])
        self._to_keep.append(positions[finite])
        self.seen[positions] = True

    def _fill(self, name: str, positions: Tensor, rows: Tensor) -> None:
        if name not in self.filled:
            self.filled[name] = self._allocate(name, (len(self.seen), rows.shape[1]))
        self.filled[name][positions] = rows
