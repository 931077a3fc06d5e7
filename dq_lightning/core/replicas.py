"""Runs replicas of a network side by side, one on each device, over batches that come from one iterator, in order."""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import Any, TypeVar, cast

import torch

from dq_lightning.core.workers import available_cores, torch_threads

Item = TypeVar("Item")
Result = TypeVar("Result")
# One batch is in work on a device while the next one waits for it.
BATCHES_PER_REPLICA = 2


def run_in_order(
    replicas: Sequence[tuple[torch.device, Callable[[Item], Result]]], items: Iterable[Item]
) -> Iterator[Result]:
    """Yield the result of every item in order; each replica runs in a thread of its own and takes the next item.

    The calling thread reads the items, so that a loader whose processes are forked forks them before the threads start,
    and hears of those that end. At most `BATCHES_PER_REPLICA` items for each replica are read but not yielded. With one
    replica no thread is started: every item is read, run and yielded before the next is read.

    An error ends the work at once: later items are not started, those in work are finished, and the error of the first
    item that failed is raised, after the results of all items before it.

    Args:
        replicas: device and function of each replica. A function is never called twice at the same time. Functions
            must give equal results for equal items; on different kinds of devices the last bits may differ.
        items: what the functions are called with.

    Example:
        >>> cpu = torch.device("cpu")
        >>> list(run_in_order([(cpu, abs), (cpu, abs)], [-3, 2, -1]))
        [3, 2, 1]
    """
    if len(replicas) == 1:
        yield from map(replicas[0][1], items)
        return
    free: SimpleQueue[tuple[torch.device, Callable[[Item], Result]]] = SimpleQueue()
    for replica in replicas:
        free.put(replica)
    own, lock = threading.local(), threading.Lock()
    # Items from this number on are not wanted any more.
    stop, grad_mode = math.inf, torch.is_grad_enabled()

    def run(number: int, item: Item) -> Result:
        nonlocal stop
        if number >= stop:
            return cast(Result, None)
        if not hasattr(own, "replica"):
            own.replica = free.get_nowait()
        device, function = own.replica
        try:
            # The current device and the grad mode are those of a thread.
            with _current(device), torch.set_grad_enabled(grad_mode):
                return cast(Result, function(item))
        except BaseException:
            with lock:
                stop = min(stop, number)
            raise

    waiting: deque[Future[Result]] = deque()
    with torch_threads(len(replicas), "replica") as pool:
        try:
            for number, item in enumerate(items):
                waiting.append(pool.submit(run, number, item))
                del item
                while waiting and (waiting[0].done() or len(waiting) >= BATCHES_PER_REPLICA * len(replicas)):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            stop = -1


def in_threads(calls: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """Yield the results of calls in order; a limited number of calls runs ahead in threads, one for each core."""
    return run_in_order([(torch.device("cpu"), lambda call: call())] * min(16, available_cores()), calls)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
