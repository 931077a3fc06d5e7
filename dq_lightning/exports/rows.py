"""Writing the rows of a compact set as files: JSON, a Hugging Face dataset on disk, or row numbers."""

import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor

from dq_lightning.cache.lock import host_name, process_alive
from dq_lightning.core.errors import StoreError
from dq_lightning.core.fields import check_local
from dq_lightning.sources.hub import hub_kind

# This pattern matches lone surrogates, which are halves of characters and cannot be encoded as UTF-8.
_HALVES = re.compile("[\ud800-\udfff]")


def write_json(rows: Any, index: Tensor, path: str | Path) -> Path:
    """Write the kept rows as a JSON list, indented by four as Alpaca is, or as one row per line for a `.jsonl` file.

    All fields are written, in the order of the original, and text is written as it is (UTF-8). The file appears
    completely or not at all.

    Args:
        rows: all N rows, dicts by position: a list or a Hugging Face dataset.
        index: int64 [M], `Selection.index`.
        path: path of the file, which is returned; its folder is created.

    Raises:
        StoreError: a row does not exist or holds a value that JSON cannot express, or the file cannot be written.
    """

    def write(place: Path) -> None:
        with place.open("w", encoding="utf-8") as file:
            if Path(path).suffix == ".jsonl":
                file.writelines(f"{_as_json(row, number)}\n" for number, row in _kept(rows, index))
            else:
                written = ",\n".join(_as_json(row, number, indent=4) for number, row in _kept(rows, index))
                file.write("[\n" + "".join(f"    {line}\n" for line in written.split("\n")) + "]")

    return whole(Path(path), write)


def write_dataset(rows: Any, index: Tensor, path: str | Path) -> Path:
    """Write the kept rows as a Hugging Face dataset for `datasets.load_from_disk`; features and formats are kept.

    Rows and index are as in `write_json`. `path` is a folder that does not exist yet, is empty, or holds such a
    dataset, which is replaced; it is returned.

    Raises:
        StoreError: a row does not exist, a column holds what a dataset cannot store, or the folder holds something
            else.
    """
    target = Path(path)
    check_free(target, "dataset_info.json")
    if hub_kind(rows) == "Dataset":
        _check(rows, index)
        # Without flatten_indices the whole table would be written, together with a list of positions.
        kept = rows.select(index.tolist()).flatten_indices()
    else:
        kept = _as_table([dict(row) for _, row in _kept(rows, index)])
    return whole(target, kept.save_to_disk)


def _as_table(rows: list[dict[str, Any]]) -> Any:
    """Make a Hugging Face dataset of rows: None fills missing fields, and columns of mixed types are stored as JSON."""
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    try:
        return _table(columns)
    except Exception as error:
        whole = error
    for name, cells in columns.items():
        try:
            _table({name: cells})
        except Exception as error:
            raise StoreError(
                f"column {name!r} cannot be written as a dataset ({type(error).__name__}: {error}): write json instead, or "
                "leave the column out"
            ) from error
    raise StoreError(f"the rows cannot be written as a dataset ({whole}): write json instead") from whole


def _table(columns: dict[str, list[Any]]) -> Any:
    from datasets import Dataset

    made = Dataset.from_dict(columns, on_mixed_types="use_json")
    for name, feature in made.features.items():
        # A value that JSON cannot express would be written as some text, so what is read back is compared.
        if "Json(" in repr(feature) and json.loads(json.dumps(columns[name])) != columns[name]:
            raise ValueError("its values are of several types, and some of them cannot be written as JSON")
    return made


def write_index(index: Tensor, path: str | Path) -> Path:
    """Write row numbers, int64 [M], as a `.npy` file that `numpy.load` reads, and return its path."""
    return whole(Path(path), lambda place: np.save(place, index.numpy().astype(np.int64), allow_pickle=False))


def _kept(rows: Any, index: Tensor) -> Iterator[tuple[int, Any]]:
    _check(rows, index)
    for number in index.tolist():
        yield number, rows[number]


def _check(rows: Any, index: Tensor) -> None:
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(rows):
        raise StoreError(
            f"the selection has rows {int(index.min())} to {int(index.max())}, but there are {len(rows)} rows: pass the "
            "dataset that it was made from"
        )


def _as_json(row: Any, number: int, indent: int | None = None) -> str:
    try:
        # NaN is not valid JSON, and other readers stop at it.
        text = json.dumps(dict(row), ensure_ascii=False, indent=indent, allow_nan=False)
        # A lone surrogate has no UTF-8 bytes, but JSON can escape it.
        return _HALVES.sub(lambda half: f"\\u{ord(half[0]):04x}", text)
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"row {number} cannot be written as JSON ({error}): leave out the column with this value, or write a Hugging Face "
            "dataset instead"
        ) from error


def whole(target: Path, write: Callable[[Path], Any]) -> Path:
    """Write beside the target and rename, so that no reader sees a half-written file or folder; return the target.

    Args:
        target: file or folder to write; an existing one is replaced if it is of the same kind.
        write: function that creates a file or folder at the path it is given.

    Raises:
        StoreError: the target cannot be written, or a folder stands where a file is to be written, or the reverse.
    """
    check_local("output", target)
    check_writable(target.parent)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.{host_name()}-{os.getpid()}-", dir=target.parent))
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        place = folder / target.name
        write(place)
        if target.exists() and place.is_dir() != target.is_dir():
            kinds = ("a folder", "a file") if target.is_dir() else ("a file", "a folder")
            raise StoreError(f"{target} is {kinds[0]}, but {kinds[1]} has to be written there: pass another output")
        if place.is_dir() and target.exists():
            target.rename(folder / "before")
        os.replace(place, target)  # noqa: PTH105
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def check_writable(folder: str | Path) -> None:
    """Check before any work that results can be written into a folder, which need not exist. Nothing is left behind.

    Raises:
        ConfigError: the folder is the address of a remote place.
        StoreError: the path is a file, or the folder cannot be created or written.
    """
    check_local("output", folder)
    wanted = Path(folder).absolute()
    place = wanted
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".dq-", dir=place))  # noqa: PTH106
    except OSError as error:
        raise _unwritable(wanted, error) from error


def check_free(folder: Path, marker: str) -> None:
    """Refuse to replace a folder that holds something else than an earlier export, each of which has the file `marker`.

    Raises:
        StoreError: the folder is not empty and lacks the marker.
    """
    if folder.exists() and not (folder / marker).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(
            f"{folder} exists already and was not written by this export (it has no {marker}): pass another folder"
        )


def _unwritable(target: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{target} cannot be written ({error.strerror or error}): make room, repair its permissions, or pass another output"
    )


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes of this host left behind for the same output."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.{host_name()}-*"):
        pid = left.name.removeprefix(f".{target.name}.{host_name()}-").partition("-")[0]
        if pid.isdecimal() and not process_alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def features_of(class_names: tuple[str, ...] | None) -> Any:
    """Return the Arrow schema of the columns, with what Hugging Face datasets needs for images and classes."""
    from datasets import ClassLabel, Features, Image, Value

    columns = {"image": Image(), "index": Value("int64"), "bin": Value("int16"), "id": Value("string")}
    if class_names is not None:
        columns["label"] = ClassLabel(names=list(class_names))
    return cast(Any, Features)(columns).arrow_schema
