"""What the three regimes cost, in seconds of one machine; only their ratios decide."""

from collections.abc import Sequence
from dataclasses import dataclass

# There are at least this many candidates. For a first round, this share of them is picked.
LEAST, SHARE = 256, 0.4
# The processor's cache holds so many entries of float32 rows (16 MiB); more come from memory at every pass.
CACHED = 1 << 22


@dataclass(frozen=True)
class Costs:
    """Costs of the steps of the greedy for rows of some width, on the CPU or a GPU.

    Attributes:
        width: number of entries that a product of two rows multiplies.
        wide: number of entries that a product of a row with the vector w multiplies; for rows with two factors it is
            much more than `width`.
        most: greatest number of candidates with a matrix.
        device: `"cpu"` or `"cuda"`.
        threads: number of threads of the CPU.
    """

    width: int
    wide: int
    most: int
    device: str = "cpu"
    threads: int = 1

    @property
    def _rates(self) -> tuple[float, float, float]:
        """Seconds for a term of a product of matrices, an entry of the matrix, and an entry of an exact pass."""
        if self.device != "cpu":
            return 1e-13, 2e-11, 3e-12
        return tuple(rate / self.threads for rate in (3e-11, 3e-9, 2.5e-9))  # type: ignore[return-value]

    def matrix(self, rows: int) -> float:
        """Matrix of inner products of all rows."""
        term, entry, _ = self._rates
        return 0.5 * rows * rows * (self.width * term + entry)

    def walk(self, number: int) -> float:
        """So many inner products, in float64, of a row with a pick, and the gains that follow from them."""
        return number * (self.width * 1e-10 + 2e-8) / self.threads

    def from_matrix(self, rows: int) -> float:
        """One pick from the matrix of `rows` rows, which one thread makes, or a GPU if there are many rows."""
        if self.device != "cpu" and rows >= 1 << 12:
            return 2.8e-5 + rows * (1e-11 + self.wide * 4e-13)
        return 4e-6 + rows * 2.4e-9

    def check(self, rows: int) -> float:
        """One exact pass over the rows that proves a round of picks."""
        return 2e-3 + rows * (self.wide if self.device == "cpu" else 8 * self.wide) * self._rates[2]

    def candidates(self, rows: int, picks: int) -> float:
        """Picks among `rows` candidates: their matrix, and the picks."""
        return self.matrix(rows) + picks * self.from_matrix(rows)

    def in_a_round(self, rows: int, picks: int) -> float:
        """Each of `picks` picks that a round makes for `rows` rows, among as many candidates as that takes."""
        return (self.check(rows) + self.candidates(int(max(LEAST, picks / SHARE)), picks)) / picks

    def best_round(self, rows: int) -> int:
        """Number of candidates for which a pick costs least; not a cost."""
        sizes = [LEAST << power for power in range(12) if LEAST << power <= min(self.most, rows // 2)]
        return min(sizes or [LEAST], key=lambda size: self.in_a_round(rows, int(SHARE * size)))

    def steady(self, rows: int) -> float:
        """A pick by candidates where the order of the gains is steady."""
        return self.in_a_round(rows, int(SHARE * self.best_round(rows)))

    def from_pass(self, rows: int) -> float:
        """One pick after a pass over float32 rows."""
        if self.device != "cpu":
            return 2.8e-5 + rows * (1e-11 + self.wide * 1.8e-12)
        if rows * self.wide <= CACHED:
            return 7e-5 + rows * (1e-9 + self.wide * 1.5e-10)
        return 7e-5 + rows * (1e-9 + self.wide * 3.5e-10 / self.threads)

    def passes(self, rows: int, sizes: Sequence[int]) -> float:
        """All picks of bins of these sizes by passes over the rows that are left, `rows` at first."""
        total = max(1, sum(sizes))
        return sum(size * self.from_pass(rows * sum(sizes[number:]) // total) for number, size in enumerate(sizes))
