"""An ordinary Lightning script for CIFAR-10, and the one line that makes it train on a compact set.

python examples/swap_in.py --data DATA_DIR                     # 12.5 % of the samples, chosen by Dataset Quantization
python examples/swap_in.py --data DATA_DIR --keep-ratio 1.0    # all of them
"""

import argparse

import lightning as L
import torch
from torch.nn import functional as F
from torchvision.datasets import CIFAR10
from torchvision.models import resnet18
from torchvision.transforms import v2

from dq_lightning import QuantizedDataModule


class Classifier(L.LightningModule):
    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = resnet18(num_classes=10)
        self.network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.network.maxpool = torch.nn.Identity()

    def training_step(self, batch, batch_index):
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def validation_step(self, batch, batch_index):
        images, labels = batch
        self.log("accuracy", (self.network(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.hparams.learning_rate, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
        return [optimizer], [schedule]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", required=True, help="folder that holds cifar-10-batches-py, or that it is downloaded into"
    )
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--keep-ratio", type=float, default=0.125)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--limit-batches", type=int, default=None, help="batches per epoch, for a trial")
    args = parser.parse_args()

    plain = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.262)),
    ]
    augment = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *plain])
    train = CIFAR10(args.data, train=True, transform=augment, download=args.download)
    test = CIFAR10(args.data, train=False, transform=v2.Compose(plain), download=args.download)

    # before: data = L.LightningDataModule.from_datasets(train, test, batch_size=args.batch_size)
    data = QuantizedDataModule(train, val=test, keep_ratio=args.keep_ratio, num_bins=10, batch_size=args.batch_size)

    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator=args.accelerator,
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        limit_train_batches=args.limit_batches,
        limit_val_batches=args.limit_batches,
        log_every_n_steps=10,
    )
    trainer.fit(Classifier(), data)
    print(f"accuracy after the last epoch: {float(trainer.callback_metrics['accuracy']):.2%}")


if __name__ == "__main__":
    main()
