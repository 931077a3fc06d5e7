"""Folders of class folders with images, told by what is in them."""

from pathlib import Path
from typing import Any

# as torchvision's ImageFolder
IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def has_class_folders(folder: Path) -> bool:
    """Whether all folders inside a folder hold images, and there is at least one."""
    inside = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return bool(inside) and all(any(p.suffix.lower() in IMAGES for p in one.iterdir()) for one in inside)


def open_image_folder(folder: Path) -> Any:
    """Open torchvision's `ImageFolder`, without a transform."""
    from torchvision.datasets import ImageFolder

    return ImageFolder(str(folder))
