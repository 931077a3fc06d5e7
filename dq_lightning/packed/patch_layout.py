"""Arranges the kept patches of an image into the strip that a codec encodes, and puts them back into the image.

Kept patches stand side by side in one long row, in the order of the grid, so that most of them have their true left
neighbour. Each patch stands in a cell whose side is a multiple of the codec's block size. A cell's pixels outside of
its patch are copies of the patch's last row and column.

The code is pure: it reads and writes no files.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from dq_lightning.core.errors import StoreError
from dq_lightning.core.records import MAX_PIXELS, Grid

# A longer strip is divided into several rows, because JPEG allows at most 65,500 pixels per side.
MAX_STRIP_SIDE = 65_500

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Layout(Grid):
    """The grid of patches over an image, and the strip that holds its kept patches.

    Attributes:
        channels: C, number of channels.
        side: side of a cell of the strip in pixels, at least P.
        count: k, number of kept patches.

    Raises:
        StoreError: if the padded image or the strip would be too large.
    """

    channels: int
    side: int
    count: int

    def __post_init__(self) -> None:
        super().__post_init__()
        padded = max(self.num_patches * self.patch_size**2, self.strip_size[0] * self.strip_size[1])
        if padded > 4 * MAX_PIXELS or max(self.strip_size) > MAX_STRIP_SIDE:
            raise StoreError(
                f"patches of {self.patch_size} pixels of an image of {self.height} x {self.width} cannot be laid out: "
                "take smaller patches or a smaller image"
            )

    @property
    def divides(self) -> bool:
        """Whether the patch side divides the image's sides, so that no patch is partial."""
        return self.height % self.patch_size == 0 == self.width % self.patch_size

    @property
    def strip_cells(self) -> tuple[int, int]:
        """Number of rows of cells in the strip, and of cells in each row."""
        rows = max(1, -(-self.count // max(1, MAX_STRIP_SIDE // self.side)))
        return rows, -(-self.count // rows)

    @property
    def strip_size(self) -> tuple[int, int]:
        """Height and width of the strip in pixels."""
        rows, columns = self.strip_cells
        return rows * self.side, columns * self.side


def cut(pixels: Pixels, mask: Mask, layout: Layout) -> Pixels:
    """Cut the kept patches [k, side, side, C] out of pixels [H, W, C]; padding copies their last row and column."""
    rows, columns = layout.rows, layout.columns
    patch, spare = layout.patch_size, layout.side - layout.patch_size
    padding = ((0, rows * patch - layout.height), (0, columns * patch - layout.width), (0, 0))
    whole = pixels if layout.divides else np.pad(pixels, padding, "edge")
    cells = whole.reshape(rows, patch, columns, patch, layout.channels).swapaxes(1, 2)
    kept = cells[mask.reshape(rows, columns)]
    return np.pad(kept, ((0, 0), (0, spare), (0, spare), (0, 0)), "edge") if spare else kept


def strip_of(cells: Pixels, layout: Layout) -> Pixels:
    """Arrange cells [k, side, side, C] in the strip [height, width, C]; places left over repeat the last cell."""
    rows, columns = layout.strip_cells
    spare = np.repeat(cells[-1:], rows * columns - len(cells), 0)
    laid = np.concatenate([cells, spare]).reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(laid).reshape(*layout.strip_size, layout.channels)


def patches_in(strip: Pixels, layout: Layout) -> Pixels:
    """Take the patches [k, P, P * C], without their padding, out of the strip that `strip_of` made."""
    rows, columns = layout.strip_cells
    wide = strip.reshape(rows, layout.side, columns, layout.side * layout.channels).swapaxes(1, 2)
    cells = wide.reshape(rows * columns, layout.side, layout.side * layout.channels)
    return cells[: layout.count, : layout.patch_size, : layout.patch_size * layout.channels]


def place(patches: Pixels, mask: Mask, layout: Layout) -> Pixels:
    """Put patches [k, P, P * C] where the mask keeps them, fill the rest with the mean colour, and return [H, W, C]."""
    rows, columns = layout.rows, layout.columns
    padded = np.zeros((rows * layout.patch_size, columns * layout.patch_size, layout.channels), np.uint8)
    run = np.dtype((np.void, layout.patch_size * layout.channels))
    _cells(padded, layout)[mask.reshape(rows, columns)] = patches.view(run)[..., 0]
    return _fill_zeros(np.ascontiguousarray(padded[: layout.height, : layout.width]), mask, layout)


def _cells(whole: Pixels, layout: Layout) -> np.ndarray[Any, np.dtype[np.void]]:
    """View contiguous pixels as rows of patches [rows, columns, P]; numpy copies each row, one element, at once."""
    rows, columns = layout.rows, layout.columns
    run = np.dtype((np.void, layout.patch_size * layout.channels))
    return whole.reshape(rows, layout.patch_size, columns, -1).view(run)[..., 0].swapaxes(1, 2)


def refill(pixels: Pixels, mask: Mask, layout: Layout) -> Pixels:
    """Return a copy of pixels [H, W, C] whose dropped patches have the mean colour of the kept patches."""
    whole = pixels.copy()
    if layout.count < len(mask):
        _paint(whole, np.zeros(layout.channels, np.uint8), mask, layout)
    return _fill_zeros(whole, mask, layout)


def _fill_zeros(whole: Pixels, mask: Mask, layout: Layout) -> Pixels:
    """Paint the dropped patches, which must be 0, in the mean colour [C] of the kept pixels, rounded half up."""
    if layout.count == len(mask):
        return whole
    # The sum of 257 bytes fits into 16 bits. Rows are summed first, because numpy is slow on short axes.
    narrow = np.add.reduce(whole.reshape(layout.height, -1), 0, np.uint16 if layout.height <= 257 else np.uint32)
    total = np.add.reduce(narrow.reshape(-1, layout.channels), 0, np.int64)
    num_kept = max(1, _num_pixels(mask, layout))
    _paint(whole, ((2 * total + num_kept) // (2 * num_kept)).astype(np.uint8), mask, layout)
    return whole


def _paint(whole: Pixels, colour: Pixels, mask: Mask, layout: Layout) -> None:
    """Paint the dropped patches of pixels [H, W, C] in a colour [C]."""
    if not layout.divides:
        whole[~pixel_mask(mask, layout)] = colour
        return
    run = np.dtype((np.void, layout.patch_size * layout.channels))
    _cells(whole, layout)[~mask.reshape(layout.rows, layout.columns)] = np.frombuffer(
        colour.tobytes() * layout.patch_size, run
    )[0]


def _num_pixels(mask: Mask, layout: Layout) -> int:
    """Return the number of pixels in the kept patches."""
    if layout.divides:
        return layout.count * layout.patch_size**2
    return int(np.count_nonzero(pixel_mask(mask, layout)))


def pixel_mask(mask: Mask, layout: Layout) -> Mask:
    """Return a mask bool [H, W] that is True at the kept pixels."""
    wide = mask.reshape(layout.rows, layout.columns).repeat(layout.patch_size, 0).repeat(layout.patch_size, 1)
    return wide[: layout.height, : layout.width]


def raw_bytes(pixels: Pixels, mask: Mask, layout: Layout) -> bytes:
    """Return the bytes of the kept pixels, patch by patch and row by row; partial patches have fewer pixels."""
    if layout.divides:
        return bytes(cut(pixels, mask, layout).tobytes())
    return bytes(pixels.reshape(-1, layout.channels)[_kept_places(mask, layout)].tobytes())


def place_raw(data: bytes, mask: Mask, layout: Layout) -> Pixels:
    """Decode what `raw_bytes` returned to pixels uint8 [H, W, C], with the mean colour in the dropped patches.

    Raises:
        StoreError: if the number of bytes does not fit the mask.
    """
    expected = _num_pixels(mask, layout) * layout.channels
    if len(data) != expected:
        raise StoreError(f"a patched image has {len(data)} bytes of pixels, its mask keeps {expected}")
    flat = np.frombuffer(data, np.uint8)
    if layout.divides:
        return place(flat.reshape(layout.count, layout.patch_size, -1), mask, layout)
    whole = np.zeros((layout.height, layout.width, layout.channels), np.uint8)
    whole.reshape(-1, layout.channels)[_kept_places(mask, layout)] = flat.reshape(-1, layout.channels)
    return _fill_zeros(whole, mask, layout)


def _kept_places(mask: Mask, layout: Layout) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the indices of the kept pixels in the flat image, int64 [n], in the order in which they are stored."""
    rows, columns = layout.rows, layout.columns
    patch = layout.patch_size
    places = np.full((rows * patch, columns * patch), -1)
    places[: layout.height, : layout.width] = np.arange(layout.height * layout.width).reshape(layout.height, -1)
    kept = places.reshape(rows, patch, columns, patch).swapaxes(1, 2)[mask.reshape(rows, columns)].ravel()
    return kept[kept >= 0]
