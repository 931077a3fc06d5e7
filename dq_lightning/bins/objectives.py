"""Objectives: the set functions that a bin maximizes, each computed as the gain of adding one more sample.

To add an objective, write one class with the two methods of `Objective` and add one line to `OBJECTIVES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dq_lightning.bins.similarity import Similarities
from dq_lightning.core.config import Objective as ObjectiveName
from dq_lightning.core.errors import ConfigError

# Rows of a similarity matrix that are looked at together.
_CHANGED = 128


class Objective(Protocol):
    """A set function f over the n samples that are left when a bin is begun, with a current set that starts empty."""

    def gains(self, rows: Tensor) -> Tensor:
        """Return f(set + x) - f(set) for the samples x given as int64 [k]; the result is float64 [k]."""
        ...

    def add(self, row: int) -> None:
        """Add a sample to the current set."""
        ...


@dataclass(frozen=True)
class Setting:
    """Settings that an objective is constructed with.

    Attributes:
        lam: weight of representativeness against diversity in the graph cut.
        count: number of samples in the bin.
        every_step: True if the maximizer asks for all gains at every step (naive), False if it asks only for those of
            a few samples (lazy and stochastic).
    """

    lam: float
    count: int
    every_step: bool


@dataclass(frozen=True)
class Choice:
    """An entry of the table of objectives.

    Attributes:
        make: function that constructs the objective for one bin.
        needs_positive: True if the gains are guaranteed never to grow only when no similarity is negative.
        memory: function (n, count, width, every_step) -> bytes of memory that a bin of `count` among n samples takes,
            whose rows have so many columns.
    """

    make: Callable[[Similarities, Setting], Objective]
    needs_positive: bool
    memory: Callable[[int, int, int, bool], int]


class GraphCut:
    """Graph cut: gain(x) = lam * sum_j S[j, x] - 2 * sum_{s in set} S[s, x] (Zhou et al. 2023, eq. 3)."""

    def __init__(self, similarities: Similarities, setting: Setting) -> None:
        self._similarities = similarities
        # With lam = 0 the sums are not needed, and they are costly for the radial basis function.
        self._gains = setting.lam * (similarities.sums() if setting.lam else torch.zeros_like(similarities.diagonal()))

    def gains(self, rows: Tensor) -> Tensor:
        return self._gains[rows]

    def add(self, row: int) -> None:
        self._gains -= 2.0 * self._similarities.columns(torch.tensor([row]))[:, 0]


class SumRedundancy:
    """Negated redundancy: f(A) = - sum_{a, b in A} S[a, b], which prefers samples that are unlike those in the set.

    The gain is gain(x) = - S[x, x] - 2 * sum_{s in set} S[s, x].
    """

    def __init__(self, similarities: Similarities, setting: Setting) -> None:
        self._similarities = similarities
        self._gains = -similarities.diagonal()

    def gains(self, rows: Tensor) -> Tensor:
        return self._gains[rows]

    def add(self, row: int) -> None:
        self._gains -= 2.0 * self._similarities.columns(torch.tensor([row]))[:, 0]


class FacilityLocation:
    """Facility location: f(A) = sum_i max(0, max_{a in A} S[i, a]).

    Every sample i counts its similarity with the most similar sample of A. With `every_step` the similarities are held
    as a matrix [n, n] and all gains are updated after each pick, since one pick changes the most similar member of few
    samples. Otherwise a gain is computed from its column of S when it is asked for.
    """

    def __init__(self, similarities: Similarities, setting: Setting) -> None:
        self._similarities = similarities
        self._best = torch.zeros(len(similarities), dtype=torch.float64, device=similarities.device)
        self._matrix: Tensor | None = None
        if setting.every_step:
            self._matrix = similarities.columns(torch.arange(len(similarities)))
            self._gains = torch.zeros_like(self._best)
            for part in torch.split(self._matrix, _CHANGED):
                self._gains += part.clamp(min=0.0).sum(dim=0)

    def gains(self, rows: Tensor) -> Tensor:
        if self._matrix is not None:
            return self._gains[rows]
        gains = []
        for some in torch.split(rows, 64):
            gain = torch.zeros(len(some), dtype=torch.float64, device=self._best.device)
            for first, part in self._similarities.blocks_of_columns(some):
                gain += (part - self._best[first : first + len(part), None]).clamp_(min=0.0).sum(dim=0)
            gains.append(gain)
        return torch.cat(gains)

    def add(self, row: int) -> None:
        if self._matrix is None:
            self._best = torch.maximum(self._best, self._similarities.columns(torch.tensor([row]))[:, 0])
            return
        column = self._matrix[:, row]
        changed = torch.nonzero(column > self._best).flatten()
        for part in torch.split(changed, _CHANGED):
            # S is symmetric, so the rows of the changed samples equal their columns.
            served = self._matrix[part]
            lost = (served - self._best[part, None]).clamp_(min=0.0) - (served - column[part, None]).clamp_(min=0.0)
            self._gains -= lost.sum(dim=0)
        self._best[changed] = column[changed]


class LogDeterminant:
    """Log-determinant: f(A) = log det(I + S_A) (Kulesza and Taskar 2012).

    Each pick adds one column to the Cholesky factor (Chen, Zhang and Zhou 2018, "Fast greedy MAP inference for
    determinantal point process", algorithm 1).
    """

    def __init__(self, similarities: Similarities, setting: Setting) -> None:
        self._similarities = similarities
        self._pivots = 1.0 + similarities.diagonal()
        self._factor = torch.zeros(setting.count, len(similarities), dtype=torch.float64, device=similarities.device)
        self._size = 0

    def gains(self, rows: Tensor) -> Tensor:
        return torch.log(self._pivots[rows].clamp(min=1.0))

    def add(self, row: int) -> None:
        known = self._factor[: self._size]
        fresh = self._similarities.columns(torch.tensor([row]))[:, 0] - known[:, row] @ known
        fresh[row] += 1.0
        fresh /= torch.sqrt(self._pivots[row].clamp(min=1.0))
        self._factor[self._size] = fresh
        self._size += 1
        self._pivots = self._pivots - fresh * fresh


class FeatureBased:
    """Feature-based function: f(A) = sum_d sqrt(sum_{a in A} x[a, d]) (Wei et al. 2014).

    Raises:
        ConfigError: the features have negative entries or a head gradient.
    """

    def __init__(self, similarities: Similarities, setting: Setting) -> None:
        self._rows = similarities.rows
        for block in self._rows.blocks():
            if len(block.factors) > 1 or bool((block.factors[0] < 0).any()):
                raise ConfigError(
                    "objective 'feature_based' needs features without negative entries and no head gradient; pass features "
                    "behind a ReLU, or choose another objective"
                )
        self._total = torch.zeros(self._rows.width, dtype=torch.float64, device=self._rows.device)

    def gains(self, rows: Tensor) -> Tensor:
        before = self._total.sqrt().sum()
        parts = [
            (self._rows.take(part).factors[0] + self._total).sqrt_().sum(dim=1) - before
            for part in torch.split(rows, 8192)
        ]
        return torch.cat(parts)

    def add(self, row: int) -> None:
        self._total = self._total + self._rows.take(torch.tensor([row])).factors[0][0]


def _linear(n: int, count: int, width: int, every_step: bool) -> int:
    return 32 * n


def _facility_location(n: int, count: int, width: int, every_step: bool) -> int:
    # Beside the matrix there are all rows in float64, for a moment twice, or later some rows of the matrix, four times.
    return 8 * n * n + max(16 * n * width, 32 * _CHANGED * n) if every_step else 64 * n


OBJECTIVES: dict[ObjectiveName, Choice] = {
    "graph_cut": Choice(GraphCut, True, _linear),
    "facility_location": Choice(FacilityLocation, False, _facility_location),
    "log_determinant": Choice(LogDeterminant, False, lambda n, count, width, every_step: 8 * n * count + 64 * n),
    "sum_redundancy": Choice(SumRedundancy, True, _linear),
    "feature_based": Choice(FeatureBased, False, _linear),
}
