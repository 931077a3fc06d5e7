"""Fixtures shared by all tests: real data where it is, a cache of their own, no hub."""

import functools
import gc
import importlib.util
import itertools
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import shortcuts, warm_processes
from tests.full_count import FULL, examples

# a test must never reach a hub, nor leave anything in the user's cache
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# tests run side by side: one thread each, and each of the processes that they start
os.environ.setdefault("OMP_NUM_THREADS", "1")

# how long an example takes says more about what else the machine does than about the code; the examples are the same in every
# default run, and the full count looks for new ones
settings.register_profile(
    "any_machine",
    max_examples=examples(100),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=not FULL,
)
settings.load_profile("any_machine")

WARM = pytest.StashKey()
# these tests are about what networks compute, and how often
ABOUT_FEATURES = ("features", "patches", "bins", "test_batching.py", "test_resume.py", "test_gpu.py")
SHARED = Path(os.environ.get("DQ_LIGHTNING_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def pytest_configure(config):
    """One process forks scripts for the whole session, whichever of the test processes starts them."""
    if not hasattr(config, "workerinput"):
        os.environ[shortcuts.FOLDER] = tempfile.mkdtemp(prefix="dq_features_")
        config.stash[WARM] = warm_processes.begin()


def pytest_unconfigure(config):
    """End that process."""
    if WARM in config.stash:
        config.stash[WARM].stdin.close()
        config.stash[WARM].wait()
        shutil.rmtree(os.environ[shortcuts.FOLDER], ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Importing tests and libraries makes millions of objects that stay: collections of garbage never look through them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_collect_file():
    """The docstrings of tests hold no examples; looking for some takes seconds."""
    found = yield
    return [one for one in found if type(one).__name__ != "DoctestModule"]


def pytest_sessionstart(session):
    """What is computed once for many tests."""
    if hasattr(session.config, "workerinput") or not session.config.getoption("numprocesses", None):
        shortcuts.install()


def pytest_runtest_setup(item):
    """Tests of features compute them."""
    shortcuts.compute_features(not set(ABOUT_FEATURES).isdisjoint(item.nodeid.partition("::")[0].split("/")))


def pytest_collection_modifyitems(items):
    """Skip tests marked gpu where there is none."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def caches(tmp_path_factory):
    """A folder for the caches of all tests, and their numbers: pytest's own numbered folders are looked through each time."""
    return tmp_path_factory.mktemp("caches"), itertools.count()


@pytest.fixture(autouse=True)
def own_cache(caches, monkeypatch):
    """Every test has an empty cache."""
    folder, numbers = caches
    path = folder / str(next(numbers))
    path.mkdir()
    monkeypatch.setenv("DQ_LIGHTNING_CACHE", str(path))


@pytest.fixture
def few_bundled_images(monkeypatch):
    """The bundled part of CIFAR-10 holds 40 training and 10 test images of each class, a fifth of what it has."""
    import numpy as np

    from dq_lightning.demo import sample_data

    whole = sample_data._bundled

    @functools.cache
    def fifth(split):
        images, labels = whole(split)
        chosen = np.sort(np.concatenate([np.flatnonzero(labels == label)[::5] for label in range(10)]))
        return images[chosen], labels[chosen]

    monkeypatch.setattr(sample_data, "_bundled", fifth)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with the real data, weights and golden answers."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data beside the project ({SHARED.name}/ is missing)")
    return SHARED


@pytest.fixture(scope="session")
def cifar_root(shared_dir) -> str:
    """Root for torchvision's CIFAR10, restored once per machine from the lossless sheets."""
    root = Path(tempfile.gettempdir()) / "dq_lightning_test_cifar10"
    if not (root / "cifar-10-batches-py" / "batches.meta").is_file():
        script = shared_dir / "data" / "restore_cifar.py"
        spec = importlib.util.spec_from_file_location("restore_cifar", script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        partial = Path(tempfile.mkdtemp(prefix="dq_cifar_"))
        module.restore(shared_dir / "data", partial)
        root.mkdir(exist_ok=True)
        target = root / "cifar-10-batches-py"
        if not target.exists():
            (partial / "cifar-10-batches-py").replace(target)
    return str(root)


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """What is there before a module's tests, the imported libraries above all, is not looked through by later collections.

    Memory is collected after every computation of features; the objects of libraries would take half a second each time.
    """
    gc.collect()
    gc.freeze()
