"""Train ResNet-18 on a compact part of CIFAR-10 and report the accuracy after the last epoch, as the mean of several seeds.

python examples/cifar10.py --data ~/data_cifar --keep_ratio 0.125                  # DQ's choice, made here or cached
python examples/cifar10.py --data ~/data_cifar --select_indices select_indices_CIFAR10_0.125.npy       # files of row numbers
python examples/cifar10.py --data ~/data_cifar --data_dir results/pixel --select_indices FILE     # reconstructed images
python examples/cifar10.py ... --output results/training_logs [--resume]           # keep checkpoints, go on from the last one

Defaults are the published ones: SGD 0.1, momentum 0.9, weight decay 5e-4, cosine over 200 epochs, random crops and mirroring;
batches of 128, or of 16 where at most 10 % of the 50,000 images are kept. Several files of row numbers are one run each.
"""

import argparse
import statistics
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import CIFAR10
from torchvision.models import resnet18
from torchvision.transforms import v2

from dq_lightning import DQError, QuantizedDataModule
from dq_lightning.exports.published import open_image_folder
from dq_lightning.selection.given import read_index

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PLAIN = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
AUGMENT = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *PLAIN])


class Classifier(L.LightningModule):
    """ResNet-18 for 32 pixels: a first convolution of 3 x 3 without stride, and no pooling behind it."""

    def __init__(self, learning_rate: float, num_classes: int = 10) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.network = resnet18(num_classes=num_classes)
        self.network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.network.maxpool = torch.nn.Identity()

    def training_step(self, batch, batch_index):
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch, batch_index):
        hits = (self.network(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", hits, batch_size=len(batch[1]), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.learning_rate, momentum=0.9, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps), "interval": "step"}
        ]


def cifar10(args: argparse.Namespace, train: bool, transform: v2.Transform) -> CIFAR10:
    try:
        return CIFAR10(args.data, train=train, transform=transform)
    except RuntimeError as error:
        raise SystemExit(
            f"{args.data} holds no CIFAR-10 ({error}): pass the folder that cifar-10-batches-py is in"
        ) from error


def chosen_part(args: argparse.Namespace, file: Path) -> Dataset:
    """The images that a file of row numbers names, from CIFAR-10 itself or from a folder of reconstructed images."""
    if args.data_dir is None:
        images = cifar10(args, train=True, transform=AUGMENT)
        return Subset(images, read_index(file, len(images)).tolist())
    rows = read_index(file)
    # a folder is read by class, CIFAR-10 is not
    folder, positions = open_image_folder(args.data_dir, transform=AUGMENT)
    items = np.flatnonzero(np.isin(positions, rows))
    if len(items) != len(rows):
        raise SystemExit(f"{args.data_dir} has only {len(items):,} of the {len(rows):,} images that {file} names")
    return Subset(folder, items.tolist())


def train(args: argparse.Namespace, seed: int, file: Path | None) -> float:
    """One run; accuracy in percent on the test images after the last epoch."""
    L.seed_everything(seed, verbose=False)
    test = DataLoader(
        cifar10(args, train=False, transform=v2.Compose(PLAIN)), args.eval_batch_size, num_workers=args.num_workers
    )
    if file is None:
        size = args.batch_size or (16 if args.keep_ratio <= 0.1 else 128)
        data = QuantizedDataModule(
            cifar10(args, train=True, transform=AUGMENT), keep_ratio=args.keep_ratio, num_bins=args.num_bins,
            batch_size=size, seed=seed, num_workers=args.num_workers,
        )  # fmt: skip
    else:
        part = chosen_part(args, file)
        size = args.batch_size or (16 if len(part) <= 5000 else 128)
        data = DataLoader(part, size, shuffle=True, num_workers=args.num_workers)
    folder = args.output and args.output / f"{file.stem if file else f'DQ_{args.keep_ratio:g}'}_seed{seed}"
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator=args.accelerator,
        devices=args.devices,
        precision=args.precision,
        limit_train_batches=args.limit_batches,
        limit_test_batches=args.limit_batches,
        logger=False,
        enable_checkpointing=folder is not None,
        callbacks=[ModelCheckpoint(folder, save_last=True, enable_version_counter=False)] if folder else None,
        enable_model_summary=False,
        enable_progress_bar=not args.quiet,
    )
    module = Classifier(args.learning_rate)
    trainer.fit(module, data, ckpt_path="last" if args.resume else None)
    accuracy = 100 * trainer.test(module, test, verbose=False)[0]["accuracy"]
    print(
        f"{file or f'DQ {args.keep_ratio:.1%}'}, batches of {size}, seed {seed}: {accuracy:.2f} % after the last epoch"
    )
    return accuracy


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of torchvision's CIFAR10")
    parser.add_argument("--data_dir", help="folder of reconstructed images, CLASS/NAME.png with index.npy")
    parser.add_argument(
        "--select_indices", type=Path, nargs="+", help=".npy files of row numbers; DQ chooses if left out"
    )
    parser.add_argument("--keep_ratio", type=float, default=0.125)
    parser.add_argument("--num_bins", type=int, default=10)
    parser.add_argument("--batch_size", type=int, help="128, or 16 for at most 5,000 images")
    parser.add_argument("--eval_batch_size", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--learning_rate", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_workers", type=int, default=4)
    parser.add_argument("--precision", default="32-true", help="bf16-mixed is twice as fast on new GPUs")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--output", type=Path, help="folder of checkpoints, one folder a run; none if left out")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoints in --output")
    parser.add_argument("--limit_batches", type=int, help="batches per epoch, for a trial")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    if args.data_dir is not None and args.select_indices is None:
        parser.error("--data_dir needs --select_indices")
    if args.resume and args.output is None:
        parser.error("--resume needs --output, the folder of the checkpoints")
    return args


def main() -> None:
    args = parse()
    torch.set_float32_matmul_precision("high")
    try:
        accuracies = [train(args, seed, file) for file in args.select_indices or [None] for seed in args.seeds]
    except DQError as error:
        raise SystemExit(str(error)) from error
    spread = f" +- {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    print(f"accuracy {statistics.mean(accuracies):.2f} %{spread} (mean of {len(accuracies)} runs, last epoch)")


if __name__ == "__main__":
    main()
