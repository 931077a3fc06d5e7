"""The real CIFAR-10 images that the package bundles: 200 training and 50 test images of each class, lossless, in one file."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

SAMPLE_FILE = Path(__file__).resolve().parent.parent / "assets" / "cifar10_sample.npz"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE, COLUMNS = 32, 50


class SampleCIFAR10(Dataset[tuple[Any, int]]):
    """A balanced part of CIFAR-10 (Krizhevsky 2009) with torchvision's attributes.

    Args:
        train: 2,000 images of the training split, or 500 of the test split.
        transform: of the image (RGB, 32 x 32), as in torchvision.
    """

    def __init__(self, train: bool = True, transform: Callable[[Image.Image], Any] | None = None) -> None:
        split = "train" if train else "test"
        with np.load(SAMPLE_FILE, allow_pickle=False) as file:
            labels = file[f"{split}_labels"]
            self.data = cut_sheet(decode_sheet(file[f"{split}_sheet"]), len(labels))
        self.targets: list[int] = labels.tolist()
        self.classes = list(CLASSES)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image: Any = Image.fromarray(self.data[index])
        return (image if self.transform is None else self.transform(image)), self.targets[index]


def make_sheet(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images [N, 32, 32, 3] in rows of 50 on one sheet; the last row is filled up with black."""
    rows = -(-len(images) // COLUMNS)
    padded = np.zeros((rows * COLUMNS, SIDE, SIDE, 3), np.uint8)
    padded[: len(images)] = images
    return padded.reshape(rows, COLUMNS, SIDE, SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(rows * SIDE, COLUMNS * SIDE, 3)


def cut_sheet(sheet: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """The inverse of `make_sheet`: the first `count` images [count, 32, 32, 3]."""
    rows = sheet.shape[0] // SIDE
    images = sheet.reshape(rows, SIDE, COLUMNS, SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(-1, SIDE, SIDE, 3)
    return np.ascontiguousarray(images[:count])


def encode_sheet(sheet: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lossless WebP bytes of a sheet, as uint8."""
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "WEBP", lossless=True, quality=100, method=6)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def decode_sheet(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The inverse of `encode_sheet`."""
    return np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))


def balanced_choice(labels: NDArray[np.int64], per_class: int, seed: int) -> NDArray[np.int64]:
    """Positions, ascending, of `per_class` samples of each class drawn by a seed."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for value in np.unique(labels):
        members = np.flatnonzero(labels == value)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:per_class].numpy()])
    return np.sort(np.concatenate(chosen))
