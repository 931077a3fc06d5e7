"""The flow from a dataset to its compact set: one lock at a time, and entries that go away between two steps."""

import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from dq_lightning import PatchConfig
from dq_lightning.cache import entries as cache
from dq_lightning.cache.entries import STATIONS
from dq_lightning.core import isolation
from dq_lightning.core.errors import StoreError
from dq_lightning.features import origins
from dq_lightning.patches import reconstructors
from dq_lightning.pipeline import build, filling, packing, quantize
from dq_lightning.pipeline.plan import FEATURES, FILLED, SELECTION, STORE
from tests.robustness.worlds import RUNS, content, image_run


@pytest.fixture
def locked(monkeypatch):
    """Stations whose entries were locked, in order; no two locks are ever held together."""
    stations, held = [], []
    real = cache.work_lock

    @contextmanager
    def watched(path, finished):
        assert not held
        with real(path, finished) as got:
            held.append(path)
            stations.append(path.name.rpartition("-")[0])
            try:
                yield got
            finally:
                held.pop()

    monkeypatch.setattr(cache, "work_lock", watched)
    return stations


def patched_run(root, **more):
    return image_run(root, patches=PatchConfig(drop_ratio=0.5), **more)


def test_steps_are_made_in_order_each_under_its_own_lock(place: Path, locked) -> None:
    patched_run(place)
    assert locked == list(STATIONS)
    expected = content(place)
    for lost, made in (
        # the entries behind the deepest one that is needed may be gone
        ([FEATURES, FILLED], [FILLED]),
        ([FEATURES, SELECTION, STORE], [SELECTION, STORE]),
        (STATIONS, list(STATIONS)),
    ):
        for station in lost:
            shutil.rmtree(place / station, ignore_errors=True)
        locked.clear()
        patched_run(place)
        assert locked == made
        assert content(place).items() <= expected.items()
    assert content(place) == expected
    locked.clear()
    patched_run(place, force_recompute=True)
    assert locked == list(STATIONS)
    assert content(place) == expected


@pytest.mark.parametrize("force", [False, True])
def test_a_store_that_goes_away_before_it_is_filled_is_made_again(force, place: Path, locked, monkeypatch) -> None:
    RUNS["patches"](place / "alone")
    locked.clear()
    real, removed = filling.write_filled, []

    def write(folder, store, *others, **more):
        if not removed:
            removed.append(store)
            shutil.rmtree(store)
            shutil.rmtree(store.parents[1] / SELECTION)
        real(folder, store, *others, **more)

    monkeypatch.setattr(filling, "write_filled", write)
    patched_run(place / "cache", force_recompute=force)
    assert content(place / "cache") == content(place / "alone")
    # scores are found by the selection, which had to be made again first
    assert locked == [*STATIONS, SELECTION, STORE, FILLED]


def test_a_store_that_always_goes_away_ends_the_run(place: Path, locked, monkeypatch) -> None:
    real = filling.write_filled

    def write(folder, store, *others, **more):
        shutil.rmtree(store)
        real(folder, store, *others, **more)

    monkeypatch.setattr(filling, "write_filled", write)
    with pytest.raises(StoreError):
        patched_run(place)
    assert locked.count(FILLED) == build.MAX_WALKS


def test_a_sample_that_cannot_be_stored_ends_the_run_at_once(place: Path, locked, monkeypatch) -> None:
    def refuse(*args):
        raise StoreError("this sample cannot be stored")

    monkeypatch.setattr(packing, "packed_items", refuse)
    with pytest.raises(StoreError, match="this sample cannot be stored"):
        patched_run(place)
    assert locked == list(STATIONS[: STATIONS.index(STORE) + 1])


def test_networks_and_data_are_identified_once_a_run(place: Path, monkeypatch) -> None:
    hashed = []
    for owner, name in ((origins, "digest_encoder"), (reconstructors, "digest_module"), (quantize, "source_identity")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _n=name, _r=real, **k: (hashed.append(_n), _r(*a, **k))[1])
    once = ["digest_encoder", "digest_encoder", "digest_module", "source_identity"]
    patched_run(place)
    assert sorted(hashed) == once
    hashed.clear()
    assert patched_run(place).reused
    assert sorted(hashed) == once


def test_the_random_state_is_saved_once_a_run(place: Path, monkeypatch) -> None:
    real, saved = isolation.isolated_random_state, []

    def watched(seed=None):
        # blocks with a seed are there for the seed
        saved.extend([1] if seed is None else [])
        return real(seed)

    for name, module in list(sys.modules.items()):
        # sources are used alone as well, where their own checks are the outermost call
        own = name.startswith("dq_lightning.") and not name.startswith("dq_lightning.sources.")
        if own and hasattr(module, "isolated_random_state"):
            monkeypatch.setattr(module, "isolated_random_state", watched)
    patched_run(place)
    assert saved == [1]
