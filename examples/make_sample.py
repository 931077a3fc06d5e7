"""Make the sample of CIFAR-10 that the package bundles.

python examples/make_sample.py --data DATA_DIR --output dq_lightning/assets/cifar10_sample.npz
"""

import argparse

import numpy as np
from torchvision.datasets import CIFAR10

from dq_lightning.demo.sample_data import balanced_choice, encode_sheet, make_sheet


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
