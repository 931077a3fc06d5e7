"""Measure how many bytes samples take without dropped patches, as a comparison for the size of a store of patches."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dq_lightning.core.arrays import as_image
from dq_lightning.core.errors import SourceError
from dq_lightning.core.records import PatchChoice, Selection, StoreInfo
from dq_lightning.packed.layouts import is_grey_or_rgb
from dq_lightning.packed.values import encode_properties
from dq_lightning.pipeline.patching import patches_of, whole_bytes
from dq_lightning.pipeline.plan import Plan
from dq_lightning.sources.items import Leaf, at, evenly_spaced, parts
from dq_lightning.sources.skipping import readable_items

MEASURED_SAMPLES = 1000


@dataclass(frozen=True)
class PatchFacts:
    """Facts about a store of patches, and sizes to compare it with; see `StoreInfo`.

    Attributes:
        patch_size: P, side of a patch in pixels.
        image_size: (height, width) of a typical image in pixels.
        keep_ratio: share of the patches that is stored.
        original_bytes: bytes of the kept samples in the original dataset.
        source_bytes: bytes of the whole original dataset.
        unpatched_bytes: bytes of the kept samples with whole images in the codec of the store.
    """

    patch_size: int
    image_size: tuple[int, int]
    keep_ratio: float
    original_bytes: int
    source_bytes: int
    unpatched_bytes: int


def measure_bytes(plan: Plan, selection: Selection, choice: PatchChoice) -> PatchFacts:
    """Measure the bytes of the kept samples and of the whole dataset as the dataset stores them, and with whole images.

    For a folder of image files the size of every file is asked from the file system. Without files, and for the whole
    images in the codec of the store, at most 1,000 samples are read and the result is scaled up.
    """
    patches, place = patches_of(plan), plan.source.image_leaf()
    kept, whole = selection.index.tolist(), len(plan.source)
    tried = [kept[place] for place in evenly_spaced(len(kept), MEASURED_SAMPLES)]
    unpatched = 0
    for position in tried:
        leaf = at(plan.source.plain(position), place)
        if is_grey_or_rgb(leaf):
            unpatched += plain_bytes(leaf, patches.codec, patches.config.quality)
        else:
            unpatched += whole_bytes(plan, position, leaf)
    return PatchFacts(
        patch_size=patches.patch_size,
        image_size=patches.image_size,
        keep_ratio=choice.keep_ratio,
        original_bytes=owner_bytes(plan, kept),
        source_bytes=owner_bytes(plan, range(whole)),
        unpatched_bytes=round(unpatched * len(kept) / max(1, len(tried))),
    )


def plain_bytes(leaf: Any, codec: str, quality: int) -> int:
    """Return the bytes of a whole image in a codec of patches, as Pillow writes it by default, and of its properties."""
    beside = len(encode_properties(leaf)) if isinstance(leaf, Image.Image) else 0
    if codec == "raw":
        return int(np.asarray(leaf).nbytes) + beside
    buffer = io.BytesIO()
    as_image(leaf).save(buffer, codec.upper(), **({} if codec == "png" else {"quality": quality}))
    return len(buffer.getvalue()) + beside


def owner_bytes(plan: Plan, positions: Sequence[int]) -> int:
    """Return the bytes of samples in the original dataset: of files, or of the images and arrays in each sample.

    Samples that cannot be read count as 0 bytes in a folder of files; otherwise they are left out of the average.
    """
    paths = [plan.source.path(position) for position in positions]
    others = [position for position, path in zip(positions, paths, strict=True) if path is None]
    total = _read_bytes(plan, others)
    for path in paths:
        with contextlib.suppress(
            OSError
        ):  # The sample of a missing file was left out as unreadable, or was never read.
            total += 0 if path is None else Path(path).stat().st_size
    return total


def _read_bytes(plan: Plan, positions: Sequence[int]) -> int:
    """Estimate the bytes of samples in the original dataset from at most 1,000 of them, without using file sizes."""
    place, sizes = plan.source.image_leaf(), []
    tried = [positions[number] for number in evenly_spaced(len(positions), MEASURED_SAMPLES)]
    for position, sample in readable_items(plan.source, tried):
        with contextlib.suppress(SourceError):
            sizes.append(whole_bytes(plan, position, at(sample, place)) + _bytes_beside(sample, place))
    return round(sum(sizes) * len(positions) / max(1, len(sizes)))


def _bytes_beside(sample: Any, place: Leaf) -> int:
    """Return the bytes of all further images, arrays and bytes of a sample, such as a second picture or a mask.

    Numbers and words, such as classes and names, do not count.
    """
    total = 0
    for leaf, value in parts(sample):
        if leaf == place:
            continue
        if isinstance(value, Image.Image):
            total += int(np.asarray(value).nbytes)
        elif isinstance(value, Tensor | np.ndarray) and value.ndim:
            total += int(value.nbytes)
        elif isinstance(value, bytes):
            total += len(value)
    return total


def describe_costs(info: StoreInfo) -> str:
    """Return one line for the log that compares the bytes of a store of patches with the sizes in `PatchFacts`."""
    compared = {
        "of the same samples as they were": info.original_bytes,
        "of the whole dataset": info.source_bytes,
        "of the same samples in this codec without dropping": info.unpatched_bytes,
    }
    if info.unpatched_bytes == info.original_bytes:
        compared.popitem()
    shares = ", ".join(f"{info.bytes / size:.1%} {of} ({size:,})" for of, size in compared.items() if size)
    return (
        f"{info.patch_keep_ratio:.1%} of the patches, {info.bytes:,} bytes on the disk, everything included: {shares}"
    )
