"""A builder that is killed, interrupted or ended at any instant leaves nothing that a later run takes for an entry."""

import itertools
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from tqdm import auto

from dq_lightning import PatchConfig, QuantizeConfig, SelectionConfig, quantize
from dq_lightning.cache import files, lock, shards
from tests.lightning_scripts.common import photos
from tests.robustness.worlds import (
    RUNS,
    assert_only_right_entries,
    content,
    delivered,
    ended,
    entries,
    forked,
    image_run,
    kill_at,
    new_root,
    points_of,
    some_points,
    started,
    until,
)


@pytest.fixture
def every_batch_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long stages keep finished work by the clock; here always, so that points do not depend on it."""
    monkeypatch.setattr(shards, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(shards, "MAX_SECONDS", 0.0)


def kill_at_points(place: Path, name: str, start: Path | None, every: bool) -> None:
    run = RUNS[name]
    run(place / "warm")  # loads and remembers what only the first run of a process does
    points = points_of(run, new_root(start, place / "undisturbed"))
    expected = content(place / "undisturbed")
    assert len(points) > 40
    # the point before a rename is an fsync, which changes nothing that a killed process leaves
    for number in range(len(points)) if every else some_points(points, before=0, step=23):
        root = new_root(start, place / str(number))
        assert kill_at(number, run, root) == -signal.SIGKILL
        assert_only_right_entries(root, expected)
        run(root)
        assert content(root) == expected


@pytest.mark.parametrize("name", RUNS)
def test_killed_at_commit_points(place: Path, name: str) -> None:
    kill_at_points(place, name, started(name, place), every=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_killed_at_every_commit_point(place: Path, name: str) -> None:
    kill_at_points(place, name, started(name, place), every=True)


@pytest.mark.slow
@pytest.mark.usefixtures("every_batch_is_kept")
@pytest.mark.parametrize("name", ["packed", "patches", "text"])
def test_killed_at_every_commit_point_of_a_whole_run(place: Path, name: str) -> None:
    kill_at_points(place, name, None, every=True)


def test_killed_while_everything_is_replaced(place: Path) -> None:
    def run(root: Path) -> None:
        image_run(root, force_recompute=True)

    image_run(place / "undisturbed")
    expected = content(place / "undisturbed")
    image_run(place / "killed")
    for number in itertools.count(step=9):
        # how many points there are depends on what an earlier kill has left to be replaced
        if kill_at(number, run, place / "killed") == 0:
            break
        assert_only_right_entries(place / "killed", expected)
        if number % 27 == 0:
            run(place / "killed")
            assert content(place / "killed") == expected
    assert number > 80
    assert content(place / "killed") == expected


def small_build(root: Path) -> Any:
    """The bundled encoder, classifier and reconstructor over real images, with filling."""
    settings = QuantizeConfig(selection=SelectionConfig(keep_ratio=0.2), patches=PatchConfig(drop_ratio=0.3))
    return quantize(photos(40, None), settings, cache_dir=root, device="cpu", progress=False)


def kill_at_random_times(place: Path, kills: int) -> None:
    draw = random.Random(0)
    small_build(place / "warm")  # what the first run of a process does is not done again by its children
    begun = time.monotonic()
    assert ended(forked(lambda: small_build(place / "undisturbed"))) == 0
    seconds = time.monotonic() - begun
    expected, seen = content(place / "undisturbed"), delivered(small_build(place / "undisturbed"))
    done = 0
    while done < kills:
        root = place / f"killed-{done}"
        # some runs are killed again and again before one is left alone
        for _ in range(min(draw.choice((1, 1, 1, 2, 4)), kills - done)):
            child = forked(lambda root=root: small_build(root))
            time.sleep(draw.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
            assert ended(child) in (-signal.SIGKILL, 0)
            done += 1
            assert_only_right_entries(root, expected)
        info = small_build(root)
        assert content(root) == expected
        assert delivered(info) == seen


def test_killed_at_random_times(place: Path) -> None:
    kill_at_random_times(place, 3)


@pytest.mark.slow
def test_killed_at_200_random_times(place: Path) -> None:
    kill_at_random_times(place, 200)


def paused(root: Path, marker: Path, run: Callable[[Path], Any] = RUNS["packed"]) -> None:
    """Build until the compact set is half written, then wait."""

    def wait(operation: str, path: Path) -> None:
        if (operation == "write" and path.name == "values.bin") or (
            path.name == "column-0.npy" and operation == "fsync"
        ):
            marker.touch()
            time.sleep(60)

    files.observer = wait
    run(root)


def litter(root: Path) -> list[Path]:
    return [*root.glob("[1-9]*/.*")]


def assert_locks_are_free(root: Path) -> None:
    locks = [path for path in (root / ".locks").iterdir() if ".owner" not in path.name]
    assert locks
    for path in locks:
        with FileLock(path, timeout=0, thread_local=False):
            pass


def test_ended_by_the_scheduler(place: Path) -> None:
    expected = content(Path(RUNS["packed"](place / "undisturbed").path).parents[1])
    root = place / "cache"
    child = forked(lambda: paused(root, place / "marker"))
    until((place / "marker").exists, child)
    os.kill(child, signal.SIGTERM)
    assert ended(child) == -signal.SIGTERM
    assert_only_right_entries(root, expected)
    assert_locks_are_free(root)
    left = litter(root)
    assert left
    begun = time.monotonic()
    RUNS["packed"](root)
    # it does not wait until the dead process counts as silent
    assert time.monotonic() - begun < lock.SILENCE_SECONDS / 2
    assert content(root) == expected
    # a little later nobody can be at work on it
    for folder in left:
        for path in (*folder.iterdir(), folder):
            os.utime(path, (time.time() - 120,) * 2)
    for number in (1, 2):
        image_run(root, store="packed", seed=number)
    assert not litter(root)


def test_interrupted_from_the_keyboard(place: Path) -> None:
    RUNS["packed"](place / "undisturbed")
    expected = content(place / "undisturbed")
    root, log = place / "cache", place / "log"
    child = forked(lambda: paused(root, place / "marker"), log)
    until((place / "marker").exists, child)
    os.kill(child, signal.SIGINT)
    assert ended(child, 20) == 1
    said = log.read_text().strip().splitlines()
    assert said[-1] == "KeyboardInterrupt"
    assert not litter(root)
    assert_locks_are_free(root)
    assert_only_right_entries(root, expected)
    RUNS["packed"](root)
    assert content(root) == expected


def test_a_notebook_goes_on_after_an_interrupt(place: Path) -> None:
    root = place / "cache"

    def notebook() -> None:
        try:
            paused(root, place / "marker")
        except KeyboardInterrupt:
            files.observer = None
        (place / "interrupted").touch()
        until((place / "go on").exists)
        RUNS["packed"](root)

    child = forked(notebook)
    until((place / "marker").exists, child)
    os.kill(child, signal.SIGINT)
    until((place / "interrupted").exists, child)
    assert not litter(root)
    assert_locks_are_free(root)
    RUNS["packed"](root)
    (place / "go on").touch()
    assert ended(child) == 0
    assert len(entries(root)) == 4


def test_a_lock_of_the_progress_bars_that_was_never_given_back(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked processes share tqdm's lock: one killed while it holds it must not stop the others, which want no bar."""
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    shared = multiprocessing.get_context("fork").RLock()
    monkeypatch.setattr(auto.tqdm, "_lock", shared, raising=False)
    assert auto.tqdm.get_lock() is shared

    def take_it() -> None:
        shared.acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert ended(forked(take_it)) == -signal.SIGKILL
    for name in ("patches", "paid"):
        assert ended(forked(lambda name=name: RUNS[name](place / name)), 20) == 0
    assert not shared.acquire(block=False)
