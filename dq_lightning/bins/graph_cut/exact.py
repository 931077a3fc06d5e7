"""Sums and inner products that do not depend on the order of operations, so that near ties are decided reproducibly."""

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

# If a part has at most 28 bits, every partial sum of up to 2**25 parts is exact in 53 bits.
_PART_BITS = 28
_SPLITTER = 2.0**27 + 1.0


class ExactSum:
    """A sum of float64 vectors that depends neither on the order of the additions nor on the device.

    Each entry is split on two fixed grids, 2**-28 and 2**-57 of the scale, on which floating-point addition makes no
    error for up to 2**25 summands (Demmel and Nguyen 2013, "Fast reproducible floating-point summation"). The part of
    an entry below the second grid is dropped, which is at most 2**-58 of the scale for each summand.

    Args:
        width: number W of entries of each vector.
        scale: bound on the absolute value of every entry.
    """

    def __init__(self, width: int, scale: float) -> None:
        exponent = math.frexp(scale)[1] if scale > 0 else 0
        self._magic = [math.ldexp(1.5, exponent - _PART_BITS + 52), math.ldexp(1.5, exponent - 2 * _PART_BITS - 1 + 52)]
        self.high: Array = np.zeros(width)
        self.low: Array = np.zeros(width)

    def add(self, rows: Tensor, sign: float = 1.0) -> None:
        """Add the rows of a float64 tensor [n, W], or subtract them with sign -1."""
        high = (rows + self._magic[0]).sub_(self._magic[0])
        low = (rows - high).add_(self._magic[1]).sub_(self._magic[1])
        self.high += sign * high.sum(dim=0).cpu().numpy()
        self.low += sign * low.sum(dim=0).cpu().numpy()


def two_product(left: Array, right: Array | float) -> tuple[Array, Array]:
    """Return the rounded product and its rounding error (Dekker 1971)."""
    product = left * right
    left_scaled, right_scaled = _SPLITTER * left, _SPLITTER * np.asarray(right)
    left_high = left_scaled - (left_scaled - left)
    right_high = right_scaled - (right_scaled - right)
    left_low, right_low = left - left_high, right - right_high
    error = left_low * right_low - (
        ((product - left_high * right_high) - left_low * right_high) - left_high * right_low
    )
    return product, error


def exact_dot(rows: Array, vector: tuple[Array, ...], constant: float = 0.0) -> list[float]:
    """Return `constant + row . sum(vector)` for every row, each rounded once.

    Args:
        rows: float64 [n, W].
        vector: float64 parts [W] that add up to the vector, the largest part first.
        constant: number that is added to each inner product before it is rounded.
    """
    # Where entries are short, most low parts and errors are zero.
    pairs = [two_product(rows, part) for part in vector if part.any()]
    terms = np.concatenate([rows[:, :0], *(terms for pair in pairs for terms in pair if terms.any())], axis=1)
    return [math.fsum([constant, *row[row != 0.0].tolist()]) for row in terms]
