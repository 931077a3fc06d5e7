"""Near-duplicates among embeddings: rows that an earlier row stands for. PURE."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.core.errors import ConfigError, FeatureError
from dq_lightning.core.records import Bins

# rows compared at a time: 4 MiB of similarities
_BLOCK = 1024
# similar pairs whose similarity is computed again at a time: 25 MiB for 768 numbers a row
_PAIRS = 4096
# a row and its copy may differ from 1 by the rounding of their lengths
_ROUNDING = 1e-12


def find_duplicates(features: NDArray[np.floating] | Tensor, threshold: float) -> Tensor:
    """The earliest row that each row is a near-duplicate of.

    Rows are looked at in order; one is a near-duplicate when its cosine with an earlier row that was kept is at least the
    threshold (to within 1e-12). So every row left out is close to one that stays, and no two that stay are close. The cosine
    with a zero row is 0.

    Args:
        features: floating [N, D].
        threshold: of the cosine, in (0, 1].

    Returns:
        int64 [N]: the lowest kept row that is close enough, the row's own number where it is kept. The rows that stay are
        `find_duplicates(x, t) == torch.arange(N)`.

    Raises:
        ConfigError: the threshold is out of range.
        FeatureError: the features are no finite floating matrix.

    Complexity: O(N M D), M rows being kept; memory O(N D), never N x N. Similarities are computed in single precision, and
    in double precision where they are closer to the threshold than rounding errors reach, so the answer is that of double
    precision.
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
    """Bins of some samples among all.

    Args:
        bins: of M samples.
        kept: int64 [M], their positions, ascending.
        total: N.

    Returns:
        Bins of N samples: the others have assignment and rank -1 and gain 0, and no selection takes them.
    """
    assignment, rank = torch.full((total,), -1, dtype=torch.int16), torch.full((total,), -1, dtype=torch.int32)
    gain, group = torch.zeros(total), torch.zeros(total, dtype=torch.int32)
    assignment[kept], rank[kept], gain[kept], group[kept] = bins.assignment, bins.rank, bins.gain, bins.group
    return Bins(assignment, rank, gain, group, bins.num_bins)


class _Search:
    """One pass over the rows, block by block, against what was kept before.

    Attributes:
        kept: int64, the rows kept so far.
    """

    def __init__(self, values: Tensor, single: Tensor, threshold: float) -> None:
        self.values, self.single, self.limit = values, single.numpy(), threshold - _ROUNDING
        # of an inner product of two rounded unit vectors in single precision, whatever the order of its sum
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
                # the first that is close: argmax gives the lowest of equals
                self.of[left[found]] = some[close[found].int().argmax(dim=1)]
            left = block[self.of[block] == block]
            self._inside(left)
            kept = torch.cat([kept, left[self.of[left] == left]])
        return self.of

    def _inside(self, rows: Tensor) -> None:
        """Rows of one block among themselves, in order."""
        close = self._close(rows, rows).tril(diagonal=-1).numpy()
        stays = np.ones(len(rows), dtype=bool)
        for place in np.flatnonzero(close.any(axis=1)):
            nearby = np.flatnonzero(close[place] & stays)
            if len(nearby):
                stays[place] = False
                self.of[rows[place]] = rows[nearby[0]]

    def _close(self, rows: Tensor, others: Tensor) -> Tensor:
        """Whether the cosine reaches the threshold, bool [len(rows), len(others)]."""
        # NumPy's product: torch's may be set to fewer bits by the user (set_float32_matmul_precision), also on the CPU
        product = self.single[rows.numpy()] @ self.single[others.numpy()].T
        close = torch.zeros(product.shape, dtype=torch.bool)
        # one look at each number for the many rows that are close to nothing
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
    """Rows of length one in double precision; zero rows stay zero."""
    wide = rows.double().cpu()
    # scaled first, so that squares of tiny or huge numbers neither vanish nor overflow
    wide = wide / wide.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    return wide / torch.where(length > 0, length, torch.ones_like(length))
