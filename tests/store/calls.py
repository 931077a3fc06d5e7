"""Something happens at the n-th call to the file layer, or a stage's shards are due when a test says so."""

from collections.abc import Callable
from pathlib import Path


def at_call(number: int, act: Callable[[Path], None]) -> Callable[[str, Path], None]:
    left = [number]

    def observe(operation: str, path: Path) -> None:
        if left[0] == 0:
            act(path)
        left[0] -= 1

    return observe


class DueShards:
    """Shards that are due after every `batches` batches, without a disk."""

    def __init__(self, batches=1):
        self.pieces, self.batches, self.asked = [], batches, 0

    def restore(self, total, made_from=""):
        return ({name: array.copy() for name, array in piece.items()} for piece in self.pieces)

    def is_due(self):
        self.asked += 1
        return self.asked % self.batches == 0

    def keep(self, count, arrays):
        self.pieces.append({name: array.copy() for name, array in arrays.items()})
