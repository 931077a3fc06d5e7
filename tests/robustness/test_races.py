"""Many processes on one key: one result, nobody hangs, also when locks lie and builders differ; prune beside them."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dq_lightning import PackedDataset
from dq_lightning.cache import lock
from dq_lightning.cache.entries import Cache
from dq_lightning.commands import cache_care
from dq_lightning.commands.cache_care import prune
from dq_lightning.core.errors import DQError
from dq_lightning.features.encoders import NetworkEncoder
from dq_lightning.pipeline.plan import FEATURES
from tests.full_count import FULL
from tests.robustness.worlds import RUNS, content, delivered, ended, entries, forked, image_run, until

PROCESSES = 8
ROUND_SECONDS = 60.0


def race(root: Path, run: Callable[[Path], Any], prepare: Callable[[int], None], kills: list[float]) -> list[str]:
    """Start builders together, kill some after so many seconds; what each survivor said: content hash and samples."""
    said = root.with_name(root.name + "-said")
    said.mkdir()
    gate, opened = os.pipe()

    def builder(number: int) -> None:
        os.close(opened)
        prepare(number)
        os.read(gate, 1)
        info = run(root)
        (said / str(number)).write_text(f"{info.path} {info.content_hash} {hash(str(delivered(info)))}")

    children = [forked(lambda number=number: builder(number), said / "log") for number in range(PROCESSES)]
    os.close(gate)
    os.close(opened)
    started = time.monotonic()
    for child, after in zip(children, kills, strict=False):
        time.sleep(max(0.0, started + after - time.monotonic()))
        os.kill(child, signal.SIGKILL)
    for number, child in enumerate(children):
        status = ended(child, ROUND_SECONDS)
        allowed = (0, -signal.SIGKILL) if number < len(kills) else (0,)
        assert status in allowed, (said / "log").read_text()
    answers = [path.read_text() for path in said.iterdir() if path.name != "log"]
    assert len(answers) >= PROCESSES - len(kills)
    return answers


def liar(number: int) -> None:
    """A lock that everybody gets."""
    lock.FileLock.acquire = lambda self, *_, **__: None
    lock.FileLock.release = lambda self, *_, **__: None


def rounds(place: Path, count: int) -> None:
    draw = random.Random(0)
    for number in range(count):
        run = RUNS[draw.choice(["indices", "packed", "patches"])]
        root = place / str(number)
        run(place / "alone")
        expected = content(Path(run(place / f"alone-{number}").path).parents[1])
        kills = sorted(draw.uniform(0, 0.4) for _ in range(draw.choice((0, 2, 4))))
        answers = race(root, run, liar if number % 2 else lambda number: None, kills)
        assert len(set(answers)) == 1
        run(root)
        assert content(root) == expected
        shutil.rmtree(root)
        shutil.rmtree(place / f"alone-{number}")


def test_eight_processes_on_one_key(place: Path) -> None:
    rounds(place, 2)


@pytest.mark.slow
def test_eight_processes_on_one_key_fifty_times(place: Path) -> None:
    rounds(place, 50)


def test_builders_that_differ_agree_on_the_first_result(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = NetworkEncoder.embed

    def embed(self: NetworkEncoder, batch: torch.Tensor) -> torch.Tensor:
        # the arithmetic of machines differs, while networks and data are the same
        found = real(self, batch)
        noise = torch.Generator().manual_seed(int(os.environ.get("NOISE", "0")))
        return found + torch.randn(found.shape, generator=noise)

    def noisy(number: int) -> None:
        liar(number)
        os.environ["NOISE"] = str(number)

    monkeypatch.setattr(NetworkEncoder, "embed", embed)
    for number in range(2 if FULL else 1):
        root = place / str(number)
        assert len(set(race(root, RUNS["packed"], noisy, []))) == 1
        # every station was made from the features that won
        shutil.copytree(root / FEATURES, place / f"again-{number}" / FEATURES)
        RUNS["packed"](place / f"again-{number}")
        assert content(place / f"again-{number}") == content(root)
    monkeypatch.setenv("NOISE", "99")
    assert content(place / "0") != content(RUNS["packed"](place / "plain") and place / "plain")


def make_old(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in a cache now counts as made and used long ago."""
    then = time.time()
    real = cache_care.last_used
    monkeypatch.setattr(cache_care, "last_used", lambda e: real(e) - 86400 * 9 * (real(e) < then + 5))


def test_prune_leaves_what_another_process_has_open(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = RUNS["patches"](place)
    make_old(place, monkeypatch)

    def reader() -> None:
        store = PackedDataset(info.path)
        (place / "open").touch()
        until((place / "pruned").exists)
        assert len(list(PackedDataset(info.path))) == len(list(store)) == len(store)

    child = forked(reader, place / "log")
    until((place / "open").exists, child)
    done = prune(place, older_than_days=1, max_bytes=0)
    assert [str(entry.path) for entry in done.busy] == [info.path]
    assert [str(path) for path in entries(place)] == [info.path]
    (place / "pruned").touch()
    assert ended(child) == 0, (place / "log").read_text()
    assert len(prune(place, older_than_days=1).removed) == 1
    assert not entries(place)


def test_prune_leaves_what_loader_processes_have_open(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = RUNS["packed"](place)
    make_old(place, monkeypatch)
    store = PackedDataset(info.path)
    loader = torch.utils.data.DataLoader(store, batch_size=1, num_workers=1, collate_fn=list, persistent_workers=True)
    batches = iter(loader)
    next(batches)
    assert [str(entry.path) for entry in prune(place, older_than_days=1).busy] == [info.path]
    assert len(list(batches)) == len(store) - 1
    del batches, loader, store
    until(lambda: prune(place, max_bytes=0) and not entries(place))


def test_prune_beside_builders(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = place / "cache"
    RUNS["packed"](root)
    monkeypatch.setattr(cache_care, "RECENT_SECONDS", 1.0)
    expected = {seed: delivered(image_run(place / "alone", store="packed", seed=seed)) for seed in range(3)}

    def builder() -> None:
        number = 0
        while not (place / "enough").exists():
            number += 1
            begun = time.monotonic()
            try:
                assert delivered(image_run(root, store="packed", seed=number % 3)) == expected[number % 3]
            except DQError:
                # a builder that stands still for longer than what counts as recent may lose what it was about to use
                if time.monotonic() - begun < 1:
                    raise

    children = [forked(builder, place / "log") for _ in range(2)]
    removed = []

    def enough() -> bool:
        # what a compact set was made from is not used again once the set is there
        removed.extend(prune(root, max_bytes=0).removed)
        return len(removed) > 4

    until(enough, children[0])
    (place / "enough").touch()
    assert [ended(child) for child in children] == [0, 0], (place / "log").read_text()


def test_prune_sweeps_up_what_was_left_over(place: Path) -> None:
    info = RUNS["packed"](place)
    aside = Path(info.path).with_name(".damaged-abc-12")
    shutil.copytree(info.path, aside)
    stale = place / "0-digests" / ".tmp-12-ab"
    stale.write_text("half")
    os.utime(stale, (time.time() - 9 * 86400,) * 2)
    young = Path(info.path).with_name(f".tmp-elsewhere-12-{Path(info.path).name}-ab")
    young.mkdir()
    prune(place, older_than_days=100, dry_run=True)
    assert aside.exists()
    prune(place, older_than_days=100)
    assert not aside.exists()
    assert not stale.exists()
    assert young.exists()
    assert Cache(place, verify="hash").entries()
    assert RUNS["packed"](place).reused
