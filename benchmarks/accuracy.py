"""Test accuracy on CIFAR-10 of networks trained on DQ's choice and on random parts of the same size.

    python benchmarks/accuracy.py --cifar DATA_DIR --keep-ratios 0.125 --seeds 3 --epochs 20                       # CPU size
    python benchmarks/accuracy.py --cifar DATA_DIR --network resnet18 --keep-ratios 0.1 0.2 --seeds 3 --epochs 200 # GPU

Every arm gets the same network, augmentation, schedule and number of steps; the last epoch is reported. "stratified" is random
with equal numbers of each class, as DQ's choice has.
"""

import argparse
import statistics
import time

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import CIFAR10
from torchvision.models import resnet18

from dq_lightning import QuantizeConfig, QuantizedDataModule, SelectionConfig, make_bins, select
from dq_lightning.features.bundled import CIFAR10_MEAN, CIFAR10_STD, SmallResNet


def augment(images: Tensor, padding: int = 4) -> Tensor:
    """Random crops with a reflected border and random mirroring of uint8 images [B, 3, H, W], image by image."""
    batch, _, height, width = images.shape
    padded = F.pad(images.float(), [padding] * 4, mode="reflect")
    offsets = torch.randint(0, 2 * padding + 1, (2, batch, 1, 1), device=images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)[None, :, None]
    steps = torch.arange(width, device=images.device)[None, None, :].expand(batch, 1, width)
    mirrored = torch.rand(batch, 1, 1, device=images.device) < 0.5
    columns = offsets[1] + torch.where(mirrored, width - 1 - steps, steps)
    which = torch.arange(batch, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows, columns].permute(0, 3, 1, 2)


class Classifier(L.LightningModule):
    """SGD 0.1, momentum 0.9, weight decay 5e-4, cosine to zero over all steps."""

    def __init__(self, network: str) -> None:
        super().__init__()
        if network == "resnet18":
            self.network = resnet18(num_classes=10)
            self.network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
            self.network.maxpool = torch.nn.Identity()
        else:
            self.network = SmallResNet(depths=(1, 1, 1))
        self.network = self.network.to(memory_format=torch.channels_last)
        self.register_buffer("mean", 255 * torch.tensor(CIFAR10_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(CIFAR10_STD).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = (images.float() - self.mean) / self.std
        return self.network(x.contiguous(memory_format=torch.channels_last))

    def training_step(self, batch, batch_index):
        return F.cross_entropy(self(augment(batch[0])), batch[1])

    def test_step(self, batch, batch_index):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps), "interval": "step"}
        ]


def tensors(dataset: CIFAR10) -> TensorDataset:
    return TensorDataset(torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets))


def accuracy(part: TensorDataset, test: TensorDataset, args: argparse.Namespace, seed: int) -> float:
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        devices=1,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Classifier(args.network)
    trainer.fit(model, DataLoader(part, args.batch_size, shuffle=True, drop_last=True))
    return 100 * trainer.test(model, DataLoader(test, 1000), verbose=False)[0]["accuracy"]


def choose(arm: str, train: CIFAR10, keep_ratio: float, seed: int, cache_dir: str | None) -> Tensor:
    """Positions of the part that an arm trains on."""
    if arm == "random":
        count = int(len(train) * keep_ratio + 0.5)
        return torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:count]
    if arm == "stratified":
        one_bin = make_bins(torch.zeros(len(train), 1), num_bins=1, labels=train.targets)
        return select(one_bin, keep_ratio=keep_ratio, seed=seed).index
    config = QuantizeConfig(selection=SelectionConfig(keep_ratio=keep_ratio, seed=seed))
    module = QuantizedDataModule(train, config=config, cache_dir=cache_dir)
    module.prepare_data()
    module.setup("fit")
    return module.selection.index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", required=True)
    parser.add_argument("--network", choices=("small", "resnet18"), default="small")
    parser.add_argument("--keep-ratios", type=float, nargs="+", default=[0.125])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--arms", nargs="+", default=["dq", "stratified", "random"])
    parser.add_argument("--cache-dir")
    args = parser.parse_args()
    train, test = CIFAR10(args.cifar), tensors(CIFAR10(args.cifar, train=False))
    whole = tensors(train)
    print("| keep ratio | choice | accuracy | each seed | seconds |\n|---|---|---|---|---|")
    for keep_ratio in args.keep_ratios:
        for arm in args.arms:
            started, results = time.perf_counter(), []
            for seed in range(args.seeds):
                index = choose(arm, train, keep_ratio, seed, args.cache_dir)
                results.append(accuracy(TensorDataset(*whole[index]), test, args, seed))
            spread = statistics.stdev(results) if len(results) > 1 else 0.0
            each = ", ".join(f"{value:.1f}" for value in results)
            seconds = time.perf_counter() - started
            print(
                f"| {keep_ratio} | {arm} | {statistics.mean(results):.1f} ± {spread:.1f} | {each} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
