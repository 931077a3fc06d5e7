"""Make the sample of CIFAR-10 that the package bundles.

python examples/make_sample.py --data DATA_DIR --output dq_lightning/assets/cifar10_sample.npz
"""

import argparse
import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets import CIFAR10

from dq_lightning.demo.sample_data import COLUMNS, SIDE


def make_sheet(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Arrange images uint8 [N, 32, 32, 3] in rows of 50 on one sheet; the last row is filled up with black."""
    rows = -(-len(images) // COLUMNS)
    padded = np.zeros((rows * COLUMNS, SIDE, SIDE, 3), np.uint8)
    padded[: len(images)] = images
    return padded.reshape(rows, COLUMNS, SIDE, SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(rows * SIDE, COLUMNS * SIDE, 3)


def encode_sheet(sheet: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the bytes of a sheet as lossless WebP, in a uint8 array."""
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "WEBP", lossless=True, quality=100, method=6)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def balanced_choice(labels: NDArray[np.int64], per_class: int, seed: int) -> NDArray[np.int64]:
    """Return the positions, ascending, of `per_class` randomly drawn samples of each class.

    Args:
        labels: class of every sample, int64 [N].
        per_class: number of samples drawn from each class.
        seed: seed of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for value in np.unique(labels):
        members = np.flatnonzero(labels == value)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:per_class].numpy()])
    return np.sort(np.concatenate(chosen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--output", required=True)
    parser.add_argument(
        "--per-class", type=int, nargs=2, default=(200, 50), help="training and test images of each class"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    arrays = {}
    for split, per_class in zip(("train", "test"), args.per_class, strict=True):
        whole = CIFAR10(args.data, train=split == "train")
        labels = np.asarray(whole.targets)
        chosen = balanced_choice(labels, per_class, args.seed)
        arrays[f"{split}_sheet"] = encode_sheet(make_sheet(whole.data[chosen]))
        arrays[f"{split}_labels"] = labels[chosen].astype(np.uint8)
        arrays[f"{split}_positions"] = chosen.astype(np.int32)
    np.savez(args.output, **arrays)
    print({name: array.nbytes for name, array in arrays.items()})


if __name__ == "__main__":
    main()
