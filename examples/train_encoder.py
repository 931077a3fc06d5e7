"""Train the small encoder that the package bundles, on the CIFAR-10 training split alone.

    python examples/train_encoder.py --data DATA_DIR --output dq_lightning/assets/cifar10_encoder.safetensors

About 20 minutes on 2 CPU cores with bfloat16, 1 minute on a GPU. The last epoch is what is kept and reported: the test
split is read once, after training, and chooses nothing.
"""

import argparse
import json
import time
from pathlib import Path

import lightning as L
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import CIFAR10

from dq_lightning.features.bundled import CIFAR10_MEAN, CIFAR10_STD, SmallResNet, load_small_resnet, to_half


def random_crop_and_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Shift every image of [B, C, H, W] by up to `padding` pixels (reflected border) and mirror half of them."""
    batch, _, height, width = images.shape
    padded = F.pad(images, [padding] * 4, mode="reflect")
    top = torch.randint(0, 2 * padding + 1, (batch, 1, 1), device=images.device)
    left = torch.randint(0, 2 * padding + 1, (batch, 1, 1), device=images.device)
    rows = top + torch.arange(height, device=images.device)[None, :, None]
    columns = torch.arange(width, device=images.device)[None, None, :].expand(batch, 1, width)
    flip = torch.rand(batch, 1, 1, device=images.device) < 0.5
    columns = left + torch.where(flip, width - 1 - columns, columns)
    pick = torch.arange(batch, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[pick, rows, columns].permute(0, 3, 1, 2)


class EncoderTraining(L.LightningModule):
    """Cross-entropy with label smoothing, SGD with Nesterov momentum and a one-cycle rate."""

    def __init__(self, learning_rate: float, weight_decay: float = 5e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = SmallResNet().to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor(CIFAR10_MEAN).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(CIFAR10_STD).view(1, 3, 1, 1) * 255)

    def forward(self, images: Tensor) -> Tensor:
        x = (images.float() - self.mean) / self.std
        return self.model(x.contiguous(memory_format=torch.channels_last))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(random_crop_and_flip(images)), labels, label_smoothing=0.1)
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: list[Tensor], batch_index: int) -> None:
        images, labels = batch
        self.log("test_accuracy", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        decayed = [p for p in self.parameters() if p.ndim > 1]
        plain = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=self.hparams.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.hparams.learning_rate, total_steps=self.trainer.estimated_stepping_batches, pct_start=0.2
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def cifar10_tensors(root: str, train: bool) -> TensorDataset:
    """The split as uint8 images [N, 3, 32, 32] and int64 labels [N]."""
    split = CIFAR10(root, train=train)
    return TensorDataset(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--output", type=Path, required=True, help="the .safetensors file that is written")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=0.4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-batches", type=int, default=None, help="batches per epoch, for a trial")
    args = parser.parse_args()
    L.seed_everything(args.seed)
    train, test = cifar10_tensors(args.data, True), cifar10_tensors(args.data, False)
    module = EncoderTraining(args.learning_rate)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        devices=1,
        limit_train_batches=args.limit_batches,
        limit_test_batches=args.limit_batches,
    )
    started = time.perf_counter()
    trainer.fit(module, DataLoader(train, args.batch_size, shuffle=True, drop_last=True))
    metadata = {
        "widths": json.dumps([32, 64, 128]),
        "depths": json.dumps([1, 1, 2]),
        "num_classes": "10",
        "trained_on": "CIFAR-10 train split",
        "epochs": str(args.epochs),
        "seed": str(args.seed),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(to_half(module.model.state_dict()), args.output, metadata)
    # What is reported is what was written: half-precision weights, run in float32.
    module.model = load_small_resnet(args.output)[0]
    trainer = L.Trainer(logger=False, enable_checkpointing=False, devices=1, limit_test_batches=args.limit_batches)
    accuracy = trainer.test(module, DataLoader(test, 500), verbose=False)[0]["test_accuracy"]
    save_file(to_half(module.model.state_dict()), args.output, metadata | {"test_accuracy": f"{accuracy:.4f}"})
    print(
        f"test accuracy {accuracy:.2%} after {args.epochs} epochs, {time.perf_counter() - started:.0f} s, {args.output}"
    )


if __name__ == "__main__":
    main()
