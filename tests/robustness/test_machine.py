"""Any order of builds, kills, changes, losses, prunes, moves and races: a build always returns the right content."""

import os
import random
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from torch import nn

from dq_lightning import BinConfig, QuantizeConfig, SelectionConfig, quantize
from dq_lightning.cache import manifest
from dq_lightning.cache.manifest import Damage, check_entry
from dq_lightning.commands import cache_care
from dq_lightning.core.errors import StoreError
from dq_lightning.pipeline.plan import STORE
from tests.robustness.worlds import Points, content, delivered, ended, entries, forked

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
Config = tuple[int, float, int, str]


class Pixels(torch.utils.data.Dataset):
    """A data set in memory; the version decides the pixels."""

    def __init__(self, version: int) -> None:
        draw = np.random.default_rng(version)
        self.images = draw.integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
        self.labels = [i % 2 for i in range(10)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index], self.labels[index]


class Means(nn.Module):
    """The means of the colours."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))


def build(root: Path, wanted: Config) -> Any:
    version, ratio, seed, kind = wanted
    config = QuantizeConfig(
        bins=BinConfig(num_bins=2), selection=SelectionConfig(keep_ratio=ratio, seed=seed), store=kind
    )
    encoder = (Means(), as_floats)
    return quantize(Pixels(version), config, encoder=encoder, cache_dir=root, device="cpu", progress=False)


def as_floats(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class Truth:
    """What a build alone, in a cache of its own, gives."""

    def __init__(self) -> None:
        self.place = Path(tempfile.mkdtemp(dir=MEMORY))
        self.known: dict[Config, tuple[Any, dict[str, str]]] = {}

    def of(self, wanted: Config) -> tuple[Any, dict[str, str]]:
        if wanted not in self.known:
            root = self.place / str(len(self.known))
            found = delivered(build(root, wanted))
            self.known[wanted] = found, content(root)
        return self.known[wanted]

    def files(self) -> dict[str, str]:
        """Every file of every entry that any configuration so far can have."""
        return {name: value for _, files in self.known.values() for name, value in files.items()}


def use(root: Path, wanted: Config, seen: Any, rotten: bool) -> None:
    """Build and read. A large file that has changed is noticed by its reader, and made good by the next run."""
    with suppress(*([StoreError] if rotten else [])):
        assert delivered(build(root, wanted)) == seen
    assert delivered(build(root, wanted)) == seen


class CacheMachine(RuleBasedStateMachine):
    truth: Truth

    @initialize()
    def start(self) -> None:
        self.place = Path(tempfile.mkdtemp(dir=MEMORY))
        self.root = self.place / "0"
        self.moves, self.rotten = 0, False
        self.wanted: Config = (0, 0.2, 0, "packed")

    def entries_of(self) -> list[Path]:
        return entries(self.root)

    @rule()
    def build(self) -> None:
        use(self.root, self.wanted, self.truth.of(self.wanted)[0], self.rotten)
        self.rotten = False
        store = {name for name in self.truth.of(self.wanted)[1] if name.startswith(STORE)}
        assert store <= content_of_whole_entries(self.root).keys()

    @rule(ratio=st.sampled_from([0.2, 0.4]), seed=st.integers(0, 1), kind=st.sampled_from(["packed", "indices"]))
    def change_config(self, ratio: float, seed: int, kind: str) -> None:
        self.wanted = (self.wanted[0], ratio, seed, kind)

    @rule(version=st.integers(0, 2))
    def change_data(self, version: int) -> None:
        self.wanted = (version, *self.wanted[1:])

    @rule(point=st.integers(0, 120))
    def kill(self, point: int) -> None:
        self.truth.of(self.wanted)

        def killed() -> None:
            points = Points(self.root)

            def act(path: str) -> None:
                if len(points.names) > point:
                    os.kill(os.getpid(), signal.SIGKILL)

            points.act = act
            points.install()
            build(self.root, self.wanted)

        assert ended(forked(killed)) in (0, -signal.SIGKILL)

    @rule(draw=st.randoms(use_true_random=False))
    def delete_file(self, draw: random.Random) -> None:
        if found := self.entries_of():
            draw.choice(sorted(draw.choice(found).iterdir())).unlink()

    @rule(draw=st.randoms(use_true_random=False))
    def rot(self, draw: random.Random) -> None:
        paths = [path for entry in self.entries_of() for path in sorted(entry.iterdir()) if path.stat().st_size]
        if paths:
            path = draw.choice(paths)
            data = bytearray(path.read_bytes())
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            path.write_bytes(data)
            self.rotten = True

    @rule(share=st.floats(0, 1))
    def prune(self, share: float) -> None:
        if self.root.is_dir():
            bound = round(share * sum(path.stat().st_size for entry in self.entries_of() for path in entry.iterdir()))
            cache_care.prune(self.root, max_bytes=bound)

    @rule()
    def move_folder(self) -> None:
        self.moves += 1
        moved = self.place / str(self.moves)
        if self.root.is_dir():
            self.root.rename(moved)
        self.root = moved

    @rule(seconds=st.floats(0, 0.05), kill=st.booleans())
    def two_builders(self, seconds: float, kill: bool) -> None:
        seen = self.truth.of(self.wanted)[0]

        def builder() -> None:
            use(self.root, self.wanted, seen, self.rotten)

        children = [forked(builder, self.place / "log") for _ in range(2)]
        if kill:
            time.sleep(seconds)
            os.kill(children[0], signal.SIGKILL)
        results = [ended(child) for child in children]
        assert results[1] == 0, (self.place / "log").read_text()
        assert results[0] in (0, -signal.SIGKILL), (self.place / "log").read_text()

    @invariant()
    def whatever_passes_for_an_entry_is_right(self) -> None:
        if not hasattr(self, "root"):
            return
        right = self.truth.files()
        found = content_of_whole_entries(self.root)
        assert found.items() <= right.items()

    def teardown(self) -> None:
        if hasattr(self, "root"):
            self.build()
            shutil.rmtree(self.place)


def content_of_whole_entries(root: Path) -> dict[str, str]:
    """The files of every entry that a run would use."""
    whole = set()
    for entry in entries(root):
        try:
            check_entry(entry, "hash", station=entry.parent.name, key=entry.name)
        except (Damage, OSError):
            continue
        whole.add(f"{entry.parent.name}/{entry.name}")
    readable = Path(tempfile.mkdtemp(dir=MEMORY))
    try:
        for name in whole:
            shutil.copytree(root / name, readable / name)
        return content(readable)
    finally:
        shutil.rmtree(readable)


def run_machine(monkeypatch: pytest.MonkeyPatch, examples: int, steps: int) -> None:
    # large files are compared when they are read, and what was just made may be pruned
    monkeypatch.setattr(manifest, "SMALL_BYTES", 200)
    monkeypatch.setattr(cache_care, "RECENT_SECONDS", -1.0)
    truth = Truth()
    machine = type("Machine", (CacheMachine,), {"truth": truth})
    bounds = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        database=None,
        # a failing order is short enough to be read, and long to be shortened
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(machine, settings=bounds)
    finally:
        shutil.rmtree(truth.place)


def test_any_order_of_events(monkeypatch: pytest.MonkeyPatch) -> None:
    run_machine(monkeypatch, 6, 12)


@pytest.mark.slow
def test_any_order_of_many_events(monkeypatch: pytest.MonkeyPatch) -> None:
    run_machine(monkeypatch, 60, 25)
