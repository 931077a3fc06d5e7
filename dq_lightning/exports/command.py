"""One function for every export format: it finds the samples that a path stands for, and the writer of the format."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dq_lightning.cache.entries import Cache, default_cache_dir
from dq_lightning.cache.files import read_sealed
from dq_lightning.cache.manifest import read_manifest
from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import CacheError, StoreError
from dq_lightning.core.isolation import isolated
from dq_lightning.core.packages import needed_for
from dq_lightning.core.records import Bins, Selection
from dq_lightning.exports.fiftyone import write_fiftyone, write_fiftyone_of_source
from dq_lightning.exports.hub import push_images, write_image_dataset
from dq_lightning.exports.images import write_ids, write_image_folder, write_litdata, write_parquet, write_webdataset
from dq_lightning.exports.results import HUB
from dq_lightning.exports.rows import write_dataset, write_index, write_json
from dq_lightning.exports.samples import kept_of_source, kept_of_store
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.pipeline.compact import COMPACT_FILE, Compact, open_compact, read_bins_of
from dq_lightning.pipeline.plan import BINS, GIVEN, parts_behind
from dq_lightning.pipeline.remote import local_set
from dq_lightning.selection.given import read_index
from dq_lightning.sources.adapt import as_source
from dq_lightning.sources.base import Source
from dq_lightning.sources.text import is_row

WRITERS = {
    "imagefolder": write_image_folder,
    "huggingface": write_image_dataset,
    "parquet": write_parquet,
    "webdataset": write_webdataset,
    "litdata": write_litdata,
}


@isolated()
def export_set(
    path: str | Path,
    format: str,
    output: str,
    *,
    dataset: Any = None,
    name: str = "dataset",
    fill: bool = True,
    reconstructor: Any = None,
    private: bool = True,
    license: str = "unknown",
    labels: Any = None,
    settings: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    device: str = "auto",
    progress: bool = True,
) -> str:
    """Write a compact set in another format, and return what was written, for a message: path or repository.

    The arguments are those of the command `export`: `path` is the folder of the set, or a `.npy` file of positions in
    the dataset; `format` a key of `WRITERS`, or `"indices"`, `"json"`, `"fiftyone"` or `"hub"`; `output` the folder or
    file that is written, or `OWNER/NAME` for the hub. A packed set needs no dataset. Files are named after the dataset's
    `name`. A new hub repository is private unless `private` is False, and its card names the `license` and the
    `settings` that the set was made with. `labels` are those of `as_source`. Dropped patches are filled as in
    `kept_of_store`.

    Raises:
        StoreError: the set and the dataset do not belong together, or lack what the format needs.
    """
    path = local_set(path)
    compact, selection, packed, source = _opened(path, dataset, labels)
    if format == "indices":
        return _write_indices(Path(output), selection, packed, source, name)
    if source is not None:
        holds_text = source.modality == "text"
    else:
        holds_text = packed is not None and len(packed) > 0 and is_row(packed[0])
    if format == "json" or holds_text:
        return _write_rows(format, output, selection, packed, source)
    facts = {} if compact is None else set_facts(compact)
    if format == "fiftyone" and source is not None:
        bins = None if compact is None else _bins_behind(compact, cache_dir)
        return str(write_fiftyone_of_source(source, selection, bins, output, name, facts))
    if source is not None and (packed is None or not packed.has_patches):
        images = kept_of_source(source, selection, name)
    elif packed is not None:
        images = kept_of_store(path, fill=fill, reconstructor=reconstructor, device=device, progress=progress)
    else:
        raise _needs_dataset(path)
    if format == "fiftyone":
        return str(write_fiftyone(images, output, facts))
    if format == "hub":
        if settings and str(settings.get("dataset", "")).startswith(HUB):
            facts["hub"] = str(settings["dataset"]).removeprefix(HUB)
        of_all = None if source is None else source.labels()
        whole = None
        if of_all is not None and of_all.are_classes:
            whole = torch.bincount(of_all.values, minlength=of_all.num_classes)[: of_all.num_classes].tolist()
        with needed_for("the export to the hub", StoreError):
            push_images(images, output, private=private, facts=facts, settings=settings, whole=whole, license=license)
        return output
    with needed_for(f"the export as {format}", StoreError):
        return str(WRITERS[format](images, output))


def needs_dataset(path: str | Path, format: str) -> bool | None:
    """Return whether an export needs the dataset: True, False where it writes more with it, None where it is of no use.

    Raises:
        StoreError: the folder holds no compact set.
    """
    place = local_set(path)
    holds_samples = place.suffix not in (".npy", ".npz") and open_compact(place).info.kind == "packed"
    if not holds_samples:
        return format != "indices"
    return False if format == "fiftyone" else None


def set_facts(compact: Compact) -> dict[str, Any]:
    """Return what is known of a compact set, as plain values that JSON can hold; what does not apply is left out."""
    info, config = compact.info, compact.config
    facts = {
        "samples": info.num_samples,
        "of": info.num_source_samples,
        "source": read_sealed(Path(info.path) / COMPACT_FILE).get("source"),
        "encoder": info.encoder,
        "encoder_digest": info.encoder_digest,
        "keep_ratio": config.get("selection", {}).get("keep_ratio"),
        "seed": config.get("selection", {}).get("seed"),
        "num_bins": config.get("bins", {}).get("num_bins"),
        "patches": f"{info.patch_keep_ratio:.1%}" if info.patch_keep_ratio < 1 else None,
        "content_hash": info.content_hash,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _bins_behind(compact: Compact, cache_dir: str | None) -> Bins | None:
    """Return the bins that a set was drawn from, from the cache that holds the set or else the user's; None without."""
    path = Path(compact.info.path)
    parts = parts_behind(read_manifest(path)["parts"])
    if BINS not in parts:
        return None
    roots = (path.absolute().parent.parent, Path(cache_dir or default_cache_dir()))
    for root in roots:
        with contextlib.suppress(CacheError):
            return read_bins_of(replace(compact, parts=parts), Cache(root))
    get_logger().warning(
        f"rank and gain are not written, because the bins behind {path} are not in the cache {roots[1]}: pass the cache "
        "that it was made in as cache_dir="
    )
    return None


def _opened(
    path: Path, dataset: Any, labels: Any
) -> tuple[Compact | None, Selection, PackedDataset | None, Source | None]:
    """Return the set, the selection, the packed samples or None, and the source (None if no dataset was given)."""
    compact = None
    if path.suffix in (".npy", ".npz"):
        index = torch.from_numpy(read_index(path))
        selection, packed = Selection(index, torch.full((len(index),), -1).short()), None
    else:
        compact = open_compact(path, verify="hash")
        selection, packed = compact.selection, PackedDataset(path) if compact.info.kind == "packed" else None
    source = None if dataset is None else source_of_set(path, compact, selection, dataset, labels)
    return compact, selection, packed, source


def source_of_set(
    path: Path, compact: Compact | None, selection: Selection, dataset: Any, labels: Any = None
) -> Source:
    """Open the dataset that a compact set was made from, with the options of that time.

    `compact` is None for a file of positions, for which only the length of the dataset is checked.

    Raises:
        StoreError: it is another dataset, or has changed.
    """
    total, options = None, dict[str, Any]()
    if compact is not None:
        total = compact.info.num_source_samples
        options = compact.reading | {"on_error": compact.config.get("on_error", "raise")}
    # The writers of images say what is missing where there is none.
    source = as_source(dataset, needs_images=False, labels=labels, **options)
    if (total is not None and len(source) != total) or (len(selection) and int(selection.index[-1]) >= len(source)):
        raise StoreError(
            f"{path} was made from a dataset of {total or int(selection.index[-1]) + 1:,} samples, but the given dataset "
            f"has {len(source):,}: pass the dataset that it was made from"
        )
    made_of = None if compact is None else str(read_manifest(path)["parts"]["source"])
    if made_of is None or made_of.startswith(GIVEN):
        return source
    # In other data, positions mean other samples, as after files were added or renamed.
    memory = Cache(default_cache_dir()).memory
    seen = (source.identity_is_certain and source.quick_digest(memory)) or source.digest(memory)
    if seen != made_of:
        raise StoreError(
            f"{path} was made from other content than {source.describe()} has now (digest {made_of[:8]} then, {seen[:8]} now): "
            "pass the dataset as it was then, or quantize again"
        )
    return source


def _write_indices(
    output: Path, selection: Selection, packed: PackedDataset | None, source: Source | None, name: str
) -> str:
    path = output if output.suffix == ".npy" else output / f"select_indices_{name}.npy"
    write_index(selection.index, path)
    names = packed.ids if packed is not None else None
    if source is not None:
        names = [source.sample_id(position) for position in selection.index.tolist()]
    if names is None:
        return f"{path} (without a file of ids: pass --dataset or --data_path to write one, too)"
    write_ids(list(names), path.with_suffix(".ids.txt"))
    return f"{path}, {path.with_suffix('.ids.txt').name}"


def _write_rows(
    format: str, output: str, selection: Selection, packed: PackedDataset | None, source: Source | None
) -> str:
    if source is not None and source.modality != "text":
        raise StoreError(
            f"json is a format for rows of text, but {source.describe()} holds images: choose another format"
        )
    rows: Any
    if packed is not None:
        rows, index = packed, torch.arange(len(packed))
    elif source is not None:
        rows, index = source.plain_items(), selection.index
    else:
        raise _needs_dataset("this set")
    if len(rows) and not hasattr(rows[int(index[0])], "keys"):
        raise StoreError(
            f"{format} needs samples that are dicts of named fields, which these are not: choose another format"
        )
    if format == "json":
        return str(write_json(rows, index, output))
    if format == "huggingface":
        with needed_for("the export as huggingface", StoreError):
            return str(write_dataset(rows, index, output))
    raise StoreError(f"rows of text are exported as json, huggingface or indices, not as {format}: choose one of these")


def _needs_dataset(path: Any) -> StoreError:
    return StoreError(
        f"{path} holds positions, not samples: pass --dataset and --data_path of the dataset that it was made from, or "
        "quantize with --store packed"
    )
