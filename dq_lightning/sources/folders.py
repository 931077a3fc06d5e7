"""Recognizes and opens folders that hold one folder of images for each class."""

from pathlib import Path
from typing import Any

# The endings of file names that torchvision's `ImageFolder` accepts.
IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def has_class_folders(folder: Path) -> bool:
    """Whether a folder holds at least one folder, and each of them (apart from hidden ones) holds an image."""
    inside = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return bool(inside) and all(any(p.suffix.lower() in IMAGES for p in one.iterdir()) for one in inside)


def open_image_folder(folder: Path) -> Any:
    """Open torchvision's `ImageFolder`, without a transform."""
    from torchvision.datasets import ImageFolder

    return ImageFolder(str(folder))
