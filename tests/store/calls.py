"""Something happens at the n-th call to the file layer."""

from collections.abc import Callable
from pathlib import Path


def at_call(number: int, act: Callable[[Path], None]) -> Callable[[str, Path], None]:
    left = [number]

    def observe(operation: str, path: Path) -> None:
        if left[0] == 0:
            act(path)
        left[0] -= 1

    return observe
