"""Threads of our own: blocks of rows side by side, one torch thread each. PURE."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from dq_lightning.core.workers import one_thread

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

    def run(self, function: Callable[[Item], None], items: Sequence[Item]) -> None:
        """Call the function with every item and wait for all; an error of one is raised."""
        deque(self.map(function, items), maxlen=0)


@contextmanager
def block_workers(device: torch.device) -> Iterator[Workers]:
    """Use as many threads as torch would, but for whole blocks, because most operations here are small (see `one_thread`)."""
    if device.type != "cpu" or torch.get_num_threads() == 1:
        yield Workers()
        return
    with one_thread() as count, ThreadPoolExecutor(count) as pool:
        yield Workers(pool, count)
