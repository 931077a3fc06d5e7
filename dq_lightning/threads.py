"""One thread for work of many short steps."""

from collections.abc import Iterator
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
