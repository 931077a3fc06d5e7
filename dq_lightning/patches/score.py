"""Loops over images of any sizes and computes a score for every patch of each image."""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from dq_lightning.core.arrays import image_to_uint8
from dq_lightning.core.batching import HalvedBatches
from dq_lightning.core.console import progress_bar
from dq_lightning.core.errors import PatchError
from dq_lightning.core.handles import Items, read_in_order
from dq_lightning.core.records import Grid
from dq_lightning.core.replicas import run_in_order
from dq_lightning.core.resuming import Shards
from dq_lightning.core.sharing import Arrays, Job, Sharing
from dq_lightning.patches.saliency import PatchScorer

# Images of one size share a batch if they are in the same window of so many batches.
WINDOW_BATCHES = 4


class ImageSource(Protocol):
    """What the loop needs of a dataset: images by position."""

    def image(self, index: int, /) -> Image.Image:
        """Return the RGB image of a sample."""


def _image(source: ImageSource, index: Tensor, place: int) -> Tensor:
    return image_to_uint8(source.image(int(index[place]))).contiguous()


class Scored(NamedTuple):
    """Scores of the patches of a batch of images of one size.

    Attributes:
        places: int64 [B], places of the images among those that are scored.
        scores: float32 [B, L].
        size: int64 [2], height and width of the images in pixels.
    """

    places: Tensor
    scores: Tensor
    size: Tensor


@dataclass(frozen=True)
class ScoreLoop:
    """The loop that reads images and scores their patches.

    Attributes:
        source: dataset of the images.
        index: int64 [M], positions of the images to score.
        scorer: scorer on the first device; each other device gets a replica. Its target layer is known, see
            `PatchScorer.replica`.
        patch_size: side of a patch in pixels.
        labels: int64 [M], classes of these images, or None.
        devices: devices that share the batches.
        batch_size: most images of a batch.
        num_workers: number of loader processes.
    """

    source: ImageSource
    index: Tensor
    scorer: PatchScorer
    patch_size: int
    labels: Tensor | None = None
    devices: Sequence[torch.device] = (torch.device("cpu"),)
    batch_size: int = 64
    num_workers: int = 0

    def windows(self, missing: Tensor) -> list[list[int]]:
        """Split places, int64 ascending, into the windows inside which images are batched.

        No window crosses a multiple of its size, so images that are left out change the batches of no other window.
        """
        _, counts = torch.unique_consecutive(missing // (WINDOW_BATCHES * self.batch_size), return_counts=True)
        return [part.tolist() for part in torch.split(missing, counts.tolist())]

    def scored(self, missing: Tensor, numbers: Iterator[int]) -> Iterator[Scored]:
        """Yield the batches of the numbered windows of the images at some places.

        Raises:
            SourceError: if an image cannot be read; it is raised as the source raised it.
            PatchError: if scores are not finite, and the message names the sample; or if one image alone exceeds the
                GPU's memory.
        """
        scorers = [self.scorer, *(self.scorer.replica(device) for device in self.devices[1:])]
        replicas = [
            (device, partial(self._score, one, device, HalvedBatches("saliency", PatchError)))
            for device, one in zip(self.devices, scorers, strict=True)
        ]
        yield from run_in_order(replicas, self._batches(self.windows(missing), numbers))

    def packed(self, missing: Tensor, numbers: Iterator[int]) -> Iterator[Arrays]:
        """Yield what `scored` does as arrays, of which `unpacked` makes the same again."""
        return ({name: part.numpy() for name, part in some._asdict().items()} for some in self.scored(missing, numbers))

    def _batches(self, windows: list[list[int]], numbers: Iterator[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of the numbered windows: places int64 [B], and images [B, 3, H, W] of one size.

        If a run continues without the images of the first batches, the other batches come out unchanged.
        """
        asked = deque[tuple[int, bool]]()

        def places() -> Iterator[int]:
            for number in numbers:
                asked.extend((place, place == windows[number][-1]) for place in windows[number])
                yield from windows[number]

        images = Items(len(self.index), partial(_image, self.source, self.index))
        waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        for image in read_in_order(images, self.num_workers, numbers=places()):
            place, ends_window = asked.popleft()
            shape = tuple(image.shape)
            waiting.setdefault(shape, []).append((place, image))
            ready = [waiting.pop(shape)] if len(waiting[shape]) == self.batch_size else []
            if ends_window:
                ready += waiting.values()
                waiting.clear()
            for batch in ready:
                yield torch.tensor([place for place, _ in batch]), torch.stack([image for _, image in batch])

    def _score(
        self, scorer: PatchScorer, device: torch.device, halved: HalvedBatches, batch: tuple[Tensor, Tensor]
    ) -> Scored:
        places, images = batch

        def scores_of(images: Tensor, positions: Tensor, labels: Tensor | None) -> Tensor:
            own = None if labels is None else labels.to(device)
            return scorer.scores(images.to(device, non_blocking=True), own, positions, self.patch_size)

        labels = None if self.labels is None else self.labels[places]
        scores = halved.run(scores_of, images, self.index[places], labels).float().cpu()
        if not bool(scores.isfinite().all()):
            bad = int((~scores.isfinite().all(1)).nonzero()[0])
            raise PatchError(
                f"the saliency of sample {int(self.index[places[bad]])} is not finite: look at its pixels, or use "
                'saliency="variance"'
            )
        return Scored(places, scores, torch.tensor(images.shape[2:]))


def unpacked(arrays: Arrays) -> Scored:
    """Return what `ScoreLoop.packed` made arrays of."""
    return Scored(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def score_images(
    loop: ScoreLoop, *, progress: bool = True, shards: Shards | None = None, sharing: Sharing | None = None
) -> tuple[Tensor, Tensor]:
    """Score every patch of the M images of a loop.

    If the GPU's memory is not enough, a batch is halved; this does not change a score. The shards hold the finished
    scores of an earlier run, which continues with the rest, and new ones are added to them. `sharing` is how windows of
    batches are shared with other processes, which call `ScoreLoop.packed` with the arrays of the job.

    Returns:
        scores float32 [sum of L_i], image after image, and sizes int32 [M, 2], height and width of each image in
        pixels.

    Raises:
        SourceError: as `ScoreLoop.scored` raises it.
        PatchError: as `ScoreLoop.scored` raises it.
    """
    index, sharing = loop.index, sharing or Sharing()
    table = _Scores(len(index), loop.patch_size, shards or Shards())
    with progress_bar(progress, total=len(index), unit="img", description="saliency") as bar:
        missing = torch.tensor(
            table.restore(made_from=hashlib.sha256(index.numpy().tobytes()).hexdigest()), dtype=torch.int64
        )
        bar.update(len(index) - len(missing))
        arrays = {"index": index.numpy(), "missing": missing.numpy()}
        job = Job("saliency", {}, arrays, len(loop.windows(missing)), len(missing))
        for some in sharing.share(job, partial(loop.scored, missing), unpacked, lambda some: len(some.places)):
            table.add(some)
            bar.update(len(some.places))
    return torch.cat([torch.empty(0), *table.rows]), table.sizes


class _Scores:
    """The scores `rows`, M tensors [L_i] that are empty until an image is scored, and the `sizes` int32 [M, 2]."""

    def __init__(self, num_images: int, patch_size: int, shards: Shards) -> None:
        self.rows: list[Tensor] = [torch.empty(0)] * num_images
        self.sizes = torch.zeros(num_images, 2, dtype=torch.int32)
        self._patch_size, self._shards = patch_size, shards
        self._to_keep: list[int] = []

    def restore(self, made_from: str) -> list[int]:
        """Load the scores that an earlier run has saved, and return the places of the images that are missing."""
        for piece in self._shards.restore(len(self.rows), made_from):
            places = piece["places"].tolist()
            sizes = torch.from_numpy(piece["sizes"])
            self.sizes[places] = sizes
            for place, row in zip(
                places, split_scores(torch.from_numpy(piece["scores"]), sizes, self._patch_size), strict=True
            ):
                self.rows[place] = row
        return [place for place, row in enumerate(self.rows) if not len(row)]

    def add(self, some: Scored) -> None:
        places = some.places.tolist()
        self.sizes[places] = some.size.to(torch.int32)
        for place, row in zip(places, some.scores, strict=True):
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
    """Split the concatenated scores that `score_images` returned, with sizes, into a view [L_i] for each image."""
    counts = [Grid(height, width, patch_size).num_patches for height, width in sizes.tolist()]
    return list(torch.split(scores, counts)) if counts else []
