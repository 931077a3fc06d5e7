"""Tiny whole runs, builders in forked children that are killed or disturbed, and what a cache holds afterwards."""

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dq_lightning import BinConfig, FeatureConfig, PackedDataset, PatchConfig, QuantizeConfig, SelectionConfig, quantize
from dq_lightning.cache import files
from dq_lightning.cache.entries import STATIONS
from dq_lightning.cache.manifest import MANIFEST
from dq_lightning.features.openai_embeddings import OpenAIOrigin
from dq_lightning.pipeline.plan import FILLED
from tests.lightning_scripts.common import photos, to_tensor
from tests.lightning_scripts.patched_images import small_mae

COUNT = 12
MAIN_THREAD = threading.main_thread().name
HANG_SECONDS = 120.0
Content = dict[str, str]


class Colours(nn.Module):
    """An encoder: the mean colour through fixed weights."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 0.5], [0.2, -1.0], [0.3, 0.1]]))

    def forward(self, images):
        return images.mean(dim=(2, 3)) @ self.weight


class Edges(nn.Module):
    """A classifier with fixed weights."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 10)
        with torch.no_grad():
            for number, weights in enumerate(self.parameters()):
                weights.copy_(torch.linspace(-1, 1, weights.numel()).sin().view_as(weights) * (number + 1))

    def forward(self, images):
        return self.head(torch.relu(self.convolution(images)).mean(dim=(2, 3)))


@cache
def images():
    return photos(COUNT, None)


@cache
def networks():
    return {"encoder": (Colours(), to_tensor), "classifier": (Edges(), to_tensor), "reconstructor": small_mae()}


def config(**more: Any) -> QuantizeConfig:
    selection = SelectionConfig(keep_ratio=0.34, seed=more.pop("seed", 0))
    return QuantizeConfig(bins=BinConfig(num_bins=2), selection=selection, **more)


def image_run(root: Path, **settings: Any) -> Any:
    options = {name: settings.pop(name) for name in ("force_recompute", "verify") if name in settings}
    wanted = config(**settings)
    given = networks() if wanted.patches.drops else {"encoder": networks()["encoder"]}
    return quantize(images(), wanted, cache_dir=root, device="cpu", progress=False, **given, **options)


def text_run(root: Path) -> Any:
    rows = [{"instruction": f"say {i}", "input": "", "output": "word " * (1 + i % 5)} for i in range(COUNT)]
    vectors = np.random.default_rng(1).normal(size=(COUNT, 3)).astype(np.float32)
    return quantize(rows, config(store="packed"), encoder=vectors, cache_dir=root, progress=False)


class Embeddings:
    """What the client of an embeddings API gives; it tells `paid` of every text that it is asked for."""

    def __init__(self, paid: Callable[[list[str]], None] = lambda texts: None):
        self.embeddings, self._paid = self, paid

    def create(self, model: str, input: list[str]) -> Any:
        self._paid(input)
        rows = [np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)[:3] / 255 for text in input]
        return SimpleNamespace(data=[SimpleNamespace(index=i, embedding=row.tolist()) for i, row in enumerate(rows)])


def paid_run(root: Path, paid: Callable[[list[str]], None] = lambda texts: None) -> Any:
    rows = [{"instruction": f"say {i}", "input": "", "output": "word " * (1 + i % 5)} for i in range(COUNT)]
    settings = config(features=FeatureConfig("openai:small", batch_size=4, num_workers=1))
    with mock.patch.object(OpenAIOrigin, "client", return_value=Embeddings(paid)):
        return quantize(rows, settings, cache_dir=root, progress=False)


RUNS: dict[str, Callable[[Path], Any]] = {
    "indices": image_run,
    "packed": lambda root: image_run(root, store="packed"),
    "patches": lambda root: image_run(root, patches=PatchConfig(drop_ratio=0.5)),
    "text": text_run,
    "paid": paid_run,
}


# runs that begin with the first stations of a run: what happens to those is tried with the indices
CONTINUED = {"packed": "indices", "patches": "indices", "text": "text"}


def started(name: str, place: Path) -> Path | None:
    """A cache with what a run has in common with another one, or None."""
    if name not in CONTINUED:
        return None
    RUNS[CONTINUED[name]](place / "other")
    shutil.copytree(place / "other", place / "start")
    for station in STATIONS[3:]:
        shutil.rmtree(place / "start" / station, ignore_errors=True)
    return place / "start"


def new_root(start: Path | None, root: Path) -> Path:
    """A new cache, empty or as another run left it."""
    return root if start is None else Path(shutil.copytree(start, root))


def entries(root: Path) -> list[Path]:
    """Every folder that a run could take for an entry."""
    return [
        entry
        for station in STATIONS
        if (root / station).is_dir()
        for entry in sorted((root / station).iterdir())
        if not entry.name.startswith(".")
    ]


def content(root: Path) -> Content:
    """SHA-256 of every file of every entry; of the manifests, which tell when they were made, what is to be equal."""
    found = {}
    for entry in entries(root):
        for path in entry.iterdir():
            name = path.relative_to(root).as_posix()
            if path.name == MANIFEST:
                values = files.read_sealed(path)
                found[name] = json.dumps([values["station"], values["key"], values["parts"], values["files"]])
            else:
                found[name] = files.file_digest(path)
    return found


def delivered(info: Any, patched: bool = True) -> list[Any]:
    """What a training set made of a compact set holds, item by item and in batches, in comparable form."""
    if info.kind == "indices":
        return [info.content_hash]
    store = PackedDataset(info.path)
    every = list(range(len(store)))
    places = [store]
    filled = Path(info.path).parents[1] / FILLED
    if patched and store.has_patches and filled.is_dir():
        places += [PackedDataset(path) for path in entries(filled.parent) if path.parent == filled]
    return [
        [[plain(place[i]) for i in every], list(map(plain, place.__getitems__(every))), list(place.ids)]
        for place in places
    ]


def plain(sample: Any) -> Any:
    if isinstance(sample, tuple | list):
        return [plain(value) for value in sample]
    if isinstance(sample, dict):
        return {name: plain(value) for name, value in sample.items()}
    if isinstance(sample, np.ndarray):
        return (str(sample.dtype), sample.tolist())
    return (sample.mode, sample.size, sample.tobytes()) if isinstance(sample, Image.Image) else sample


def forked(act: Callable[[], Any], log: Path | None = None) -> int:
    """Start a child that acts and leaves, without what the test runner would do at its exit; its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        # what a shell starts in the background ignores it, and so would this child
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if log is not None:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
            sys.stderr = os.fdopen(2, "w", closefd=False)
        act()
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def ended(child: int, seconds: float = HANG_SECONDS) -> int:
    """How a child ended: its exit status, or minus the signal. A test fails when it does not end."""
    deadline = time.monotonic() + seconds
    while True:
        seen, status = os.waitpid(child, os.WNOHANG)
        if seen:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail(f"process {child} still ran after {seconds} s")
        time.sleep(0.002)


def until(seen: Callable[[], Any], child: int | None = None, seconds: float = HANG_SECONDS) -> None:
    """Wait for something to happen, as long as the child that should do it lives."""
    deadline = time.monotonic() + seconds
    while not seen():
        if child is not None and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            pytest.fail(f"process {child} ended early")
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.005)


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.link", "os.symlink", "os.utime")


class Points:
    """Every change that the threads at work make under a folder, as Python itself reports it, and every write and fsync.

    Hooks can't be taken out of a process again: install it in a child.

    Attributes:
        names: what was seen, in order.
        act: called with the path at each point.
    """

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.names: list[tuple[str, str]] = []
        self.act: Callable[[str], None] = lambda path: None
        self.busy = False

    def install(self) -> None:
        sys.addaudithook(self._audit)
        files.observer = self._observe

    def _observe(self, operation: str, path: Path) -> None:
        # what creates, renames and makes folders is reported by the interpreter
        if operation in ("write", "fsync"):
            self._point(operation, str(path))

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITES and isinstance(path, str | os.PathLike):
                self._point("open", os.fspath(path))
        elif event in CHANGES:
            paths = [os.fspath(a) for a in arguments if isinstance(a, str | os.PathLike)]
            # removal goes through descriptors of folders: the path is then a bare name
            within = event in ("os.remove", "os.rmdir") and isinstance(arguments[-1], int) and arguments[-1] != -1
            self._point(event, self.root + "/..." if within else paths[-1])

    def _point(self, name: str, path: str) -> None:
        thread = threading.current_thread()
        # requests of an API record what they cost themselves; a heartbeat comes at any time
        if self.busy or not path.startswith(self.root) or not thread.name.startswith((MAIN_THREAD, "embed")):
            return
        self.busy = True
        try:
            self.names.append((name, path))
            self.act(path)
        finally:
            self.busy = False


def points_of(run: Callable[[Path], Any], root: Path) -> list[tuple[str, str]]:
    """Operation and path of every point of an undisturbed run."""
    report = root.with_name(root.name + "-points.json")

    def counted() -> None:
        points = Points(root)
        points.install()
        run(root)
        report.write_text(json.dumps(points.names))

    assert ended(forked(counted)) == 0
    return [(name, path) for name, path in json.loads(report.read_text())]


def some_points(points: list[tuple[str, str]], before: int = 1, step: int = 11) -> list[int]:
    """Numbers of the renames, by which finished work begins to count, of points next to them, and of some others.

    The points between two renames write into one temporary folder, which is nothing to a later run, whatever is in it.

    Args:
        points: operation and path of every point.
        before: how many points before a rename are taken; that after it is taken always.
        step: from one of the others to the next.
    """
    renames = [number for number, (name, _) in enumerate(points) if name == "os.rename"]
    chosen = {*range(0, len(points), step), *(number + more for number in renames for more in range(-before, 2))}
    return sorted(chosen & {*range(len(points))})


def kill_at(number: int, run: Callable[[Path], Any], root: Path) -> int:
    """Run in a child that kills itself, by SIGKILL, at its point of that number; how it ended."""

    def killed() -> None:
        points = Points(root)

        def act(path: str) -> None:
            if len(points.names) > number:
                os.kill(os.getpid(), signal.SIGKILL)

        points.act = act
        points.install()
        run(root)

    return ended(forked(killed))


def assert_only_right_entries(root: Path, expected: Content) -> None:
    """Whatever could be taken for an entry has all its files, with the right bytes, and nothing else."""
    found = content(root)
    folders = {str(entry.relative_to(root)) for entry in entries(root)}
    wanted = {name: value for name, value in expected.items() if str(Path(name).parent) in folders}
    assert found == wanted
