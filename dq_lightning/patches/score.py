"""The loop over images: a score of every patch of every image, whatever sizes the images have."""

import hashlib
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dq_lightning.core.console import progress_bar
from dq_lightning.core.errors import DQError, PatchError
from dq_lightning.core.handles import FORK
from dq_lightning.core.records import Grid
from dq_lightning.core.resuming import NothingKept, Shards
from dq_lightning.patches.saliency import PatchScorer

logger = logging.getLogger("dq_lightning")
# images of other sizes than the batch's wait for company, but not without limit
WAITING_BATCHES = 8


class ImageSource(Protocol):
    """What the loop needs of a dataset."""

    def image(self, index: int, /) -> Image.Image:
        """RGB image of a sample."""
        ...


class _Read(NamedTuple):
    """An image uint8 [3, H, W], or why there is none."""

    image: Tensor | None
    error: Exception | None


class _Images(Dataset[_Read]):
    def __init__(self, source: ImageSource, index: Tensor) -> None:
        self._source, self._index = source, index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, place: int) -> _Read:
        try:
            pixels = np.array(self._source.image(int(self._index[place])))
            return _Read(torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), None)
        except Exception as error:
            # returned, not raised: the loader would bury it under its own traceback
            return _Read(None, error)


def score_images(
    source: ImageSource,
    index: Tensor,
    scorer: PatchScorer,
    patch_size: int,
    *,
    labels: Tensor | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
    shards: Shards | None = None,
) -> tuple[Tensor, Tensor]:
    """Score every patch of some images of a source.

    Images of one size share a batch; when the GPU's memory is short the batch is halved. No score depends on either.

    Args:
        source: gives RGB images by position.
        index: int64 [M], positions.
        scorer: on `device`.
        patch_size: P in pixels.
        labels: int64 [M], class of each of these images, or None.
        device: of the scorer.
        batch_size: images a step.
        num_workers: loader processes.
        progress: show a bar.
        shards: where finished scores are kept, so that a killed run goes on with what is missing; None keeps nothing.

    Returns:
        scores float32 [sum of L_i], image after image, and sizes int32 [M, 2], height and width of every image.

    Raises:
        SourceError: an image cannot be read; as the source raised it.
        PatchError: scores are not finite; names the sample.
    """
    table = _Scores(len(index), patch_size, shards or NothingKept())
    stepper = _HalvedBatch(scorer, patch_size, torch.device(device))
    with progress_bar(progress, total=len(index), unit="img", description="saliency") as bar:
        missing = table.restore(made_from=hashlib.sha256(index.numpy().tobytes()).hexdigest())
        bar.update(len(index) - len(missing))
        reads = zip(missing, _read_all(_Images(source, index[missing]), num_workers), strict=True)
        for places, images in _batches(reads, batch_size):
            chosen = torch.tensor(places)
            batch_labels = None if labels is None else labels[chosen]
            scores = stepper.scores(images, batch_labels, index[chosen]).float().cpu()
            if not bool(scores.isfinite().all()):
                bad = int((~scores.isfinite().all(1)).nonzero()[0])
                raise PatchError(
                    f"the saliency of sample {int(index[places[bad]])} is not finite: look at its pixels, or use "
                    'saliency="variance"'
                )
            table.add(places, scores, (images.shape[2], images.shape[3]))
            bar.update(len(places))
    return torch.cat([torch.empty(0), *table.rows]), table.sizes


class _Scores:
    """The scores that are there.

    Attributes:
        rows: float32 [L_i] of every image, empty before it is scored.
        sizes: int32 [M, 2], heights and widths.
    """

    def __init__(self, num_images: int, patch_size: int, shards: Shards) -> None:
        self.rows: list[Tensor] = [torch.empty(0)] * num_images
        self.sizes = torch.zeros(num_images, 2, dtype=torch.int32)
        self._patch_size, self._shards = patch_size, shards
        self._to_keep: list[int] = []

    def restore(self, made_from: str) -> list[int]:
        """Take over what an earlier run has kept; the places of the images that are missing."""
        for piece in self._shards.restore(len(self.rows), made_from):
            places = piece["places"].tolist()
            sizes = torch.from_numpy(piece["sizes"])
            self.sizes[places] = sizes
            for place, row in zip(
                places, split_scores(torch.from_numpy(piece["scores"]), sizes, self._patch_size), strict=True
            ):
                self.rows[place] = row
        return [place for place, row in enumerate(self.rows) if not len(row)]

    def add(self, places: list[int], scores: Tensor, size: tuple[int, int]) -> None:
        self.sizes[places] = torch.tensor(size, dtype=torch.int32)
        for place, row in zip(places, scores, strict=True):
            self.rows[place] = row
        self._to_keep += places
        if self._shards.is_due():
            kept = self._to_keep
            arrays = {
                "places": torch.tensor(kept).numpy(),
                "sizes": self.sizes[kept].numpy(),
                "scores": torch.cat([self.rows[place] for place in kept]).numpy(),
            }
            self._shards.keep(len(kept), arrays)
            self._to_keep = []


def split_scores(scores: Tensor, sizes: Tensor, patch_size: int) -> list[Tensor]:
    """The inverse of the concatenation in `score_images`: for every image a view [L_i]."""
    counts = [Grid(height, width, patch_size).num_patches for height, width in sizes.tolist()]
    return list(torch.split(scores, counts)) if counts else []


def _read_all(images: _Images, num_workers: int) -> Iterator[_Read]:
    context: Any = FORK if num_workers else None
    yield from DataLoader(
        images,
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context=context,
        # a generator of its own: without one the loader draws its seed from the global one
        generator=torch.Generator().manual_seed(0),
    )


def _batches(reads: Iterator[tuple[int, _Read]], batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
    """Places and images [B, 3, H, W] of one size, B at most `batch_size`.

    Without the images of the first batches, the reads give the other batches unchanged: what they hold has waited for as long.
    """
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    held = 0
    for place, (image, error) in reads:
        if error is not None:
            raise error
        assert image is not None
        alike = waiting.setdefault(tuple(image.shape), [])
        alike.append((place, image))
        held += 1
        if len(alike) == batch_size or held > WAITING_BATCHES * batch_size:
            ready = waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
            held -= len(ready)
            yield [place for place, _ in ready], torch.stack([image for _, image in ready])
    for ready in waiting.values():
        yield [place for place, _ in ready], torch.stack([image for _, image in ready])


class _HalvedBatch:
    """Scores in pieces of the largest size that the device's memory has held so far."""

    def __init__(self, scorer: PatchScorer, patch_size: int, device: torch.device) -> None:
        self._scorer, self._patch_size, self._device = scorer, patch_size, device
        self._limit: int | None = None

    def scores(self, images: Tensor, labels: Tensor | None, positions: Tensor) -> Tensor:
        pieces: list[Tensor] = []
        done = 0
        while done < len(images):
            part = slice(done, done + (self._limit or len(images)))
            found = self._try(images[part], None if labels is None else labels[part], positions[part])
            if found is None:
                size = len(images[part])
                if size == 1:
                    raise DQError('one image alone exceeds the GPU\'s memory; free some, or pass device="cpu"')
                self._limit = size // 2
                logger.warning("saliency: GPU memory is short; going on with %d images a step", self._limit)
                torch.cuda.empty_cache()
                continue
            pieces.append(found)
            done += len(found)
        return torch.cat(pieces)

    def _try(self, images: Tensor, labels: Tensor | None, positions: Tensor) -> Tensor | None:
        # the error's traceback holds the activations, so it must be gone before memory is released
        try:
            moved = images.to(self._device, non_blocking=True)
            own = None if labels is None else labels.to(self._device)
            return self._scorer.scores(moved, own, positions, self._patch_size)
        except torch.OutOfMemoryError:
            return None
