"""Open datasets that the user passed as paths, and find validation and test splits in a `DatasetDict`."""

import os
from pathlib import Path
from typing import Any

from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import ConfigError
from dq_lightning.sources.folders import has_class_folders, open_image_folder
from dq_lightning.sources.hub import hub_kind
from dq_lightning.sources.hub_streams import shard_files
from dq_lightning.sources.jsonl import NAMES, is_rows_file, read_rows

# Names of the splits of a DatasetDict that are used for validation and for testing; the first that exists is taken.
SPLITS = {"val": ("validation", "valid", "val", "dev"), "test": ("test",)}


def open_path(path: str | Path, name: str) -> Any:
    """Open the dataset that a path names: a file of text rows, or a folder of class folders with images.

    Args:
        path: path of the file or folder.
        name: name of the keyword that the path was passed as: `"train"`, `"val"`, `"test"` or `"predict"`.

    Returns:
        For a folder of images, torchvision's `ImageFolder`. For a file of rows, the path itself if `name` is `"train"`,
        else the rows. For tar or Parquet files, or a folder of them, the path itself, which is a stream.

    Raises:
        ConfigError: the path is neither.
        SourceError: the file cannot be read.
    """
    if name == "train" and shard_files(path) is not None:
        return path
    place = Path(path).expanduser()
    if is_rows_file(path):
        return path if name == "train" else read_rows(path)
    if place.is_dir() and has_class_folders(place):
        return open_image_folder(place)
    seen = "does not exist"
    if place.exists():
        seen = "is a folder without class folders of images" if place.is_dir() else "is not a file of text rows"
    split = next(
        (f"; it has a folder {one}/ in it: pass that" for one in ("train", "val") if (place / one).is_dir()), ""
    )
    compact = ", the folder of a packed compact set" if name == "train" else ""
    raise ConfigError(
        f"{name}={str(path)!r} {seen}{split}. Pass the folder that holds one folder of images for each class{compact}, or a "
        f"file of text rows ({NAMES}). Open any other dataset before you pass it, such as "
        "datasets.load_dataset('csv', data_files=...) or datasets.load_from_disk(...)"
    )


def open_paths(given: Any, name: str) -> Any:
    """Open every path in what the user passed: a single path, or the elements of a list or dict; see `open_path`.

    Everything else is returned as it is.
    """
    if isinstance(given, str | Path):
        return open_path(given, name)
    if type(given) is list and any(map(_is_path, given)):
        return [open_paths(one, name) for one in given]
    if type(given) is dict:
        return {key: open_paths(one, name) for key, one in given.items()}
    return given


def _is_path(value: Any) -> bool:
    # A list of strings may also be a dataset of samples, so a string counts as a path only if it is named like a file of
    # rows or exists on the disk.
    return isinstance(value, Path) or (isinstance(value, str) and (is_rows_file(value) or os.path.exists(value)))  # noqa: PTH110 (long texts)


def other_splits(train: Any, given: dict[str, Any], *, same_form: bool) -> dict[str, Any]:
    """Return the datasets for `val`, `test` and `predict`, completed from the splits of a Hugging Face `DatasetDict`.

    If `train` is a `DatasetDict` or an `IterableDatasetDict`, its splits take the place of what was not given. `same_form`
    says whether they are delivered in the same form as the train split. They are not if `transform=` replaces the
    transform of the train split; then a split is not used, and a warning says so.
    """
    if (kind := hub_kind(train)) not in ("DatasetDict", "IterableDatasetDict"):
        return given
    found = dict(given)
    for name, splits in SPLITS.items():
        split = next((split for split in splits if split in train), None)
        if split is None or found[name] is not None:
            continue
        if same_form:
            found[name] = train[split]
            get_logger().info(f"{name}= was not given: the split {split!r} of the {kind} is taken")
        else:
            get_logger().warning(
                f"the split {split!r} of the {kind} is not used, because transform= is for the train split alone: pass "
                f"{name}=dataset[{split!r}]{'.with_transform(...)' if kind == 'DatasetDict' else '.map(...)'}"
            )
    return found
