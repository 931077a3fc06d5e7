"""Writes a report: of the compact set in a folder, or of one that is open already."""

import json
from pathlib import Path
from typing import Any

from dq_lightning.cache.entries import Cache
from dq_lightning.core.devices import DeviceNames
from dq_lightning.core.isolation import isolated_random_state
from dq_lightning.exports.command import source_of_set
from dq_lightning.exports.results import INFO
from dq_lightning.exports.rows import whole
from dq_lightning.loading.train_set import Opened
from dq_lightning.pipeline.remote import local_set
from dq_lightning.report.gather import gather
from dq_lightning.report.material import Material, collect, material_of_set
from dq_lightning.report.page import render

REPORT = "report.html"


def report_of_set(
    path: str | Path,
    output: str | Path = REPORT,
    *,
    dataset: Any = None,
    labels: Any = None,
    place: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    seconds: dict[str, float] | None = None,
    projection: str = "pca",
    device: DeviceNames = "auto",
) -> Path:
    """Write a report on the compact set in a folder.

    Args:
        path: folder of the set, or the folder that the command `quantize` wrote its results into.
        output: file that is written, or a folder, which gets a `report.html`.
        dataset: the dataset that the set was made from; None shows what can be shown without it.
        labels: classes that the set was made with in place of the dataset's own.
        place: `dataset`, `data_path` and `split` of the command, for the line that makes the set again.
        cache_dir: folder of the cache that holds features and bins; None takes the one that the set is in, or the default.
        seconds: wall time in seconds of every step that made the set, where it is known.
        projection: how the map is made, `"pca"` or `"umap"`.
        device: device that fills the dropped patches of a few images.

    Returns:
        The path of the file.

    Raises:
        StoreError: the set cannot be read, the dataset is another one, or the file cannot be written.
        ConfigError: `projection="umap"` without the package umap-learn.
    """
    folder = local_set(path, cache_dir)
    with isolated_random_state():
        compact, cache = material_of_set(folder, cache_dir)
        source = None if dataset is None else source_of_set(folder, compact, compact.selection, dataset, labels)
        material = collect(compact, cache, source)
        known = seconds or _seconds_beside(folder)
        return write_report(material, output, seconds=known, place=place, projection=projection, device=device)


def report_of_opened(opened: Opened, cache: Cache, output: str | Path, **options: Any) -> Path:
    """Write a report on the compact set of a data module; the options are those of `gather`.

    The arguments are what the data module has opened, its cache, and the file that is written. The path of the file is
    returned.

    Raises:
        StoreError: the file cannot be written.
        ConfigError: `projection="umap"` without the package umap-learn.
    """
    with isolated_random_state():
        source = None if opened.plan is None else opened.plan.source
        return write_report(collect(opened.compact, cache, source), output, **options)


def write_report(material: Material, output: str | Path, **options: Any) -> Path:
    """Write a report of what was collected, with the options of `gather`, and return the path of the file.

    Raises:
        StoreError: the file cannot be written.
    """
    target = Path(output).expanduser()
    if target.is_dir():
        target = target / REPORT
    page = render(gather(material, **options))
    # A file name that is not UTF-8 is written as backslash escapes.
    return whole(target, lambda place: place.write_bytes(page.encode("utf-8", "backslashreplace")))


def _seconds_beside(folder: Path) -> dict[str, float]:
    """Return the seconds that the command `quantize` wrote beside a set into its results, else an empty dict."""
    try:
        seconds = json.loads((folder.parent / INFO).read_text(encoding="utf-8"))["seconds"]
        return {str(name): float(value) for name, value in seconds.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
