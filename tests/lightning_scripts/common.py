"""What the tests of the data module and the scripts that they start in processes of their own have in common."""

import zlib

import lightning as L
import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Subset

from dq_lightning.demo.sample_data import SampleCIFAR10


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def photos(count=200, transform=to_tensor):
    """Real CIFAR-10 images, evenly spread over the 2,000 that are bundled."""
    whole = SampleCIFAR10(transform=transform)
    # what is looked through and hashed is the part that is needed
    step = len(whole) // count
    whole.data, whole.targets = np.ascontiguousarray(whole.data[::step]), whole.targets[::step]
    return Subset(whole, list(range(count)))


def held_out(count=20, transform=to_tensor):
    return Subset(SampleCIFAR10(train=False, transform=transform), list(range(count)))


def name_of(image):
    """A number that tells images apart."""
    image = image.cpu() if isinstance(image, torch.Tensor) else image
    return zlib.crc32(np.ascontiguousarray(image).tobytes())


class Recorder(L.LightningModule):
    """A linear classifier that remembers which images it saw, in order."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(3, num_classes)
        self.seen: list[int] = []
        self.epochs: list[list[int]] = []

    def on_train_epoch_start(self):
        self.epochs.append([])

    def step(self, batch):
        images, labels = batch
        return F.cross_entropy(self.layer(images.mean(dim=(2, 3))), labels)

    def training_step(self, batch, _):
        names = [name_of(image) for image in batch[0]]
        self.seen += names
        self.epochs[-1] += names
        return self.step(batch)

    def validation_step(self, batch, _):
        self.log("val_loss", self.step(batch))

    def test_step(self, batch, index):
        self.log("test_loss", self.step(batch))

    def predict_step(self, batch, _):
        return self.layer(batch[0].mean(dim=(2, 3)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def trainer(**settings):
    return L.Trainer(**({"max_epochs": 1, "devices": 1} | QUIET | settings))
