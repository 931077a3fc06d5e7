"""What each setting of the codecs costs and loses, measured on a few samples of a dataset."""

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
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
from dq_lightning.pipeline.encoding import encode_leaf, encoded_items
from dq_lightning.pipeline.patch_bytes import owner_bytes
from dq_lightning.pipeline.patching import image_place
from dq_lightning.pipeline.plan import Plan
from dq_lightning.sources.items import at, evenly_spaced, plain_parts
from dq_lightning.sources.skipping import readable_items

SMALL_SIDE = 64
# Settings are compared on so many images; the bytes of the chosen one are then measured on more.
COMPARED = {"small": 128, "photo": 24}
MEASURED = {"small": 1000, "photo": 200}
QUALITIES = {
    ("jpeg", "small"): (10, 15, 20, 25, 30, 40, 50, 60, 70, 75, 80, 85, 90, 95),
    ("webp", "small"): (5, 10, 20, 30, 40, 50, 60, 70, 75, 80, 90),
    ("jpeg", "photo"): (10, 20, 30, 50, 75, 90),
    ("webp", "photo"): (10, 30, 50, 75, 90),
}
# Between two qualities, the chosen one's neighbours, so many parts are tried.
FINER_PARTS = 4
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

    Attributes:
        settings: the settings that may be chosen.
        fixed_bytes: bytes of the store that do not grow with the number of samples, without the parts of its key.

    Raises:
        ConfigError: the settings ask for a codec, and the samples are no images that it can hold.
        SourceError: a sample cannot be read.
        StoreError: a sample cannot be stored.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, self._fixed, self._size = plan, plan.config.encoding, _size_name(plan)
        kept = ByteSetting("keep", None, None, 0.0)
        sample_bytes, self.fixed_bytes = _packed_bytes(plan, kept, _positions(plan, MEASURED[self._size]))
        self.settings: list[ByteSetting] = []
        if self._fixed.codec in ("auto", "keep"):
            self.settings.append(replace(kept, sample_bytes=sample_bytes))
        few = _positions(plan, COMPARED[self._size])
        self._images = _images(plan, few) if self._fixed.codec != "keep" else []
        # Bytes of a sample beside the file of its image.
        self._beside = 0.0
        if self._images:
            tried = _candidates(self._fixed, self._size, self._images)
            self._beside = _packed_bytes(plan, tried[0], few)[0] - self._costs(tried[0])[0]
            self.settings += map(self._measured, tried)
        if not self.settings:
            raise ConfigError(
                f"encoding.codec={self._fixed.codec!r} encodes 8-bit grey or RGB images, and {plan.source.describe()} has "
                "none: leave it out"
            )

    def add_finer(self, setting: ByteSetting) -> None:
        """Measure qualities between a setting and its neighbours, and add them to the settings."""
        if setting.codec == "keep" or self._fixed.quality is not None:
            return
        kind = (setting.codec, setting.longest_side)
        known = sorted(
            one.quality for one in self.settings if (one.codec, one.longest_side) == kind and one.quality is not None
        )
        at = known.index(setting.quality or 0)
        for low, high in itertools.pairwise(known[max(0, at - 1) : at + 2]):
            between = {low + (high - low) * part // FINER_PARTS for part in range(1, FINER_PARTS)} - {low, high}
            self.settings += [self._measured(replace(setting, quality=quality)) for quality in sorted(between)]

    def _measured(self, setting: ByteSetting) -> ByteSetting:
        size, psnr = self._costs(setting)
        return replace(setting, sample_bytes=self._beside + size, psnr=psnr)

    def _costs(self, setting: ByteSetting) -> tuple[float, float]:
        return _sizes_and_error(self._images, [encode_leaf(leaf, own, setting) for leaf, own in self._images])


def measure_again(plan: Plan, setting: ByteSetting) -> ByteSetting:
    """Return a setting with its bytes measured on more samples, and one standard error more than their mean."""
    few = _positions(plan, MEASURED[_size_name(plan)])
    mean, _ = _packed_bytes(plan, setting, few)
    found = _images(plan, few) if setting.codec != "keep" else []
    spread = 0.0
    if len(found) > 1 and len(few) < len(plan.candidates):
        sizes = _sizes([file for leaf, own in found if (file := encode_leaf(leaf, own, setting)) is not None])
        spread = float(np.std(sizes)) / math.sqrt(len(sizes))
    return replace(setting, sample_bytes=mean + spread)


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


def _candidates(fixed: EncodingConfig, size: str, found: Sequence[tuple[Any, Any]]) -> list[ByteSetting]:
    codecs = ("jpeg", "webp") if fixed.codec == "auto" else (fixed.codec,)
    sides = [fixed.longest_side]
    if fixed.longest_side is None and size == "photo":
        longest = sorted(max(pixels_of(leaf)[2].shape[:2]) for leaf, _ in found)[len(found) // 2]
        sides += [round(share * longest) for share in SIDE_SHARES]
    return [
        ByteSetting(codec, quality, side, 0.0)
        for side in sides
        for codec in codecs
        for quality in ((fixed.quality,) if fixed.quality is not None else QUALITIES[codec, size])
    ]


def _sizes_and_error(found: Sequence[tuple[Any, Any]], files: Sequence[StoredImage | None]) -> tuple[float, float]:
    """Return the mean stored bytes of files, and the peak signal-to-noise ratio of their mean squared error, in dB."""
    errors, kept = [], []
    for (leaf, _), file in zip(found, files, strict=True):
        if file is None:
            continue
        kept.append(file)
        pixels = pixels_of(leaf)[2]
        with Image.open(io.BytesIO(file.data)) as opened:
            image = opened.convert("RGB" if pixels.shape[2] == 3 else "L")
        if image.size != (pixels.shape[1], pixels.shape[0]):
            image = image.resize((pixels.shape[1], pixels.shape[0]), Image.Resampling.BICUBIC)
        difference = np.asarray(image, np.float32).reshape(pixels.shape) - pixels
        errors.append(float(np.mean(difference * difference)))
    error = float(np.mean(errors))
    return float(np.mean(_sizes(kept))), 10 * math.log10(255**2 / error) if error else math.inf


def _sizes(files: Sequence[StoredImage]) -> list[int]:
    starts = shared_starts(files[:64])
    sizes = [len(write_file(file, starts)) for file in files]
    # Each file in the store is preceded by its length.
    return [size + (1 if size < 128 else 2 if size < 1 << 14 else 3) for size in sizes]


def _packed_bytes(plan: Plan, setting: ByteSetting, positions: Sequence[int]) -> tuple[float, int]:
    """Pack a few samples, and return the mean bytes of one, and the bytes that any number of samples takes."""
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
    return (sum(sizes.values()) - fixed) / max(1, len(readable)), fixed + DESCRIPTION_BYTES
