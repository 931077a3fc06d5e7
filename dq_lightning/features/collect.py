"""Rows of features from wherever they come, each to its place, checked to be finite."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dq_lightning.errors import FeatureError
from dq_lightning.progress import progress_bar
from dq_lightning.records import Features

Allocate = Callable[[str, tuple[int, int]], Tensor]
# rows stay on the device until so many batches are done, because every copy to the host waits for the device
BATCHES_PER_COPY = 16
NAMED_SAMPLES = 5


class Rows(NamedTuple):
    """Features of some samples, on any device.

    Attributes:
        positions: int64 [B] on the CPU, the samples.
        embedding: floating [B, D].
        head_gradient: floating [B, C], or None.
    """

    positions: Tensor
    embedding: Tensor
    head_gradient: Tensor | None = None


def allocate_in_memory(name: str, shape: tuple[int, int]) -> Tensor:
    """An empty float32 tensor."""
    return torch.empty(shape, dtype=torch.float32)


def collect(stream: Iterator[Rows], num_samples: int, progress: bool, allocate: Allocate, advice: str) -> Features:
    """Copy the rows to the host, a block of batches at a time, and check that they are finite.

    Args:
        stream: rows of every sample, each once, in any order.
        num_samples: N.
        progress: show a bar.
        allocate: makes the float32 CPU tensor to fill.
        advice: what to do about values that are not finite.

    Raises:
        FeatureError: a row is not finite, or missing.
    """
    filled: dict[str, Tensor] = {}
    waiting: list[Rows] = []
    not_finite: list[Tensor] = []
    seen = torch.zeros(num_samples, dtype=torch.bool)

    def copy() -> None:
        positions = torch.cat([rows.positions for rows in waiting])
        for name in ("embedding", "head_gradient"):
            parts = [part for rows in waiting if (part := getattr(rows, name)) is not None]
            if not parts:
                continue
            block = torch.cat(parts)
            if name not in filled:
                filled[name] = allocate(name, (num_samples, block.shape[1]))
            block = block.to("cpu", torch.float32)
            filled[name][positions] = block
            not_finite.append(positions[~block.isfinite().all(dim=1)])
        seen[positions] = True
        waiting.clear()

    with progress_bar(progress, total=num_samples, unit="sample", description="features") as bar:
        for rows in stream:
            waiting.append(rows)
            if len(waiting) == BATCHES_PER_COPY:
                copy()
            bar.update(len(rows.positions))
        if waiting:
            copy()
    if not seen.all():
        raise FeatureError(f"the encoder gave no features of {int((~seen).sum())} of {num_samples} samples")
    _check_finite(torch.unique(torch.cat(not_finite)), num_samples, advice)
    return Features(filled["embedding"], filled.get("head_gradient"))


def _check_finite(bad: Tensor, num_samples: int, advice: str) -> None:
    if len(bad) == 0:
        return
    names = ", ".join(str(int(index)) for index in bad[:NAMED_SAMPLES])
    raise FeatureError(
        f"{len(bad)} of {num_samples} samples have features that are NaN or infinite; the first are samples {names}. {advice}"
    )
