"""Feature vectors of samples, stored as one or two factors whose inner products are multiplied."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dq_lightning.bins.graph_cut.workers import Workers

# A block of rows that is converted to float64 at a time has this many entries, which take 2 MiB.
_BLOCK_ENTRIES = 1 << 18


@dataclass(frozen=True, eq=False)
class Rows:
    """n float64 vectors, each of which is the outer product of its rows in the factors.

    An embedding has one factor [n, D]. A last-layer gradient, the outer product of g and [1, h], has two factors [n, C]
    and [n, D + 1], and the inner product of two such gradients is `(g_i . g_j)(1 + h_i . h_j)`, so the outer product
    itself need not be computed. A vector of the space of the rows has the shape [D], or [C, D + 1] with two factors.

    Attributes:
        factors: float64 matrices with n rows each.
    """

    factors: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.factors[0])

    def take(self, chosen: Tensor) -> "Rows":
        """Return a copy of the rows with the indices `chosen`, int64 [k]."""
        return Rows(tuple(factor.index_select(0, chosen.to(factor.device)) for factor in self.factors))

    def ranges(self) -> list[tuple[int, int]]:
        """Return the first and last row (exclusive) of blocks of about 2 MiB."""
        return block_ranges(len(self), sum(factor.shape[1] for factor in self.factors))

    def span(self, first: int, last: int) -> "Rows":
        """Return the rows from `first` to `last` (exclusive) without copying them."""
        return Rows(tuple(factor[first:last] for factor in self.factors))

    def lengths(self) -> Tensor:
        """Return the Euclidean lengths of the vectors, float64 [n]."""
        result: Tensor = torch.linalg.vector_norm(self.factors[0], dim=1)
        for factor in self.factors[1:]:
            result = result * torch.linalg.vector_norm(factor, dim=1)
        return result

    def inner(self, others: "Rows", out: Tensor | None = None) -> Tensor:
        """Return the inner products with m other rows, [n, m] of the type of the rows, in `out` if that is given."""
        result = torch.mm(self.factors[0], others.factors[0].T, out=out)
        for mine, theirs in zip(self.factors[1:], others.factors[1:], strict=True):
            result *= mine @ theirs.T
        return result

    def against(self, vectors: Tensor) -> Tensor:
        """Return the inner products with c vectors [c, D] or [c, C, D + 1], float64 [n, c]."""
        if len(self.factors) == 1:
            return self.factors[0] @ vectors.T
        left, right = self.factors
        # A single product with all vectors side by side reads the wide factor only once.
        halfway = (right @ vectors.flatten(0, 1).T).view(len(left), len(vectors), left.shape[1])
        return (halfway @ left[:, :, None])[:, :, 0]

    def sum(self) -> Tensor:
        """Return the sum of all rows, float64 [1, D] or [1, C, D + 1]."""
        if len(self.factors) == 1:
            return self.factors[0].sum(dim=0, keepdim=True)
        left, right = self.factors
        return (left.T @ right)[None]

    def gains_after(self, vector: Tensor, others: "Rows", steps: Tensor) -> Tensor:
        """Return each row's inner product with a vector that twice some other rows were taken from, float64 [n].

        Args:
            vector: [1, D] or [1, C, D + 1].
            others: T rows.
            steps: int64 [n], how many of the first of the other rows were taken from the vector for each row.
        """
        if len(self.factors) == 1:
            before = torch.nn.functional.pad(others.factors[0].cumsum(dim=0), (0, 0, 1, 0))
            products = before.index_select(0, steps).mul_(self.factors[0])
        else:
            products = self.inner(others).mul_(torch.arange(len(others), device=steps.device) < steps[:, None])
        return self.against(vector)[:, 0] - 2.0 * products.sum(dim=1)

    def written_out(self) -> Iterator[Tensor]:
        """Yield the vectors themselves as float64 [k, W], a few rows at a time; only near ties need them."""
        if len(self.factors) == 1:
            yield self.factors[0]
            return
        left, right = self.factors
        step = max(1, _BLOCK_ENTRIES // (left.shape[1] * right.shape[1]))
        for start in range(0, len(self), step):
            part = slice(start, start + step)
            yield (left[part, :, None] * right[part, None, :]).flatten(1)


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Features of some of the N samples, kept as the caller passed them.

    They have any floating dtype and are in memory, on a device or memory-mapped from a file. Rows are converted to
    float64, and scaled to length one for the cosine, one block at a time, so no copy of all rows is made.

    Attributes:
        raw: (embedding,) or (head gradient, embedding), with N rows each.
        scales: float64 [N] for each factor, divisors of its rows; None leaves the rows as they are.
        members: int64 [n], positions of the samples among all N, ascending.
        device: device that blocks are computed on.
        workers: threads that compute the blocks.
        step: number that all entries are whole multiples of and are divided by; 1.0 leaves them as they are.
    """

    raw: tuple[Tensor, ...]
    scales: tuple[Tensor, ...] | None
    members: Tensor
    device: torch.device
    workers: Workers
    step: float = 1.0

    def __len__(self) -> int:
        return len(self.members)

    @property
    def widths(self) -> list[int]:
        """Number of columns of each factor; an embedding behind a head gradient has a constant 1 in front."""
        return [self.raw[0].shape[1], *(part.shape[1] + 1 for part in self.raw[1:])]

    @property
    def width(self) -> int:
        """Number of entries W of a vector, which is the product of `widths`."""
        return math.prod(self.widths)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a vector of the space of the rows: (D,) or (C, D + 1)."""
        return tuple(self.widths)

    @property
    def depth(self) -> int:
        """Number of terms that the rounding error bound of an inner product is proportional to."""
        return sum(width + 2 for width in self.widths)

    def only(self, chosen: Tensor) -> "StoredRows":
        """Return the store restricted to the members with the indices `chosen`, int64 [k]; no row is copied."""
        return replace(self, members=self.members[chosen])

    def take(self, chosen: Tensor) -> Rows:
        """Return the rows of the members with the indices `chosen`, int64 [k], in float64."""
        samples = self.members[chosen]
        parts = [samples[first:last] for first, last in block_ranges(len(samples), sum(self.widths))]
        if len(parts) < 2:
            return self.load(samples)
        loaded = list(self.workers.map(self.load, parts))
        return Rows(tuple(torch.cat([part.factors[i] for part in loaded]) for i in range(len(self.raw))))

    def ranges(self) -> list[tuple[int, int]]:
        """Return the first and last row (exclusive) of blocks of about 2 MiB."""
        return block_ranges(len(self), sum(self.widths))

    def span(self, first: int, last: int) -> Rows:
        """Return the rows of the members from `first` to `last` (exclusive) in float64."""
        return self.load(self.members[first:last])

    def blocks(self) -> Iterator[Rows]:
        """Yield all rows in order, about 2 MiB at a time."""
        for first, last in self.ranges():
            yield self.span(first, last)

    def load(self, samples: Tensor) -> Rows:
        """Return the rows of samples, given by their positions among all N, int64 [k], in float64."""
        factors = []
        for number in range(len(self.raw)):
            values = wide_factor(self.raw, number, samples, self.device)
            if self.scales is not None:
                values /= self.scales[number][samples].to(self.device)[:, None]
            if self.step != 1.0:
                values /= self.step
            factors.append(values)
        return Rows(tuple(factors))

    def against(self, vectors: Tensor) -> Tensor:
        """Return the inner products with c vectors [c, D] or [c, C, D + 1], float64 [n, c], block by block."""
        parts = list(self.workers.map(lambda ends: self.span(*ends).against(vectors), self.ranges()))
        empty = torch.empty(0, len(vectors), dtype=torch.float64, device=self.device)
        return torch.cat(parts) if parts else empty


def block_ranges(total: int, width: int) -> list[tuple[int, int]]:
    """Split `total` rows of `width` float64 numbers into (first, last) ranges of about 2 MiB, `last` exclusive."""
    step = max(1, _BLOCK_ENTRIES // max(1, width))
    return [(first, min(first + step, total)) for first in range(0, total, step)]


def wide_factor(raw: tuple[Tensor, ...], number: int, samples: Tensor, device: torch.device) -> Tensor:
    """Return rows of factor `number` in float64, [k, width].

    An embedding behind a head gradient (`number` 1) gets the constant input 1 of the layer's bias in front.
    """
    part = raw[number]
    values = part.index_select(0, samples.to(part.device)).to(device).to(torch.float64)
    return torch.cat([torch.ones_like(values[:, :1]), values], dim=1) if number else values


def row_lengths(values: Tensor) -> Tensor:
    """Return the Euclidean lengths of float64 rows, float64 [n], summed in the same order on every device."""
    squares = values * values
    width = squares.shape[1]
    if width == 0:
        return torch.zeros(len(values), dtype=torch.float64, device=values.device)
    while width > 1:
        half = (width + 1) // 2
        squares[:, : width - half] += squares[:, half:width]
        width = half
    return torch.sqrt(squares[:, 0])
