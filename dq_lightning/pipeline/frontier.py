"""What each setting of the codecs costs and loses, measured on a few samples of a dataset."""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from itertools import compress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from dq_lightning.core.arrays import as_image
from dq_lightning.core.config import EncodingConfig, PatchConfig
from dq_lightning.core.errors import ConfigError, StoreError
from dq_lightning.core.records import EncodedImage, PatchedImage, StoredImage
from dq_lightning.packed.file_stream import shared_starts, write_file
from dq_lightning.packed.layouts import pixels_of
from dq_lightning.packed.values import encode_value
from dq_lightning.packed.whole_images import decode_file
from dq_lightning.packed.writer import LOOK_AHEAD_SAMPLES, STORE_FILE, Item, write_packed
from dq_lightning.pipeline.budget import JPEG_BONUS, ByteSetting, told_setting
from dq_lightning.pipeline.encoding import (
    encode_items,
    encode_leaf,
    encoded_items,
    has_images,
    holds_places,
    read_item,
    reduced,
)
from dq_lightning.pipeline.patch_bytes import owner_bytes
from dq_lightning.pipeline.patch_frontier import PatchTrial
from dq_lightning.pipeline.patch_plan import PatchPlan, make_patch_plan
from dq_lightning.pipeline.plan import Plan
from dq_lightning.sources.items import at, evenly_spaced, plain_parts
from dq_lightning.sources.skipping import readable_items

SMALL_SIDE = 64
# The sizes of so many images say whether the set holds photos. Some images of such a set may be small.
SIZED = 16
# Settings are compared on so many images; the bytes of the chosen one are then measured on more.
COMPARED = {"small": 96, "photo": 24}
MEASURED = {"small": 1000, "photo": 200}
# Of samples without an image, whose bytes differ much more, so many are measured one by one.
MEASURED_ROWS = 100_000
# Of photos up to this many pixels are measured, and at least the number above.
MEASURED_PIXELS = 40_000_000
# Bytes and error change steadily with the quality, so the best one is found by bisection.
QUALITIES: dict[str, Sequence[int]] = {
    "small": range(5, 97),
    # Qualities between these are measured where they may be chosen.
    "photo": (10, 20, 30, 40, 50, 60, 70, 80, 86, 91, 95),
}
# In so many samples places in the image are looked for.
PLACES_LOOKED_FOR = 4
# A photo is tried at these shares of its longest side, too.
SIDE_SHARES = (0.75, 0.5)
NPY_HEADER_BYTES = 128
# About one in so many samples is kept where positions matter.
MEAN_GAP = 8
# The share of dropped patches whose cost is told where no drop ratio is given, and the number of images it is measured on.
TRIED_DROP_RATIO, TRIED_IMAGES = 0.2, 48
# Bytes of the manifest and of compact.json, without the parts of the key.
DESCRIPTION_BYTES = 4_500


# Codec, quality and longest side.
_How = tuple[str, int | None, int | None]


class Frontier:
    """What the settings of the codecs that `config.encoding` leaves open cost and lose, measured on a few samples.

    Samples of text, and images without a known place in their sample, are stored as they are. A plan that drops patches
    is measured with its own share of them dropped, and the errors are those of the kept pixels.

    Args:
        plan: plan of the run.
        room: bytes that the store may take, apart from the parts of its key.
        wanted: number of samples that are kept if they fit.
        is_fixed: whether exactly so many are kept.
        device: device that a classifier runs on, if patches are dropped by one.
        sizes: what `sizes_without_images` gives.

    Attributes:
        settings: the settings that may be chosen: of each codec and side those that bisection looked at.
        fixed_bytes: bytes of the store that do not grow with the number of samples, without the parts of its key.

    Raises:
        ConfigError: the settings ask for a codec, and the samples are no images that it can hold.
        SourceError: a sample cannot be read.
        StoreError: a sample cannot be stored.
    """

    def __init__(
        self,
        plan: Plan,
        room: int,
        wanted: int,
        is_fixed: bool,
        device: str,
        sizes: Mapping[int, int] | None = None,
    ) -> None:
        self._sizes = sizes
        self._wanted, self._is_fixed, self._device = wanted, is_fixed, device
        self._plan, self._fixed, self._size = plan, plan.config.encoding, _size_name(plan)
        self._room, self._floor = float(room), self._fixed.least_psnr
        self._few = _readable(plan, COMPARED[self._size])
        # Those of the few samples that a codec can hold: image, own file, pixels uint8 [H, W, C].
        self._images: list[tuple[Any, EncodedImage | None]] = []
        self._pixels: list[Any] = []
        # For each setting that was applied to many samples, these and their bytes, by position.
        self._packed: dict[_How, dict[int, Item]] = {}
        self._bytes: dict[_How, dict[int, float]] = {}
        self.settings: list[ByteSetting] = []
        self.fixed_bytes = 0
        # Bytes of a sample beside the file of its image.
        self._beside: float | None = None
        # What gives a setting its bytes and its error on the few samples.
        self._measure: Callable[[ByteSetting], ByteSetting] = self._measured
        if plan.patches is None:
            self._measure_whole()
        else:
            self._measure_patches(plan.patches)

    def _measure_whole(self) -> None:
        plan = self._plan
        kept = ByteSetting("keep", None, None, 0.0)
        sample_bytes, self.fixed_bytes = _packed_bytes(plan, self._many, encode_items(plan, kept, self._read_many()))
        self._room -= self.fixed_bytes
        if self._fixed.codec in ("auto", "keep"):
            self.settings.append(replace(kept, sample_bytes=sample_bytes))
        self._images = _images(plan, self._few) if self._fixed.codec != "keep" else []
        self._pixels = [pixels_of(leaf)[2] for leaf, _ in self._images]
        codecs = ("jpeg", "webp") if self._fixed.codec == "auto" else (self._fixed.codec,)
        scales = self._fixed.longest_side is None and not any(
            holds_places(plain_parts(plan.source.plain(i)), plan.source.image_leaf())
            for i in (self._few[:PLACES_LOOKED_FOR] if self._images else ())
        )
        for side in _sides(self._fixed, self._size, self._images) if scales else [self._fixed.longest_side]:
            for codec in codecs if self._images and self._may_win(side) else ():
                self._search(ByteSetting(codec, None, side, 0.0))
        if not self.settings:
            raise ConfigError(
                f"encoding.codec={self._fixed.codec!r} encodes 8-bit grey or RGB images, and {plan.source.describe()} has "
                "none: leave it out"
            )

    def _measure_patches(self, patches: PatchPlan) -> None:
        trial, ratio = PatchTrial(self._plan, self._few, self._device), patches.config.drop_ratio
        self._measure = partial(self._patched, trial)
        lossless = ("raw",) if self._size == "small" else ("png",)
        codecs: tuple[str, ...] = (self._fixed.codec,)
        if patches.config.codec != "auto":
            codecs = (patches.config.codec,)
        elif self._fixed.codec in ("auto", "keep"):
            codecs = lossless if self._fixed.codec == "keep" else (*lossless, "jpeg", "webp")
        for codec in codecs:
            one = ByteSetting(codec, None, None, 0.0, drop_ratio=ratio)
            if codec in ("raw", "png"):
                self.settings.append(self._patched(trial, one))
            else:
                self._search(one)

    def with_dropped_patches(self, chosen: ByteSetting) -> str:
        """Return a sentence on what dropping a fifth of the patches would give in place of a chosen setting.

        The patches of least variance are dropped on trial, and the error is that after harmonic filling. Samples that
        are stored as they are, or with dropped patches already, give an empty text.

        Args:
            chosen: setting that was chosen.
        """
        if self._plan.patches is not None or chosen.codec == "keep" or chosen.longest_side is not None:
            return ""
        if self._size == "small" and self._fixed.codec == "auto":
            # Patches of a few pixels are no blocks of a JPEG.
            fine = [one for one in self.settings if one.codec == "webp" and one.psnr >= min(self._floor, chosen.psnr)]
            chosen = max(fine, key=lambda one: (self._count(one), one.psnr), default=chosen)
        height, width = pixels_of(self._images[0][0])[2].shape[:2]
        size = self._plan.config.patches.patch_size
        config = PatchConfig(TRIED_DROP_RATIO, patch_size=size, saliency="variance", reconstruct="off")
        dull = replace(self._plan, patches=make_patch_plan(config, (height, width)))
        trial = PatchTrial(dull, self._few[:TRIED_IMAGES], self._device, fills=True)
        open_, quality = self._fixed.quality is None, chosen.quality
        finer = [other for other in QUALITIES[self._size] if quality is not None and other > quality] if open_ else []

        @cache
        def at(number: int) -> tuple[ByteSetting, list[Item]]:
            one = replace(chosen, quality=[quality, *finer][number], drop_ratio=TRIED_DROP_RATIO, own_share=0.0)
            items = trial.items(one)
            return replace(one, sample_bytes=_packed_bytes(dull, trial.positions, items)[0]), items

        most, first = self._count(at(0)[0]), 1
        if most == self._wanted:
            first = bisect_left(
                range(1 + len(finer)), True, lo=1, key=lambda number: at(number)[0].sample_bytes * most > self._room
            )
        told, items = at(first - 1)
        told = replace(told, psnr=_mean_psnr(trial.errors(items)))
        return (
            f"; dropping a fifth of the patches too, the dullest, would give {told_setting(told, most)[:-1]} after filling); "
            "drop_ratio=0.2 does so by a classifier, in one more pass over the images"
        )

    def adjust(self, at: int, known: Collection[int]) -> None:
        """Measure a setting on more samples, and correct what is known of other qualities of its codec and side.

        Args:
            at: number of the setting in `settings`.
            known: numbers of the settings that were measured on more samples already.
        """
        old, new = self.settings[at], self.measure_again(self.settings[at])
        self.settings[at] = new
        if new.quality is None:
            return
        ratio = new.sample_bytes / old.sample_bytes
        gain = new.psnr - old.psnr if math.isfinite(old.psnr) and math.isfinite(new.psnr) else 0.0
        for number, other in enumerate(self.settings):
            if other.family == new.family and number != at and number not in known:
                self.settings[number] = replace(other, sample_bytes=other.sample_bytes * ratio, psnr=other.psnr + gain)

        def is_too_large(setting: ByteSetting) -> bool:
            return setting.sample_bytes * self._wanted > self._room

        def measure(quality: int) -> ByteSetting:
            made = self._add(replace(new, quality=quality))
            self.settings[-1] = replace(made, sample_bytes=made.sample_bytes * ratio, psnr=made.psnr + gain)
            return self.settings[-1]

        own = [(one.quality or 0, one) for one in self.settings if one.family == new.family]
        if self._is_fixed or (not is_too_large(new) and new.psnr >= self._floor):
            # Finer images may fit after all, or only coarser ones.
            too_fine = min((quality for quality, one in own if is_too_large(one)), default=0)
            fitting = max((quality for quality, one in own if not is_too_large(one)), default=too_fine)
            bisect_left(range(fitting + 1, too_fine), True, key=lambda quality: is_too_large(measure(quality)))
            return
        # Coarser images may reach the floor, or only finer ones.
        fine = min((quality for quality, one in own if one.psnr >= self._floor), default=0)
        coarse = max((quality for quality, one in own if one.psnr < self._floor and quality < fine), default=fine)
        bisect_left(range(coarse + 1, fine), True, key=lambda quality: measure(quality).psnr >= self._floor)

    def measure_again(self, setting: ByteSetting) -> ByteSetting:
        """Return a setting measured on more samples.

        The bytes are two standard errors more than their mean, because a store that is too large is packed twice; the
        squared error is one standard error more. Where all samples are measured, both are exact.
        """
        plan, many = self._plan, self._many
        if plan.patches is None:
            if setting.codec == "keep":
                mean, _ = _packed_bytes(plan, many, encode_items(plan, setting, self._read_many()))
                if self._sizes is not None and all(i in self._sizes for i in plan.candidates.tolist()):
                    # Together they take less than one by one.
                    share = mean * len(many) / max(1, sum(self._sizes[i] for i in many))
                    self._bytes[_how(setting)] = known = {i: self._sizes[i] * share for i in plan.candidates.tolist()}
                    mean = math.fsum(known.values()) / len(known)
                return replace(setting, sample_bytes=mean)
            items, files, errors = self._encoded_many(setting)
            encoded = (isinstance(at(sample, plan.source.image_leaf()), StoredImage) for sample, _ in items)
            self._packed[_how(setting)] = dict(compress(zip(many, items, strict=True), encoded))
            mean, _ = _packed_bytes(plan, many, items)
            of_files = iter(_stored_sizes([file for file, _ in files]))
            # Images that the codec cannot hold stay as they are, and take more than the others.
            leaves = [at(sample, plan.source.image_leaf()) for sample, _ in items]
            sizes = [next(of_files) if isinstance(one, StoredImage) else len(encode_value(one)) for one in leaves]
            if len(many) == len(plan.candidates):
                beside = mean - float(np.mean(sizes))
                self._bytes[_how(setting)] = {i: size + beside for i, size in zip(many, sizes, strict=True)}
            setting = replace(setting, own_share=sum(is_own for _, is_own in files) / max(1, len(files)))
        else:
            items = self._many_patched.items(setting)
            mean, _ = _packed_bytes(plan, many, items)
            images = [at(sample, plan.source.image_leaf()) for sample, _ in items]
            sizes = [len(one.data) for one in images if isinstance(one, PatchedImage)]
            errors = self._many_patched.errors(items)
        share = math.sqrt(1 - len(many) / len(plan.candidates)) / math.sqrt(max(1, len(sizes)))
        error = float(np.mean(errors) + np.std(errors) * share) if errors else 0.0
        return replace(setting, sample_bytes=mean + 2 * float(np.std(sizes)) * share, psnr=_psnr(error))

    def packed(self, setting: ByteSetting) -> Mapping[int, Item]:
        """Return the samples, by position, that a setting was applied to by `measure_again`."""
        return self._packed.get(_how(setting), {})

    def bytes_of(self, setting: ByteSetting) -> Mapping[int, float]:
        """Return the bytes of every sample, by position, where all of them were measured; else nothing."""
        return self._bytes.get(_how(setting), {})

    def _encoded_many(self, setting: ByteSetting) -> tuple[list[Item], list[tuple[StoredImage, bool]], list[float]]:
        """Apply a setting to the many samples.

        Returns:
            The samples; the new files of those images that the codec can hold, and whether each is the dataset's own; and
            the mean squared error of each.
        """
        place, waiting = self._plan.source.image_leaf(), deque[Item]()

        def noted() -> Iterator[Item]:
            for item in self._read_many():
                waiting.append(item)
                yield item

        items, files, errors = list[Item](), list[tuple[StoredImage, bool]](), list[float]()
        for item in encode_items(self._plan, setting, noted()):
            (plain, own), file = waiting.popleft(), at(item[0], place)
            items.append(item)
            if isinstance(file, StoredImage):
                files.append((file, own is not None and own.data == file.data))
                errors.append(_error(pixels_of(at(plain, place))[2], decode_file(file)))
        return items, files, errors

    @cached_property
    def _many(self) -> list[int]:
        """Positions of the samples that the chosen setting is measured on."""
        if self._size == "small":
            return list(self._many_small)
        return _readable(self._plan, self._number_measured())

    @cached_property
    def _many_small(self) -> dict[int, Item]:
        plan = self._plan
        wanted = _positions(plan, self._number_measured())
        return {i: (plain_parts(sample), plan.source.encoded(i)) for i, sample in readable_items(plan.source, wanted)}

    def _read_many(self) -> Iterable[Item]:
        """Return the samples that the chosen setting is measured on; photos are read whenever they are needed."""
        if self._size == "small":
            return self._many_small.values()
        return (read_item(self._plan, position) for position in self._many)

    @cached_property
    def _many_patched(self) -> PatchTrial:
        return PatchTrial(self._plan, self._many, self._device)

    def _number_measured(self) -> int:
        """Return how many samples the chosen setting is measured on: more of small photos than of large ones."""
        if self._size == "small" or not self._few:
            return MEASURED[self._size]
        leaf = at(plain_parts(self._plan.source.plain(self._few[0])), self._plan.source.image_leaf())
        shape = leaf.size if isinstance(leaf, Image.Image) else tuple(leaf.shape)
        return min(MEASURED["small"], max(MEASURED["photo"], MEASURED_PIXELS // max(1, int(math.prod(shape)))))

    def _patched(self, trial: PatchTrial, setting: ByteSetting) -> ByteSetting:
        items = trial.items(setting)
        sample_bytes, fixed = _packed_bytes(trial.plan, trial.positions, items)
        if not self.fixed_bytes:
            self.fixed_bytes = fixed
            self._room -= fixed
        return replace(setting, sample_bytes=sample_bytes, psnr=_mean_psnr(trial.errors(items)))

    def _may_win(self, side: int | None) -> bool:
        """Whether images of a smaller side can reach the floor, and more than what all samples fit with already."""
        fitting = [one.merit for one in self.settings if one.sample_bytes * self._wanted <= self._room]
        if side is None or self._fixed.longest_side is not None:
            return True
        errors = [_error(pixels_of(leaf)[2], reduced(as_image(leaf), side)) for leaf, _ in self._images]
        psnr = _psnr(float(np.mean(errors)))
        return psnr > self._floor and psnr + JPEG_BONUS > max(fitting, default=0.0)

    def _search(self, one: ByteSetting) -> None:
        """Measure the coarsest quality above the floor and the finest that all samples fit with.

        Args:
            one: a setting whose quality is to be found.
        """
        qualities: Sequence[int] = QUALITIES[self._size]
        patches = self._plan.config.patches
        if self._fixed.quality is not None or (one.drop_ratio and patches.codec != "auto"):
            qualities = (patches.quality if self._fixed.quality is None else self._fixed.quality,)

        @cache
        def at(number: int) -> ByteSetting:
            return self._add(replace(one, quality=qualities[number]))

        def too_large(number: int) -> bool:
            return at(number).sample_bytes * self._wanted > self._room

        numbers = range(len(qualities))
        finest = -1 if too_large(0) else bisect_left(numbers, True, lo=1, key=too_large) - 1
        if finest >= 0 and at(finest).psnr >= self._floor:
            at(max(0, finest - 1))  # in its place, should it be too large on more images
            between = range(qualities[finest], qualities[min(finest + 1, len(qualities) - 1)])[1:]
            self._between(one, between, lambda made: made.sample_bytes * self._wanted > self._room)
            return
        # Not all samples fit above the floor. If their number is fixed, they are kept below it.
        low = bisect_left(numbers, True, hi=len(numbers) - 1, key=lambda number: at(number).psnr >= self._floor)
        at(min(low + 1, len(numbers) - 1))  # in its place, should it miss the floor on more images
        between = range(qualities[max(0, low - 1)], qualities[low])[1:]
        self._between(one, between, lambda made: made.psnr >= self._floor)

    def _between(self, one: ByteSetting, qualities: range, is_beyond: Callable[[ByteSetting], bool]) -> None:
        """Measure qualities between two of the table, if their codec and side may be what is chosen."""

        def best(settings: Sequence[ByteSetting]) -> tuple[int, float]:
            fine = (setting for setting in settings if setting.psnr >= self._floor)
            return max(((self._count(setting), setting.merit) for setting in fine), default=(0, 0.0))

        own = [other for other in self.settings if other.family == one.family]
        if best(own) >= best([other for other in self.settings if other.family != one.family]):
            bisect_left(qualities, True, key=lambda quality: is_beyond(self._add(replace(one, quality=quality))))

    def _add(self, setting: ByteSetting) -> ByteSetting:
        """Measure a setting on the few samples, and add it to the settings."""
        self.settings.append(self._measure(setting))
        return self.settings[-1]

    def _count(self, setting: ByteSetting) -> int:
        return min(self._wanted, math.floor(self._room / setting.sample_bytes))

    def _measured(self, setting: ByteSetting) -> ByteSetting:
        files = [file for leaf, own in self._images if (file := encode_leaf(leaf, own, setting)) is not None]
        errors = [_error(pixels, decode_file(file)) for pixels, file in zip(self._pixels, files, strict=True)]
        is_own = [own is not None and own.data == file.data for (_, own), file in zip(self._images, files, strict=True)]
        sizes, own_share = _stored_sizes(files), sum(is_own) / len(files)
        if self._beside is None:
            packed, _ = _packed_bytes(
                self._plan, self._few, encoded_items(self._plan, setting, torch.tensor(self._few))
            )
            self._beside = packed - float(np.mean(sizes))
        sample_bytes = self._beside + float(np.mean(sizes))
        return replace(setting, sample_bytes=sample_bytes, psnr=_mean_psnr(errors), own_share=own_share)


def source_bytes(plan: Plan, sizes: Mapping[int, int] | None) -> int:
    """Return the bytes of the whole dataset: of its files, encoded images or raw pixels, or of its rows or other samples.

    Args:
        plan: plan of the run.
        sizes: what `sizes_without_images` gives.
    """
    total = len(plan.source)
    return owner_bytes(plan, range(total)) if sizes is None else round(sum(sizes.values()) * total / max(1, len(sizes)))


def sizes_without_images(plan: Plan) -> dict[int, int] | None:
    """Return the bytes of each sample, by position, where samples hold no image, such as rows of text; else None.

    Of more than 100,000 samples only so many are read.
    """
    if has_images(plan):
        return None
    read = readable_items(plan.source, evenly_spaced(len(plan.source), MEASURED_ROWS))
    return {position: len(encode_value(plain_parts(sample))) for position, sample in read}


def _size_name(plan: Plan) -> str:
    if not has_images(plan):
        return "small"
    for _, sample in readable_items(plan.source, _positions(plan, SIZED)):
        leaf = at(plain_parts(sample), plan.source.image_leaf())
        shape = leaf.size if isinstance(leaf, Image.Image) else tuple(leaf.shape)
        if max(shape) > SMALL_SIDE:
            return "photo"
    return "small"


def _positions(plan: Plan, count: int) -> list[int]:
    candidates = plan.candidates
    return [int(candidates[number]) for number in evenly_spaced(len(candidates), count)]


def _images(plan: Plan, positions: Sequence[int]) -> list[tuple[Any, EncodedImage | None]]:
    """Return those images that a codec can hold, with their own files."""
    found: list[tuple[Any, EncodedImage | None]] = []
    if not has_images(plan):
        return found
    for position, sample in readable_items(plan.source, positions):
        leaf = at(plain_parts(sample), plan.source.image_leaf())
        try:
            pixels_of(leaf)
        except StoreError:
            continue
        found.append((leaf, plan.source.encoded(position)))
    return found


def _sides(fixed: EncodingConfig, size: str, found: Sequence[tuple[Any, EncodedImage | None]]) -> list[int | None]:
    """Return the longest sides that are tried; None keeps every size."""
    if fixed.longest_side is not None or size != "photo" or not found:
        return [fixed.longest_side]
    longest = sorted(max(pixels_of(leaf)[2].shape[:2]) for leaf, _ in found)[len(found) // 2]
    return [None, *(round(share * longest) for share in SIDE_SHARES)]


def _how(setting: ByteSetting) -> _How:
    """Return what a setting does to an image."""
    return setting.codec, setting.quality, setting.longest_side


def _stored_sizes(files: Sequence[StoredImage]) -> list[int]:
    """Return the bytes that each file takes in a store."""
    starts = shared_starts(files[:LOOK_AHEAD_SAMPLES])
    sizes = [len(write_file(file, starts)) for file in files]
    # Each file in the store is preceded by its length.
    return [size + (1 if size < 128 else 2 if size < 1 << 14 else 3) for size in sizes]


def _error(pixels: Any, image: Image.Image) -> float:
    """Return the mean squared error, from 0 to 255, of an image against pixels [H, W, C], after scaling it to their size."""
    mode = "RGB" if pixels.shape[2] == 3 else "L"
    image = image if image.mode == mode else image.convert(mode)
    if image.size != (pixels.shape[1], pixels.shape[0]):
        image = image.resize((pixels.shape[1], pixels.shape[0]), Image.Resampling.BICUBIC)
    difference = np.asarray(image, np.float32).reshape(pixels.shape) - pixels
    return float(np.mean(difference * difference))


def _psnr(error: float) -> float:
    return 10 * math.log10(255**2 / error) if error else math.inf


def _mean_psnr(errors: Sequence[float]) -> float:
    """Return the dB of the mean of squared errors; infinite where there are none."""
    return _psnr(float(np.mean(errors))) if errors else math.inf


def _readable(plan: Plan, count: int) -> list[int]:
    return [position for position, _ in readable_items(plan.source, _positions(plan, count))]


def _packed_bytes(plan: Plan, positions: Sequence[int], items: Iterable[Item]) -> tuple[float, int]:
    """Pack a few samples; return the mean bytes of one, and the bytes that any number of them takes.

    Positions and bins are random, as those of a draw are: evenly spaced ones would take hardly any bytes.
    """
    draw, names = torch.Generator().manual_seed(0), [plan.source.sample_id(position) for position in positions]
    index = (
        torch.empty(len(positions), dtype=torch.float64)
        .exponential_(1 / MEAN_GAP, generator=draw)
        .ceil()
        .cumsum(0)
        .long()
    )
    if names == [str(position) for position in positions]:
        names = [str(position) for position in index.tolist()]
    num_bins = plan.config.bins.num_bins if plan.chosen is None else 1
    with TemporaryDirectory(prefix="dq_lightning-", ignore_cleanup_errors=True) as folder:
        write_packed(
            Path(folder),
            items,
            ids=names,
            index=index,
            bins=torch.randint(0, num_bins, (len(positions),), generator=draw).to(torch.int16),
            attributes={"source": plan.source.describe()},
            squeeze=True,
        )
        sizes = {path.name: path.stat().st_size for path in Path(folder).iterdir()}
    fixed = sizes[STORE_FILE] + NPY_HEADER_BYTES * sum(name.endswith(".npy") for name in sizes)
    return (sum(sizes.values()) - fixed) / max(1, len(positions)), fixed + DESCRIPTION_BYTES
