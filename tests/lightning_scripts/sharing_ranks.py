"""A rank that makes compact sets together with others: `sharing_ranks.py FOLDER SCENARIO ...`, with a launcher's variables.

For each scenario it leaves FOLDER/SCENARIO/report-RANK.json.
"""

import hashlib
import json
import logging
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from dq_lightning import quantize
from dq_lightning.cache import shards
from dq_lightning.core.batching import HalvedBatches
from dq_lightning.packed import writer
from dq_lightning.pipeline import meeting
from tests.lightning_scripts.common import photos, to_tensor

COUNT, BATCH_SIZE, SECONDS = 80, 4, 120.0
RANK, NUM_RANKS = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))), int(os.environ.get("WORLD_SIZE", "1"))


class Edges(nn.Module):
    """A small classifier with fixed weights."""

    def __init__(self):
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)
        with torch.no_grad():
            for number, weights in enumerate(self.parameters()):
                weights.copy_(torch.linspace(-9, 9, weights.numel()).sin().view_as(weights) * (number + 1))

    def forward(self, images):
        return self.head(torch.relu(self.convolution(images)).mean(dim=(2, 3)))


class FrontToBack(torch.utils.data.IterableDataset):
    """A dataset as a stream."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return (self.dataset[number] for number in range(len(self.dataset)))


class Counted:
    """Counts the images that go through networks in batches; `before` is called at each batch with their number so far."""

    seen, before = 0, staticmethod(lambda seen: None)

    @classmethod
    def watch(cls):
        real = HalvedBatches.run

        def watched(this, function, batch, *others):
            cls.before(cls.seen)
            cls.seen += len(batch)
            return real(this, function, batch, *others)

        HalvedBatches.run = watched


def content(root):
    """Digests of all files of all entries by their names; a manifest holds the time when it was written."""
    paths = [path for path in sorted(root.glob("[1-9]-*/[!.]*/*")) if path.name != "manifest.json"]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def meet(folder, name):
    """Wait until all ranks are here."""
    (folder / f"{name}-{RANK}").touch()
    until = time.monotonic() + SECONDS
    while len(list(folder.glob(f"{name}-*"))) < NUM_RANKS:
        assert time.monotonic() < until, f"a rank is missing at {name}"
        time.sleep(0.005)


def before_of(scenario, folder):
    """What a rank does before it works on a batch."""

    def before(seen):
        if scenario == "late" or NUM_RANKS == 1:
            # the last rank comes when the others have begun
            if RANK == NUM_RANKS - 1 or NUM_RANKS == 1 or seen != 5 * BATCH_SIZE:
                return
            (folder / "begun").touch()
        # every rank does four batches, or three where one fails in its third
        if (
            seen < (3 if scenario == "broken" else 4) * BATCH_SIZE
            and not scenario.startswith(("late", "only-one", "resumed", "patches", "apart-patches"))
            and not os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") > "0"
        ):
            meet(folder, f"working-{seen}")
        if scenario == "slow" and RANK == 1:
            time.sleep(0.1)
        if scenario == "broken" and RANK == 1 and seen == 2 * BATCH_SIZE:
            raise ValueError("disk on fire")
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if (scenario == f"kill-{RANK}" or (scenario == "restart" and RANK == 1 and first)) and seen == 3 * BATCH_SIZE:
            os.kill(os.getpid(), signal.SIGKILL)
        if scenario.startswith("kill"):
            time.sleep(0.02)

    return before


@contextmanager
def every_rank_does_a_piece_of_each_job(folder, killed_in=None):
    """In the job `killed_in` rank 1 is killed when it takes its second piece."""
    real = meeting._claims, writer.LOOK_AHEAD_SAMPLES, writer.PIECE_SAMPLES

    def claims(exchange, number, job, *given):
        for done, piece in enumerate(real[0](exchange, number, job, *given)):
            if not done:
                meet(folder, f"job-{number}")
            elif job.name == killed_in and RANK == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            elif job.name == killed_in:
                # The other one leaves it a second piece.
                time.sleep(0.5)
            yield piece

    meeting._claims, writer.LOOK_AHEAD_SAMPLES, writer.PIECE_SAMPLES = claims, 5, 3
    try:
        yield
    finally:
        meeting._claims, writer.LOOK_AHEAD_SAMPLES, writer.PIECE_SAMPLES = real


def patches():
    """Keyword arguments of a set of patches that are scored, packed and filled."""
    from tests.lightning_scripts.patched_images import small_mae

    settings = {
        "selection": {"keep_ratio": 0.5},
        "bins": {"num_bins": 2},
        "features": {"batch_size": BATCH_SIZE, "num_workers": 0},
        "patches": {"drop_ratio": 0.2, "batch_size": 2},
    }
    return {"config": settings, "classifier": (Edges(), to_tensor), "reconstructor": small_mae()}


def run(scenario, folder):
    folder.mkdir(parents=True, exist_ok=True)
    Counted.seen, Counted.before = 0, staticmethod(before_of(scenario, folder))
    root = folder / (f"cache-{RANK}" if "apart" in scenario else "cache")
    lines, report = [], {}
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("dq_lightning").addHandler(handler)
    logging.getLogger("dq_lightning").setLevel(logging.INFO)
    if scenario.startswith(("kill", "resumed", "restart", "patches-")):
        shards.MIN_SECONDS = shards.MAX_SECONDS = 0.0
    if scenario.startswith(("kill", "resumed", "patches-")):
        root = folder.parent / "cache"
    if scenario != "only-one":
        # all have left the last scenario
        meet(folder, "ready")
    if scenario == "late" and RANK == NUM_RANKS - 1 and NUM_RANKS > 1:
        while not (folder / "begun").exists():
            time.sleep(0.005)
    started = time.monotonic()
    try:
        settings = {"features": {"batch_size": BATCH_SIZE, "num_workers": 0, "kind": "gradient"}, "store": "packed"}
        given = patches() if "patches" in scenario else {"config": settings}
        dataset = photos(COUNT, None)
        if scenario == "stream":
            # Streams are shared only by ranks that a group or a launcher has brought together.
            if NUM_RANKS > 1:
                torch.distributed.init_process_group("gloo")
            dataset, settings["features"]["kind"] = FrontToBack(dataset), "embedding"
        together = nullcontext()
        if scenario in ("patches", "patches-killed", "apart-patches"):
            killed_in = "packing" if scenario == "patches-killed" else None
            together = every_rank_does_a_piece_of_each_job(folder, killed_in)
        with together:
            info = quantize(
                dataset, encoder=(Edges(), to_tensor), cache_dir=root, device="cpu", progress=False, **given
            )
        report = {"path": info.path, "hash": info.content_hash, "reused": info.reused}
    except Exception as error:
        report = {"error": f"{type(error).__name__}: {error}"}
    logging.getLogger("dq_lightning").removeHandler(handler)
    report |= {"seen": Counted.seen, "seconds": time.monotonic() - started, "log": lines, "content": content(root)}
    (folder / f"report-{RANK}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    Counted.watch()
    for name in sys.argv[2:]:
        if name != "only-one" or RANK == NUM_RANKS - 1:
            run(name, Path(sys.argv[1]) / name)
