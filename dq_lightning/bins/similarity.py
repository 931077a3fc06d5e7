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
        self._origin = _first_row(rows) if kind == "rbf" else None

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
        left, right = _apart(left, self._origin), _apart(right, self._origin)
        product = left.inner(right)
        if self.kind == "cosine":
            return product.mul_(0.5).add_(0.5)
        if self.kind == "dot":
            return product
        # Rounding may make |a - b|^2 = |a|^2 + |b|^2 - 2 a.b negative for equal rows, so it is clamped.
        squares = left.lengths()[:, None] ** 2 + right.lengths()[None, :] ** 2
        return torch.exp(-self.gamma * (squares - 2.0 * product).clamp_(min=0.0))


def _first_row(rows: StoredRows) -> Tensor | None:
    """Return the first row if rows have one factor, [1, D], and None otherwise."""
    return rows.take(torch.zeros(1, dtype=torch.int64)).factors[0] if len(rows.widths) == 1 and len(rows) else None


def _apart(rows: Rows, origin: Tensor | None) -> Rows:
    """Return rows minus a row that is given, because distances that are small beside the lengths would be lost."""
    return rows if origin is None else Rows((rows.factors[0] - origin,))


def default_gamma(rows: StoredRows) -> float:
    """Return one over the mean squared distance of two rows, or 1 if all rows are equal.

    Raises:
        FeatureError: the squared distances are too small or too large for float64.
    """
    origin, squares, vector, is_zero = _first_row(rows), 0.0, torch.zeros(()), True
    for block in (_apart(block, origin) for block in rows.blocks()):
        squares += float((block.lengths() ** 2).sum()) / len(rows)
        vector = vector + block.sum() / len(rows)
        is_zero = is_zero and not any(factor.any() for factor in block.factors)
    if not is_zero and not _SMALLEST <= squares < float("inf"):
        raise FeatureError(
            f"similarity 'rbf' squares the distances of features, and the mean of these squares is {squares:g}, which "
            "float64 cannot hold; scale the features, or use similarity 'cosine'"
        )
    spread = 2.0 * (squares - float((vector * vector).sum()))
    return 1.0 / spread if spread > _SMALLEST * 2.0**-60 else 1.0
