"""Runs of two processes. Each writes what it saw to FOLDER/report-RANK.json; usage: several_processes.py MODE FOLDER."""

import json
import os
import sys
import time
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, random_split

from dq_lightning import QuantizedDataModule, quantize
from dq_lightning.pipeline import extracting, selecting
from tests.lightning_scripts.common import Recorder, photos, trainer

REPORT: dict = {}


def count_builds(folder):
    """Leave a file for every time that features are made, by whichever process."""
    real = extracting.extract_features

    def counted(*args, **settings):
        (folder / f"build-{os.getpid()}-{time.time_ns()}").touch()
        return real(*args, **settings)

    extracting.extract_features = counted


def builds(folder):
    return len(list(folder.glob("build-*")))


def fit(name, make_module, **settings):
    """Train an epoch on two processes and report what this one saw, or the error that ended it."""
    L.seed_everything(1, verbose=False)
    model = Recorder()
    running = trainer(**({"devices": 2, "strategy": "ddp"} | settings))
    started = time.perf_counter()
    try:
        module = make_module(running.global_rank)
        running.fit(model, module)
        REPORT[name] = {"seen": model.seen, "hash": module.info.content_hash, "steps": running.global_step}
    except (Exception, SystemExit) as error:
        REPORT[name] = {"error": f"{type(error).__name__}: {error}"}
    REPORT[name]["seconds"] = time.perf_counter() - started
    return running


def make(cache_dir, dataset=None, **settings):
    settings = {"keep_ratio": 0.25, "num_bins": 5, "batch_size": 5, "num_workers": 0} | settings
    return QuantizedDataModule(dataset or photos(), cache_dir=cache_dir, **settings)


class Unseeded(L.LightningDataModule):
    """A module whose split depends on the global random state."""

    def setup(self, stage):
        self.train, _ = random_split(photos(), [0.8, 0.2])

    def train_dataloader(self):
        return DataLoader(self.train, 8, shuffle=True)


class FromTheClock(Unseeded):
    def setup(self, stage):
        seed = int.from_bytes(os.urandom(4), "little")
        self.train, _ = random_split(photos(), [0.8, 0.2], torch.Generator().manual_seed(seed))


class Broken(Dataset):
    """Item 3 ends the process that reads it."""

    def __init__(self, error):
        self.photos, self.error = photos(20), error

    def __len__(self):
        return 20

    def __getitem__(self, i):
        if i == 3 and os.environ.get("LOCAL_RANK", "0") == "0":
            raise self.error
        return self.photos[i]


def other_seed(real):
    """A select that draws otherwise: what a node with other arithmetic would do."""
    return lambda bins, **settings: real(bins, **(settings | {"seed": 99}))


def popen(folder):
    count_builds(folder)
    running = fit("miss", lambda rank: make(folder / "cache"))
    REPORT["builds after the first"] = builds(folder)
    fit("hit", lambda rank: make(folder / "cache"))
    REPORT["builds after the second"] = builds(folder)
    fit(
        "unseeded split",
        lambda rank: QuantizedDataModule.from_datamodule(
            Unseeded(), keep_ratio=0.25, num_bins=5, cache_dir=folder / "cache"
        ),
    )
    fit(
        "split from the clock",
        lambda rank: QuantizedDataModule.from_datamodule(
            FromTheClock(), keep_ratio=0.25, num_bins=5, cache_dir=folder / "cache"
        ),
    )
    fit("failure", lambda rank: make(folder / "cache", Broken(OSError("disk on fire"))))
    fit("exit", lambda rank: make(folder / "cache", Broken(SystemExit("asked to stop"))))
    fit("too small", lambda rank: make(folder / "cache", batch_size=26, drop_last=True))

    rank = running.global_rank
    real = selecting.select
    selecting.select = other_seed(real) if rank else real
    config = make(folder).config
    REPORT["own hash"] = quantize(photos(), config, cache_dir=folder / f"own-{rank}", distributed="off").content_hash
    selecting.select = real
    fit("different sets", lambda rank: make(folder / f"own-{rank}"))
    fit("unseen cache", lambda rank: make(folder / f"empty-{rank}"))
    write(folder, rank)
    # not caught: both processes must end by themselves, with the cause
    trainer(devices=2, strategy="ddp").fit(Recorder(), make(folder / "cache", Broken(OSError("the last straw"))))


def nodes(folder):
    count_builds(folder)
    node = int(os.environ["NODE_RANK"])
    two = {"devices": 1, "num_nodes": 2}
    fit("own caches", lambda rank: make(folder / f"node-{node}"), **two)
    REPORT["builds with own caches"] = builds(folder)

    def one_prepares(cache_dir, **settings):
        module = make(cache_dir, **settings)
        module.prepare_data_per_node = False
        return module

    fit("shared cache, one prepares", lambda rank: one_prepares(folder / "shared"), **two)
    REPORT["builds with a shared cache"] = builds(folder)
    fit("own caches, one prepares", lambda rank: one_prepares(folder / f"later-{node}"), **two)
    write(folder, node)


class Reporting(Recorder):
    """Writes from the spawned process, whose memory nobody else sees."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_end(self):
        report = {"seen": self.seen, "hash": self.trainer.datamodule.info.content_hash}
        (self.folder / f"report-{self.global_rank}.json").write_text(json.dumps(report))


def spawn(folder):
    module = make(folder / "cache")
    running = trainer(devices=2, strategy="ddp_spawn")
    running.fit(Reporting(folder), module)


def write(folder, rank):
    (folder / f"report-{rank}.json").write_text(json.dumps(REPORT))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"popen": popen, "nodes": nodes, "spawn": spawn}[sys.argv[1]](Path(sys.argv[2]))
