"""Which encoder, how many bins, which ratio: test accuracy on a part of CIFAR-10 of a small network trained on each choice.

    python benchmarks/advice.py --cifar DATA_DIR --weights tf_efficientnet_lite0.safetensors  # 39 trainings
    python benchmarks/advice.py --cifar DATA_DIR --quick  # minutes; the numbers say little

One thing changes at a time: encoders and numbers of bins at the same keep ratio, ratios with the bundled encoder and ten bins,
all against a random part and one with equal numbers of each class. Every training has the same network, augmentation, schedule
and number of steps. Features come from the cache, and results that are in --results are not computed again, so a stopped run
goes on where it was.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accuracy import accuracy, tensors
from torch import Tensor
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import CIFAR10

from dq_lightning import (
    BinConfig,
    FeatureConfig,
    QuantizeConfig,
    SelectionConfig,
    load_selection,
    make_bins,
    quantize,
    select,
)

PHOTO_ENCODER = "tf_efficientnet_lite0"
BINS, RATIOS, MIDDLE = (1, 5, 10, 20), (0.05, 0.1, 0.2), 0.1


@dataclass(frozen=True)
class Arm:
    """One way to choose."""

    encoder: str
    bins: int
    ratio: float

    @property
    def name(self) -> str:
        return f"{self.encoder}/{self.bins}/{self.ratio}"


def arms(args: argparse.Namespace) -> dict[str, list[Arm]]:
    """The arms of every table; one that stands in several tables is trained once."""
    encoders = ["bundled", *([PHOTO_ENCODER] if args.weights else [])]
    baselines = ["random", "stratified"]
    return {
        "encoder": [Arm(name, 0 if name in baselines else 10, MIDDLE) for name in (*encoders, *baselines)],
        "bins": [Arm("bundled", bins, MIDDLE) for bins in args.bins],
        "keep ratio": [
            Arm(name, 0 if name in baselines else 10, ratio)
            for ratio in args.ratios
            for name in ("bundled", *baselines)
        ],
    }


def choose(arm: Arm, train: Subset, labels: Tensor, seed: int, args: argparse.Namespace) -> Tensor:
    """Positions in `train` of the part that an arm trains on."""
    if arm.encoder == "random":
        count = int(len(train) * arm.ratio + 0.5)
        return torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:count]
    if arm.encoder == "stratified":
        one_bin = make_bins(torch.zeros(len(train), 1), num_bins=1, labels=labels)
        return select(one_bin, keep_ratio=arm.ratio, seed=seed).index
    weights = args.weights if arm.encoder == PHOTO_ENCODER else None
    config = QuantizeConfig(
        FeatureConfig(arm.encoder, weights),
        BinConfig(num_bins=arm.bins),
        SelectionConfig(keep_ratio=arm.ratio, seed=seed),
    )
    return load_selection(quantize(train, config, cache_dir=args.cache_dir, progress=False).path).index


def measured(args: argparse.Namespace) -> Iterator[tuple[str, Arm, list[float], float]]:
    """Accuracies in percent of every arm of every table, and the seconds that they took just now."""
    whole, test = CIFAR10(args.cifar), tensors(CIFAR10(args.cifar, train=False))
    # the same images whatever the seeds: a part of all classes alike, from anywhere in the set
    rows = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[: args.samples].sort().values
    train, data = Subset(whole, rows.tolist()), TensorDataset(*tensors(whole)[rows])
    test = TensorDataset(*test[: args.test_samples])
    place = Path(args.results)
    # what the numbers depend on beside the arm
    scene = f"{args.samples}/{args.test_samples}/{args.steps}/{args.batch_size}"
    known = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
    for table, listed in arms(args).items():
        for arm in listed:
            started, results = time.perf_counter(), []
            for seed in range(args.seeds):
                key = f"{scene}/{arm.name}/{seed}"
                if key not in known:
                    part = TensorDataset(*data[choose(arm, train, data.tensors[1], seed, args)])
                    known[key] = accuracy(part, test, with_epochs(args, len(part)), seed)
                    place.write_text(json.dumps(known, indent=0), encoding="utf-8")
                results.append(known[key])
            yield table, arm, results, time.perf_counter() - started


def with_epochs(args: argparse.Namespace, count: int) -> argparse.Namespace:
    """As many epochs as give about the wanted number of steps."""
    epochs = max(1, round(args.steps / max(1, count // args.batch_size)))
    return argparse.Namespace(network="small", epochs=epochs, batch_size=min(args.batch_size, count))


def parse(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", required=True)
    parser.add_argument("--weights", help=f"local weights of timm's {PHOTO_ENCODER}; left out without")
    parser.add_argument("--samples", type=int, default=10_000, help="of the training split, to choose from")
    parser.add_argument("--test-samples", type=int, default=10_000)
    parser.add_argument("--bins", type=int, nargs="+", default=BINS)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help="of each training")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--cache-dir")
    parser.add_argument("--results", default="advice.json", help="file of results, read and added to")
    parser.add_argument("--quick", action="store_true", help="2,000 images, 40 steps, 2 seeds")
    args = parser.parse_args(given)
    if args.quick:
        args.samples, args.test_samples, args.steps, args.seeds = 2000, 1000, 40, 2
    return args


def main() -> None:
    args, last = parse(), ""
    for table, arm, results, seconds in measured(args):
        if table != last:
            print(f"\n| {table} | bins | keep ratio | accuracy | each seed | seconds |\n|---|---|---|---|---|---|")
            last = table
        spread = statistics.stdev(results) if len(results) > 1 else 0.0
        each = ", ".join(f"{value:.1f}" for value in results)
        mean = statistics.mean(results)
        print(
            f"| {arm.encoder} | {arm.bins or '-'} | {arm.ratio:g} | {mean:.1f} ± {spread:.1f} | {each} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
