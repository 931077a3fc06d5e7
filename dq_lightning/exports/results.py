"""The folder that `dq-lightning quantize --output` writes: settings, positions, and a copy of the compact set."""

import json
import shutil
from pathlib import Path
from typing import Any

from dq_lightning.core.config import QuantizeConfig
from dq_lightning.core.records import StoreInfo
from dq_lightning.exports.images import check_free
from dq_lightning.exports.names import dataset_name
from dq_lightning.exports.published import selection_file
from dq_lightning.exports.rows import whole, write_index
from dq_lightning.pipeline.compact import SET_FOLDER, load_selection, open_compact

CONFIG, INFO = "config.yaml", "info.json"


def write_results(folder: Path, info: StoreInfo, config: QuantizeConfig, place: dict[str, Any]) -> None:
    """Write `config.yaml`, `info.json`, `select_indices_NAME_RATIO.npy` and `compact/`.

    Args:
        folder: folder of the results, created when it is missing; files of an earlier result are replaced one by one.
        info: description of the compact set.
        config: all settings of the run.
        place: where the dataset is: `dataset`, `data_path` and further arguments of the command.

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
    write_text(folder / INFO, json.dumps(described, indent=2) + "\n")
    write_config(folder / CONFIG, place | config.to_dict())


def write_config(path: Path, values: dict[str, Any]) -> None:
    """Write settings as YAML that the command reads back with `--config`; settings that are None are left out."""
    import yaml

    plain = {key: value for key, value in values.items() if value is not None}
    tools: Any = yaml
    write_text(path, tools.safe_dump(plain, sort_keys=False, allow_unicode=True))


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8), completely or not at all."""
    whole(path, lambda place: place.write_text(text, encoding="utf-8"))
