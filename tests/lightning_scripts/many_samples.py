"""Many tiny samples through the whole flow, and what memory that takes. Usage: many_samples.py COUNT CACHE REPORT

REPORT gets, in MiB: the peak of this process, and the private memory of every loader process after each epoch.
"""

import json
import os
import sys
from pathlib import Path

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import Dataset

from dq_lightning import QuantizedDataModule
from tests.lightning_scripts.common import to_tensor, trainer

EPOCHS, WORKERS = 3, 2


class Tiny(Dataset):
    """Images of 8 x 8 noisy pixels in ten colours."""

    def __init__(self, count):
        generator = np.random.default_rng(0)
        self.labels = generator.integers(0, 10, count)
        colours = generator.integers(40, 215, (10, 1, 1, 3), dtype=np.uint8)
        self.pixels = generator.integers(0, 40, (count, 8, 8, 3), dtype=np.uint8)
        self.pixels += colours[self.labels]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return Image.fromarray(self.pixels[i]), int(self.labels[i])


class Transformed(Tiny):
    def __init__(self, count):
        super().__init__(count)
        self.transform = to_tensor

    def __getitem__(self, i):
        image, label = super().__getitem__(i)
        return self.transform(image), label


class Quarters(torch.nn.Module):
    """Mean colours of four quarters: an encoder that costs nothing."""

    def forward(self, images):
        return F.adaptive_avg_pool2d(images, 2).flatten(1)


def private_mib(pid):
    """What a process has of its own: pages shared with others do not count."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    lines = dict(line.split(":", 1) for line in text.splitlines()[1:])
    return sum(int(lines[key].split()[0]) for key in ("Private_Clean", "Private_Dirty")) / 1024


class Watching(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 10)
        self.workers = []

    def training_step(self, batch, _):
        return F.cross_entropy(self.layer(batch[0].mean((2, 3))), batch[1])

    def on_train_epoch_end(self):
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        self.workers.append([private_mib(pid) for pid in children])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def main(count, cache, report):
    module = QuantizedDataModule(
        Transformed(int(count)),
        encoder=(Quarters(), to_tensor),
        keep_ratio=0.1,
        batch_size=500,
        num_workers=WORKERS,
        persistent_workers=True,
        cache_dir=cache,
    )
    model = Watching()
    trainer(max_epochs=EPOCHS).fit(model, module)
    # not ru_maxrss, which a process has from the one that started it
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) / 1024
    values = {"peak": peak, "workers": model.workers, "kept": module.info.num_samples, "seconds": module.info.seconds}
    Path(report).write_text(json.dumps(values))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
