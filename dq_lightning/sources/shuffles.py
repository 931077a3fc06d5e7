"""Finds shuffles in streams of known libraries, and steps that give each rank a share of the data.

Shuffles of other libraries are found when a second pass differs.
"""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from dq_lightning.core.errors import SourceError
from dq_lightning.sources.base import Source, getter_owner

_MAX_DEPTH = 64


def is_stream(dataset: Any) -> bool:
    """Whether a dataset is a torch `IterableDataset` that cannot be read by position.

    Datasets of litdata and MosaicML are iterable too, but have `__getitem__` and a length.
    """
    by_position = getter_owner(dataset) not in (None, Dataset) and hasattr(type(dataset), "__len__")
    return isinstance(dataset, IterableDataset) and not by_position and not isinstance(dataset, Source)


def check_shuffles(stream: Any) -> None:
    """Check that no step of a stream is known to change its order from pass to pass.

    Raises:
        SourceError: a step shuffles or draws samples at random.
    """
    mixed = [type(stream).__name__] * type(stream).__name__.startswith("Combined")
    for step in (*mixed, *_hub_steps(getattr(stream, "_ex_iterable", None), _MAX_DEPTH), *_webdataset_steps(stream)):
        raise SourceError(
            f"the stream {type(stream).__name__} is shuffled ({step}), but it has to give the same order in each pass: the "
            "samples that are chosen in the first are packed in the second. Leave the shuffle out (no .shuffle(...), "
            "shardshuffle=False); the loader of the compact set shuffles in training"
        )


def check_whole(stream: Any) -> None:
    """Check that no step of a stream is known to give each rank of a run another share of the data.

    Raises:
        SourceError: a step does.
    """
    share = None
    if getattr(getattr(stream, "_distributed", None), "world_size", 1) > 1:
        share = "split_dataset_by_node"
    steps = getattr(stream, "pipeline", ())
    if any(getattr(step, "__name__", "") == "split_by_node" for step in (steps if isinstance(steps, list) else ())):
        share = "nodesplitter=split_by_node"
    if share is not None:
        raise SourceError(
            f"the stream {type(stream).__name__} gives each rank a share of the data ({share}), and the compact set would be "
            "chosen from the share of one rank: pass the whole stream (without split_dataset_by_node; with nodesplitter=None "
            "for WebDataset). The loader of the compact set deals its samples to the ranks in training"
        )


def _hub_steps(step: Any, depth: int) -> Iterator[str]:
    """The steps of a Hugging Face `IterableDataset` that shuffle."""
    if step is None or not depth:
        return
    name = type(step).__name__
    if "Shuffle" in name or "Randomly" in name:
        yield name
    for inner in (getattr(step, "ex_iterable", None), *getattr(step, "ex_iterables", ())):
        yield from _hub_steps(inner, depth - 1)


def _webdataset_steps(stream: Any) -> Iterator[str]:
    """The steps of a WebDataset pipeline that shuffle or resample."""
    steps = getattr(stream, "pipeline", ())
    for step in steps if isinstance(steps, list | tuple) else ():
        function = getattr(step, "f", None)
        name = getattr(function, "__name__", type(step).__name__).lstrip("_")
        if name == "shuffle":
            size = next(iter(getattr(step, "args", ())), getattr(step, "kw", {}).get("bufsize", 1000))
            if size and size > 1:
                yield f"shuffle({size})"
        elif name == "detshuffle" and step.bufsize > 1:
            yield f"detshuffle({step.bufsize})"
        elif name in ("ResampledShards", "ResampledShardList", "MultiShardSample", "rsample", "DirectoryShardList"):
            yield name
        elif getattr(step, "seed", None) is not None and name == "SimpleShardList":
            yield f"SimpleShardList(seed={step.seed})"
