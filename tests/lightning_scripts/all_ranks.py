"""Ranks of a Trainer that make the compact set together; usage: all_ranks.py FOLDER."""

import json
import sys
from pathlib import Path

from dq_lightning import QuantizedDataModule
from tests.lightning_scripts import common
from tests.lightning_scripts.common import Recorder, photos, to_tensor
from tests.lightning_scripts.sharing_ranks import Counted, Edges, meet


def main(folder):
    # every rank works on at least one batch
    Counted.before = staticmethod(lambda seen: meet(folder, "working") if seen == 0 else None)
    Counted.watch()
    module = QuantizedDataModule(
        photos(80), keep_ratio=0.25, num_bins=2, batch_size=5, num_workers=0, cache_dir=folder / "cache",
        encoder=(Edges(), to_tensor), config={"features": {"batch_size": 4}}, distributed="all",
    )  # fmt: skip
    model, trainer = Recorder(), common.trainer(devices=2, strategy="ddp")
    trainer.fit(model, module)
    report = {"embedded": Counted.seen, "trained": model.seen, "hash": module.info.content_hash}
    (folder / f"report-{trainer.global_rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
