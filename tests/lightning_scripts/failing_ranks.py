"""Runs in which one rank fails, forked from a warm parent. Usage: failing_ranks.py FOLDER NUM_RANKS SCENARIO ...

A scenario is PLACE-KIND-RANK: where (prepare, setup, train, or override: a user's own setup, before ours), how (error, exit,
kill) and which rank. Every rank is a node of its own for Lightning, so each has a `prepare_data`. FOLDER/SCENARIO/rank-R.txt is
what rank R printed, end.json beside it how each ended and after how many seconds.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from torch.utils.data import Dataset

from dq_lightning import QuantizedDataModule
from dq_lightning.loading.train_set import DatasetTrainSet
from tests.lightning_scripts.common import Recorder, photos, trainer

LIMIT_SECONDS = 100


def fail(kind):
    if kind == "error":
        raise OSError("disk on fire")
    if kind == "exit":
        raise SystemExit("asked to stop")
    os.kill(os.getpid(), signal.SIGKILL)


class Broken(Dataset):
    """Reading item 3 ends the rank."""

    def __init__(self, kind):
        self.photos, self.kind = photos(40), kind

    def __len__(self):
        return 40

    def __getitem__(self, i):
        if i == 3:
            fail(self.kind)
        return self.photos[i]


class FailsInTraining(Recorder):
    kind = None

    def training_step(self, batch, index):
        if self.kind and index == 1:
            fail(self.kind)
        return super().training_step(batch, index)


class FailsInItsOwnSetup(QuantizedDataModule):
    kind = None

    def setup(self, stage=None):
        fail(self.kind)


def run_rank(folder, place, kind, failing, count):
    rank = int(os.environ["NODE_RANK"])
    mine = rank == failing
    # identity is given: only this rank's reading fails
    data = Broken(kind) if mine and place == "prepare" else photos(40)
    kind_of_module = FailsInItsOwnSetup if mine and place == "override" else QuantizedDataModule
    FailsInItsOwnSetup.kind = kind
    module = kind_of_module(
        data,
        keep_ratio=0.5,
        num_bins=2,
        batch_size=2,
        num_workers=0,
        cache_dir=folder / (f"cache-{rank}" if place == "prepare" else "cache"),
        fingerprint="forty photos",
    )
    if mine and place == "setup":
        DatasetTrainSet.open = lambda *given: fail(kind)
    model = FailsInTraining()
    model.kind = kind if mine and place == "train" else None
    trainer(devices=1, num_nodes=count, max_epochs=2).fit(model, module)


def scenario(folder, name, count):
    place, kind, failing = name.split("-")
    folder = folder / name
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started, children = time.monotonic(), {}
    for rank in range(count):
        child = os.fork()
        if child == 0:
            output = os.open(folder / f"rank-{rank}.txt", os.O_CREAT | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ |= {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "0", "NODE_RANK": str(rank),
                "WORLD_SIZE": str(count),
            }  # fmt: skip
            code = 0
            try:
                run_rank(folder, place, kind, int(failing), count)
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children[child] = rank
    end = {}
    while children and time.monotonic() - started < LIMIT_SECONDS:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            end[children.pop(child)] = [os.waitstatus_to_exitcode(status), time.monotonic() - started]
        else:
            time.sleep(0.02)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    (folder / "end.json").write_text(json.dumps(end))


def main(folder, count, *names):
    for name in names:
        scenario(Path(folder), name, int(count))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
