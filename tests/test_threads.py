"""Threads of ours may use torch in a forked process too, where torch guards its own pool against one thread alone."""

import os
import threading
import traceback

import pytest
import torch

from dq_lightning.core.workers import torch_threads

# without the care of torch_threads, 9 of 10 forks fail where torch's own pool has so many threads, which take time to start
FORKS, THREADS = 5, 8


@pytest.fixture
def a_large_pool():
    """Torch has a pool of its own that forked processes inherit, as after the bins of every run."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.usefixtures("a_large_pool")
def test_threads_of_a_forked_process_use_torch(capfd):
    together = threading.Barrier(THREADS)

    def work(number):
        together.wait()
        return int(torch.arange(THREADS)[number])

    failed = 0
    for _ in range(FORKS):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with torch_threads(THREADS) as pool:
                    assert list(pool.map(work, range(THREADS))) == list(range(THREADS))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        failed += os.waitpid(child, 0)[1] != 0
    assert not failed, capfd.readouterr().err[-2000:]


def test_the_number_of_threads_of_torch_stays():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with torch_threads(2, "some") as pool:
            name = pool.submit(lambda: threading.current_thread().name).result()
        assert name.startswith("some")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
