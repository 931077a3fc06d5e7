"""Opening the dataset that a name, a folder or a file on the command line stands for."""

import difflib
import inspect
import os
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from dq_lightning.core.errors import DQError, SourceError
from dq_lightning.core.packages import needed_for
from dq_lightning.exports.results import HUB
from dq_lightning.sources.folders import has_class_folders, open_image_folder
from dq_lightning.sources.jsonl import is_rows_file
from dq_lightning.sources.prompts import LAYOUTS

TORCHVISION = "torchvision.datasets"
# The published scripts use these names for a folder of class folders below train/ and val/.
FOLDERS = ("ImageNet", "ImageFolder")
# By default pandas would take NA, N/A, None, null and more words for missing cells.
_CSV_CELLS: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
# This pattern matches whole numbers that fit 64 bits and are written in the one usual way.
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
TABLES = (".parquet", ".arrow", ".csv")
KINDS = (
    "a torchvision class (CIFAR10, torchvision.datasets.SVHN), ImageNet or ImageFolder with data_path=, hub:OWNER/NAME, "
    "a class of your own (package.module.Class), or in data_path= a folder of class folders, a .json, .jsonl, .parquet, "
    ".arrow or .csv file, or a folder that Dataset.save_to_disk of Hugging Face datasets wrote"
)


def open_dataset(
    dataset: str | dict[str, Any] | None, data_path: str | Path | None = None, split: str = "train"
) -> Any:
    """Open a dataset without transforms.

    Args:
        dataset: kind of the dataset (see `KINDS`), or `{"class_path": ..., "init_args": {...}}` as in LightningCLI, or
            the path itself; None derives the kind from `data_path`.
        data_path: folder or file of the dataset.
        split: split to read, for datasets that have several.

    Returns:
        A dataset that `as_source` accepts; for a file of rows, its path.

    Raises:
        SourceError: there is no such dataset, or it cannot be opened.
    """
    with needed_for("opening this dataset", SourceError):
        return _open(dataset, Path(data_path).expanduser() if data_path is not None else None, split)


def _open(dataset: str | dict[str, Any] | None, place: Path | None, split: str) -> Any:
    if isinstance(dataset, dict):
        _has_no_splits(str(dataset.get("class_path")), split)
        return _made(dataset)
    if dataset in FOLDERS:
        return _folder(_needed(place, dataset), split)
    if dataset is not None and dataset.startswith(HUB):
        return _hub(dataset.removeprefix(HUB), split)
    if dataset is not None and place is None and Path(dataset).expanduser().exists():
        return _by_path(Path(dataset).expanduser(), split)
    if dataset is not None:
        return _of_class(dataset, place, split)
    return _by_path(_needed(place, None), split)


def _needed(place: Path | None, dataset: str | None) -> Path:
    if place is None:
        missing = "no dataset was named: pass dataset=, data_path=, or both"
        if dataset is not None:
            missing = f"{dataset} is read from a folder, and none was named: pass it as data_path="
        raise SourceError(f"{missing}. A dataset is {KINDS}")
    if not place.exists():
        raise SourceError(f"{place} does not exist: correct data_path=. A dataset is {KINDS}")
    return place


def _by_path(place: Path, split: str) -> Any:
    if is_rows_file(place):
        _has_no_splits(str(place), split)
        return str(place)
    if place.is_file() and place.suffix.lower() in TABLES:
        _has_no_splits(str(place), split)
        return _table([place])
    if (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file():
        from datasets import DatasetDict, load_from_disk

        found = _opened(lambda: load_from_disk(str(place)), str(place))
        if isinstance(found, DatasetDict) and split not in found:
            raise SourceError(f"the dataset has no split {split!r}: pass one of {', '.join(map(str, found))} as split=")
        if isinstance(found, DatasetDict):
            return found[split]
        _has_no_splits(str(place), split)
        return found
    tables = sorted(path for path in place.rglob("*") if path.suffix.lower() in TABLES) if place.is_dir() else []
    # A folder of class folders may also hold tables that describe the images, as the exports of this package do.
    if tables and not has_class_folders(_root(place, split)):
        chosen = [path for path in tables if path.name.startswith(split)]
        if not chosen:
            _has_no_splits(str(place), split)
        chosen = chosen or tables
        return _table([path for path in chosen if path.suffix == chosen[0].suffix])
    return _folder(place, split)


def _root(place: Path, split: str) -> Path:
    return place / split if (place / split).is_dir() else place


def _has_no_splits(name: str, split: str) -> None:
    """Raise SourceError if another split than `"train"`, which is the default, is wanted of data that have no splits.

    A folder or file whose name begins with the split's is this split.
    """
    if split != "train" and not Path(name).name.startswith(split):
        raise SourceError(f"{name} has no split {split!r}: correct split=, or leave it out to read the whole")


def _folder(place: Path, split: str) -> Any:
    root = _root(place, split)
    if root == place:
        _has_no_splits(str(place), split)
    return _opened(lambda: open_image_folder(root), str(root))


def _table(paths: list[Path]) -> Any:
    from datasets import Dataset, concatenate_datasets

    kind = paths[0].suffix.lower()
    names: list[Any] = [os.fspath(path) for path in paths]
    if kind == ".arrow":
        return _opened(lambda: concatenate_datasets([Dataset.from_file(name) for name in names]), names[0])
    if kind == ".csv":
        return _opened(lambda: _csv(names), names[0])
    return _opened(lambda: Dataset.from_parquet(names), names[0])


def _csv(names: list[Any]) -> Any:
    """Read CSV files as text cells, unchanged; only an empty cell is missing, and no word stands for a missing cell.

    A column becomes numbers only where every cell is written exactly as such a number would be written, and never where
    its name says that it may hold text.
    """
    import pandas as pd  # type: ignore[import-untyped]  # comes with `datasets`, which reads CSV by it
    from datasets import Dataset, Value

    columns = list(pd.read_csv(names[0], nrows=0).columns)
    text = Dataset.from_csv(names, features=_features(dict.fromkeys(columns, Value("string"))), **_CSV_CELLS)
    texts = {column for _, required, optional in LAYOUTS for column in (*required, *optional)}
    kinds = {name: "string" if name in texts else _kind_of(text[name]) for name in columns}
    return text.cast(_features({name: Value(kind) for name, kind in kinds.items()}))


def _features(columns: dict[str, Any]) -> Any:
    from datasets import Features

    made: Any = Features
    return made(columns)


def _kind_of(cells: Any) -> str:
    """Return `"int64"` or `"float64"` where writing the numbers again gives exactly the same cells, else `"string"`."""
    seen = {cell for cell in cells if cell is not None}
    if seen and all(_INTEGER.fullmatch(cell) for cell in seen):
        return "int64"
    try:
        return "float64" if seen and all(repr(float(cell)) == cell for cell in seen) else "string"
    except ValueError:
        return "string"


def _hub(name: str, split: str) -> Any:
    from datasets import load_dataset, load_dataset_builder

    def load() -> Any:
        # A hub repository of CSV files is read by pandas, too, so it needs the same options.
        of_csv = hasattr(load_dataset_builder(name).config, "keep_default_na")
        return load_dataset(name, split=split, **(_CSV_CELLS if of_csv else {}))

    return _opened(load, name)


def _of_class(name: str, place: Path | None, split: str) -> Any:
    made = _class(name if "." in name else f"{TORCHVISION}.{name}")
    parameters = inspect.signature(made).parameters
    arguments: dict[str, Any] = {}
    if "root" in parameters:
        arguments["root"] = str(_needed(place, name))
    if "train" in parameters:
        if split not in ("train", "test"):
            raise SourceError(f"{name} has no split {split!r}: pass train or test as split=")
        arguments["train"] = split == "train"
    elif "split" in parameters:
        arguments["split"] = split
    else:
        _has_no_splits(name, split)
    return _opened(lambda: made(**arguments), name)


def _made(described: Any) -> Any:
    """Build the object of a class path; its arguments may be described by class paths again."""
    if isinstance(described, list):
        return [_made(one) for one in described]
    if not isinstance(described, dict) or "class_path" not in described:
        return described
    arguments = {name: _made(value) for name, value in described.get("init_args", {}).items()}
    return _opened(lambda: _class(described["class_path"])(**arguments), described["class_path"])


def _class(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    try:
        found: Callable[..., Any] = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        known = {one.casefold(): one for one in (*import_module(TORCHVISION).__all__, *FOLDERS)}
        near = difflib.get_close_matches(name.casefold(), known, 1) if module in ("", TORCHVISION) else []
        advice = f": did you mean {known[near[0]]}?" if near else "."
        raise SourceError(f"there is no {path} ({error}){advice} A dataset is {KINDS}") from error
    return found


def _opened(make: Callable[[], Any], name: str) -> Any:
    try:
        return make()
    except DQError:
        raise
    except Exception as error:
        raise SourceError(
            f"{name} cannot be opened ({type(error).__name__}: {error}): check its name, its path and the split"
        ) from error
