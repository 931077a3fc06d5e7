"""Threads and processes: one thread for many short steps, threads that may use torch, number of loader processes."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

# Starting and stopping loader processes takes about this long, so they do not pay off for less work.
WORKER_START_SECONDS = 2.0
# At most so many loader processes read for one device.
MAX_WORKERS = 8


@contextmanager
def one_thread() -> Iterator[int]:
    """Run torch's operations in one thread inside the block, then restore the number of threads, which is yielded.

    OpenMP's threads synchronise after each operation and spin while they wait. If the operations are short and another
    program wants the same core, the waiting takes far longer than the work.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield count
    finally:
        torch.set_num_threads(count)


def torch_threads(count: int, name: str = "") -> ThreadPoolExecutor:
    """Create a pool of threads that may use torch, also in a forked process (a notebook on several devices, a loader).

    In a forked process each thread's first operation replaces the thread pool that torch inherited, and torch guards
    this step against one thread alone: two threads at once fail with "Invalid thread pool!" (torch 2.14). So the
    calling thread takes this step before other threads exist. The names of the threads begin with `name`.
    """
    torch.set_num_threads(torch.get_num_threads())
    return ThreadPoolExecutor(count, thread_name_prefix=name)


def available_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def automatic_workers(processes_on_node: int = 1, num_devices: int = 1) -> int:
    """Return the number of loader processes that leaves one core to each training process, at most 8 for each device.

    Args:
        processes_on_node: number of training processes on this machine.
        num_devices: number of devices that each process feeds.
    """
    return max(0, min(MAX_WORKERS * num_devices, available_cores() // max(1, processes_on_node) - 1))
