"""What samples are compared by: rows of one or two factors, whose inner products multiply. PURE."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Rows:
    """n float64 vectors, each the outer product of its rows in the factors, never written out.

    An embedding has one factor [n, D]. A last-layer gradient `g (x) [1, h]` has two, [n, C] and [n, D + 1], and the inner
    product of two such gradients is `(g_i . g_j)(1 + h_i . h_j)`.
    """

    factors: tuple[Array, ...]

    def __len__(self) -> int:
        return len(self.factors[0])

    def __getitem__(self, chosen: NDArray[np.int64] | slice) -> "Rows":
        return Rows(tuple(factor[chosen] for factor in self.factors))

    @property
    def width(self) -> int:
        """Length of a vector when written out."""
        return int(np.prod([factor.shape[1] for factor in self.factors]))

    @property
    def depth(self) -> int:
        """Number of terms that rounding errors of an inner product grow with."""
        return sum(factor.shape[1] + 1 for factor in self.factors)

    def norms(self) -> Array:
        """Euclidean lengths [n]."""
        lengths = np.ones(len(self))
        for factor in self.factors:
            lengths *= np.sqrt(np.einsum("ij,ij->i", factor, factor))
        return lengths

    def inner(self, sample: int) -> Array:
        """Inner products [n] with one of the rows."""
        product: Array = self.factors[0] @ self.factors[0][sample]
        for factor in self.factors[1:]:
            product *= factor @ factor[sample]
        return product

    def against(self, vector: Array) -> Array:
        """Inner products [n] with a vector [W]."""
        if len(self.factors) == 1:
            return np.asarray(self.factors[0] @ vector)
        left, right = self.factors
        return np.asarray(np.einsum("ij,ij->i", left, right @ vector.reshape(left.shape[1], right.shape[1]).T))

    def written_out(self) -> Array:
        """The vectors themselves, [n, W]: for a few rows at a time only."""
        if len(self.factors) == 1:
            return self.factors[0]
        left, right = self.factors
        return (left[:, :, None] * right[:, None, :]).reshape(len(left), -1)

    def blocks(self, entries: int = 1 << 18) -> "list[Rows]":
        """Slices of about `entries` numbers when written out."""
        step = max(1, entries // max(1, self.width))
        return [self[start : start + step] for start in range(0, len(self), step)]


def unit_rows(values: Array) -> Array:
    """Scale rows to length one; a zero row stays zero.

    The largest entry is taken out first, exactly, as a power of two: squares of gradients as small as 1e-200 don't vanish.
    """
    largest = np.abs(values).max(axis=1, initial=0.0)
    exponent = np.frexp(largest)[1]
    scaled = np.ldexp(values, -exponent[:, None])
    lengths = np.sqrt(np.sum(scaled * scaled, axis=1))
    return np.asarray(scaled / np.where(lengths > 0, lengths, 1.0)[:, None])
