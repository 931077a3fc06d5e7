"""Find near-duplicates among embeddings: rows that are close to an earlier row, which is kept in their place."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.core.errors import ConfigError, FeatureError
from dq_lightning.core.records import Bins

# This many rows are compared at a time, which makes 4 MiB of similarities.
_BLOCK = 1024
# The similarity of this many pairs is recomputed in float64 at a time, which takes 25 MiB for rows of 768 numbers.
_PAIRS = 4096
# The cosine of a row with its copy may differ from 1 by the rounding of their lengths.
_ROUNDING = 1e-12


def find_duplicates(features: NDArray[np.floating] | Tensor, threshold: float) -> Tensor:
    """Find for each row the earliest kept row that it is a near-duplicate of.

    Rows are visited in order. A row is a near-duplicate if its cosine with an earlier kept row is at least the
    threshold (to within 1e-12), and it is kept otherwise. So every row that is left out is close to a kept row, and no
    two kept rows are close to each other. The cosine with a zero row is 0.

    Time is O(N M D) if M rows are kept; memory is O(N D), never N x N. Similarities are computed in float32, and again
    in float64 where the float32 rounding error bound does not decide on which side of the threshold they lie, so the
    result is that of float64.

    Args:
        features: floating matrix [N, D].
        threshold: smallest cosine of a near-duplicate, in (0, 1].

    Returns:
        int64 [N]: number of the lowest kept row that is close enough, or the row's own number if it is kept. The kept
        rows are those with `find_duplicates(x, t) == torch.arange(N)`.

    Raises:
        ConfigError: the threshold is out of range.
        FeatureError: the features are not a floating matrix or hold values that are not finite.

    >>> find_duplicates(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]), 0.9).tolist()
    [0, 1, 0]
    """
    if not 0 < threshold <= 1:
        raise ConfigError(
            f"deduplicate={threshold!r}: a cosine threshold lies in (0, 1]; 0.95 leaves out close paraphrases"
        )
    values = torch.as_tensor(features)
    if values.ndim != 2 or not values.is_floating_point():
        raise FeatureError(f"features must be a floating matrix [N, D], got {values.dtype} {tuple(values.shape)}")
    single = torch.empty(values.shape, dtype=torch.float32)
    for start in range(0, len(values), _BLOCK):
        single[start : start + _BLOCK] = _unit(values[start : start + _BLOCK]).float()
    if not bool(torch.isfinite(single).all()):
        raise FeatureError("features hold NaN or infinite numbers; embed the samples again")
    return _Search(values, single, threshold).run()


def spread_bins(bins: Bins, kept: Tensor, total: int) -> Bins:
    """Turn bins of M kept samples into bins of all N samples.

    Args:
        bins: bins of the M kept samples.
        kept: int64 [M], positions of the kept samples among all N, ascending.
        total: number N of all samples.

    Returns:
        Bins of N samples. The samples that are not kept have assignment -1, rank -1 and gain 0, and are never selected.
    """
    assignment, rank = torch.full((total,), -1, dtype=torch.int16), torch.full((total,), -1, dtype=torch.int32)
    gain, group = torch.zeros(total), torch.zeros(total, dtype=torch.int32)
    assignment[kept], rank[kept], gain[kept], group[kept] = bins.assignment, bins.rank, bins.gain, bins.group
    return Bins(assignment, rank, gain, group, bins.num_bins)


class _Search:
    """One pass over the rows, block by block, that compares each block with the rows kept before and with itself.

    Args:
        values: floating [N, D], the features.
        single: float32 [N, D], the features scaled to length one.
        threshold: smallest cosine of a near-duplicate.

    Attributes:
        of: int64 [N], result of `find_duplicates` for the rows visited so far.
    """

    def __init__(self, values: Tensor, single: Tensor, threshold: float) -> None:
        self.values, self.single, self.limit = values, single.numpy(), threshold - _ROUNDING
        # This bounds the error of a float32 inner product of two rounded unit vectors, summed in any order.
        self.error = (values.shape[1] + 4) * 2.0**-23
        self.of = torch.arange(len(values))

    def run(self) -> Tensor:
        kept = torch.empty(0, dtype=torch.int64)
        for start in range(0, len(self.values), _BLOCK):
            block = torch.arange(start, min(start + _BLOCK, len(self.values)))
            for first in range(0, len(kept), _BLOCK):
                some = kept[first : first + _BLOCK]
                left = block[self.of[block] == block]
                close = self._close(left, some)
                found = close.any(dim=1)
                # Among equal values argmax returns the lowest index, which is the first close row.
                self.of[left[found]] = some[close[found].int().argmax(dim=1)]
            left = block[self.of[block] == block]
            self._inside(left)
            kept = torch.cat([kept, left[self.of[left] == left]])
        return self.of

    def _inside(self, rows: Tensor) -> None:
        """Compare the rows of one block with each other, in order."""
        close = self._close(rows, rows).tril(diagonal=-1).numpy()
        stays = np.ones(len(rows), dtype=bool)
        for place in np.flatnonzero(close.any(axis=1)):
            nearby = np.flatnonzero(close[place] & stays)
            if len(nearby):
                stays[place] = False
                self.of[rows[place]] = rows[nearby[0]]

    def _close(self, rows: Tensor, others: Tensor) -> Tensor:
        """Return whether the cosine is at least the threshold, bool [len(rows), len(others)]."""
        # NumPy computes the product, because the user may have reduced the precision of torch's
        # (set_float32_matmul_precision), which also applies to the CPU.
        product = self.single[rows.numpy()] @ self.single[others.numpy()].T
        close = torch.zeros(product.shape, dtype=torch.bool)
        # Most rows are close to no other row, so only rows whose greatest cosine is large enough are examined further.
        places = torch.from_numpy(np.flatnonzero(product.max(axis=1, initial=-1.0) >= self.limit - self.error))
        if len(places) == 0:
            return close
        cosine = torch.from_numpy(product)[places]
        close[places] = self._decided(cosine, rows[places], others)
        return close

    def _decided(self, cosine: Tensor, rows: Tensor, others: Tensor) -> Tensor:
        close = cosine >= self.limit + self.error
        doubtful = ((cosine >= self.limit - self.error) & ~close).nonzero()
        for start in range(0, len(doubtful), _PAIRS):
            mine, theirs = doubtful[start : start + _PAIRS].unbind(dim=1)
            exact = (_unit(self.values[rows[mine]]) * _unit(self.values[others[theirs]])).sum(dim=1)
            close[mine, theirs] = exact >= self.limit
        return close


def _unit(rows: Tensor) -> Tensor:
    """Return the rows scaled to length one, in float64 on the CPU; zero rows stay zero."""
    wide = rows.double().cpu()
    # Dividing by the largest entry first keeps squares of tiny or huge numbers from vanishing or overflowing.
    wide = wide / wide.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    return wide / torch.where(length > 0, length, torch.ones_like(length))
