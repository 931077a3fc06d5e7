"""Similarities between samples, computed block by block: cosine, inner product and radial basis function."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dq_lightning.bins.rows import Rows, StoredRows
from dq_lightning.core.config import Similarity
from dq_lightning.core.errors import FeatureError

# Similarities are computed at most this many at a time, which take 8 MiB.
_ENTRIES = 1 << 20
# Sums of squares below this may have lost digits, because float64 has no full precision below 2**-1022.
_SMALLEST = 2.0**-900


class Similarities:
    """Similarity matrix S [n, n] of n rows, of which only the requested columns are computed.

    Args:
        rows: the n rows, which must have length one (or zero) for the cosine.
        kind: `"cosine"` is 1/2 + cos/2, `"dot"` is the inner product and `"rbf"` is exp(-gamma |a - b|^2).
        gamma: factor in the exponent of the radial basis function.
    """

    def __init__(self, rows: StoredRows, kind: Similarity, gamma: float = 1.0) -> None:
        self.rows = rows
        self.kind = kind
        self.gamma = gamma
        self._squares: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def device(self) -> torch.device:
        """Device that the similarities are computed on."""
        return self.rows.device

    def columns(self, chosen: Tensor) -> Tensor:
        """Return the columns S[:, chosen], float64 [n, k], for indices `chosen`, int64 [k]."""
        made = torch.empty(len(self), len(chosen), dtype=torch.float64, device=self.device)
        for first, part in self.blocks_of_columns(chosen):
            made[first : first + len(part)] = part
        return made

    def blocks_of_columns(self, chosen: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row and the rows of blocks of the columns S[:, chosen], float64 [m, k], of at most 8 MiB each."""
        others, first = self.rows.take(chosen), 0
        for block in self.rows.blocks():
            for start in range(0, len(block), step := max(1, _ENTRIES // max(1, len(others)))):
                part = self._between(block.span(start, start + step), others)
                yield first, part
                first += len(part)

    def diagonal(self) -> Tensor:
        """Return the diagonal entries S[i, i], float64 [n]."""
        if self.kind == "rbf":
            return torch.ones(len(self), dtype=torch.float64, device=self.device)
        squares = torch.cat([block.lengths() ** 2 for block in self.rows.blocks()])
        return 0.5 + 0.5 * squares if self.kind == "cosine" else squares

    def sums(self) -> Tensor:
        """Return the sum of every column, float64 [n], in O(n W), or O(n^2 W) for the radial basis function."""
        if self.kind == "rbf":
            total = torch.zeros(len(self), dtype=torch.float64, device=self.device)
            for start in range(0, len(self), 512):
                chosen = torch.arange(start, min(start + 512, len(self)))
                for _, part in self.blocks_of_columns(chosen):
                    total[start : start + len(chosen)] += part.sum(dim=0)
            return total
        vector = torch.stack([block.sum() for block in self.rows.blocks()]).sum(dim=0)
        linear = self.rows.against(vector)[:, 0]
        return 0.5 * len(self) + 0.5 * linear if self.kind == "cosine" else linear

    def can_be_negative(self) -> bool:
        """Return whether some similarity may be negative, as only inner products of negative entries can be."""
        if self.kind != "dot":
            return False
        return any(bool((factor < 0).any()) for block in self.rows.blocks() for factor in block.factors)

    def _between(self, left: Rows, right: Rows) -> Tensor:
        product = left.inner(right)
        if self.kind == "cosine":
            return product.mul_(0.5).add_(0.5)
        if self.kind == "dot":
            return product
        # Rounding may make |a - b|^2 = |a|^2 + |b|^2 - 2 a.b negative for equal rows, so it is clamped.
        squares = left.lengths()[:, None] ** 2 + right.lengths()[None, :] ** 2
        return torch.exp(-self.gamma * (squares - 2.0 * product).clamp_(min=0.0))


def default_gamma(rows: StoredRows) -> float:
    """Return one over the mean squared distance of two rows, or 1 if all rows are equal.

    Raises:
        FeatureError: the squares of the features are too small or too large for float64.
    """
    total = max(1, len(rows))
    squares = sum(float((block.lengths() ** 2).sum()) for block in rows.blocks()) / total
    vector = torch.stack([block.sum() for block in rows.blocks()]).sum(dim=0) / total if len(rows) else torch.zeros(1)
    if not _SMALLEST <= squares < float("inf") and any(
        factor.any() for block in rows.blocks() for factor in block.factors
    ):
        raise FeatureError(
            f"similarity 'rbf' squares the features, and the mean of their squares is {squares:g}, which float64 cannot hold; "
            "scale them, or use similarity 'cosine'"
        )
    spread = 2.0 * (squares - float((vector * vector).sum()))
    return 1.0 / spread if spread > _SMALLEST * 2.0**-60 else 1.0
