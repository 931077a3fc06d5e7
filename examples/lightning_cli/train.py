"""LightningCLI: model, trainer and data in one YAML file.

python examples/lightning_cli/train.py fit --config examples/lightning_cli/cifar10.yaml --data.init_args.keep_ratio 0.2
python examples/lightning_cli/train.py fit --config examples/lightning_cli/cifar10.yaml \\
    --data.init_args.train.init_args.root ~/data_cifar --data.init_args.val.init_args.root ~/data_cifar
"""

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from torch.nn import functional as F
from torchvision.models import resnet18

from dq_lightning import QuantizedDataModule


class Classifier(L.LightningModule):
    """ResNet-18 for 32 pixels.

    Args:
        num_classes: of the data; linked to the data module.
        learning_rate: of SGD, falling to zero along a cosine.
    """

    def __init__(self, num_classes: int = 10, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = resnet18(num_classes=num_classes)
        self.network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.network.maxpool = torch.nn.Identity()

    def training_step(self, batch, batch_index):
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch, batch_index):
        hits = (self.network(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", hits, prog_bar=True, sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.hparams.learning_rate, momentum=0.9, weight_decay=5e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


def main() -> None:
    LightningCLI(Classifier, QuantizedDataModule, subclass_mode_data=True)


if __name__ == "__main__":
    main()
