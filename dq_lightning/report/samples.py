"""Samples as small pictures and short texts."""

import base64
import io
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dq_lightning.core.errors import DQError
from dq_lightning.core.records import Bins
from dq_lightning.report.material import Material
from dq_lightning.report.records import STATES, Shown
from dq_lightning.sources.base import Source

# Pictures of a sheet have at most this many pixels a side; smaller images are shown as they are.
SIDE = 112
MOST_CHARACTERS = 240
_QUALITY = 80
# The pictures of a report take at most about 2.2 MB as files, and a third more as text: 550 of these, and one sprite.
PICTURE_BYTES, SPRITE_BYTES = 4_000, 800_000
MOST_NAME = 120


class Samples:
    """Reads samples of a dataset, or of a packed set, for a report.

    Args:
        material: what the report is made from.
    """

    def __init__(self, material: Material) -> None:
        self._material = material
        self._names = material.class_names()
        self._bins = material.bins if isinstance(material.bins, Bins) else None
        self._texts: dict[int, str] = {}

    @property
    def source(self) -> Source | None:
        """The source that samples are read from: the dataset, the packed set, or None."""
        return self._material.source or self._material.stored

    def place(self, position: int) -> int | None:
        """Return the position of a sample in `source`, or None where it is not there."""
        material = self._material
        if material.source is not None:
            return position
        if material.stored is None:
            return None
        return self._kept_number(position)

    def _kept_number(self, position: int) -> int | None:
        index = self._material.index
        place = int(torch.searchsorted(index, position))
        return place if place < len(index) and int(index[place]) == position else None

    def label_number(self, position: int) -> int | None:
        """Return the number of a sample's class, or None where it has none or it is not known."""
        material = self._material
        if material.labels is not None:
            return int(material.labels.values[position])
        number = None if material.kept_labels is None else self._kept_number(position)
        return None if number is None or material.kept_labels is None else int(material.kept_labels.values[number])

    def bin(self, position: int) -> int | None:
        """Return the bin of a sample, or None where it is in none or it is not known."""
        if self._bins is not None:
            found = int(self._bins.assignment[position])
        else:
            number = self._kept_number(position)
            found = -1 if number is None else int(self._material.compact.selection.bin[number])
        return found if found >= 0 else None

    def show(self, position: int, side: int | None = SIDE) -> Shown:
        """Return a sample with its picture or text; `side` None leaves the picture out."""
        number, place = self.label_number(position), self.place(position)
        picture, text = None, None
        if place is not None and self.source is not None:
            if self.source.modality == "image":
                image = self.image(position) if side is not None else None
                picture = None if image is None or side is None else as_address(fitted(image, side))
                text = "no picture" if image is None and side is not None else None
            else:
                text = self.text(position)
        return Shown(
            position=position,
            name=self._name(place),
            label=None if number is None or number >= len(self._names) else self._names[number],
            bin=self.bin(position),
            state=STATES[int(self._material.state[position])],
            picture=picture,
            text=text,
        )

    def image(self, position: int) -> Image.Image | None:
        """Return the image of a sample in RGB, or None where there is none or it cannot be read."""
        place = self.place(position)
        if place is None or self.source is None or self.source.modality != "image":
            return None
        try:
            return self.source.image(place)
        except (DQError, OSError, ValueError):
            return None

    def read_texts(self, positions: Iterable[int]) -> None:
        """Read the texts of samples that will be shown, all at once, which takes far less time than one by one."""
        if self.source is None or self.source.modality == "image":
            return
        there = [(position, place) for position in positions if (place := self.place(position)) is not None]
        try:
            texts = self.source.texts([place for _, place in there])
        except DQError:
            return  # Some text cannot be read; `text` reads them one by one and says which.
        self._texts |= {position: _shortened(text) for (position, _), text in zip(there, texts, strict=True)}

    def text(self, position: int) -> str | None:
        """Return the beginning of a sample's text, or None where there is none."""
        if position in self._texts:
            return self._texts[position]
        place = self.place(position)
        if place is None or self.source is None:
            return None
        try:
            return _shortened(self.source.texts([place])[0])
        except DQError:
            return "(cannot be read)"

    def _name(self, place: int | None) -> str:
        """Return the name of a sample where the dataset has names other than positions."""
        if place is None or self.source is None or self._material.source is None:
            return ""
        try:
            name = self.source.sample_id(place)
        except DQError:
            return ""
        return "" if name == str(place) else name[-MOST_NAME:]


def _shortened(text: str) -> str:
    short = " ".join(text[: 2 * MOST_CHARACTERS].split())
    return short if len(short) <= MOST_CHARACTERS else short[: MOST_CHARACTERS - 1] + "…"


def some_of(positions: Tensor, count: int, seed: int = 0) -> list[int]:
    """Return at most `count` of the positions, drawn without regard to their order, ascending."""
    chosen = random.Random(seed).sample(range(len(positions)), min(count, len(positions)))
    return positions[sorted(chosen)].tolist()


def fitted(image: Image.Image, side: int) -> Image.Image:
    """Return the image, made smaller where a side has more than `side` pixels."""
    if max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side), reducing_gap=2.0)
    return image


def as_address(image: Image.Image, quality: int = _QUALITY, most_bytes: int = PICTURE_BYTES) -> str:
    """Return an image as a `data:` address that holds a WebP file.

    An image that takes more bytes is encoded more coarsely, and at last made smaller, so that a report has a bounded size.
    """
    for coarser in (quality, quality // 2, quality // 4):
        data = _webp(image, coarser)
        if len(data) <= most_bytes:
            break
    while len(data) > most_bytes and max(image.size) > 8:
        image = image.resize((max(1, image.width // 2), max(1, image.height // 2)))
        data = _webp(image, quality // 4)
    return "data:image/webp;base64," + base64.b64encode(data).decode("ascii")


def _webp(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=2)
    return buffer.getvalue()


def as_sprite(images: list[Image.Image], tile: int, columns: int) -> str:
    """Return one image with the given ones side by side, each in the middle of a square of `tile` pixels."""
    rows = -(-len(images) // columns)
    sheet: Any = Image.new("RGB", (columns * tile, max(1, rows) * tile), (128, 128, 128))
    for number, image in enumerate(images):
        small = fitted(image, tile)
        left, top = number % columns * tile, number // columns * tile
        sheet.paste(small, (left + (tile - small.width) // 2, top + (tile - small.height) // 2))
    return as_address(sheet, 62, SPRITE_BYTES)


def from_pixels(pixels: np.ndarray[Any, Any]) -> Image.Image:
    """Return an RGB image of pixels uint8 [H, W, C] with 1 or 3 channels."""
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3))))
