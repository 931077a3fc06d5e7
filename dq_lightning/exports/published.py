"""The files of the published scripts: bins and selections as `.npy` files of row numbers.

This module reads and writes these files:

select_indices_NAME_exp{0..K-1}.npy   int64, the samples of one bin, group by group in the order in which they were
picked select_indices_NAME_RATIO.npy         int64, the selected samples, ascending
bins.npz                              all fields of `Bins`, because the published files lack groups and gains
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import StoreError
from dq_lightning.core.records import Bins
from dq_lightning.exports.rows import whole, write_index
from dq_lightning.selection.given import read_index

BINS_FILE = "bins.npz"
FIELDS = {"assignment": np.int16, "rank": np.int32, "gain": np.float32, "group": np.int32}


def write_bin_files(folder: str | Path, name: str, bins: Bins) -> list[Path]:
    """Write bins as the published files of a dataset's name, and completely in `bins.npz` beside them.

    The folder is created when it is missing; files of the same names are replaced.

    Returns:
        Paths of the files, `bins.npz` last.

    Raises:
        StoreError: the folder cannot be written.
    """
    folder = Path(folder)
    order = torch.from_numpy(np.lexsort((bins.rank.numpy(), bins.group.numpy())))
    written = [
        write_index(order[bins.assignment[order] == number], folder / f"select_indices_{name}_exp{number}.npy")
        for number in range(bins.num_bins)
    ]
    # An earlier run may have written more bins into this folder, which do not belong to these.
    for path in folder.glob(f"select_indices_{name}_exp*.npy"):
        if path not in written:
            path.unlink()
    values: dict[str, Any] = {field: getattr(bins, field).numpy().astype(dtype) for field, dtype in FIELDS.items()}
    values["num_bins"] = np.int64(bins.num_bins)
    if bins.score is not None:
        values["score"] = bins.score.numpy()
    return [*written, whole(folder / BINS_FILE, lambda place: np.savez_compressed(place, **values))]


def read_bin_files(folder: str | Path, labels: Tensor | None = None) -> tuple[Bins, NDArray[np.int64], str]:
    """Read the bins of a folder, written by this package or published.

    Args:
        folder: folder of `select_indices_NAME_exp{k}.npy`.
        labels: class of every sample [N], for published files, which do not contain the classes.

    Returns:
        The bins of the samples that are in any bin; the positions of these samples, int64 [M], ascending, which are `0
        .. M - 1` unless the files leave samples out; and NAME.

    Raises:
        StoreError: a file is missing or damaged, two bins share a sample, or the labels are of a smaller dataset.
    """
    folder = Path(folder).expanduser()
    name, parts = _parts(folder)
    together = np.concatenate(parts)
    positions, counts = np.unique(together, return_counts=True)
    if len(positions) and counts.max() > 1:
        raise StoreError(
            f"{folder}: sample {positions[counts.argmax()]} is in two bins, but bins must be disjoint: make them again"
        )
    if (folder / BINS_FILE).is_file():
        bins = _read_whole(folder, parts)
        return bins, np.arange(len(bins)), name
    if not len(positions):
        raise StoreError(f"{folder}: the bins hold no samples: make them again")
    if not np.array_equal(positions, np.arange(len(positions))):
        get_logger().warning(
            f"{folder}: the bins hold only {len(positions):,} of at least {positions[-1] + 1:,} samples, and keep_ratio is the "
            "share of the samples in the bins that is kept"
        )
    if labels is not None and len(labels) <= positions[-1]:
        raise StoreError(
            f"{folder} has sample {positions[-1]}, but the dataset has only {len(labels):,} samples: pass the dataset that "
            "the bins were made from"
        )
    if labels is None:
        get_logger().warning(
            f"the classes of the samples are not known (there is no {BINS_FILE} in {folder}), so every bin gives the same "
            "share, but the shares of the classes may differ: name the dataset (--dataset, --data_path), or make the bins with "
            "`dq-lightning bins`"
        )
    assignment = np.empty(len(positions), np.int16)
    rank = np.empty(len(positions), np.int32)
    group = np.zeros(len(positions), np.int32)
    if labels is not None:
        group = labels.numpy()[positions].astype(np.int32)
    for number, part in enumerate(parts):
        places = np.searchsorted(positions, part)
        assignment[places] = number
        for value in np.unique(group[places]):
            members = places[group[places] == value]
            rank[members] = np.arange(len(members))
    gain = np.zeros(len(positions), np.float32)
    made = [torch.from_numpy(array) for array in (assignment, rank, gain, group)]
    return Bins(made[0], made[1], made[2], made[3], len(parts)), positions, name


def selection_file(name: str, keep_ratio: float) -> str:
    """Return the name of the published file of a selection.

    Example:
        >>> selection_file("CIFAR10", 0.125)
        'select_indices_CIFAR10_0.125.npy'
    """
    return f"select_indices_{name}_{keep_ratio:g}.npy"


def open_image_folder(folder: str | Path, transform: Any = None) -> tuple[Any, NDArray[np.int64]]:
    """Open a folder of reconstructed images, written by this package or published (`LABEL/POSITION.png`).

    Args:
        folder: folder of class folders; where all their names are whole numbers, these are the labels.
        transform: transform of the images, as in torchvision.

    Returns:
        torchvision's `ImageFolder`, and the position of each of its items in the original dataset, int64 [length], read
        from `index.npy` if that file exists, else from the file names.

    Raises:
        StoreError: there are no images, or their positions are unknown or not unique.
    """
    from torchvision.datasets import ImageFolder

    root = Path(folder).expanduser()

    try:
        images = ImageFolder(str(root), transform=transform, allow_empty=True)
    except FileNotFoundError as error:
        raise StoreError(
            f"{root} has no class folders with images ({error}): pass the folder that holds one folder for each class"
        ) from error
    if all(name.isdecimal() for name in images.classes):
        # ImageFolder sorts the names as text, which puts "10" before "9", so the labels are taken from the names.
        labels = [int(name) for name in images.classes]
        images.samples = images.imgs = [(path, labels[place]) for path, place in images.samples]
        images.targets = [label for _, label in images.samples]
        images.class_to_idx = dict(zip(images.classes, labels, strict=True))
        images.classes.sort(key=int)
    names = [Path(path) for path, _ in images.samples]
    if (root / "index.npy").is_file():
        positions = read_index(root / "index.npy", ordered=False)
    elif all(name.stem.isdecimal() for name in names):
        positions = np.array([int(name.stem) for name in names], np.int64)
    else:
        odd = next(name for name in names if not name.stem.isdecimal())
        raise StoreError(
            f"{root} has no index.npy, and the name of {odd.relative_to(root)} is not a position in the original dataset: "
            "make the folder with `dq-lightning reconstruct` or `dq-lightning export`"
        )
    if len(positions) != len(images) or len(np.unique(positions)) != len(positions):
        raise StoreError(
            f"{root} has {len(images):,} images, but {len(np.unique(positions)):,} different positions of images: files were "
            "added or removed, or have equal names; make the folder again"
        )
    return images, positions


def _parts(folder: Path) -> tuple[str, list[NDArray[np.int64]]]:
    """Return the dataset's name and the samples of every bin, in the order of its file."""
    found: dict[str, dict[int, Path]] = {}
    for path in folder.glob("select_indices_*_exp*.npy"):
        if match := re.fullmatch(r"select_indices_(.+)_exp(\d+)\.npy", path.name):
            found.setdefault(match[1], {})[int(match[2])] = path
    if len(found) != 1:
        seen = f"those of {', '.join(sorted(found))}" if found else "none of them"
        raise StoreError(
            f"{folder} must hold the files select_indices_NAME_exp0.npy, ... of one dataset, but it holds {seen}: pass the "
            "folder that `dq-lightning bins` wrote"
        )
    ((name, files),) = found.items()
    if sorted(files) != list(range(len(files))):
        missing = next(number for number in range(len(files)) if number not in files)
        raise StoreError(f"{folder / f'select_indices_{name}_exp{missing}.npy'} is missing: make the bins again")
    return name, [read_index(files[number], ordered=False) for number in range(len(files))]


def _read_whole(folder: Path, parts: list[NDArray[np.int64]]) -> Bins:
    try:
        with np.load(folder / BINS_FILE, allow_pickle=False) as file:
            assignment, rank, gain, group = (torch.from_numpy(file[field]) for field in FIELDS)
            score = torch.from_numpy(file["score"]) if "score" in file else None
            bins = Bins(assignment, rank, gain, group, int(file["num_bins"]), score=score)
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"{folder / BINS_FILE} cannot be read ({error}): make the bins again") from error
    same = len(parts) == bins.num_bins and all(
        np.array_equal(np.sort(part), np.flatnonzero(bins.assignment.numpy() == number))
        for number, part in enumerate(parts)
    )
    if not same:
        raise StoreError(
            f"{folder / BINS_FILE} and the files select_indices_*_exp*.npy beside it hold different bins: make them again, or "
            f"remove {BINS_FILE} to use the other files"
        )
    return bins
