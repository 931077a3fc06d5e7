"""A short name for a dataset, used in the file names of its results."""

from pathlib import Path
from typing import Any

# This prefix names a dataset of the Hugging Face hub: hub:OWNER/NAME.
HUB = "hub:"


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
