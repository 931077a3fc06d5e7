"""What a bin is picked for: functions of a set, each as the gains it gives to the samples not yet in it. PURE.

A new objective is one class with the two methods of `Objective` and one line in `OBJECTIVES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dq_lightning.bins.similarity import Similarities
from dq_lightning.core.config import Objective as ObjectiveName
from dq_lightning.core.errors import ConfigError


class Objective(Protocol):
    """A set function f over the n samples left when a bin is begun; the set is empty at first."""

    def gains(self, rows: Tensor) -> Tensor:
        """f(set + x) - f(set) for some samples x, int64 [k] -> float64 [k]."""
        ...

    def add(self, row: int) -> None:
        """Put a sample into the set."""
        ...


@dataclass(frozen=True)
class Setting:
    """What an objective is made with.

    Attributes:
        lam: weight of representativeness in the graph cut.
        count: size of the bin.
        every_step: whether all gains are asked for at every step (naive), or those of a few samples (lazy).
    """

    lam: float
    count: int
    every_step: bool


@dataclass(frozen=True)
class Choice:
    """A row of the table of objectives.

    Attributes:
        make: builds it for one bin.
        needs_positive: its gains never grow only when no similarity is negative.
        memory: bytes it takes for a bin of `count` among n samples, (n, count, every_step) -> bytes.
    """

    make: Callable[[Similarities, Setting], Objective]
    needs_positive: bool
    memory: Callable[[int, int, bool], int]


class GraphCut:
    """gain(x) = lam * sum_j S[j, x] - 2 * sum_{s in set} S[s, x] (Zhou et al. 2023, eq. 3)."""

    def __init__(self, similarities: Similarities, setting: Setting) -> None:
        self._similarities = similarities
        # lam = 0 asks for no sums, which are costly for the radial basis function
        self._gains = setting.lam * (similarities.sums() if setting.lam else torch.zeros_like(similarities.diagonal()))

    def gains(self, rows: Tensor) -> Tensor:
        return self._gains[rows]

    def add(self, row: int) -> None:
        self._gains -= 2.0 * self._similarities.columns(torch.tensor([row]))[:, 0]


class SumRedundancy:
    """f(A) = - sum_{a, b in A} S[a, b], so gain(x) = - S[x, x] - 2 * sum_{s in set} S[s, x]: the least alike first."""

    def __init__(self, similarities: Similarities, setting: Setting) -> None:
        self._similarities = similarities
        self._gains = -similarities.diagonal()

    def gains(self, rows: Tensor) -> Tensor:
        return self._gains[rows]

    def add(self, row: int) -> None:
        self._gains -= 2.0 * self._similarities.columns(torch.tensor([row]))[:, 0]


class FacilityLocation:
    """f(A) = sum_i max(0, max_{a in A} S[i, a]): every sample is served by the one of A that is most like it.

    With `every_step` the similarities are held as a matrix [n, n] and the gains are kept running, since one pick changes
    the best server of few samples; else a gain is computed from its column when it is asked for.
    """

    def __init__(self, similarities: Similarities, setting: Setting) -> None:
        self._similarities = similarities
        self._best = torch.zeros(len(similarities), dtype=torch.float64, device=similarities.device)
        self._matrix: Tensor | None = None
        if setting.every_step:
            self._matrix = similarities.columns(torch.arange(len(similarities)))
            self._gains = self._matrix.clamp(min=0.0).sum(dim=0)

    def gains(self, rows: Tensor) -> Tensor:
        if self._matrix is not None:
            return self._gains[rows]
        parts = [
            (self._similarities.columns(part) - self._best[:, None]).clamp_(min=0.0).sum(dim=0)
            for part in torch.split(rows, 64)
        ]
        return torch.cat(parts)

    def add(self, row: int) -> None:
        if self._matrix is None:
            self._best = torch.maximum(self._best, self._similarities.columns(torch.tensor([row]))[:, 0])
            return
        column = self._matrix[:, row]
        changed = torch.nonzero(column > self._best).flatten()
        for part in torch.split(changed, 1024):
            # S is symmetric, so the rows of the changed samples are what their columns would be
            served = self._matrix[part]
            lost = (served - self._best[part, None]).clamp_(min=0.0) - (served - column[part, None]).clamp_(min=0.0)
            self._gains -= lost.sum(dim=0)
        self._best[changed] = column[changed]


class LogDeterminant:
    """f(A) = log det(I + S_A) (Kulesza and Taskar 2012), by one more column of the Cholesky factor at each pick.

    Chen, Zhang and Zhou 2018, "Fast greedy MAP inference for determinantal point process", algorithm 1.
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
    """f(A) = sum_d sqrt(sum_{a in A} x[a, d]) for features that are not negative (Wei et al. 2014)."""

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


def _linear(n: int, count: int, every_step: bool) -> int:
    return 32 * n


OBJECTIVES: dict[ObjectiveName, Choice] = {
    "graph_cut": Choice(GraphCut, True, _linear),
    "facility_location": Choice(
        FacilityLocation, False, lambda n, _, every_step: 8 * n * n if every_step else 1100 * n
    ),
    "log_determinant": Choice(LogDeterminant, False, lambda n, count, _: 8 * n * count),
    "sum_redundancy": Choice(SumRedundancy, True, _linear),
    "feature_based": Choice(FeatureBased, False, _linear),
}
