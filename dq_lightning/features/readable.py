"""Find samples that cannot be read, in one pass over the source before features are made, for `on_error="skip"`."""

import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dq_lightning.core.console import progress_bar
from dq_lightning.core.errors import FeatureError, SourceError, may_pass
from dq_lightning.core.records import Labels
from dq_lightning.core.resuming import Shards
from dq_lightning.features.collect import NAMED_SAMPLES
from dq_lightning.features.loading import ImageBatch, ImageBatches, iterate_batches, split_at_multiples
from dq_lightning.features.samples import CheckedSource

logger = logging.getLogger("dq_lightning")
SAMPLES_AT_ONCE = 256


def find_unreadable(
    source: CheckedSource,
    *,
    positions: Tensor | None = None,
    num_workers: int | Literal["auto"] = "auto",
    progress: bool = True,
    shards: Shards | None = None,
) -> Tensor:
    """Read every sample once, and log one warning with the number of unreadable samples and the first few of them.

    Samples are read with `check(i)`, or for text with `texts(positions)`; only those at `positions`, ascending, if
    given. The shards hold the findings of an earlier run, and new ones are added to them. `num_workers` loader
    processes read images; `"auto"` chooses their number by the time that a few samples take.

    Returns:
        int64 [U], positions of the samples whose reading raised a SourceError, ascending.

    Raises:
        FeatureError: no sample can be read.
        SourceError: the failure may be temporary (a stale network file, no memory) and so is not due to the sample.
    """
    samples = torch.arange(len(source)) if positions is None else positions
    found = _found_in_all(source, samples, num_workers, progress, shards or Shards())
    if not found:
        return torch.empty(0, dtype=torch.int64)
    named = "; ".join(f"sample {index}: {text}" for index, text in found[:NAMED_SAMPLES])
    more = f"; and {len(found) - NAMED_SAMPLES} more" if len(found) > NAMED_SAMPLES else ""
    if len(found) == len(samples):
        raise FeatureError(f"none of the {len(samples)} samples can be read: {named}{more}")
    logger.warning(
        'on_error="skip": %d of %d samples can\'t be read and are left out: %s%s', len(found), len(samples), named, more
    )
    return torch.tensor([index for index, _ in found])


def without_labels(labels: Labels, samples: Tensor) -> Labels:
    """Return a copy of the labels in which the given samples, int64 positions, have no class."""
    values = labels.values.clone()
    values[samples] = labels.num_classes
    return Labels(values, labels.names, unlabeled=True)


def _found_in_all(
    source: CheckedSource, samples: Tensor, num_workers: int | Literal["auto"], progress: bool, shards: Shards
) -> list[tuple[int, str]]:
    """Return (position, error text) of each unreadable sample that an earlier run or this one has found."""
    found: list[tuple[int, str]] = []
    done = 0
    for piece in shards.restore(len(samples)):
        done, problems = json.loads(piece["json"].tobytes())
        found += problems
    kept, stored = done, len(found)
    with progress_bar(progress, total=len(samples), unit="sample", description="reading") as bar:
        bar.update(done)
        for count, problems in _problems(source, samples[done:], num_workers):
            found += problems
            done += count
            bar.update(count)
            if shards.is_due():
                text = json.dumps([done, found[stored:]]).encode()
                shards.keep(done - kept, {"json": np.frombuffer(text, np.uint8)})
                kept, stored = done, len(found)
    return found


def _problems(
    source: CheckedSource, samples: Tensor, num_workers: int | Literal["auto"]
) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """Yield for each batch the number of its samples and (position, error text) of its unreadable samples."""
    if source.modality == "text":
        for start in range(0, len(samples), SAMPLES_AT_ONCE):
            rows = samples[start : start + SAMPLES_AT_ONCE]
            yield len(rows), _problems_of_texts(source, rows.tolist())
    elif len(samples):
        tried = _TriedImages(source, _nothing, split_at_multiples(samples, SAMPLES_AT_ONCE))
        for members, batch in zip(tried.batches, iterate_batches(tried, num_workers, torch.device("cpu")), strict=True):
            yield len(members), batch.warnings


def _problems_of_texts(source: CheckedSource, rows: list[int]) -> list[tuple[int, str]]:
    try:
        source.texts(rows)
        return []
    except SourceError:
        return [(row, text) for row in rows if (text := _problem(source, row)) is not None]


def _problem(source: CheckedSource, index: int) -> str | None:
    """Return why a sample cannot be read, or None if it can; an error that may be temporary is raised."""
    try:
        source.check(index)
    except SourceError as error:
        if may_pass(error):
            raise
        return str(error)
    return None


def _nothing(image: Image.Image) -> Tensor:
    return torch.empty(0)


class _TriedImages(ImageBatches):
    """Batches whose samples are read and discarded; the warnings of a batch are its unreadable samples."""

    source: CheckedSource

    def __getitem__(self, batch: int) -> ImageBatch:
        texts = [(index, _problem(self.source, index)) for index in self.batches[batch].tolist()]
        return ImageBatch(torch.empty(0), [(index, text) for index, text in texts if text is not None])

    def prepare(self, index: int) -> Tensor:
        """Read one sample and ignore failures; `choose_num_workers` calls this to measure the time."""
        with suppress(SourceError):
            self.source.image(index)
        return torch.empty(0)
