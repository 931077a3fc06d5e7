"""The patch step of a few kept images: original, saliency, kept patches, filled image, with their bytes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dq_lightning.cache.tensors import read_scores
from dq_lightning.core.devices import DeviceNames, resolve_devices
from dq_lightning.core.errors import DQError
from dq_lightning.core.isolation import isolated
from dq_lightning.core.records import PatchedImage
from dq_lightning.packed.patches import unpack_image
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.patches.score import split_scores
from dq_lightning.pipeline.compact import stored_patch_plan
from dq_lightning.pipeline.filling import Filler, stored_image, stored_place
from dq_lightning.pipeline.plan import PATCHES, scored_parts
from dq_lightning.report.material import NO_DATASET, Material
from dq_lightning.report.records import PatchExample, PatchStep
from dq_lightning.report.samples import PICTURE_BYTES, Samples, as_address, fitted, from_pixels
from dq_lightning.sources.items import evenly_spaced

SHOWN_IMAGES = 6
SIDE = 160


def show_patches(material: Material, samples: Samples, device: DeviceNames) -> PatchStep | str:
    """Return a few images of the patch step, or a sentence that says why there are none."""
    compact = material.compact
    if compact.patches is None:
        return "All patches of the kept images are kept (drop_ratio= is 0)."
    store = PackedDataset(compact.info.path, patches="packed")
    place, notes = stored_place(store), []
    tried = [(number, store[number]) for number in evenly_spaced(len(store), 2 * SHOWN_IMAGES)]
    cut = [(number, sample) for number, sample in tried if isinstance(stored_image(sample, place), PatchedImage)]
    cut = cut[:: 2 if len(cut) > SHOWN_IMAGES else 1][:SHOWN_IMAGES]
    if not cut:
        return "No image of the set was cut into patches."
    if material.source is None:
        notes.append(f"The original images are not shown. {NO_DATASET}")
    scores = _scores(material)
    if scores is None:
        notes.append("The saliency is not shown, because it is no longer in the cache.")
    filled, why = _filled(material, [sample for _, sample in cut], [number for number, _ in cut], place, device)
    if why is not None:
        notes.append(f"The filled images are not shown: {why}")
    examples = []
    for order, (number, _) in enumerate(cut):
        patched, position = store.patched(number), int(store.index[number])
        own = None if scores is None else scores[number]
        examples.append(_example(patched, position, material, samples, own, filled.get(order)))
    return PatchStep(tuple(examples), compact.patches.patch_size, tuple(notes))


def _example(
    patched: PatchedImage,
    position: int,
    material: Material,
    samples: Samples,
    scores: torch.Tensor | None,
    filled: Image.Image | None,
) -> PatchExample:
    pixels, mask = unpack_image(patched)
    covered = _on_pixels(mask, patched)
    original = samples.image(position) if material.source is not None else None
    before = None
    if material.source is not None and original is not None:
        encoded = material.source.encoded(position)
        before = len(encoded.data) if encoded is not None else 3 * original.width * original.height
    kept = pixels.copy()
    kept[~covered] = 128
    heat = (
        None
        if scores is None
        else _heat(scores.numpy(), patched, from_pixels(pixels) if original is None else original)
    )
    return PatchExample(
        position=position,
        original=None if original is None else _shown(original),
        saliency=None if heat is None else _shown(heat),
        kept=_shown(from_pixels(kept)),
        filled=None if filled is None else _shown(filled),
        original_bytes=before,
        kept_bytes=len(patched.data) + len(patched.mask),
        keep_ratio=patched.num_kept / patched.num_patches,
    )


def _shown(image: Image.Image) -> str:
    return as_address(fitted(image, SIDE), 85, 2 * PICTURE_BYTES)


def _on_pixels(values: NDArray[Any], patched: PatchedImage) -> NDArray[Any]:
    """Return one value of each patch [L] on its pixels, [H, W]."""
    grid = patched.grid
    table = values.reshape(grid.rows, grid.columns)
    wide = table.repeat(patched.patch_size, axis=0).repeat(patched.patch_size, axis=1)
    return wide[: patched.height, : patched.width]


def _heat(scores: NDArray[Any], patched: PatchedImage, image: Image.Image) -> Image.Image | None:
    """Return the image in grey under the scores of its patches, from blue for the lowest to red for the highest."""
    if len(scores) != patched.num_patches:
        return None
    order = scores.argsort().argsort() / max(1, len(scores) - 1)
    share = _on_pixels(order, patched)[..., None]
    low, high = np.array([40.0, 80.0, 200.0]), np.array([230.0, 60.0, 30.0])
    grey = np.asarray(image.convert("L").resize((patched.width, patched.height)), dtype=np.float64)[..., None]
    return Image.fromarray((0.5 * grey + 0.5 * (low + share * (high - low))).clip(0, 255).astype(np.uint8))


def _scores(material: Material) -> list[torch.Tensor] | None:
    """Return the scores of the patches of each kept image from the cache, or None where they are not there."""
    compact = material.compact
    own = compact.parts.get(PATCHES)
    path = None if own is None else material.cache.find(PATCHES, scored_parts(own, compact.selection))
    if path is None or compact.patches is None:
        return None
    scores, sizes = read_scores(path)
    return split_scores(scores, sizes, compact.patches.patch_size)


def _filled(
    material: Material, stored: list[Any], numbers: list[int], place: tuple[str | int, ...], device: DeviceNames
) -> tuple[dict[int, Image.Image], str | None]:
    """Return the filled images by their order, and why there are none."""
    compact = material.compact
    try:
        if compact.filled is not None:
            ready = PackedDataset(Path(compact.filled))
            return {order: _opened(stored_image(ready[number], place)) for order, number in enumerate(numbers)}, None
        plan = stored_patch_plan(compact)
        if plan.reconstructor is None:
            return {}, 'the set was made with reconstruct="off", which fills dropped patches with the mean colour.'
        with isolated():
            made = Filler(plan, str(resolve_devices(device)[0])).pixels(stored, place)
        return {order: from_pixels(pixels) for order, pixels in made.items()}, None
    except DQError as error:
        return {}, str(error)


def _opened(leaf: Any) -> Image.Image:
    if isinstance(leaf, Image.Image):
        return leaf.convert("RGB")
    pixels = np.asarray(leaf)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    pixels = pixels.transpose(1, 2, 0) if isinstance(leaf, torch.Tensor) else pixels
    return from_pixels(pixels)
