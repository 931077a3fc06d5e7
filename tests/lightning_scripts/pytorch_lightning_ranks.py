"""Two processes of a Trainer of the package pytorch_lightning; usage: pytorch_lightning_ranks.py FOLDER."""

import json
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch

from dq_lightning.pytorch import QuantizedDataModule
from tests.lightning_scripts.common import QUIET, name_of, photos


class Network(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 10)
        self.seen: list[int] = []

    def training_step(self, batch, _):
        self.seen += [name_of(image) for image in batch[0]]
        return self.layer(batch[0].mean(dim=(2, 3))).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def main(folder):
    module = QuantizedDataModule(
        photos(40), keep_ratio=0.25, num_bins=2, batch_size=5, num_workers=0, cache_dir=folder / "cache"
    )
    network = Network()
    trainer = pl.Trainer(devices=2, strategy="ddp", max_epochs=1, **QUIET)
    trainer.fit(network, module)
    report = {"seen": network.seen, "hash": module.info.content_hash}
    (folder / f"report-{trainer.global_rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
