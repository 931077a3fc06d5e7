"""Draw samples of the first, the middle and the last bin of some classes: one row a bin, one block a class.

    python examples/draw_bins.py --output docs/bins.webp --cifar DATA_DIR --classes ship horse
    python examples/draw_bins.py --output bins.png

Without `--cifar` it takes the part of CIFAR-10 that is bundled, 2,000 images. The encoder is the bundled one.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10

from dq_lightning import QuantizedDataModule
from dq_lightning.demo.sample_data import SampleCIFAR10

GAP, BLOCK_GAP = 4, 16


def spread_picks(dm: QuantizedDataModule, group: int, number: int, count: int) -> list[int]:
    """Positions of `count` samples of a bin of a class, from its first pick to its last at equal distances."""
    inside = (dm.bins.group == group) & (dm.bins.assignment == number)
    positions: Tensor = inside.nonzero().flatten()
    in_order = positions[dm.bins.rank[positions].argsort()]
    return in_order[torch.linspace(0, len(in_order) - 1, count).round().long()].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cifar", help="folder that torchvision downloaded CIFAR-10 into")
    parser.add_argument("--classes", nargs="+", default=["ship", "horse"])
    parser.add_argument("--count", type=int, default=12, help="number of samples that are shown of each bin")
    parser.add_argument("--side", type=int, default=64, help="width and height of an image in pixels")
    parser.add_argument("--cache-dir")
    args = parser.parse_args()
    data = SampleCIFAR10() if args.cifar is None else CIFAR10(args.cifar)
    dm = QuantizedDataModule(data, num_bins=10, cache_dir=args.cache_dir)
    dm.prepare_data()
    dm.setup("fit")
    step = args.side + GAP
    height = 3 * step - GAP + BLOCK_GAP
    sheet = Image.new("RGB", (args.count * step - GAP, len(args.classes) * height - BLOCK_GAP), "white")
    for block, name in enumerate(args.classes):
        for row, number in enumerate((0, 4, 9)):
            picks = spread_picks(dm, data.classes.index(name), number, args.count)
            for column, position in enumerate(picks):
                image = data[position][0].resize((args.side, args.side), Image.Resampling.BICUBIC)
                sheet.paste(image, (column * step, block * height + row * step))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output, quality=80)
    print(f"{args.output}: {sheet.width} x {sheet.height} pixels, {args.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
