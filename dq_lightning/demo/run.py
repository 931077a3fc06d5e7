"""`dq-lightning demo`: quantize bundled images, clean and with wrong labels; train on the results and on random samples."""

import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

from dq_lightning.demo.sample_data import SampleCIFAR10
from dq_lightning.features.bundled import CIFAR10_MEAN, CIFAR10_STD, ResidualBlock
from dq_lightning.lightning import QuantizedDataModule

SEEDS = (0, 1)
KEEP_RATIO = 0.25
DROP_RATIO = 0.2
WRONG_LABELS = 0.4
NAMES = {
    "dq": "DQ",
    "patches": "DQ, filled patches",
    "random": "random",
    "wrong_dq": "wrong labels, DQ",
    "wrong_random": "wrong labels, random",
}
EPOCHS = 20
REPORT = "dq_lightning_demo.html"
BATCH_SIZE = 50
TO_TENSOR = v2.PILToTensor()
NORMALIZE = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(CIFAR10_MEAN, CIFAR10_STD)])


class SmallClassifier(L.LightningModule):
    """A residual network of 0.3 million parameters, trained by SGD with a one-cycle learning rate."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            ResidualBlock(32, 64, stride=2),
            ResidualBlock(64, 128, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(128, 10),
        )

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the cross-entropy of a batch of images uint8 [B, 3, 32, 32], moved and mirrored at random, and labels [B]."""
        images, labels = batch
        loss = F.cross_entropy(self.network(NORMALIZE(_augmented(images))), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: list[Tensor], batch_index: int) -> None:
        """Log the accuracy on a batch of images uint8 [B, 3, 32, 32] and labels [B]."""
        images, labels = batch
        self.log("accuracy", (self.network(NORMALIZE(images)).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> Any:
        """Return SGD and a one-cycle schedule over all steps, which is the same for equal numbers of steps."""
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def _augmented(images: Tensor) -> Tensor:
    """Mirror each image [B, C, H, W] with probability 1/2 and move it by up to four pixels, a batch at a time for speed."""
    count, _, height, width = images.shape
    padded = F.pad(images, [4] * 4)
    down, right = torch.randint(0, 9, (2, count, 1), device=images.device)
    rows, columns = torch.arange(height, device=images.device) + down, torch.arange(width, device=images.device) + right
    mirrored = torch.rand(count, 1, device=images.device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    sample = torch.arange(count, device=images.device)[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train_and_test(data: QuantizedDataModule | DataLoader[Any], seed: int, progress: bool) -> float:
    """Train a `SmallClassifier` and return its accuracy in percent on the bundled test images after the last epoch.

    Args:
        data: training data.
        seed: seed of the initial weights, the order of the batches and the augmentation.
        progress: show a progress bar.
    """
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
    )
    model = SmallClassifier()
    trainer.fit(model, data)
    test = DataLoader(SampleCIFAR10(train=False, transform=TO_TENSOR), 250)
    trainer = L.Trainer(logger=False, devices=1, enable_progress_bar=False)
    return 100 * trainer.test(model, test, verbose=False)[0]["accuracy"]


def run_demo(progress: bool = True, output: str | Path = REPORT) -> dict[str, list[float]]:
    """Run the whole flow on 2,000 bundled CIFAR-10 images, without a network connection and in a temporary cache.

    Args:
        progress: show progress bars.
        output: file of the report on the set of images with wrong labels, or a folder, which gets a `report.html`.

    Returns:
        Test accuracies in percent, one for each seed, under `"dq"`, `"patches"` (the same samples, a fifth of whose
        patches was dropped and filled) and `"random"`; and where labels are wrong on purpose, under `"wrong_dq"`, which
        leaves out the samples whose labels do not fit, and `"wrong_random"`.
    """
    _quiet_lightning()
    accuracies: dict[str, list[float]] = {name: [] for name in NAMES}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache_dir:
        print("1. Quantize 2,000 real CIFAR-10 images: features, bins, sampling")
        first = _quantized(cache_dir, SEEDS[0])
        seconds = _prepare(first)
        info = first.info
        source_bytes = SampleCIFAR10().data.nbytes
        print(
            f"   kept {info.num_samples} of {info.num_source_samples:,} samples in {seconds:.1f} s; "
            f"{info.num_samples * 32 * 32 * 3:,} of {source_bytes:,} bytes of pixels; {info.bytes:,} bytes on the disk (only "
            "the row numbers are stored)"
        )
        print("2. The second run finds them in the cache")
        seconds = _prepare(_quantized(cache_dir, SEEDS[0]))
        print(f"   {seconds:.2f} s, no encoder loaded")
        print(
            f"3. Drop {DROP_RATIO:.0%} of the patches of the kept images and fill them: saliency, packing, autoencoder"
        )
        patched = _quantized(cache_dir, SEEDS[0], DROP_RATIO)
        seconds = _prepare(patched)
        print(
            f"   {seconds:.1f} s; {patched.info.bytes:,} bytes on the disk, {patched.data_keep_ratio:.1%} of all patches, "
            "enough to train from without the original images"
        )
        print(f'4. Make {WRONG_LABELS:.0%} of the labels wrong, and leave out what does not fit (drop_worst="auto")')
        cleaned = _quantized(cache_dir, SEEDS[0], wrong=True)
        _prepare(cleaned)
        truth, given = torch.tensor(SampleCIFAR10().targets), torch.tensor(_sample(wrong=True).targets)
        found = cleaned.info.suspects
        left_out = 0 if found is None else len(found.index)
        kept = cleaned.selection.index
        print(
            f"   {left_out:,} samples left out; {(truth != given)[kept].float().mean():.1%} of the kept labels are wrong, "
            f"{(truth != given).float().mean():.1%} of all"
        )
        report = cleaned.report(output)
        print(f"5. Train a small network, {EPOCHS} epochs of {info.num_samples} samples")
        for seed in SEEDS:
            accuracies["dq"].append(train_and_test(_quantized(cache_dir, seed), seed, progress))
            accuracies["patches"].append(train_and_test(_quantized(cache_dir, seed, DROP_RATIO), seed, progress))
            accuracies["wrong_dq"].append(train_and_test(_quantized(cache_dir, seed, wrong=True), seed, progress))
            for name, wrong in (("random", False), ("wrong_random", True)):
                loader = DataLoader(_random_part(info.num_samples, seed, wrong), BATCH_SIZE, shuffle=True)
                accuracies[name].append(train_and_test(loader, seed, progress))
            line = ", ".join(f"{NAMES[name]} {values[-1]:.1f} %" for name, values in accuracies.items())
            print(f"   seed {seed}: {line}")
    for name, values in accuracies.items():
        mean, spread = statistics.mean(values), statistics.stdev(values)
        print(f"   {NAMES[name]:20} {mean:.1f} % +- {spread:.1f} (mean and standard deviation of {len(SEEDS)} seeds)")
    print("   Differences of about 2 points are noise with 500 test images; the README says what to expect")
    print(
        "   The bundled encoder was trained on these images with their true labels, so it finds wrong ones too easily"
    )
    print(f"done in {time.perf_counter() - started:.0f} s; the report on step 4, to open in a browser: {report}")
    return accuracies


def _sample(wrong: bool = False) -> SampleCIFAR10:
    """Return the training images; with `wrong`, a share of them under another label, always the same ones."""
    sample = SampleCIFAR10(transform=TO_TENSOR)
    if wrong:
        generator = torch.Generator().manual_seed(2**20)
        for position in torch.randperm(len(sample), generator=generator)[: round(WRONG_LABELS * len(sample))].tolist():
            shift = int(torch.randint(1, 10, (), generator=generator))
            sample.targets[position] = (sample.targets[position] + shift) % 10
    return sample


def _quantized(cache_dir: str, seed: int, drop_ratio: float = 0.0, wrong: bool = False) -> QuantizedDataModule:
    return QuantizedDataModule(
        _sample(wrong),
        keep_ratio=KEEP_RATIO,
        drop_ratio=drop_ratio,
        drop_worst="auto" if wrong else 0.0,
        num_bins=10,
        batch_size=BATCH_SIZE,
        num_workers=0,
        seed=seed,
        cache_dir=Path(cache_dir),
    )


def _prepare(module: QuantizedDataModule) -> float:
    started = time.perf_counter()
    module.prepare_data()
    module.setup("fit")
    return time.perf_counter() - started


def _random_part(count: int, seed: int, wrong: bool) -> Subset[tuple[torch.Tensor, int]]:
    whole = _sample(wrong)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    return Subset(whole, order[:count].tolist())


def _quiet_lightning() -> None:
    """Silence Lightning, because its messages at the start of each training would hide the result."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
