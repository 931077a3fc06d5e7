"""Whole images encoded anew: JPEG or WebP at a quality, at most so many pixels a side.

What is stored is what is trained on. An image stays as the dataset has it where its own file is no larger than the new
one, and where it is no 8-bit grey or RGB image.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from dq_lightning.core.arrays import as_image
from dq_lightning.core.config import EncodingConfig
from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import PatchError, SourceError, StoreError
from dq_lightning.core.records import EncodedImage, StoredImage
from dq_lightning.core.replicas import in_threads
from dq_lightning.packed.images import MODE_BITS, gives_pixels, memory_bytes, raw_bytes_of
from dq_lightning.packed.layouts import is_grey_or_rgb, layout_of_image, told_image
from dq_lightning.packed.lossy import SHARED_TABLES_SIDE, encode_lossy
from dq_lightning.packed.values import BYTES_PER_PIXEL, encode_properties
from dq_lightning.packed.whole_images import with_files
from dq_lightning.packed.writer import Item
from dq_lightning.pipeline.budget import ByteSetting
from dq_lightning.pipeline.plan import Plan
from dq_lightning.sources.items import Leaf, at, parts, plain_parts, with_value

DEFAULT_QUALITY = 75
NOTHING_KNOWN: Mapping[int, Item] = MappingProxyType({})
# So many pixels are read before they are encoded, and encoded before they are written: reading, encoding and writing one
# small image after the other takes up to twice the time, because each displaces the others from the processor's cache.
PIXELS_AT_ONCE = 1 << 19
# A thread is given fewer, so that a few hundred images make work for all.
PIXELS_OF_A_THREAD = 1 << 16


def encoded_items(
    plan: Plan,
    setting: ByteSetting,
    index: Tensor,
    numbers: Iterator[int] | None = None,
    known: Mapping[int, Item] = NOTHING_KNOWN,
) -> Iterator[Item]:
    """Yield samples at some positions, those with the given numbers or all, with their images as a setting stores them.

    `known` holds samples by position that this setting was applied to already.
    """
    positions = index.numpy()
    chosen = positions.tolist() if numbers is None else (int(positions[number]) for number in numbers)
    return encode_items(plan, setting, (known.get(i) or read_item(plan, i) for i in chosen))


def read_item(plan: Plan, position: int) -> Item:
    """Return a sample as a packed store takes it, with the dataset's own file of its image."""
    return plain_parts(plan.source.plain(position)), plan.source.encoded(position)


def encode_items(plan: Plan, setting: ByteSetting, read: Iterable[Item]) -> Iterator[Item]:
    """Yield samples with their images as a setting stores them, in order.

    The samples are read in the calling thread, and encoded in others; small JPEGs are encoded in the calling thread too,
    because Pillow's encoder holds the lock of the interpreter there, and so is everything in a loader process, which has
    others beside it. The setting `"keep"` leaves
    every sample as it is; under a budget of bytes small images are stored as the dataset's own files where these are
    smaller than the pixels.
    """
    if setting.codec == "keep":
        yield from read if plan.config.max_bytes is None else (_with_own_file(plan, *item) for item in read)
        return
    place = plan.source.image_leaf()

    def encode(items: Iterable[Item]) -> Iterator[Item]:
        for sample, encoded in items:
            leaf = at(sample, place)
            file = None if isinstance(leaf, StoredImage) else encode_leaf(leaf, encoded, setting)
            yield (sample, encoded) if file is None else (with_value(sample, place, file), None)

    def pixels(item: Item) -> int:
        leaf = at(item[0], place)
        if isinstance(leaf, StoredImage):
            return memory_bytes(leaf.data) // BYTES_PER_PIXEL
        return math.prod(leaf.size if isinstance(leaf, Image.Image) else getattr(leaf, "shape", ()))

    read = iter(read)
    first = list(islice(read, 1))
    is_small = all(pixels(item) <= SHARED_TABLES_SIDE**2 for item in first)
    in_place = (setting.codec == "jpeg" and is_small) or get_worker_info() is not None
    most = PIXELS_AT_ONCE if in_place else PIXELS_OF_A_THREAD

    def calls() -> Iterator[Callable[[], list[Item]]]:
        some: list[Item] = []
        for item in chain(first, read):
            some.append(item)
            if pixels(item) * len(some) >= most:
                yield partial(list, encode(some))
                some = []
        yield partial(list, encode(some))

    for encoded_ones in (call() for call in calls()) if in_place else in_threads(calls()):
        yield from encoded_ones


def _with_own_file(plan: Plan, sample: Any, encoded: EncodedImage | None) -> Item:
    """Return a sample with its image as the dataset's own file where that is smaller than the pixels."""
    leaf = None if encoded is None else at(sample, plan.source.image_leaf())
    if encoded is None or not isinstance(leaf, Image.Image) or leaf.mode not in MODE_BITS:
        return sample, encoded
    if len(encoded.data) >= raw_bytes_of(leaf.mode, leaf.size):
        return sample, encoded
    return with_files(sample, encoded, every=True), None


def fixed_setting(config: EncodingConfig) -> ByteSetting:
    """Return the setting that a config asks for without a budget; its bytes and its error are not known."""
    if not config.encodes:
        return ByteSetting("keep", None, None, math.nan, math.nan)
    quality = DEFAULT_QUALITY if config.quality is None else config.quality
    return ByteSetting(config.codec, quality, config.longest_side, math.nan, math.nan)


def described_setting(setting: ByteSetting, max_bytes: int | None = None) -> dict[str, Any]:
    """Return a setting and the budget as plain JSON, in the form of `StoreInfo.encoding`."""
    psnr = round(setting.psnr, 2) if math.isfinite(setting.psnr) else None
    facts = {"codec": setting.codec, "quality": setting.quality, "longest_side": setting.longest_side}
    return facts | {"psnr": psnr, "max_bytes": max_bytes}


def warn_of_encoding(plan: Plan, samples: Sequence[Any]) -> None:
    """Warn where encoding images anew, as the settings ask, would change none of a few samples, or make labels wrong."""
    fixed = plan.config.encoding
    if fixed.codec == "keep" or not fixed.closed or plan.patches is not None or not samples:
        return
    settings = ", ".join(f"{name}={getattr(fixed, name)!r}" for name in fixed.closed)
    leaves = [at(sample, plan.source.image_leaf()) for sample in samples] if has_images(plan) else []
    if not any(map(is_grey_or_rgb, leaves)):
        seen = f" (such as a {told_image(leaves[0])})" if leaves else ""
        get_logger().warning(
            f"encoding.{settings} changes 8-bit grey and RGB images alone, and none of the {len(samples)} samples that were "
            f"looked at has one{seen}: what is no such image is stored as it is"
        )
    elif fixed.longest_side is not None and any(holds_places(sample, plan.source.image_leaf()) for sample in samples):
        get_logger().warning(
            f"encoding.longest_side={fixed.longest_side} makes images smaller, and the samples hold arrays, lists or "
            "images beside them, which stay as they are: if these are boxes, key points or masks in pixels, they will no "
            "longer fit; leave longest_side out then"
        )


def has_images(plan: Plan) -> bool:
    """Return whether the samples hold one image each, at a known place."""
    if plan.source.modality != "image":
        return False
    try:
        plan.source.image_leaf()
    except (PatchError, SourceError):
        return False
    return True


def holds_places(sample: Any, place: Leaf) -> bool:
    """Whether a sample holds what may tell places in its image, such as boxes or a mask: an array, or a filled list or dict.

    Such an image is not scaled, because these would no longer fit it.
    """
    for leaf, value in parts(sample):
        if place[: len(leaf)] == leaf:
            continue  # the image, or what it is in
        if isinstance(value, Tensor | np.ndarray):
            if math.prod(value.shape) > 1:
                return True
        elif isinstance(value, Mapping | list | tuple):
            if len(value):
                return True
        elif isinstance(value, Image.Image):
            return True
    return False


def encode_leaf(leaf: Any, encoded: EncodedImage | None, setting: ByteSetting) -> StoredImage | None:
    """Encode an image as the dataset delivers it, of which `encoded` is the dataset's own file, as JPEG or WebP.

    Returns:
        The new file; the dataset's own if it is no larger and gives exactly this image; None for an image that stays
        as it is, because it is no 8-bit grey or RGB image.

    Raises:
        StoreError: the codec cannot hold an image of this size, or the info of the image cannot be stored.
    """
    try:
        layout, mode = layout_of_image(leaf)
    except StoreError:
        return None
    assert setting.quality is not None
    image = as_image(leaf)
    data = encode_lossy(reduced(image, setting.longest_side), setting.codec, setting.quality)
    properties = encode_properties(leaf) if layout == "pil" else b""
    # A folder of colour images then has one column of files, whether they are its own or new ones.
    plain = encoded is not None and encoded.decoder == "pil_rgb" and mode == "RGB"
    if encoded is not None and layout == "pil" and len(encoded.data) <= len(data) and gives_pixels(encoded, image):
        return StoredImage(encoded.data, encoded.decoder, layout, properties)
    # WebP has no grey images.
    decoder = "pil_rgb" if plain else "hf:L" if mode == "L" and setting.codec == "webp" else "pil"
    return StoredImage(data, decoder, layout, properties)


def reduced(image: Image.Image, longest_side: int | None) -> Image.Image:
    """Return an image whose longest side has at most so many pixels, with the same shape; None changes nothing."""
    if longest_side is None or max(image.size) <= longest_side:
        return image
    scale = longest_side / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
