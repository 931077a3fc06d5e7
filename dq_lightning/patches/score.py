"""Loops over images of any sizes and computes a score for every patch of each image."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Protocol

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
from dq_lightning.patches.saliency import PatchScorer

# An image whose size differs from the others waits until a batch of its size is full. This limits the waiting images.
WAITING_BATCHES = 8


class ImageSource(Protocol):
    """What the loop needs of a dataset: images by position."""

    def image(self, index: int, /) -> Image.Image:
        """Return the RGB image of a sample."""


def _image(source: ImageSource, index: Tensor, place: int) -> Tensor:
    return image_to_uint8(source.image(int(index[place]))).contiguous()


def score_images(
    source: ImageSource,
    index: Tensor,
    scorer: PatchScorer,
    patch_size: int,
    *,
    labels: Tensor | None = None,
    devices: Sequence[torch.device] = (torch.device("cpu"),),
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
    shards: Shards | None = None,
) -> tuple[Tensor, Tensor]:
    """Score every patch of the images of a source at the positions `index`, int64 [M].

    The `devices` share the batches: the scorer runs on the first of them, and each of the others gets a replica. Images
    of the same size share a batch. If the GPU's memory is not enough, the batch is halved. Neither changes a score.
    `labels`, int64 [M], are the classes of these images. The shards hold the finished scores of an earlier run, which
    continues with the rest, and new ones are added to them.

    Returns:
        scores float32 [sum of L_i], image after image, and sizes int32 [M, 2], height and width of each image in
        pixels.

    Raises:
        SourceError: if an image cannot be read; it is raised as the source raised it.
        PatchError: if scores are not finite, and the message names the sample; or if one image alone exceeds the GPU's
            memory.
    """
    table = _Scores(len(index), patch_size, shards or Shards())
    scorers = [scorer, *(scorer.replica(device) for device in devices[1:])]
    replicas = [
        (device, partial(_score, one, device, HalvedBatches("saliency", PatchError), index, labels, patch_size))
        for device, one in zip(devices, scorers, strict=True)
    ]
    with progress_bar(progress, total=len(index), unit="img", description="saliency") as bar:
        missing = table.restore(made_from=hashlib.sha256(index.numpy().tobytes()).hexdigest())
        bar.update(len(index) - len(missing))
        images = Items(len(missing), partial(_image, source, index[missing]))
        reads = zip(missing, read_in_order(images, num_workers), strict=True)
        batches = _batches(reads, batch_size)
        # All replicas use the target layer that the first batch decides.
        for some in (run_in_order(replicas[:1], islice(batches, 1)), run_in_order(replicas, batches)):
            for places, scores, size in some:
                table.add(places, scores, size)
                bar.update(len(places))
    return torch.cat([torch.empty(0), *table.rows]), table.sizes


def _score(
    scorer: PatchScorer,
    device: torch.device,
    halved: HalvedBatches,
    index: Tensor,
    labels: Tensor | None,
    patch_size: int,
    batch: tuple[list[int], Tensor],
) -> tuple[list[int], Tensor, tuple[int, int]]:
    """Score a batch of images on one device; return places, scores float32 [B, L] and the size of the images."""
    places, images = batch

    def scores_of(images: Tensor, positions: Tensor, labels: Tensor | None) -> Tensor:
        own = None if labels is None else labels.to(device)
        return scorer.scores(images.to(device, non_blocking=True), own, positions, patch_size)

    chosen = torch.tensor(places)
    scores = halved.run(scores_of, images, index[chosen], None if labels is None else labels[chosen]).float().cpu()
    if not bool(scores.isfinite().all()):
        bad = int((~scores.isfinite().all(1)).nonzero()[0])
        raise PatchError(
            f"the saliency of sample {int(index[places[bad]])} is not finite: look at its pixels, or use "
            'saliency="variance"'
        )
    return places, scores, (images.shape[2], images.shape[3])


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
    """Split the concatenated scores that `score_images` returned, with sizes, into a view [L_i] for each image."""
    counts = [Grid(height, width, patch_size).num_patches for height, width in sizes.tolist()]
    return list(torch.split(scores, counts)) if counts else []


def _batches(reads: Iterator[tuple[int, Tensor]], batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
    """Group images of one size into batches of at most `batch_size`; yield their places and images [B, 3, H, W].

    If a run continues without the images of the first batches, the other batches come out unchanged, because the images
    of a batch have waited equally long.
    """
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    held = 0
    for place, image in reads:
        alike = waiting.setdefault(tuple(image.shape), [])
        alike.append((place, image))
        held += 1
        if len(alike) == batch_size or held > WAITING_BATCHES * batch_size:
            ready = waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
            held -= len(ready)
            yield [place for place, _ in ready], torch.stack([image for _, image in ready])
    for ready in waiting.values():
        yield [place for place, _ in ready], torch.stack([image for _, image in ready])
