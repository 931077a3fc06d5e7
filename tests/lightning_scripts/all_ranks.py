"""Ranks of a Trainer that make the compact set together; usage: all_ranks.py FOLDER [apart].

With "apart" each rank has a cache of its own. Rank 0 then finds the set, while rank 1 takes longer to make it than a
collective of the process group may wait.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from lightning.pytorch.strategies import DDPStrategy

from dq_lightning import QuantizedDataModule
from tests.lightning_scripts import common
from tests.lightning_scripts.common import Recorder, photos, to_tensor
from tests.lightning_scripts.sharing_ranks import Counted, Edges, meet

SHORT, LONG = timedelta(seconds=5), timedelta(minutes=30)


def main(folder, kind="shared"):
    apart, rank = kind == "apart", os.environ.get("LOCAL_RANK", "0")

    def before(seen):
        if seen == 0 and apart:
            time.sleep(1.5 * SHORT.seconds)
        elif seen == 0:
            # every rank works on at least one batch
            meet(folder, "working")

    options = {
        "keep_ratio": 0.25, "num_bins": 2, "batch_size": 5, "num_workers": 0, "encoder": (Edges(), to_tensor),
        "config": {"features": {"batch_size": 4}}, "cache_dir": folder / (f"cache-{rank}" if apart else "cache"),
    }  # fmt: skip
    if apart and rank == "0":
        QuantizedDataModule(photos(80), **options).prepare_data()
    Counted.before = staticmethod(before)
    Counted.watch()
    module = QuantizedDataModule(photos(80), distributed="all", **options)
    strategy = DDPStrategy(timeout=SHORT if apart else LONG)
    model, trainer = Recorder(), common.trainer(devices=2, strategy=strategy)
    trainer.fit(model, module)
    report = {"embedded": Counted.seen, "trained": model.seen, "hash": module.info.content_hash}
    (folder / f"report-{trainer.global_rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
