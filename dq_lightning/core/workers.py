"""One thread for work of many short steps, and threads of our own that may use torch."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[int]:
    """Let torch's operations run in one thread, and put its setting back at the end.

    OpenMP's threads meet after each operation and spin while they wait: where operations are short and another program wants
    the same core, that takes far longer than the work.

    Yields:
        The number of threads that torch had.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield count
    finally:
        torch.set_num_threads(count)


def torch_threads(count: int, name: str = "") -> ThreadPoolExecutor:
    """Threads that may use torch, also in a forked process (a notebook on several devices, a loader).

    Each thread's first operation there replaces the thread pool that torch inherited, which torch guards against one thread
    alone: two at once fail with "Invalid thread pool!" (torch 2.14). So the calling thread does it before there are others.

    Args:
        count: of threads.
        name: that theirs begin with.
    """
    torch.set_num_threads(torch.get_num_threads())
    return ThreadPoolExecutor(count, thread_name_prefix=name)


def automatic_workers(processes_on_node: int = 1) -> int:
    """Loader processes that leave one core to each training process, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(0, min(8, cores // max(1, processes_on_node) - 1))
