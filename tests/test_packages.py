"""OpenCV, scikit-learn, SciPy, Matplotlib and pandas are only needed by the features that use them."""

import os
import subprocess
import sys

import pytest

# Saliency by Grad-CAM++ of the bundled classifier, dropped patches, filling, a packed set, and a training on it.
SCRIPT = """
import importlib.metadata
import sys

for name in ("cv2", "sklearn", "scipy", "matplotlib", "pandas"):
    sys.modules[name] = None  # an import of it fails as if it were not installed


def distribution(cls, name, of_all=importlib.metadata.Distribution.from_name.__func__):
    if name.lower() in ("opencv-python", "scikit-learn", "scipy", "matplotlib", "pandas"):
        raise importlib.metadata.PackageNotFoundError(name)  # torchmetrics looks here before it imports Matplotlib
    return of_all(cls, name)


importlib.metadata.Distribution.from_name = classmethod(distribution)

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import Subset

from dq_lightning import DQError, QuantizedDataModule
from dq_lightning.commands.opening import open_dataset
from dq_lightning.demo.sample_data import SampleCIFAR10
from dq_lightning.exports.command import export_set

data = Subset(SampleCIFAR10(transform=lambda image: torch.tensor([*image.getdata()]) / 255.0), range(40))


def module(saliency, cache):
    return QuantizedDataModule(
        data, keep_ratio=0.5, num_bins=2, drop_ratio=0.25, cache_dir=cache, batch_size=8, device="cpu", num_workers=0,
        config={"patches": {"saliency": saliency}},
    )


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 10)

    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self.layer(batch[0].mean(1)), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


dm = module("gradcam++", sys.argv[1])
Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False).fit(Model(), dm)
print("trained on", dm.info.num_samples, export_set(dm.info.path, "imagefolder", sys.argv[1] + "/images"))

for attempt in (
    lambda: module("eigencam", sys.argv[1]).prepare_data(),
    lambda: open_dataset(None, sys.argv[2]),
    lambda: export_set(dm.info.path, "parquet", sys.argv[1] + "/file"),
):
    try:
        attempt()
    except DQError as error:
        print("said:", error)
"""


@pytest.mark.slow  # .ci/run runs it: it imports everything once more
def test_what_is_not_used_is_not_imported_and_what_is_missing_is_named(tmp_path):
    (tmp_path / "table.csv").write_text("text,label\na,b\n")
    arguments = [sys.executable, "-c", SCRIPT, str(tmp_path / "cache"), str(tmp_path / "table.csv")]
    done = subprocess.run(
        arguments, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "trained on 20" in done.stdout
    said = [line for line in done.stdout.splitlines() if line.startswith("said:")]
    assert said == [
        f"said: {feature} needs the package {package}, which is not installed: python -m pip install {package}"
        for feature, package in (
            ("saliency='eigencam'", "opencv-python"),
            ("opening this dataset", "pandas"),
            ("the export as parquet", "pandas"),
        )
    ]
