"""The files of the published scripts: bins and selections as `.npy` files of row numbers. Touches the disk.

select_indices_NAME_exp{0..K-1}.npy   int64, the samples of one bin, group by group in the order in which they were picked
select_indices_NAME_RATIO.npy         int64, the selected samples, ascending
bins.npz                              all of `Bins`, which the published files cannot tell apart (groups, gains)
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
from dq_lightning.core.records import Bins, Selection
from dq_lightning.exports.rows import whole, write_index
from dq_lightning.selection.given import read_index
from dq_lightning.selection.select import select

BINS_FILE = "bins.npz"
FIELDS = {"assignment": np.int16, "rank": np.int32, "gain": np.float32, "group": np.int32}


def write_bin_files(folder: str | Path, name: str, bins: Bins) -> list[Path]:
    """Write bins as published, and whole beside them.

    Args:
        folder: made when it is missing; files of the same names are replaced.
        name: of the dataset.
        bins: of N samples.

    Returns:
        The files, `bins.npz` last.
    """
    folder = Path(folder)
    order = torch.from_numpy(np.lexsort((bins.rank.numpy(), bins.group.numpy())))
    written = [
        write_index(order[bins.assignment[order] == number], folder / f"select_indices_{name}_exp{number}.npy")
        for number in range(bins.num_bins)
    ]
    # numbers of bins that an earlier run made here are no bins of this one
    for path in folder.glob(f"select_indices_{name}_exp*.npy"):
        if path not in written:
            path.unlink()
    values = {field: getattr(bins, field).numpy().astype(dtype) for field, dtype in FIELDS.items()}

    def save(place: Path) -> None:
        with place.open("wb") as file:
            np.savez_compressed(file, num_bins=np.int64(bins.num_bins), **values)

    return [*written, whole(folder / BINS_FILE, save)]


def read_bin_files(folder: str | Path, labels: Tensor | None = None) -> tuple[Bins, NDArray[np.int64], str]:
    """Read the bins of a folder, ours or published.

    Args:
        folder: of `select_indices_NAME_exp{k}.npy`.
        labels: class of every sample [N], for published files, which do not tell it.

    Returns:
        bins of the samples that are in any; their positions int64 [M], ascending, `0 .. M - 1` unless the files leave samples
        out; and NAME.

    Raises:
        StoreError: a file is missing, damaged, or shares samples with another.
    """
    folder = Path(folder).expanduser()
    name, parts = _parts(folder)
    together = np.concatenate(parts)
    positions, counts = np.unique(together, return_counts=True)
    if len(positions) and counts.max() > 1:
        raise StoreError(f"{folder}: sample {positions[counts.argmax()]} is in two bins; bins must be disjoint")
    if (folder / BINS_FILE).is_file():
        bins = _read_whole(folder, parts)
        return bins, np.arange(len(bins)), name
    if not len(positions):
        raise StoreError(f"{folder}: the bins hold no sample: make them again")
    if not np.array_equal(positions, np.arange(len(positions))):
        get_logger().warning(
            f"{folder}: the bins hold {len(positions):,} of at least {positions[-1] + 1:,} samples; the keep ratio is of these"
        )
    if labels is not None and len(labels) <= positions[-1]:
        raise StoreError(
            f"{folder} has sample {positions[-1]}, but the dataset has {len(labels):,} samples: pass its own"
        )
    if labels is None:
        get_logger().warning(
            f"{folder} does not tell the classes (there is no {BINS_FILE}), so the shares are even by bin alone and "
            "classes may come out unequal: name the dataset (--dataset, --data_path), or make the bins with `dq-lightning bins`"
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


def select_from_files(
    folder: str | Path, *, keep_ratio: float, seed: int = 0, labels: Tensor | None = None, **options: object
) -> tuple[Selection, str]:
    """Draw from the bins of a folder; see `read_bin_files` and `select`. Returns the selection and the dataset's name."""
    bins, positions, name = read_bin_files(folder, labels)
    drawn = select(bins, keep_ratio=keep_ratio, seed=seed, **options)  # type: ignore[arg-type]
    return Selection(torch.from_numpy(positions[drawn.index.numpy()]), drawn.bin), name


def selection_file(name: str, keep_ratio: float) -> str:
    """`select_indices_NAME_RATIO.npy`."""
    return f"select_indices_{name}_{keep_ratio:g}.npy"


def open_image_folder(folder: str | Path, transform: Any = None) -> tuple[Any, NDArray[np.int64]]:
    """Open a folder of reconstructed images, ours or published (`LABEL/POSITION.png`).

    Args:
        folder: of class folders. Where all are named by whole numbers, these are the labels.
        transform: of the images.

    Returns:
        torchvision's `ImageFolder`, and int64 [its length]: the position in the original dataset of each of its items, from
        `index.npy` if that is there, else from the names of the files.

    Raises:
        StoreError: there are no images, or nothing tells their positions.
    """
    from torchvision.datasets import ImageFolder

    root = Path(folder).expanduser()

    try:
        images = ImageFolder(str(root), transform=transform, allow_empty=True)
    except FileNotFoundError as error:
        raise StoreError(f"{root} holds no folder of class folders with images: {error}") from error
    if all(name.isdecimal() for name in images.classes):
        # sorted as words they are: "10" comes before "9"
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
            f"{root} has no index.npy, and the name of {odd.relative_to(root)} is no position in the original dataset: make "
            "the folder with `dq-lightning reconstruct` or `dq-lightning export`"
        )
    if len(positions) != len(images) or len(np.unique(positions)) != len(positions):
        raise StoreError(
            f"{root} has {len(images):,} images and {len(np.unique(positions)):,} positions of them: files were added, removed "
            "or named alike; make the folder again"
        )
    return images, positions


def _parts(folder: Path) -> tuple[str, list[NDArray[np.int64]]]:
    """The dataset's name and the samples of every bin, in the file's order."""
    found: dict[str, dict[int, Path]] = {}
    for path in folder.glob("select_indices_*_exp*.npy"):
        if match := re.fullmatch(r"select_indices_(.+)_exp(\d+)\.npy", path.name):
            found.setdefault(match[1], {})[int(match[2])] = path
    if len(found) != 1:
        seen = f"of {', '.join(sorted(found))}" if found else "none"
        raise StoreError(
            f"{folder} should hold the files select_indices_NAME_exp0.npy, ... of one dataset, there are {seen}: pass the "
            "folder that `dq-lightning bins` wrote"
        )
    ((name, files),) = found.items()
    if sorted(files) != list(range(len(files))):
        missing = next(number for number in range(len(files)) if number not in files)
        raise StoreError(f"{folder / f'select_indices_{name}_exp{missing}.npy'} is missing: make the bins again")
    parts = []
    for number in range(len(files)):
        parts.append(read_index(files[number], ordered=False))
    return name, parts


def _read_whole(folder: Path, parts: list[NDArray[np.int64]]) -> Bins:
    try:
        with np.load(folder / BINS_FILE, allow_pickle=False) as file:
            assignment, rank, gain, group = (torch.from_numpy(file[field]) for field in FIELDS)
            bins = Bins(assignment, rank, gain, group, int(file["num_bins"]))
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"{folder / BINS_FILE} cannot be read ({error}): make the bins again") from error
    same = len(parts) == bins.num_bins and all(
        np.array_equal(np.sort(part), np.flatnonzero(bins.assignment.numpy() == number))
        for number, part in enumerate(parts)
    )
    if not same:
        raise StoreError(
            f"{folder / BINS_FILE} and the files select_indices_*_exp*.npy beside it hold different bins: make them again, or "
            "remove the one that is not meant"
        )
    return bins
