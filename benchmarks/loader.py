"""Samples per second of the train loader against the loader a user has without us, in turns, as a ratio.

python benchmarks/loader.py --cifar DATA_DIR --photos IMAGE_FOLDER [--workers 1] [--rounds 5]
"""

import argparse
import statistics
import tempfile
import time

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms import v2

from dq_lightning import QuantizedDataModule

TENSOR = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
SMALL = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *TENSOR])
LARGE = v2.Compose([v2.RandomResizedCrop(160), v2.RandomHorizontalFlip(), *TENSOR])


def samples_per_second(loader: DataLoader) -> float:
    started, count = time.perf_counter(), 0
    for images, _ in loader:
        count += len(images)
    return count / (time.perf_counter() - started)


def compare(name: str, dataset, args: argparse.Namespace, cache: str, **settings) -> None:
    """One row: ours over a compact set, theirs over the same samples of the wrapped dataset."""
    module = QuantizedDataModule(dataset, cache_dir=cache, encoder="bundled", persistent_workers=False, **settings)
    module.prepare_data()
    module.setup("fit")
    ours = module.train_dataloader()
    same = torch.utils.data.Subset(dataset, module.selection.index.tolist())
    theirs = DataLoader(same, settings["batch_size"], shuffle=True, num_workers=settings["num_workers"])
    pairs = [(samples_per_second(ours), samples_per_second(theirs)) for _ in range(args.rounds + 1)][1:]
    ratio = statistics.median(a / b for a, b in pairs)
    print(
        f"| {name}, {settings['store']}, {settings['num_workers']} workers | {statistics.median(a for a, _ in pairs):,.0f} | "
        f"{statistics.median(b for _, b in pairs):,.0f} | {ratio:.2f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar")
    parser.add_argument("--photos")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print("| loader | ours, samples/s | torchvision, samples/s | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        for workers in args.workers:
            for store in ("indices", "packed"):
                shared = {"store": store, "num_workers": workers}
                if args.cifar:
                    small = CIFAR10(args.cifar, transform=SMALL)
                    compare("CIFAR-10", small, args, cache, keep_ratio=0.125, batch_size=128, **shared)
                if args.photos:
                    large = ImageFolder(args.photos, transform=LARGE)
                    compare("photos", large, args, cache, keep_ratio=0.4, batch_size=32, **shared)


if __name__ == "__main__":
    main()
