"""The kept images of a compact set, one by one, as encoded image files with their facts; every export writes these."""

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dq_lightning.cache.files import read_sealed
from dq_lightning.core.arrays import as_image
from dq_lightning.core.devices import DeviceNames
from dq_lightning.core.errors import StoreError
from dq_lightning.core.records import Selection
from dq_lightning.packed.images import exif_beside
from dq_lightning.packed.patches import map_patched, mean_filled
from dq_lightning.pipeline.compact import COMPACT_FILE, classes_are_given, open_compact, open_packed, stored_patch_plan
from dq_lightning.pipeline.filling import filled_items, stored_place
from dq_lightning.sources.base import Source
from dq_lightning.sources.items import at, find_image, find_target

# Every image reader knows these encodings; an image in another encoding is written anew, as PNG.
SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}
PNG_MODES = ("RGB", "L", "RGBA", "LA", "1")


@dataclass(frozen=True)
class KeptImage:
    """One kept image.

    Attributes:
        position: position in the source.
        bin: bin that the image came from; -1 when it is not known.
        name: id in the source, which is a relative path or the position; see `text_of`.
        label: class of the image, -1 if it has none though others have; None without classes.
        data: bytes of the image file.
        suffix: suffix of such a file: `.png`, `.jpg` or `.webp`.
    """

    position: int
    bin: int
    name: str
    label: int | None
    data: bytes
    suffix: str


class KeptImages:
    """The kept images of a compact set, ascending by their position in the source. Iterating yields `KeptImage`.

    Attributes:
        selection: positions and bins of the images.
        class_names: name of each class; None without labels.
        name: name of the set, for files.
    """

    def __init__(
        self, selection: Selection, class_names: tuple[str, ...] | None, items: Any, name: str = "dataset"
    ) -> None:
        self.selection, self.name = selection, name
        self.class_names = None if class_names is None else tuple(map(text_of, class_names))
        self._items = items

    def __len__(self) -> int:
        return len(self.selection)

    def __iter__(self) -> Iterator[KeptImage]:
        return iter(self._items())


def text_of(name: str) -> str:
    """Return a name as text that any format can hold: bytes that are not UTF-8 are written as backslash escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def kept_of_source(
    source: Source,
    selection: Selection,
    name: str = "dataset",
    samples: Callable[[], Iterator[Any]] | None = None,
) -> KeptImages:
    """Return the kept images of a source, at the positions of a selection; image files keep their bytes.

    `name` is that of the set, for files. `samples` returns an iterator over M other samples, in order, such as filled
    ones, whose images are encoded as PNG; labels and names are those of the source. None reads the samples from the
    source.
    """
    labels = source.labels()
    labels = labels if labels is not None and labels.are_classes else None

    def items() -> Iterator[KeptImage]:
        others = [None] * len(selection) if samples is None else samples()
        for position, bin_number, other in zip(selection.index.tolist(), selection.bin.tolist(), others, strict=True):
            if samples is None:
                data, suffix = file_of(source, position)
            else:
                data, suffix = as_png(at(other, source.image_leaf())), ".png"
            label = None if labels is None else int(labels.values[position])
            if labels is not None and labels.unlabeled and label == labels.num_classes:
                label = -1
            yield KeptImage(position, bin_number, text_of(source.sample_id(position)), label, data, suffix)

    names = None if labels is None else labels.names or tuple(map(str, range(labels.num_classes)))
    return KeptImages(selection, names, items, name)


def kept_of_store(
    path: str | Path,
    *,
    fill: bool = True,
    reconstructor: Any = None,
    device: DeviceNames = "auto",
    progress: bool = True,
) -> KeptImages:
    """Return the kept images of a packed set, without its dataset.

    With `fill`, the reconstructor, or another one given by its name, folder or network, fills dropped patches, if the
    set was made to be filled; otherwise they have the mean colour. The images are read inside `isolated`, see
    `filled_items`.

    Raises:
        StoreError: there is no packed set of images, or its reconstructor has to be named (see `stored_patch_plan`).
    """
    compact = open_compact(Path(path))
    store = open_packed(path, patches="packed")
    described = read_sealed(Path(path) / COMPACT_FILE)
    names = described["class_names"]
    first = map_patched(store[0], mean_filled)
    image = find_image(first, described["config"].get("image_column"))
    target = find_target(first, image, described["config"].get("label_column"))
    given = classes_are_given(Path(path), described)
    if described["num_classes"] is None or given is None:
        target = None
    elif target is not None and given:
        raise StoreError(
            f"{path} was made with labels= of your own, and its samples hold the targets of the dataset, which these do not "
            "name: export it with its dataset and the same labels (dataset= and labels= of export_set, or of "
            "`dq-lightning export`)"
        )
    elif names is None:
        names = [str(number) for number in range(described["num_classes"])]

    def samples() -> Iterator[Any]:
        """Return the samples with whole images: unchanged, filled, or with the mean colour in dropped patches."""
        if compact.patches is None:
            return iter(store)
        plan = stored_patch_plan(compact, reconstructor=reconstructor, reconstruct=None if fill else "off")
        if plan.config.reconstruct == "off":
            return (map_patched(sample, mean_filled) for sample in store)
        filled = filled_items(store, stored_place(store) or image, plan, device=device, progress=progress)
        return (sample for sample, _ in filled)

    def items() -> Iterator[KeptImage]:
        for number, sample in enumerate(samples()):
            label = None if target is None else _label(at(sample, target), names)
            position, bin_number = int(store.index[number]), int(store.bin[number])
            name, data = text_of(store.ids[number]), as_png(at(sample, image))
            yield KeptImage(position, bin_number, name, label, data, ".png")

    return KeptImages(compact.selection, None if target is None else tuple(names), items, Path(path).name)


def as_png(leaf: Any) -> bytes:
    """Encode an image as a PNG file without loss.

    The EXIF tags (by which a photo may be rotated), the resolution and the colour profile are kept, too. The image is a
    Pillow image, uint8 array [H, W] or [H, W, C], or uint8 tensor [H, W] or [C, H, W].

    Raises:
        StoreError: the image is of another type or mode, which PNG cannot hold exactly.
    """
    image = as_image(leaf)
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode not in PNG_MODES:
        raise StoreError(
            f"an image of mode {image.mode} cannot be written as PNG without loss: convert it to RGB, L, RGBA or LA"
        )
    exif, dpi = exif_beside(image) or image.info.get("exif"), image.info.get("dpi")
    known: dict[str, Any] = {"exif": exif} if isinstance(exif, bytes) else {}
    if isinstance(dpi, tuple) and len(dpi) == 2 and all(0 < float(side) < math.inf for side in dpi):
        known["dpi"] = dpi
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **known)  # Pillow writes the colour profile by itself.
    return buffer.getvalue()


def file_of(source: Source, position: int) -> tuple[bytes, str]:
    """Return the bytes and suffix of an image file: the original bytes if every reader can decode them, else PNG."""
    encoded = source.encoded(position)
    if encoded is not None:
        with Image.open(io.BytesIO(encoded.data)) as image:
            if image.format in SUFFIXES:
                return encoded.data, SUFFIXES[image.format]
    return as_png(at(source.plain(position), source.image_leaf())), ".png"


def _label(value: Any, names: list[str]) -> int:
    """Return the class number of a stored target, which is a number or a name; -1 for one that is missing or negative."""
    if value is None:
        return -1
    number = names.index(value) if value in names else value
    if type(number) is str or int(number) >= len(names):
        raise StoreError(
            f"the target {value!r:.40} is not one of the {len(names)} classes that the set lists: quantize again"
        )
    return max(int(number), -1)
