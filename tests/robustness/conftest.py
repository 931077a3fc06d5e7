"""Fast places for caches that are synced thousands of times, and a parent whose forks are cheap."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from dq_lightning.identity import networks

MEMORY = Path("/dev/shm")


@pytest.fixture(autouse=True)
def warm():
    """Forks of this process compute in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def networks_described_once(monkeypatch):
    """Hundreds of runs with the same networks look through them once; that is tested elsewhere."""
    real, known = networks.described_module, {}

    def described(module: nn.Module, without=()):
        key = (id(module), tuple(without))
        if key not in known:
            # the module is kept, so that its number is not given to another one
            known[key] = (module, real(module, without))
        return known[key][1]

    monkeypatch.setattr(networks, "described_module", described)


@pytest.fixture
def place(tmp_path):
    """A folder for caches: in memory where that is possible, since a test of fsync waits for each."""
    if not (MEMORY.is_dir() and os.access(MEMORY, os.W_OK)):
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="dq_lightning_", dir=MEMORY))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
