"""Which samples can be read at all: one pass before the features, for `on_error="skip"`."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dq_lightning.core.console import progress_bar
from dq_lightning.core.errors import FeatureError, SourceError, may_pass
from dq_lightning.core.records import Labels
from dq_lightning.core.resuming import NothingKept, Shards
from dq_lightning.features.collect import NAMED_SAMPLES
from dq_lightning.features.loading import ImageBatch, ImageBatches, iterate_batches

logger = logging.getLogger("dq_lightning")
SAMPLES_AT_ONCE = 256


def find_unreadable(
    source: Any,
    *,
    positions: Tensor | None = None,
    num_workers: int | Literal["auto"] = "auto",
    progress: bool = True,
    shards: Shards | None = None,
) -> Tensor:
    """Read every sample once; what cannot be read is counted and the first few are named in one warning.

    Args:
        source: N samples: `check(i)` or `image(i)`, or for text `text(i)`.
        positions: int64 [n], ascending, of the samples that are read; None reads all.
        num_workers: loader processes for images; `"auto"` decides by the time a few samples take.
        progress: show a bar.
        shards: what an earlier run has found, and where this one keeps what it finds; None keeps nothing.

    Returns:
        int64 [U], ascending: the samples whose reading raised SourceError.

    Raises:
        FeatureError: no sample can be read.
        SourceError: a failure that may pass (a stale network file, no memory) and says nothing of the sample.
    """
    samples = torch.arange(len(source)) if positions is None else positions
    found = _found_in_all(source, samples, num_workers, progress, shards or NothingKept())
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
    """The same classes, some samples having none."""
    values = labels.values.clone()
    values[samples] = labels.num_classes
    return Labels(values, labels.names, unlabeled=True)


class Blanked:
    """A source of text in which some samples are empty, for encoders that ask for all."""

    def __init__(self, source: Any, samples: Tensor) -> None:
        self._source, self._blank = source, set(samples.tolist())

    def __len__(self) -> int:
        return len(self._source)

    def texts(self, positions: Sequence[int]) -> list[str]:
        """See `text_loading.TextSource`."""
        wanted = [position for position in positions if position not in self._blank]
        read = iter(self._source.texts(wanted) if wanted else [])
        return ["" if position in self._blank else next(read) for position in positions]


def _found_in_all(
    source: Any, samples: Tensor, num_workers: int | Literal["auto"], progress: bool, shards: Shards
) -> list[tuple[int, str]]:
    """Samples that cannot be read, and why, found by an earlier run or by this one."""
    found: list[tuple[int, str]] = []
    done = 0
    for piece in shards.restore(len(samples)):
        done, problems = json.loads(piece["json"].tobytes())
        found += problems
    kept, told = done, len(found)
    with progress_bar(progress, total=len(samples), unit="sample", description="reading") as bar:
        bar.update(done)
        for count, problems in _problems(source, samples[done:], num_workers):
            found += problems
            done += count
            bar.update(count)
            if shards.is_due():
                text = json.dumps([done, found[told:]]).encode()
                shards.keep(done - kept, {"json": np.frombuffer(text, np.uint8)})
                kept, told = done, len(found)
    return found


def _problems(
    source: Any, samples: Tensor, num_workers: int | Literal["auto"]
) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """Number of samples of each batch, and what is wrong with some of them."""
    if source.modality == "text":
        for start in range(0, len(samples), SAMPLES_AT_ONCE):
            rows = samples[start : start + SAMPLES_AT_ONCE]
            yield len(rows), _problems_of_texts(source, rows.tolist())
    elif len(samples):
        tried = _TriedImages(source, _nothing, SAMPLES_AT_ONCE, samples)
        for members, batch in zip(tried.batches, iterate_batches(tried, num_workers, torch.device("cpu")), strict=True):
            if batch.error is not None:
                raise batch.error
            yield len(members), batch.warnings


def _problems_of_texts(source: Any, rows: list[int]) -> list[tuple[int, str]]:
    try:
        source.texts(rows)
        return []
    except SourceError:
        return [(row, text) for row in rows if (text := _problem(source.text, row)) is not None]


def _problem(read: Any, index: int) -> str | None:
    """Why a sample cannot be read; an error that says nothing of the sample is raised."""
    try:
        read(index)
    except SourceError as error:
        if may_pass(error):
            raise
        return str(error)
    return None


def _nothing(image: Image.Image) -> Tensor:
    return torch.empty(0)


class _TriedImages(ImageBatches):
    """Batches in which each image is read and let go; the warnings of a batch say what could not be read."""

    def __getitem__(self, batch: int) -> ImageBatch:
        try:
            # what is packed holds more than the image, and must be readable as a whole
            read = getattr(self.source, "check", self.source.image)
            texts = [(index, _problem(read, index)) for index in self.batches[batch].tolist()]
        except SourceError as error:
            return ImageBatch(None, [], error)
        return ImageBatch(None, [(index, text) for index, text in texts if text is not None], None)

    def prepare(self, index: int) -> Tensor:
        """Read one sample, whether or not that works: it is timed."""
        with suppress(SourceError):
            self.source.image(index)
        return torch.empty(0)
