"""Images to batches in loader processes: order kept, warnings collected, errors brought home as they were."""

import logging
import multiprocessing
import os
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dq_lightning.core.errors import DQError, FeatureError
from dq_lightning.core.handles import FORK, loader_processes, with_dataset
from dq_lightning.features.preprocessing import Preprocessing

logger = logging.getLogger("dq_lightning")
# starting and stopping loader processes costs about this much, so less work is not worth it
WORKER_START_SECONDS = 2.0
MAX_WORKERS = 8


class ImageSource(Protocol):
    """What the loader needs of a dataset."""

    def __len__(self) -> int: ...

    def image(self, index: int, /) -> Image.Image:
        """RGB image of a sample."""
        ...

    def decode_warning(self, index: int, /) -> str | None:
        """What is doubtful about the sample's pixels, or None."""
        ...


class ImageBatch(NamedTuple):
    """Consecutive samples.

    Attributes:
        images: [B, ...] as the preprocessing gave them, or None if there was an error.
        warnings: (index, text) of samples that were decoded doubtfully.
        error: what went wrong.
    """

    images: Tensor | None
    warnings: list[tuple[int, str]]
    error: Exception | None


class ImageBatches(Dataset[ImageBatch]):
    """Batches of a source as a map-style dataset: item b holds the samples `batches[b]`.

    Each batch lies within one stretch of `batch_size` samples of the source, so what is left out changes no other batch.

    Args:
        source: N images.
        preprocess: from an image to a tensor.
        batch_size: samples a batch at most.
        positions: int64 [n], ascending, of the samples wanted; None takes all.
    """

    def __init__(
        self, source: ImageSource, preprocess: Preprocessing, batch_size: int, positions: Tensor | None = None
    ) -> None:
        self.source = source
        self.preprocess = preprocess
        self.batch_size = batch_size
        self.batches = stretches(torch.arange(len(source)) if positions is None else positions, batch_size)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, batch: int) -> ImageBatch:
        images: list[Tensor] = []
        warnings: list[tuple[int, str]] = []
        indices = self.batches[batch].tolist()
        try:
            for index in indices:
                images.append(self.prepare(index))
                text = self.source.decode_warning(index)
                if text is not None:
                    warnings.append((index, text))
            return ImageBatch(stack(images, indices), warnings, None)
        except Exception as error:
            # returned, not raised: the loader would bury it under its own traceback
            return ImageBatch(None, warnings, error)

    def prepare(self, index: int) -> Tensor:
        """Tensor of one sample.

        Raises:
            DQError: as the source raised it.
            FeatureError: the preprocessing failed or gave no tensor; names the sample.
        """
        image = self.source.image(index)
        try:
            tensor = self.preprocess(image)
        except DQError:
            raise
        except Exception as error:
            text = f"the encoder's preprocessing failed on sample {index}: {type(error).__name__}: {error}"
            raise FeatureError(text) from error
        if not isinstance(tensor, Tensor):
            raise FeatureError(
                f"the encoder's preprocessing must give a tensor, got {type(tensor).__name__} for sample {index}; "
                "end it with torchvision's ToTensor()"
            )
        return tensor


def stretches(positions: Tensor, size: int) -> list[Tensor]:
    """Ascending positions, cut where a multiple of `size` lies between two of them."""
    _, counts = torch.unique_consecutive(positions // size, return_counts=True)
    return list(torch.split(positions, counts.tolist()))


def stack(images: list[Tensor], indices: list[int]) -> Tensor:
    """Stack equally shaped tensors, which belong to the samples `indices`."""
    for index, image in zip(indices, images, strict=True):
        if image.shape != images[0].shape:
            raise FeatureError(
                f"the encoder's preprocessing gives tensors of different shapes: {tuple(images[0].shape)} for sample "
                f"{indices[0]} and {tuple(image.shape)} for sample {index}; add a resize to a fixed size"
            )
    return torch.stack(images)


def choose_num_workers(batches: ImageBatches, device: torch.device) -> int:
    """How many loader processes pay off, from the time that a few samples take; 0 if all take under two seconds."""
    total = sum(map(len, batches.batches))
    tried = [index for batch in batches.batches[:1] for index in batch[:8].tolist()]
    started = time.perf_counter()
    try:
        for index in tried:
            batches.prepare(index)
    except Exception:
        # it is raised again, in its turn, where it belongs
        return 0
    seconds = (time.perf_counter() - started) / max(len(tried), 1) * total
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if seconds < WORKER_START_SECONDS:
        return 0
    # on a CPU the network needs the cores itself, and the loaders only fill its gaps
    return min(MAX_WORKERS, cores if device.type != "cpu" else max(1, cores // 2))


def iterate_batches(
    batches: ImageBatches, num_workers: int | Literal["auto"], device: torch.device
) -> Iterator[ImageBatch]:
    """All batches in order; pinned for a GPU, and prepared ahead in processes where that pays off.

    A dataset that processes cannot share, or that cannot be sent to them (systems without fork), is read in this process,
    and a message says so.
    """
    workers = choose_num_workers(batches, device) if num_workers == "auto" else num_workers
    # what is read here is kept in the cache, so a number that the user named gives no leave to read wrongly
    source, workers = loader_processes(batches.source, workers, asked=False, context=FORK, also=batches.preprocess)
    batches = with_dataset(batches, "source", source)
    options: dict[str, Any] = {}
    if workers > 0:
        # Python 3.14 no longer forks by default, but datasets with local classes and lambdas need it
        options = {"multiprocessing_context": multiprocessing.get_context(FORK), "prefetch_factor": 4}
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        # a generator of its own: without one the loader draws its seed from the global one
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    try:
        iterator = iter(loader)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        logger.warning("features: the dataset cannot be sent to loader processes (%s); going on without them", error)
        iterator = iter(DataLoader(batches, batch_size=None, generator=torch.Generator().manual_seed(0)))
    yield from iterator


@contextmanager
def telling_of_lost_loaders() -> Iterator[None]:
    """Say what it means that a loader process ended; torch raises wherever this process happens to be then.

    Raises:
        FeatureError: a loader process ended.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise FeatureError(
            f"a loader process ended while samples were read ({error}): it was killed, ran out of memory, or a library "
            "crashed; num_workers=0 reads in this process"
        ) from error
