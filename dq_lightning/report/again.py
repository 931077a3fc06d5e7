"""How a compact set is made again: a command for the shell, and Python code."""

import json
import shlex
from pprint import pformat
from typing import Any

from dq_lightning.core.config import QuantizeConfig
from dq_lightning.pipeline.plan import STORE
from dq_lightning.report.material import Material
from dq_lightning.report.records import Again


def make_again(material: Material, place: dict[str, Any]) -> Again:
    """Return how the set is made again.

    Args:
        material: what the report is made from.
        place: `dataset`, `data_path` and `split` of the command, as far as they are known.
    """
    config, info = material.compact.config, material.compact.info
    given = "indices" in config.get("selection", {})
    changed = {name: value for name, value in changed_settings(config).items() if name != "selection.indices"}
    if config.get("max_bytes") is not None:
        # Under a budget, the settings of a set hold the usual ratio where none was asked for.
        asked = material.compact.parts.get(STORE, {}).get("keep_ratio")
        changed = {name: value for name, value in changed.items() if name != "selection.keep_ratio"}
        changed |= {} if asked is None else {"selection.keep_ratio": asked}
    options = [f"--{name} {shlex.quote(_typed(value))}" for name, value in place.items() if value is not None]
    if not options:
        options = ["--dataset NAME --data_path FOLDER"]
    options += ["--indices select_indices.npy"] if given else []
    options += [f"--{name} {shlex.quote(_typed(value))}" for name, value in changed.items()]
    command = " \\\n  ".join(["dq-lightning quantize", *options])
    positions = '    indices="select_indices.npy",\n' if given else ""
    settings = pformat(_nested(changed), width=76, sort_dicts=False)
    python = (
        "from dq_lightning import QuantizedDataModule\n\n"
        f"config = {settings}\n"
        f"dm = QuantizedDataModule(\n    dataset,\n{positions}    config=config,\n)"
    )
    notes = []
    if not place:
        notes.append("NAME and FOLDER stand for the dataset, which the set itself does not name.")
    encoder = config.get("features", {}).get("encoder")
    notes.append(
        f"The set was made by {info.encoder or 'no encoder'}"
        + (f' (encoder="{encoder}" in the settings)' if encoder else "")
        + ". What was passed in Python as an object (a network, features, labels, scores, positions) is no setting: pass "
        "it again."
    )
    notes.append(f"The set that comes out is the same one if its content hash is {info.content_hash}.")
    return Again(command, python, tuple(notes))


def changed_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that differ from the defaults, by their dotted names.

    >>> changed_settings({"bins": {"num_bins": 5, "objective": "graph_cut"}, "store": "packed"})
    {'bins.num_bins': 5, 'store': 'packed'}
    """
    usual = _flat(QuantizeConfig().to_dict())
    return {
        name: value
        for name, value in _flat(config).items()
        if value != usual.get(name) or (name == "selection.keep_ratio" and value is not None)
    }


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return flat


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, last = name.split(".")
        inside = nested
        for folder in folders:
            inside = inside.setdefault(folder, {})
        inside[last] = value
    return nested


def _typed(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
