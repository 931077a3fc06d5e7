"""What each setting of the codecs costs and loses, measured on a few samples of a dataset."""

import io
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from dq_lightning.core.config import EncodingConfig
from dq_lightning.core.errors import ConfigError, PatchError, StoreError
from dq_lightning.core.records import StoredImage
from dq_lightning.packed.file_stream import shared_starts, write_file
from dq_lightning.packed.layouts import pixels_of
from dq_lightning.packed.values import encode_value
from dq_lightning.packed.writer import STORE_FILE, Item, write_packed
from dq_lightning.pipeline.budget import ByteSetting
from dq_lightning.pipeline.encoding import as_image, encode_leaf, encoded_items, reduced
from dq_lightning.pipeline.patch_bytes import owner_bytes
from dq_lightning.pipeline.patching import image_place
from dq_lightning.pipeline.plan import Plan
from dq_lightning.sources.items import at, evenly_spaced, plain_parts
from dq_lightning.sources.skipping import readable_items

SMALL_SIDE = 64
# Settings are compared on so many images; the bytes of the chosen one are then measured on more.
COMPARED = {"small": 96, "photo": 24}
MEASURED = {"small": 1000, "photo": 200}
# Bytes and error change steadily with the quality, so the best one is found by bisection.
QUALITIES: dict[str, Sequence[int]] = {
    "small": range(5, 97),
    "photo": (10, 15, 20, 25, 30, 40, 50, 60, 70, 75, 80, 85, 90, 95),
}
# A photo is tried at these shares of its longest side, too.
SIDE_SHARES = (0.75, 0.5)
NPY_HEADER_BYTES = 128
# Bytes of the manifest and of compact.json, without the parts of the key.
DESCRIPTION_BYTES = 4_500


class Frontier:
    """What the settings of the codecs that `config.encoding` leaves open cost and lose, measured on a few samples.

    Samples of text, and images without a known place in their sample, are stored as they are.

    Args:
        plan: plan of the run.
        room: bytes that the store may take, apart from the parts of its key.
        wanted: number of samples that are kept if they fit.
        is_fixed: whether exactly so many are kept.

    Attributes:
        settings: the settings that may be chosen: of each codec and side those that bisection looked at.
        fixed_bytes: bytes of the store that do not grow with the number of samples, without the parts of its key.

    Raises:
        ConfigError: the settings ask for a codec, and the samples are no images that it can hold.
        SourceError: a sample cannot be read.
        StoreError: a sample cannot be stored.
    """

    def __init__(self, plan: Plan, room: int, wanted: int, is_fixed: bool) -> None:
        self._wanted, self._is_fixed = wanted, is_fixed
        self._plan, self._fixed, self._size = plan, plan.config.encoding, _size_name(plan)
        kept = ByteSetting("keep", None, None, 0.0)
        sample_bytes, self.fixed_bytes, _ = _packed_bytes(plan, kept, _positions(plan, MEASURED[self._size]))
        self.settings: list[ByteSetting] = []
        if self._fixed.codec in ("auto", "keep"):
            self.settings.append(replace(kept, sample_bytes=sample_bytes))
        few = _positions(plan, COMPARED[self._size])
        self._images = _images(plan, few) if self._fixed.codec != "keep" else []
        # Bytes of a sample beside the file of its image.
        self._beside: float | None = None
        self._few, self._room, self._floor = few, room - self.fixed_bytes, self._fixed.least_psnr
        codecs = ("jpeg", "webp") if self._fixed.codec == "auto" else (self._fixed.codec,)
        for side in _sides(self._fixed, self._size, self._images):
            for codec in codecs if self._images and self._may_win(side) else ():
                self._search(codec, side)
        if not self.settings:
            raise ConfigError(
                f"encoding.codec={self._fixed.codec!r} encodes 8-bit grey or RGB images, and {plan.source.describe()} has "
                "none: leave it out"
            )

    def _may_win(self, side: int | None) -> bool:
        """Whether images of a smaller side can reach the floor, and more than what all samples fit with already."""
        fitting = [one.psnr for one in self.settings if one.sample_bytes * self._wanted <= self._room]
        if side is None or self._fixed.longest_side is not None:
            return True
        errors = [_error(pixels_of(leaf)[2], reduced(as_image(leaf), side)) for leaf, _ in self._images]
        return _psnr(float(np.mean(errors))) > max(self._floor, *fitting, 0.0)

    def _search(self, codec: str, side: int | None) -> None:
        """Measure the coarsest quality above the floor and the finest that all samples fit with."""
        qualities = QUALITIES[self._size] if self._fixed.quality is None else (self._fixed.quality,)

        @cache
        def at(number: int) -> ByteSetting:
            self.settings.append(self._measured(ByteSetting(codec, qualities[number], side, 0.0)))
            return self.settings[-1]

        numbers = range(len(qualities))
        low = bisect_left(numbers, True, hi=len(numbers) - 1, key=lambda number: at(number).psnr >= self._floor)
        at(min(low + 1, len(numbers) - 1))  # in place of the lowest, should it miss the floor on more images
        if at(low).sample_bytes * self._wanted <= self._room:
            bisect_left(numbers, True, lo=low, key=lambda number: at(number).sample_bytes * self._wanted > self._room)
        elif self._is_fixed:
            # Fixed samples are kept even below the floor.
            bisect_left(numbers, True, hi=low, key=lambda number: at(number).sample_bytes * self._wanted > self._room)
            at(0)

    def _measured(self, setting: ByteSetting) -> ByteSetting:
        files = [encode_leaf(leaf, own, setting) for leaf, own in self._images]
        sizes, errors = _sizes_and_errors(self._images, files)
        if self._beside is None:
            self._beside = _packed_bytes(self._plan, setting, self._few)[0] - float(np.mean(sizes))
        return replace(setting, sample_bytes=self._beside + float(np.mean(sizes)), psnr=_psnr(float(np.mean(errors))))


def measure_again(plan: Plan, setting: ByteSetting) -> ByteSetting:
    """Return a setting measured on more samples.

    The bytes are two standard errors more than their mean, because a store that is too large is packed twice; the
    squared error is one standard error more.
    """
    few = _positions(plan, MEASURED[_size_name(plan)])
    mean, _, items = _packed_bytes(plan, setting, few)
    if setting.codec == "keep":
        return replace(setting, sample_bytes=mean)
    leaves = [at(sample, image_place(plan)) for sample, _ in items]
    sizes, errors = _sizes_and_errors(_images(plan, few), [one for one in leaves if isinstance(one, StoredImage)])
    share = math.sqrt(1 - len(few) / len(plan.candidates)) / math.sqrt(len(sizes))
    error = float(np.mean(errors) + np.std(errors) * share)
    return replace(setting, sample_bytes=mean + 2 * float(np.std(sizes)) * share, psnr=_psnr(error))


def source_bytes(plan: Plan) -> int:
    """Return the bytes of the whole dataset: of its files, encoded images or raw pixels, or of its rows of text.

    Without files they are estimated from at most 1,000 samples.
    """
    total = len(plan.source)
    if _has_images(plan):
        return owner_bytes(plan, range(total))
    sizes = [
        len(encode_value(plain_parts(sample)))
        for _, sample in readable_items(plan.source, list(evenly_spaced(total, MEASURED["small"])))
    ]
    return round(sum(sizes) * total / max(1, len(sizes)))


def _has_images(plan: Plan) -> bool:
    if plan.source.modality != "image":
        return False
    try:
        image_place(plan)
    except PatchError:
        return False
    return True


def _size_name(plan: Plan) -> str:
    if not _has_images(plan):
        return "small"
    for _, sample in readable_items(plan.source, _positions(plan, 1)):
        leaf = at(plain_parts(sample), image_place(plan))
        shape = leaf.size if isinstance(leaf, Image.Image) else tuple(leaf.shape)
        return "small" if sorted(shape)[-1] <= SMALL_SIDE else "photo"
    return "small"


def _positions(plan: Plan, count: int) -> list[int]:
    candidates = plan.candidates
    return [int(candidates[number]) for number in evenly_spaced(len(candidates), count)]


def _images(plan: Plan, positions: Sequence[int]) -> list[tuple[Any, Any]]:
    """Return those images that a codec can hold, with their own files."""
    found: list[tuple[Any, Any]] = []
    if not _has_images(plan):
        return found
    for position, sample in readable_items(plan.source, positions):
        leaf = at(plain_parts(sample), image_place(plan))
        try:
            pixels_of(leaf)
        except StoreError:
            continue
        found.append((leaf, plan.source.encoded(position)))
    return found


def _sides(fixed: EncodingConfig, size: str, found: Sequence[tuple[Any, Any]]) -> list[int | None]:
    """Return the longest sides that are tried; None keeps every size."""
    if fixed.longest_side is not None or size != "photo" or not found:
        return [fixed.longest_side]
    longest = sorted(max(pixels_of(leaf)[2].shape[:2]) for leaf, _ in found)[len(found) // 2]
    return [None, *(round(share * longest) for share in SIDE_SHARES)]


def _sizes_and_errors(
    found: Sequence[tuple[Any, Any]], files: Sequence[StoredImage | None]
) -> tuple[list[int], list[float]]:
    """Return the stored bytes of each file, and its mean squared error on the scale of 0 to 255."""
    kept = [(leaf, file) for (leaf, _), file in zip(found, files, strict=True) if file is not None]
    errors = []
    for leaf, file in kept:
        with Image.open(io.BytesIO(file.data)) as opened:
            errors.append(_error(pixels_of(leaf)[2], opened))
    return _sizes([file for _, file in kept]), errors


def _error(pixels: Any, image: Image.Image) -> float:
    """Return the mean squared error of an image against pixels [H, W, C], after scaling it to their size."""
    image = image.convert("RGB" if pixels.shape[2] == 3 else "L")
    if image.size != (pixels.shape[1], pixels.shape[0]):
        image = image.resize((pixels.shape[1], pixels.shape[0]), Image.Resampling.BICUBIC)
    difference = np.asarray(image, np.float32).reshape(pixels.shape) - pixels
    return float(np.mean(difference * difference))


def _psnr(error: float) -> float:
    return 10 * math.log10(255**2 / error) if error else math.inf


def _sizes(files: Sequence[StoredImage]) -> list[int]:
    starts = shared_starts(files[:64])
    sizes = [len(write_file(file, starts)) for file in files]
    # Each file in the store is preceded by its length.
    return [size + (1 if size < 128 else 2 if size < 1 << 14 else 3) for size in sizes]


def _packed_bytes(plan: Plan, setting: ByteSetting, positions: Sequence[int]) -> tuple[float, int, list[Item]]:
    """Pack a few samples; return the mean bytes of one, the bytes that any number of them takes, and the samples."""
    readable = [position for position, _ in readable_items(plan.source, positions)]
    items: list[Item] = list(encoded_items(plan, setting, torch.tensor(readable, dtype=torch.int64)))
    with TemporaryDirectory(prefix="dq_lightning-", ignore_cleanup_errors=True) as folder:
        write_packed(
            Path(folder),
            items,
            ids=[plan.source.sample_id(position) for position in readable],
            index=torch.tensor(readable, dtype=torch.int64),
            bins=torch.zeros(len(readable), dtype=torch.int16),
            attributes={"source": plan.source.describe()},
            squeeze=True,
        )
        sizes = {path.name: path.stat().st_size for path in Path(folder).iterdir()}
    fixed = sizes[STORE_FILE] + NPY_HEADER_BYTES * sum(name.endswith(".npy") for name in sizes)
    return (sum(sizes.values()) - fixed) / max(1, len(readable)), fixed + DESCRIPTION_BYTES, items
