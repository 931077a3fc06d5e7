"""The commands `info`, `report`, `verify`, `export`, `prune` and `demo`."""

from typing import Any, Literal

ExportFormat = Literal[
    "imagefolder", "indices", "huggingface", "parquet", "webdataset", "litdata", "json", "fiftyone", "hub"
]  # fmt: skip


def info(path: str) -> None:
    """Print what a compact set holds, what it costs, and the settings that it was made with, as JSON.

    Args:
        path: folder of the compact set, or the folder that quantize wrote its results into.
    """
    import json

    from dq_lightning.pipeline.compact import open_compact
    from dq_lightning.pipeline.remote import local_set

    compact = open_compact(local_set(path))
    # Only the run that made the set knows how long that took.
    facts = {name: value for name, value in compact.info.to_dict().items() if name not in ("reused", "seconds")}
    print(json.dumps(facts | {"config": compact.config}, indent=2))


def report(
    path: str,
    output: str = "report.html",
    dataset: str | dict[str, Any] | None = None,
    data_path: str | None = None,
    split: str = "train",
    labels: bool | str | None = None,
    projection: Literal["pca", "umap"] = "pca",
    cache_dir: str | None = None,
    device: str = "auto",
) -> None:
    """Write a page that shows what was kept, what was left, and what looks wrong: one HTML file that needs no network.

    Example: dq-lightning report results/cifar --dataset CIFAR10 --data_path ~/data_cifar --output report.html

    Args:
        path: folder of the compact set, or the folder that quantize wrote its results into.
        output: file that is written, or a folder, which gets a report.html.
        dataset: the dataset that the set was made from, as in quantize, which gives pictures and labels of what was
            left. When left out, it is the one that quantize named in its results, if it is still there; a packed set
            shows its own samples without it.
        data_path: folder or file of the dataset, as in quantize.
        split: split to read, for datasets that have several.
        labels: the column that was used in place of the classes, or false.
        projection: how the embeddings become a map, pca or umap (needs the package umap-learn).
        cache_dir: folder of the cache that holds the features and bins behind the set; when left out, the cache that the
            set is in, else the default one.
        device: device that fills the dropped patches of a few images.
    """
    from functools import partial

    from dq_lightning.commands.opening import open_dataset
    from dq_lightning.core.console import get_logger
    from dq_lightning.core.errors import SourceError, StoreError
    from dq_lightning.exports.results import place_beside
    from dq_lightning.report.make import report_of_set

    make = partial(report_of_set, path, output, cache_dir=cache_dir, projection=projection, device=device)
    given = dataset is not None or data_path is not None
    place: dict[str, Any] = {"dataset": dataset, "data_path": data_path, "split": split, "labels": labels}
    place = place if given else place_beside(path)
    where = {name: value for name, value in place.items() if name != "labels" and (name, value) != ("split", "train")}
    try:
        opened = (
            open_dataset(place.get("dataset"), place.get("data_path"), place.get("split", split)) if place else None
        )
        written = make(dataset=opened, labels=place.get("labels"), place=where)
    except (SourceError, StoreError) as error:
        if given or not place:
            raise
        get_logger().warning(f"the dataset that was recorded beside {path} is not shown: {error}")
        written = make(place=where)
    print(f"wrote the report ({written.stat().st_size:,} bytes): {written}")


def verify(path: str) -> None:
    """Compare every file of a compact set, or of a whole cache, with the SHA-256 that was recorded; changes nothing.

    Prints the reasons and exits with status 1 when an entry is damaged.

    Args:
        path: folder of the compact set, of the results of quantize, or of a cache.
    """
    from dq_lightning.commands.cache_care import verify_folder
    from dq_lightning.core.errors import StoreError
    from dq_lightning.pipeline.remote import local_set

    problems = verify_folder(local_set(path))
    for entry, problem in problems.items():
        print(f"{'DAMAGED' if problem else 'ok':8} {entry}")
    damaged = [f"{entry}: {problem}" for entry, problem in problems.items() if problem]
    total = f"{len(problems)} {'entry is' if len(problems) == 1 else 'entries are'}"
    print(f"{len(problems) - len(damaged)} of {total} intact")
    if damaged:
        raise StoreError(
            f"{len(damaged)} of {total} damaged: {'; '.join(damaged)}. The next run makes damaged entries of a cache again; a "
            "damaged copy of a compact set has to be copied again"
        )


def export(
    path: str,
    format: ExportFormat,
    output: str,
    dataset: str | dict[str, Any] | None = None,
    data_path: str | None = None,
    split: str = "train",
    fill: bool = True,
    reconstructor: str | None = None,
    public: bool = False,
    license: str = "unknown",
    cache_dir: str | None = None,
    device: str = "auto",
    progress: bool = True,
) -> None:
    """Write a compact set in another format.

    Example: dq-lightning export results/cifar/compact imagefolder exported --dataset CIFAR10 --data_path ~/data_cifar

    Args:
        path: folder of the compact set, or the folder that quantize wrote its results into, or a .npy of positions; a
            packed set needs no dataset.
        format: imagefolder (with metadata.csv), indices (.npy and ids.txt), huggingface (load_from_disk), parquet,
            webdataset (tar), litdata, json (rows of text in the layout of the published Alpaca), fiftyone (all samples,
            with what was kept, bin, rank and gain), hub (upload with a dataset card; output is OWNER/NAME).
        output: folder or file that is written.
        dataset: the dataset that the set was made from, as in quantize; when left out with data_path, the dataset that
            quantize --output recorded beside the set is opened where one is needed.
        data_path: folder or file of the dataset, as in quantize.
        split: split to read, for datasets that have several.
        fill: let the reconstructor fill dropped patches; false paints them in the mean colour.
        reconstructor: reconstructor to use in place of the one that the set was made with.
        public: make a new hub repository public.
        license: licence of the data, by the hub's identifier such as cc-by-4.0, for the dataset card.
        cache_dir: folder of the cache that the set was made in, where fiftyone finds rank and gain; when left out,
            DQ_LIGHTNING_CACHE or else the platform's cache folder.
        device: device that the reconstructor runs on.
        progress: show progress bars.
    """
    from dq_lightning.commands.opening import open_dataset
    from dq_lightning.core.errors import SourceError, StoreError
    from dq_lightning.exports.command import export_set, needs_dataset
    from dq_lightning.exports.results import dataset_name, place_beside, recorded_settings

    settings = recorded_settings(path)
    # Groups that are no classes are not what an export should call its classes.
    column = settings.get("labels")
    labels = column if isinstance(column, str) and not column.startswith("quantiles") else None
    opened, needed = None, needs_dataset(path, format)
    if dataset is not None or data_path is not None:
        opened = open_dataset(dataset, data_path, split)
    elif needed is not None and (place := place_beside(path)):
        dataset, data_path = place.get("dataset"), place.get("data_path")
        try:
            opened = open_dataset(dataset, data_path, place.get("split", split))
        except SourceError as error:
            if needed:
                raise StoreError(
                    f"the dataset that was recorded beside {path} cannot be opened again: {error}. Pass it as dataset= and "
                    "data_path="
                ) from error
    written = export_set(
        path,
        format,
        output,
        dataset=opened,
        name="dataset" if opened is None else dataset_name(dataset, data_path),
        fill=fill,
        reconstructor=reconstructor,
        private=not public,
        license=license,
        labels=labels,
        settings=settings or None,
        cache_dir=cache_dir,
        device=device,
        progress=progress,
    )
    print(f"wrote the compact set as {format}: {written}")


def prune(
    cache_dir: str | None = None,
    older_than_days: float | None = None,
    max_size: str | None = None,
    dry_run: bool = False,
) -> None:
    """Remove entries from the cache by age, then the longest unused ones until the rest is small enough.

    An entry stays while it is being made, while a process of this host has its samples open, and for one minute after
    it was made or read. Do not prune while a training on another host uses the cache: its open files stay readable, but
    a process that it starts later does not find the set.
    Example: dq-lightning prune --older_than_days 30 --max_size 20GB

    Args:
        cache_dir: folder of the cache; when left out, DQ_LIGHTNING_CACHE or else the platform's cache folder.
        older_than_days: remove entries that were not used for more than this many days.
        max_size: upper bound on the size of the remaining entries, such as 20GB.
        dry_run: only print what would be removed.
    """
    from dq_lightning.cache.entries import default_cache_dir
    from dq_lightning.commands.cache_care import prune
    from dq_lightning.core.sizes import parse_bytes

    bound = None if max_size is None else parse_bytes(max_size)
    done = prune(cache_dir or default_cache_dir(), older_than_days=older_than_days, max_bytes=bound, dry_run=dry_run)
    for entry in done.removed:
        print(f"{'would remove' if dry_run else 'removed'} {entry.station}/{entry.key} ({entry.bytes:,} bytes)")
    for entry in done.busy:
        print(
            f"kept {entry.station}/{entry.key} ({entry.bytes:,} bytes), because it is in use or was used a moment ago"
        )
    print(f"{done.left_bytes:,} bytes {'would remain' if dry_run else 'remain'} in the cache")


def demo(progress: bool = True, output: str = "dq_lightning_demo.html") -> None:
    """Quantize bundled images, train on the result and on random samples, and print the accuracies (no network needed).

    It writes a report on the images, some of which have wrong labels.

    Args:
        progress: show progress bars.
        output: file of the report.
    """
    from dq_lightning.demo.run import run_demo

    run_demo(progress=progress, output=output)
