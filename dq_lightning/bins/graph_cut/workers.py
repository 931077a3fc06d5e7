"""Threads that process blocks of rows in parallel, each of which runs torch with one thread."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from dq_lightning.core.workers import one_thread

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Calls a function with each of some items in parallel and returns the results in the order of the items.

    Args:
        pool: threads to use; None makes all calls in the calling thread.
        count: number of threads in the pool.
    """

    def __init__(self, pool: ThreadPoolExecutor | None = None, count: int = 1) -> None:
        self._pool = pool
        self.count = count

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Return the results of the function for all items, in order, as the built-in `map` does."""
        if self._pool is None or len(items) < 2:
            return map(function, items)
        return self._pool.map(function, items)


@contextmanager
def block_workers(device: torch.device) -> Iterator[Workers]:
    """Provide `Workers` with as many threads as torch would use on the CPU.

    Each thread processes whole blocks, because most operations here are too small to be split (see `one_thread`).
    """
    if device.type != "cpu" or torch.get_num_threads() == 1:
        yield Workers()
        return
    with one_thread() as count, ThreadPoolExecutor(count) as pool:
        yield Workers(pool, count)
