"""What the three regimes cost, in seconds of one machine; only their ratios decide."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Costs of the steps of the greedy for rows of some width, on the CPU or a GPU.

    Attributes:
        width: number of entries that a product of two rows multiplies.
        device: `"cpu"` or `"cuda"`.
        threads: number of threads of the CPU.
        wide: number of entries that a product of a row with the vector w multiplies; for rows with two factors it is
            much more than `width`.
    """

    width: int
    wide: int
    device: str = "cpu"
    threads: int = 1

    @property
    def _rates(self) -> tuple[float, float, float, float]:
        """Seconds for a term of a product of matrices, an entry of the matrix, and an entry of a pass (exact, float32)."""
        if self.device != "cpu":
            return 1e-13, 2e-11, 3e-12, 1.8e-12
        return tuple(rate / self.threads for rate in (6.7e-11, 5e-9, 2.5e-9, 3e-10))  # type: ignore[return-value]

    def matrix(self, rows: int) -> float:
        """Matrix of inner products of all rows."""
        return self.pairs(0.5 * rows * rows)

    def pairs(self, number: float) -> float:
        """So many inner products of two rows."""
        term, entry, _, _ = self._rates
        return number * (self.width * term + entry)

    def from_matrix(self, rows: int) -> float:
        """One pick from the matrix of `rows` rows, which one thread makes, or a GPU if there are many rows."""
        if self.device != "cpu" and rows >= 1 << 12:
            return 2.8e-5 + rows * (1e-11 + self.wide * 4e-13)
        return 1.2e-5 + rows * 1e-9

    def check(self, rows: int) -> float:
        """One exact pass over the rows that proves a round of picks."""
        return 2e-3 + rows * (self.wide if self.device == "cpu" else 8 * self.wide) * self._rates[2]

    def candidates(self, rows: int, picks: int) -> float:
        """Picks among `rows` candidates: their matrix, and the picks."""
        return self.matrix(rows) + picks * self.from_matrix(rows)

    def from_pass(self, rows: int) -> float:
        """One pick after a pass over float32 rows."""
        return 2.8e-5 + rows * ((1e-9 if self.device == "cpu" else 1e-11) + self.wide * self._rates[3])

    def passes(self, rows: int, sizes: Sequence[int]) -> float:
        """All picks of bins of these sizes by passes over the rows that are left, `rows` at first."""
        total = max(1, sum(sizes))
        return sum(size * self.from_pass(rows * sum(sizes[number:]) // total) for number, size in enumerate(sizes))
