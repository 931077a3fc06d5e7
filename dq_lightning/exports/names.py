"""A short name of a dataset, for the files of its results."""

from pathlib import Path
from typing import Any

# what a dataset of the Hugging Face hub is named by: hub:OWNER/NAME
HUB = "hub:"


def dataset_name(dataset: str | dict[str, Any] | None, data_path: str | Path | None = None) -> str:
    """A short name for files: of the class, the hub repository, or the folder or file."""
    if isinstance(dataset, dict):
        return str(dataset.get("class_path", "dataset")).rpartition(".")[2]
    if dataset is not None:
        return dataset.removeprefix(HUB).replace("/", "_").rpartition(".")[2]
    return Path(data_path or "dataset").expanduser().absolute().name.partition(".")[0] or "dataset"
