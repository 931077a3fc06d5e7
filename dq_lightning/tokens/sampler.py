"""Batches of rows of about the same length, in a new random order every epoch, in step on all ranks."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Sampler

# batches whose rows are sorted together, at most this many and a quarter of an epoch: more waste less padding, but rows would
# meet the same rows in every epoch
_POOL, _SHARE = 50, 4


class EpochShuffle(Sampler[int]):
    """All positions in an order that depends on the seed and the epoch alone, not on the global random state.

    Like torch's `DistributedSampler` it has `epoch` and `set_epoch`; a loop that never sets the epoch gets a new order each
    time nevertheless.
    """

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count, self.seed, self.epoch = count, seed, 0
        self._next = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self._next = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        self.epoch, self._next = self._next, self._next + 1
        yield from _permutation(self.count, self.seed, self.epoch).tolist()


class LengthBatchSampler(BatchSampler):
    """Groups what a sampler draws into batches of similar length: little padding, in random order.

    Of every 50 batches' worth of draws (a quarter of the epoch when that is less) the rows are sorted by length, cut into
    batches, and the batches shuffled. Lightning puts a distributed sampler in the place of `sampler`; every rank then gets
    the same number of batches. All ranks shuffle them alike, so that batches of about the same length meet in a step and no
    rank waits for long rows elsewhere.

    Args:
        sampler: of positions; with an attribute `epoch`, as `EpochShuffle` and `DistributedSampler` have it.
        batch_size: rows of a batch.
        drop_last: leave out the smaller batch of an epoch.
        lengths: int64 [N], of all rows.
        seed: of the order of the batches.
    """

    def __init__(
        self, sampler: Any, batch_size: int, drop_last: bool, lengths: Tensor | Sequence[int], seed: int = 0
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.lengths = torch.as_tensor(lengths).tolist()
        self.seed = seed
        self._passes = 0

    def __iter__(self) -> Iterator[list[int]]:
        drawn = list(self.sampler)
        epoch = int(getattr(self.sampler, "epoch", self._passes))
        self._passes += 1
        if self.drop_last:
            drawn = drawn[: len(self) * self.batch_size]
        size = max(1, min(_POOL, len(self) // _SHARE)) * self.batch_size
        for number, start in enumerate(range(0, len(drawn), size)):
            # a stable sort: rows of one length stay in the order of the draw
            pool = sorted(drawn[start : start + size], key=self.lengths.__getitem__)
            batches = [pool[first : first + self.batch_size] for first in range(0, len(pool), self.batch_size)]
            for place in _permutation(len(batches), self.seed, epoch, number).tolist():
                yield batches[place]


def _permutation(count: int, *entropy: int) -> Tensor:
    state = 0
    for value in entropy:
        # a plain sum would give seed 0 in epoch 1 the order of seed 1 in epoch 0
        state = (state * 6364136223846793005 + value + 1442695040888963407) % 2**63
    return torch.randperm(count, generator=torch.Generator().manual_seed(state))
