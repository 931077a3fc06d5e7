"""Train timm's ResNet-50 on a compact part of ImageNet, or of any folder of class folders, with the published recipe.

python examples/imagenet.py ~/data_imagenet --keep_ratio 0.125 --devices 8
python examples/imagenet.py ~/data_imagenet --select_indices select_indices_ImageNet_0.125.npy --devices 8
python examples/imagenet.py ~/data_imagenet --data_dir results/pixel --select_indices FILE --devices 8   # reconstructed images
python examples/imagenet.py ... --resume                  # go on from the last checkpoint in --output
torchrun --nproc_per_node=8 examples/imagenet.py ...      # the same, started by torchrun; several nodes: examples/slurm.sh

Defaults are the published ones: cosine over 260 epochs, learning rate 0.6, 128 samples a device, RandAugment m9-mstd0.5-inc1,
random erasing 0.6 with pixels (not of the first of 3 augmentation splits), Jensen-Shannon consistency over the splits, batch
norms split alike, their statistics averaged over the ranks after each epoch, mixed precision. The same with timm's own script,
on an exported set (`dq-lightning export SET imagefolder results/kept --data_path ~/data_imagenet`):

torchrun --nproc_per_node=8 train.py --data-dir . --train-split results/kept --val-split ~/data_imagenet/val \\
    --model resnet50 --sched cosine --epochs 260 --lr 0.6 --reprob 0.6 --remode pixel --batch-size 128 --amp \\
    --aug-splits 3 --aa rand-m9-mstd0.5-inc1 --resplit --split-bn --jsd-loss --dist-bn reduce

which needs --num-classes N for other than 1,000 classes.
"""

import argparse
from pathlib import Path

import lightning as L
import numpy as np
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.data import create_transform, resolve_model_data_config
from timm.layers import convert_splitbn_model
from timm.loss import JsdCrossEntropy
from timm.utils.distributed import distribute_bn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder

from dq_lightning import DQError, QuantizeConfig, SelectionConfig, load_selection, quantize
from dq_lightning.exports.published import open_image_folder
from dq_lightning.selection.given import read_index


class Splits(L.LightningModule):
    """A timm network whose batches are several augmentations of the same images, one after the other."""

    def __init__(self, args: argparse.Namespace, num_classes: int) -> None:
        super().__init__()
        self.args = args
        network = timm.create_model(args.model, num_classes=num_classes)
        # one batch norm for the clean split, others for the augmented ones
        self.network = convert_splitbn_model(network, max(args.aug_splits, 2)) if args.aug_splits > 1 else network
        self.loss = (
            JsdCrossEntropy(args.aug_splits, smoothing=args.smoothing) if args.aug_splits > 1 else F.cross_entropy
        )

    def training_step(self, batch, batch_index):
        images, labels = batch
        loss = self.loss(self.network(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_train_epoch_end(self):
        if self.trainer.world_size > 1:
            distribute_bn(self.network, self.trainer.world_size, reduce=True)

    def validation_step(self, batch, batch_index):
        hits = (self.network(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", hits, batch_size=len(batch[1]), on_epoch=True, sync_dist=True, prog_bar=True)

    def configure_optimizers(self):
        args = self.args
        # as timm: neither biases nor norms decay
        decayed = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        warm = max(1, steps * args.warmup_epochs // max(1, args.epochs))
        rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-4, total_iters=warm)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm))
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [warm])
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Joined:
    """Batches of tuples of augmentations -> all first ones, all second ones, ...; the labels as many times."""

    def __init__(self, splits: int) -> None:
        self.splits = splits

    def __call__(self, samples):
        views = [view for number in range(self.splits) for view in (images[number] for images, _ in samples)]
        return torch.stack(views), torch.tensor([label for _, label in samples] * self.splits)


class KeptImages(L.LightningDataModule):
    """The chosen images; one rank chooses, before the others look for it."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.args, self.rows = args, args.select_indices and read_index(args.select_indices)
        self.data = resolve_model_data_config(timm.create_model(args.model), args={"img_size": args.img_size})

    def folder(self, split: str, transform=None) -> ImageFolder:
        root = Path(self.args.data).expanduser()
        return ImageFolder(str(root / split), transform=transform)

    def images(self, transform=None) -> tuple[ImageFolder, np.ndarray]:
        """The folder that is trained on, and the items of it."""
        rows = self.selected() if self.rows is None else self.rows
        if self.args.data_dir is None:
            images = self.folder("train", transform)
            if len(rows) and rows[-1] >= len(images):
                raise DQError(f"{self.args.select_indices} has row {rows[-1]:,}, but there are {len(images):,} images")
            return images, rows
        folder, positions = open_image_folder(self.args.data_dir, transform=transform)
        items = np.flatnonzero(np.isin(positions, rows))
        if len(items) != len(rows):
            raise DQError(f"{self.args.data_dir} has {len(items):,} of the {len(rows):,} images that were chosen")
        return folder, items

    def selected(self) -> np.ndarray:
        config = QuantizeConfig(selection=SelectionConfig(keep_ratio=self.args.keep_ratio, seed=self.args.seed))
        return load_selection(quantize(self.folder("train"), config, progress=not self.args.quiet).path).index.numpy()

    def prepare_data(self):
        if self.rows is None:
            self.selected()

    def setup(self, stage):
        args, size = self.args, self.data["input_size"][-1]
        parts = create_transform(
            self.data["input_size"], is_training=True, auto_augment=args.aa, re_prob=args.reprob, re_mode=args.remode,
            re_num_splits=args.aug_splits if args.resplit else 0, mean=self.data["mean"], std=self.data["std"],
            separate=args.aug_splits > 1, interpolation="random" if size > 64 else "bilinear",
        )  # fmt: skip
        images, rows = self.images(parts if args.aug_splits <= 1 else None)
        self.train = Subset(images, rows.tolist())
        if len(rows) // self.trainer.world_size < args.batch_size:
            raise DQError(
                f"{len(rows):,} images on {self.trainer.world_size} devices fill no batch of {args.batch_size}: lower "
                "--batch_size, or keep more"
            )
        if args.aug_splits > 1:
            self.train = Separated(self.train, parts, args.aug_splits, args.resplit)
        self.val = self.folder("val", create_transform(**self.data))

    def train_dataloader(self):
        collate = Joined(self.args.aug_splits) if self.args.aug_splits > 1 else None
        options = {"num_workers": self.args.num_workers, "collate_fn": collate, "drop_last": True}
        return DataLoader(self.train, self.args.batch_size, shuffle=True, pin_memory=True, **options)

    def val_dataloader(self):
        return DataLoader(self.val, self.args.batch_size, num_workers=self.args.num_workers)


class Separated(Dataset):
    """Every image several times: once with the basic transform, and further times with augmentation between its parts."""

    def __init__(self, images: Dataset, parts, splits: int, resplit: bool) -> None:
        self.basic, self.augment, self.normalize = parts
        self.images, self.splits, self.resplit = images, splits, resplit

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        image = self.basic(image)
        # random erasing is a part of normalize; with resplit the first, clean split goes without it
        clean = self.normalize.transforms[:2] if self.resplit else self.normalize.transforms
        views = [image]
        for part in clean:
            views[0] = part(views[0])
        views += [self.normalize(self.augment(image)) for _ in range(self.splits - 1)]
        return tuple(views), label


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder with train/ and val/, each of class folders")
    parser.add_argument("--data_dir", help="folder of reconstructed images with index.npy, in place of DATA/train")
    parser.add_argument("--select_indices", help=".npy of positions in ImageFolder(train); DQ chooses if left out")
    parser.add_argument("--keep_ratio", type=float, default=0.125)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--img_size", type=int)
    parser.add_argument("--epochs", type=int, default=260)
    parser.add_argument("--warmup_epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.6)
    parser.add_argument("--weight_decay", type=float, default=2e-5)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--batch_size", type=int, default=128, help="images of a batch on each device")
    parser.add_argument("--aa", default="rand-m9-mstd0.5-inc1")
    parser.add_argument("--reprob", type=float, default=0.6)
    parser.add_argument("--remode", default="pixel")
    parser.add_argument("--aug_splits", type=int, default=3)
    parser.add_argument("--resplit", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--num_workers", type=int, default=8)
    parser.add_argument("--precision", default="16-mixed")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--num_nodes", type=int, default=1)
    parser.add_argument("--output", default="results/training_logs")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--limit_batches", type=int, help="batches per epoch, for a trial")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args()


def main() -> None:
    args = parse()
    L.seed_everything(args.seed, workers=True, verbose=False)
    try:
        run(args)
    except (DQError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from error


def run(args: argparse.Namespace) -> None:
    data = KeptImages(args)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        precision=args.precision,
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.num_nodes,
        limit_train_batches=args.limit_batches,
        limit_val_batches=args.limit_batches,
        default_root_dir=args.output,
        callbacks=[ModelCheckpoint(Path(args.output) / "checkpoints", save_last=True, enable_version_counter=False)],
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=not args.quiet,
    )
    network = Splits(args, len(data.folder("train").classes))
    trainer.fit(network, data, ckpt_path="last" if args.resume else None)
    if "accuracy" not in trainer.callback_metrics:  # the run that goes on had come to its end
        trainer.validate(network, data, verbose=False)
    if trainer.is_global_zero:
        accuracy = 100 * float(trainer.callback_metrics["accuracy"])
        print(f"accuracy after the last epoch: {accuracy:.2f} % ({len(data.train):,} training images)")


if __name__ == "__main__":
    main()
