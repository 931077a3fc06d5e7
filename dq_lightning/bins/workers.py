"""Threads of our own: blocks of rows side by side, one torch thread each. PURE."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Runs a function over some items, in order of the items.

    Args:
        pool: None to do everything in the calling thread.
        count: threads in the pool.
    """

    def __init__(self, pool: ThreadPoolExecutor | None = None, count: int = 1) -> None:
        self._pool = pool
        self.count = count

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Like the built-in `map`; results come in order."""
        if self._pool is None or len(items) < 2:
            return map(function, items)
        return self._pool.map(function, items)


@contextmanager
def block_workers(device: torch.device) -> Iterator[Workers]:
    """Use as many threads as torch would, but for whole blocks, and put torch's setting back at the end.

    Most operations here are small. OpenMP's threads would meet after each of them and spin while they wait, which is many
    times slower than one thread as soon as another program wants the same core.
    """
    count = torch.get_num_threads()
    if device.type != "cpu" or count == 1:
        yield Workers()
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count) as pool:
            yield Workers(pool, count)
    finally:
        torch.set_num_threads(count)
