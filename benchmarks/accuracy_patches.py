"""Test accuracy on CIFAR-10 of networks trained on whole images, on images with dropped patches, and on filled ones.

    python benchmarks/accuracy_patches.py --cifar DATA_DIR --seeds 3 --epochs 20                                 # CPU size
    python benchmarks/accuracy_patches.py --cifar DATA_DIR --network resnet18 --seeds 5 --epochs 200             # GPU size

All arms train on the same samples, DQ's choice, with the network, augmentation, schedule and number of steps of accuracy.py;
the last epoch is reported. "dropped" has the mean colour of the kept pixels in place of the patches that Grad-CAM (bundled
classifier) finds least salient, "filled" what the bundled autoencoder puts there. Seeds are of weights and batches alone.
"""

import argparse
import statistics
import tempfile
import time

import numpy as np
import torch
from accuracy import accuracy, tensors
from torch.utils.data import TensorDataset
from torchvision.datasets import CIFAR10

from dq_lightning import PatchConfig, QuantizeConfig, QuantizedDataModule, SelectionConfig

RECONSTRUCT = {"dropped": "off", "filled": "prepare"}


def images_of(train: CIFAR10, arm: str, drop_ratio: float, args: argparse.Namespace, cache_dir: str) -> TensorDataset:
    """What an arm trains on: images uint8 [M, 3, 32, 32] and labels [M], in the order of the selection."""
    patches = PatchConfig()
    if arm != "whole":
        patches = PatchConfig(drop_ratio=drop_ratio, saliency=args.saliency, reconstruct=RECONSTRUCT[arm])
    config = QuantizeConfig(selection=SelectionConfig(keep_ratio=args.keep_ratio), patches=patches)
    module = QuantizedDataModule(train, config=config, cache_dir=cache_dir)
    module.prepare_data()
    module.setup("fit")
    dataset = module.train_dataloader().dataset
    samples = [dataset[i] for i in range(len(dataset))]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image, _ in samples])).permute(0, 3, 1, 2).contiguous()
    return TensorDataset(pixels, torch.tensor([label for _, label in samples]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", required=True)
    parser.add_argument("--network", choices=("small", "resnet18"), default="small")
    parser.add_argument("--keep-ratio", type=float, default=0.125)
    parser.add_argument("--drop-ratios", type=float, nargs="+", default=[0.2])
    parser.add_argument("--saliency", default="gradcam")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--cache-dir")
    args = parser.parse_args()
    train, test = CIFAR10(args.cifar), tensors(CIFAR10(args.cifar, train=False))
    arms = [("whole", 0.0), *((arm, ratio) for ratio in args.drop_ratios for arm in RECONSTRUCT)]
    with tempfile.TemporaryDirectory() as own:
        parts = {arm: images_of(train, *arm, args, args.cache_dir or own) for arm in arms}
    print("| images | drop ratio | accuracy | against whole images, seed by seed | each seed | seconds |")
    print("|---|---|---|---|---|---|")
    base: list[float] = []
    for arm, ratio in arms:
        started = time.perf_counter()
        results = [accuracy(parts[arm, ratio], test, args, seed) for seed in range(args.seeds)]
        base = base or results
        gaps = [value - other for value, other in zip(results, base, strict=True)]
        spread = statistics.stdev(results) if len(results) > 1 else 0.0
        each = ", ".join(f"{value:.1f}" for value in results)
        print(
            f"| {arm} | {ratio} | {statistics.mean(results):.1f} ± {spread:.1f} | {statistics.mean(gaps):+.1f} | {each} | "
            f"{time.perf_counter() - started:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
