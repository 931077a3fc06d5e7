"""Samplers that form batches of rows of similar length, in a new random order every epoch, in step on all ranks."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Sampler

# Number of batches whose rows are sorted together, and the divisor that limits it to a quarter of an epoch. Larger
# pools would need less padding, but the same rows would meet in every epoch.
_POOL, _SHARE = 50, 4


class EpochShuffle(Sampler[int]):
    """Sampler of all positions in an order that depends only on the seed and the epoch, not on the global random state.

    Like torch's `DistributedSampler` it has `epoch`, that of the current pass, and `set_epoch`. A loop that never sets
    the epoch gets a new order in every pass nevertheless.
    """

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count, self.seed, self.epoch = count, seed, 0
        self._next = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, and thereby the order, of the next pass."""
        self._next = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        self.epoch, self._next = self._next, self._next + 1
        yield from _permutation(self.count, self.seed, self.epoch).tolist()


class LengthBatchSampler(BatchSampler):
    """Batch sampler that groups the positions drawn by another sampler into batches of similar length.

    The draws are taken in pools of 50 batches (or a quarter of the epoch if that is less). Each pool is sorted by
    length and cut into batches, and the batches are shuffled. Lightning replaces `sampler` by a distributed sampler;
    every rank then gets the same number of batches. All ranks shuffle their batches in the same way, so that batches of
    about the same length meet in one step, and no rank waits for long rows on another rank.

    Args:
        sampler: sampler of positions, with an attribute `epoch` as `EpochShuffle` and `DistributedSampler` have it.
        batch_size: number of rows of a batch.
        drop_last: whether to leave out the last batch of an epoch if it is smaller.
        lengths: int64 [N], lengths of all rows in tokens.
        seed: seed of the order of the batches.
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
            # The sort is stable: rows of one length stay in the order of the draw.
            pool = sorted(drawn[start : start + size], key=self.lengths.__getitem__)
            batches = [pool[first : first + self.batch_size] for first in range(0, len(pool), self.batch_size)]
            for place in _permutation(len(batches), self.seed, epoch, number).tolist():
                yield batches[place]


def _permutation(count: int, *entropy: int) -> Tensor:
    state = 0
    for value in entropy:
        # With a plain sum, seed 0 in epoch 1 would have the same order as seed 1 in epoch 0.
        state = (state * 6364136223846793005 + value + 1442695040888963407) % 2**63
    return torch.randperm(count, generator=torch.Generator().manual_seed(state))
