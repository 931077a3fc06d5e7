"""Read images and make batches of them in loader processes.

The order of the samples is kept, and warnings are collected.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dq_lightning.core.errors import DQError, FeatureError
from dq_lightning.core.handles import FORK, PREFETCHED, loader_processes, read_in_order
from dq_lightning.core.sharing import Sharing
from dq_lightning.core.workers import MAX_WORKERS, WORKER_START_SECONDS, available_cores
from dq_lightning.features.preprocessing import Preprocessing
from dq_lightning.features.samples import SampleSource


class ImageBatch(NamedTuple):
    """Preprocessed images of a batch of samples.

    Attributes:
        images: output of the preprocessing, [B, ...].
        warnings: (index, text) of each sample that may have been decoded wrongly.
    """

    images: Tensor
    warnings: list[tuple[int, str]]


class ImageBatches(Dataset[ImageBatch]):
    """Batches of a source as a map-style dataset: item b is the batch of the samples at the positions `batches[b]`."""

    def __init__(self, source: SampleSource, preprocess: Preprocessing, batches: list[Tensor]) -> None:
        self.source, self.preprocess, self.batches = source, preprocess, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, batch: int) -> ImageBatch:
        indices = self.batches[batch].tolist()
        return batch_of([self.prepared(index) for index in indices], indices)

    def prepared(self, index: int) -> tuple[Tensor, str | None]:
        """Read and preprocess one sample; the text says why it may have been decoded wrongly."""
        return self.prepare(index), self.source.decode_warning(index)

    def prepare(self, index: int) -> Tensor:
        """Read and preprocess one sample; the errors are those of the source and of `preprocessed`."""
        return self.preprocessed(self.source.image(index), index)

    def preprocessed(self, image: Any, index: int) -> Tensor:
        """Preprocess the image of a sample.

        Raises:
            DQError: the preprocessing raised it.
            FeatureError: the preprocessing failed or returned something else than a tensor; the message names the
                sample.
        """
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


def split_at_multiples(positions: Tensor, size: int) -> list[Tensor]:
    """Split ascending positions into runs, so that no run crosses a multiple of `size`.

    So positions that are left out change no other run.

    >>> [part.tolist() for part in split_at_multiples(torch.tensor([0, 3, 4, 9]), 4)]
    [[0, 3], [4], [9]]
    """
    _, counts = torch.unique_consecutive(positions // size, return_counts=True)
    return list(torch.split(positions, counts.tolist()))


def batch_of(prepared: list[tuple[Tensor, str | None]], indices: list[int]) -> ImageBatch:
    """Make a batch of the prepared samples `indices`; FeatureError as `stack` raises it."""
    warnings = [(index, text) for index, (_, text) in zip(indices, prepared, strict=True) if text is not None]
    return ImageBatch(stack([image for image, _ in prepared], indices), warnings)


def stack(images: list[Tensor], indices: list[int]) -> Tensor:
    """Stack the tensors of the samples `indices` along a new first dimension.

    Raises:
        FeatureError: the tensors have different shapes.
    """
    for index, image in zip(indices, images, strict=True):
        if image.shape != images[0].shape:
            raise FeatureError(
                f"the encoder's preprocessing gives tensors of different shapes: {tuple(images[0].shape)} for sample "
                f"{indices[0]} and {tuple(image.shape)} for sample {index}; add a resize to a fixed size"
            )
    first = images[0]
    as_rows = first.ndim == 3 and first.stride(0) == 1 and not first.is_contiguous()
    if not as_rows or any(image.dtype != first.dtype or image.requires_grad for image in images):
        return torch.stack(images)
    # The values of a pixel lie together, which is the layout that networks are given: others would be made in two copies.
    whole = torch.empty(
        (len(images), *first.shape), dtype=first.dtype, device=first.device, memory_format=torch.channels_last
    )
    return torch.stack(images, out=whole)


def choose_num_workers(
    batches: ImageBatches, device: torch.device, num_devices: int = 1, sharing: Sharing | None = None
) -> int:
    """Choose the number of loader processes by the time that up to eight samples take to prepare.

    The number is 0 if all samples together would take less than two seconds, and at most eight for each device. Ranks
    that share the batches share the cores of their machine.
    """
    sharing = sharing or Sharing()
    total = sum(map(len, batches.batches))
    tried = [index for batch in batches.batches[:1] for index in batch[:8].tolist()]
    started = time.perf_counter()
    try:
        for index in tried:
            batches.prepare(index)
    except Exception:
        # The same error occurs again, and is reported, when the sample is read in its turn.
        return 0
    seconds = (time.perf_counter() - started) / max(len(tried), 1) * total / sharing.num_ranks
    if seconds < WORKER_START_SECONDS:
        return 0
    cores = max(1, available_cores() // sharing.ranks_on_node)
    # If the network runs on the CPU, it needs the cores itself, so the loader processes get only half of them.
    count = min(MAX_WORKERS * num_devices, cores if device.type != "cpu" else max(1, cores // 2))
    # The batches that loader processes have begun are not left to other ranks.
    return count if sharing.num_ranks == 1 else min(count, len(batches.batches) // (8 * sharing.num_ranks))


def iterate_batches(
    batches: ImageBatches,
    num_workers: int | Literal["auto"],
    device: torch.device,
    num_devices: int = 1,
    numbers: Iterator[int] | None = None,
    sharing: Sharing | None = None,
) -> Iterator[ImageBatch]:
    """Yield the batches with the given numbers in their order, or all.

    They come from loader processes if these pay off, and in pinned memory for a GPU.

    `num_devices` of the kind of `device` take the batches.

    A dataset that processes cannot share, or that cannot be sent to them (on systems without fork), is read in this
    process, and a warning says so.
    """
    workers = num_workers
    if getattr(batches.source, "in_order", False):
        workers = 0  # Every process would read the whole stream.
    elif workers == "auto":
        workers = choose_num_workers(batches, device, num_devices, sharing)
    # The result is stored in the cache, so unsafe sharing is not allowed even if the user set the number of processes.
    source, workers = loader_processes(batches.source, workers, asked=False, context=FORK, also=batches.preprocess)
    batches = copy.copy(batches)
    batches.source = source
    shared = sharing is not None and sharing.num_ranks > 1
    yield from read_in_order(
        batches, workers, pin_memory=device.type == "cuda", numbers=numbers, prefetch=1 if shared else PREFETCHED
    )


@contextmanager
def explaining_lost_loaders() -> Iterator[None]:
    """Explain torch's error about a loader process that ended, which torch raises at whatever code runs then.

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
