"""Threads of ours may use torch in a forked process too, where torch guards its own pool against one thread alone."""

import os
import threading
import traceback

import pytest
import torch

from dq_lightning.core.workers import torch_threads

FORKS, THREADS = 100, 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_threads_of_a_forked_process_use_torch(capfd):
    # as every run does for its bins: from here on torch has a pool that forked processes inherit
    torch.set_num_threads(torch.get_num_threads())
    failed = 0
    for _ in range(FORKS):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                together = threading.Barrier(THREADS)

                def work(number, together=together):
                    together.wait()
                    return int(torch.arange(8)[number])

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
