"""The bundled CIFAR-10 images: 200 training and 50 test images of each class, lossless, in one file."""

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

SAMPLE_FILE = Path(__file__).resolve().parent.parent / "assets" / "cifar10_sample.npz"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE, COLUMNS = 32, 50


class SampleCIFAR10(Dataset[tuple[Any, int]]):
    """A balanced part of CIFAR-10 (Krizhevsky 2009) with the attributes of torchvision's dataset.

    Args:
        train: whether to take 2,000 images of the training split, or 500 of the test split.
        transform: transform of the image (RGB, 32 x 32), as in torchvision.

    Attributes:
        data: uint8 [N, 32, 32, 3], the images.
        targets: the class of each image, 0 to 9.
        classes: the names of the ten classes.
    """

    def __init__(self, train: bool = True, transform: Callable[[Image.Image], Any] | None = None) -> None:
        images, labels = _bundled("train" if train else "test")
        self.data = images.copy()
        self.targets: list[int] = labels.tolist()
        self.classes = list(CLASSES)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image: Any = Image.fromarray(self.data[index])
        return (image if self.transform is None else self.transform(image)), self.targets[index]


@cache
def _bundled(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return images uint8 [N, 32, 32, 3] and labels [N] of a split; decoding takes a quarter of a second."""
    with np.load(SAMPLE_FILE, allow_pickle=False) as file:
        labels = file[f"{split}_labels"]
        return cut_sheet(decode_sheet(file[f"{split}_sheet"]), len(labels)), labels


def cut_sheet(sheet: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Return the first `count` images of a sheet, uint8 [count, 32, 32, 3]; `examples/make_sample.py` made it."""
    rows = sheet.shape[0] // SIDE
    images = sheet.reshape(rows, SIDE, COLUMNS, SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(-1, SIDE, SIDE, 3)
    return np.ascontiguousarray(images[:count])


def decode_sheet(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the pixels of a sheet, uint8 [H, W, 3], from the bytes of its file."""
    return np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))
