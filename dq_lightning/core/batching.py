"""Runs a function over batches in pieces that fit the memory of the device, and says which pieces suit a CPU."""

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dq_lightning.core.errors import DQError
from dq_lightning.core.isolation import release_memory

logger = logging.getLogger("dq_lightning")

# The feature maps of more elements than these do not fit the caches of a CPU, and take new memory at every layer.
# EfficientNet-Lite0 takes 35 ms for an image of 224 pixels among 4, and 100 ms among 256. The number is the same for any
# number of threads, because how many images share a piece may change the last bits of their features.
CPU_ELEMENTS = 1 << 19


class HalvedBatches:
    """Runs a function over batches, and halves the pieces that it is given whenever the device's memory runs out.

    The pieces stay small from then on. Their limit counts elements of tensors, not samples, so short texts are still
    taken many at a time after a batch of long texts did not fit.

    Args:
        work: name of the work, for the warning that pieces become smaller.
        error: class of the error that is raised when a single sample does not fit.

    Example:
        >>> import torch
        >>> from dq_lightning.core.errors import FeatureError
        >>> batches = HalvedBatches("features", FeatureError)
        >>> batches.run(lambda images: images.mean(dim=1), torch.arange(6.0).reshape(3, 2))
        tensor([0.5000, 2.5000, 4.5000])
    """

    def __init__(self, work: str, error: type[DQError]) -> None:
        self._work, self._error = work, error
        self._limit: int | None = None

    def run(self, function: Callable[..., Tensor], batch: Tensor, *others: Tensor | None) -> Tensor:
        """Return what the function gives for a batch [B, ...], B > 0, put together from the pieces.

        The function takes pieces of the batch and of each of the other tensors [B, ...] (None is passed on as it is),
        and returns a tensor with one row a sample. What it gives for a sample must not depend on the other samples of
        the piece.

        Raises:
            DQError: a single sample does not fit into the memory; the class of the error is the one given at the start.
        """
        pieces: list[Tensor] = []
        done = 0
        while done < len(batch):
            at_once = len(batch) if self._limit is None else max(1, self._limit // max(1, batch[0].numel()))
            part = slice(done, done + at_once)
            piece = batch[part]
            found = _try(function, piece, *(None if other is None else other[part] for other in others))
            if found is not None:
                pieces.append(found)
                done += len(piece)
                continue
            if len(piece) == 1:
                raise self._error(
                    f"{self._work}: one sample alone does not fit the GPU's memory: end other programs that use it, or pass "
                    'device="cpu"'
                )
            self._limit = piece.numel() // 2
            logger.warning(
                "%s: the batch does not fit the device's memory; from now on a step takes %d samples",
                self._work,
                len(piece) // 2,
            )
            release_memory()
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _try(function: Callable[..., Tensor], *pieces: Tensor | None) -> Tensor | None:
    # The traceback of the error refers to what was on the device, so this function must end before memory is released.
    try:
        return function(*pieces)
    except torch.OutOfMemoryError:
        return None


def images_at_once(images: Tensor, device: torch.device) -> int:
    """Return how many images of a batch [B, ...] a convolutional network should be given at once to be fast.

    On a CPU these are few, so that its caches hold their feature maps; on any other device it is the whole batch.

    Example:
        >>> images_at_once(torch.empty(256, 3, 224, 224), torch.device("cuda"))
        256
        >>> images_at_once(torch.empty(256, 3, 224, 224), torch.device("cpu"))
        3
    """
    if device.type != "cpu":
        return max(1, len(images))
    return max(1, CPU_ELEMENTS // max(1, math.prod(images.shape[1:])))
