"""What a user passed, where that is a path or holds several splits."""

import os
from pathlib import Path
from typing import Any

from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import ConfigError
from dq_lightning.sources.folders import has_class_folders, open_image_folder
from dq_lightning.sources.hub import hub_kind
from dq_lightning.sources.jsonl import NAMES, is_rows_file, read_rows

# how the splits of a DatasetDict are called that are read while training, and after it
SPLITS = {"val": ("validation", "valid", "val", "dev"), "test": ("test",)}


def open_path(path: str | Path, name: str) -> Any:
    """The dataset that a path stands for: a file of text rows, or a folder of class folders with images.

    Args:
        path: of it.
        name: of the argument.

    Returns:
        torchvision's `ImageFolder`; for `name="train"` the path itself of a file of rows, else its rows.

    Raises:
        ConfigError: it is neither.
        SourceError: the file cannot be read.
    """
    place = Path(path).expanduser()
    if is_rows_file(path):
        return path if name == "train" else read_rows(path)
    if place.is_dir() and has_class_folders(place):
        return open_image_folder(place)
    seen = "holds neither" if place.is_dir() else "is neither" if place.exists() else "does not exist"
    split = next(
        (f"; it has a folder {one}/ in it: pass that" for one in ("train", "val") if (place / one).is_dir()), ""
    )
    compact = ", the folder of a packed compact set" if name == "train" else ""
    raise ConfigError(
        f"{name}={str(path)!r} {seen}: a path is the folder of class folders with images{compact}, or a file of text rows "
        f"({NAMES}){split}. Open any other dataset first, such as datasets.load_dataset('csv', data_files=...) or "
        "datasets.load_from_disk(...)"
    )


def open_paths(given: Any, name: str) -> Any:
    """The same with every path in it opened; see `open_path`."""
    if isinstance(given, str | Path):
        return open_path(given, name)
    if type(given) is list and any(map(_is_path, given)):
        return [open_paths(one, name) for one in given]
    if type(given) is dict:
        return {key: open_paths(one, name) for key, one in given.items()}
    return given


def _is_path(value: Any) -> bool:
    # a list of strings may be a dataset of samples too
    return isinstance(value, Path) or (isinstance(value, str) and (is_rows_file(value) or os.path.exists(value)))  # noqa: PTH110 (long texts)


def other_splits(train: Any, given: dict[str, Any], *, same_form: bool) -> dict[str, Any]:
    """Validation and test sets, from the splits of a Hugging Face `DatasetDict` where none were passed.

    Args:
        train: what was passed as train set.
        given: what was passed as `val`, `test` and `predict`.
        same_form: those splits would be delivered as the train split is. They are not where `transform=` changes that one.
    """
    if hub_kind(train) != "DatasetDict":
        return given
    found = dict(given)
    for name, splits in SPLITS.items():
        split = next((split for split in splits if split in train), None)
        if split is None or found[name] is not None:
            continue
        if same_form:
            found[name] = train[split]
            get_logger().info(f"{name}= was not given: the split {split!r} of the DatasetDict is taken")
        else:
            get_logger().warning(
                f"the split {split!r} of the DatasetDict is not used, because transform= is for the train split alone: pass "
                f"{name}=dataset[{split!r}].with_transform(...)"
            )
    return found
