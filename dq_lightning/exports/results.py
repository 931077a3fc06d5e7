"""What commands write beside a compact set: settings, positions, a copy of the set, and tables of samples."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

from dq_lightning.core.config import QuantizeConfig
from dq_lightning.core.records import StoreInfo, Suspects
from dq_lightning.exports.published import selection_file
from dq_lightning.exports.rows import check_free, whole, write_index
from dq_lightning.pipeline.compact import SET_FOLDER, load_selection, open_compact
from dq_lightning.sources.base import Source

# This prefix names a dataset of the Hugging Face hub: hub:OWNER/NAME.
HUB = "hub:"
CONFIG, INFO = "config.yaml", "info.json"


def dataset_name(dataset: str | dict[str, Any] | None, data_path: str | Path | None = None) -> str:
    """Return a short name for files, made from the class, the hub repository, or the folder or file.

    Example:
        >>> dataset_name("hub:owner/name")
        'owner_name'

    Args:
        dataset: name or class path of the dataset, as in `open_dataset`.
        data_path: folder or file of the dataset, used when `dataset` is None.
    """
    if isinstance(dataset, dict):
        return str(dataset.get("class_path", "dataset")).rpartition(".")[2]
    if dataset is not None:
        return dataset.removeprefix(HUB).replace("/", "_").rpartition(".")[2]
    return Path(data_path or "dataset").expanduser().absolute().name.partition(".")[0] or "dataset"


def write_results(
    folder: Path, info: StoreInfo, config: QuantizeConfig, place: dict[str, Any], source: Source | None = None
) -> None:
    """Write `config.yaml`, `info.json`, `select_indices_NAME_RATIO.npy`, `compact/`, and for suspects `suspects.csv`.

    The folder is created when it is missing; files of an earlier result are replaced one by one. `place` says where the
    dataset is: `dataset`, `data_path` and further arguments of the command. `source` gives the names of the suspects.

    Raises:
        StoreError: `compact/` holds something else, a copied file is damaged, or the folder cannot be written.
    """
    target = folder / SET_FOLDER
    check_free(target, "manifest.json")
    name = dataset_name(place["dataset"], place["data_path"])
    whole(target, lambda copy: shutil.copytree(info.path, copy))
    # Our own copy is checked with all its digests, as one from somebody else would be.
    copied = open_compact(target, verify="hash").info
    counted = place.get("indices") is not None or config.max_bytes is not None
    ratio = round(info.num_samples / info.num_source_samples, 6) if counted else config.selection.share
    write_index(load_selection(target).index, folder / selection_file(name, ratio))
    described = copied.to_dict() | {"seconds": info.seconds, "reused": info.reused}
    _write_text(folder / INFO, json.dumps(described, indent=2) + "\n")
    write_config(folder / CONFIG, place | config.to_dict())
    if info.suspects is not None:
        write_suspects(info.suspects, folder / "suspects.csv", source)


def write_config(path: Path, values: dict[str, Any]) -> None:
    """Write settings as YAML that the command reads back with `--config`; settings that are None are left out."""
    import yaml

    plain = {key: value for key, value in values.items() if value is not None}
    tools: Any = yaml
    _write_text(path, tools.safe_dump(plain, sort_keys=False, allow_unicode=True))


def recorded_settings(folder: str | Path) -> dict[str, Any]:
    """Return what the command `quantize` wrote into the folder of its results: settings, and where the dataset is.

    The folder may also be the `compact/` inside it. The dict is empty where nothing was written.
    """
    import yaml

    tools: Any = yaml
    place = Path(folder).expanduser()
    try:
        written = tools.safe_load(
            ((place.parent if place.name == SET_FOLDER else place) / CONFIG).read_text(encoding="utf-8")
        )
    except (OSError, ValueError, tools.YAMLError):
        return {}
    return written if isinstance(written, dict) else {}


def place_beside(folder: str | Path) -> dict[str, Any]:
    """Return where the dataset of a set is, as the command `quantize` wrote it into the folder of its results.

    The dict has `dataset`, `data_path`, `split` and `labels`, as far as they are known. It is empty where the data are
    no longer there, and where the name of the dataset would import other code or ask a hub: a folder that was copied from
    somebody else must not decide what is loaded here.
    """
    written = recorded_settings(folder)
    place = {name: written.get(name) for name in ("dataset", "data_path", "split", "labels")}
    dataset, data_path = place["dataset"], place["data_path"]
    plain = dataset is None or (isinstance(dataset, str) and dataset.isidentifier())
    there = isinstance(data_path, str) and Path(data_path).expanduser().exists()
    return {name: value for name, value in place.items() if value is not None} if plain and there else {}


def _write_text(path: Path, text: str) -> None:
    whole(path, lambda place: place.write_text(text, encoding="utf-8"))


def write_suspects(suspects: Suspects, path: str | Path, source: Source | None = None) -> Path:
    """Write suspects as a CSV file with the columns position, name, score, label and suggested, and return its path.

    Args:
        suspects: the samples, the lowest score first.
        path: path of the file, which is replaced; its folder is created.
        source: source of the samples, which gives their names (relative paths in a dataset of files); None leaves the
            names empty.

    Raises:
        StoreError: the file cannot be written.
    """
    names = suspects.names or ()

    def name(label: int) -> str | int:
        return "" if label < 0 else names[label] if label < len(names) else label

    columns = (suspects.index, suspects.score, suspects.label, suspects.suggested)
    rows = [
        (position, "" if source is None else source.sample_id(position), f"{score:.6g}", name(label), name(suggested))
        for position, score, label, suggested in zip(*(column.tolist() for column in columns), strict=True)
    ]
    return write_table(Path(path), ("position", "name", "score", "label", "suggested"), rows)


def write_table(path: Path, header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Path:
    """Write a CSV file, which replaces one that is there, and return its path."""

    def write(place: Path) -> None:
        with place.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *rows])

    return whole(path, write)
