"""Frozen values that travel between the stations. Stations meet here and nowhere else."""

import hashlib
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from dq_lightning.core.errors import DQError, PatchError, StoreError


@dataclass(frozen=True, eq=False)
class Features:
    """What an encoder says of N samples.

    Attributes:
        embedding: floating tensor [N, D].
        head_gradient: floating tensor [N, C], the gradient of the loss with respect to the logits, or None. With it the
            samples are compared by the last layer's gradient `g (x) [1, h]`, whose inner product is
            `(g_i . g_j)(1 + h_i . h_j)`.
        unreadable: int64 [U], ascending, the samples that could not be read and were skipped: their rows are zero.
    """

    embedding: Tensor
    head_gradient: Tensor | None = None
    unreadable: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        for name, value in (("embedding", self.embedding), ("head_gradient", self.head_gradient)):
            if value is None:
                continue
            if value.ndim != 2 or not value.is_floating_point():
                raise DQError(
                    f"Features.{name} must be a floating tensor [N, width], got {value.dtype} {tuple(value.shape)}"
                )
        if self.head_gradient is not None and len(self.head_gradient) != len(self.embedding):
            raise DQError(
                f"Features: {len(self.embedding)} rows of embedding but {len(self.head_gradient)} of head_gradient"
            )

    def __len__(self) -> int:
        return len(self.embedding)


@dataclass(frozen=True, eq=False)
class Labels:
    """The class of every sample.

    Attributes:
        values: int64 [N], 0 <= value < num_classes; with `unlabeled` the value `num_classes` stands for no label.
        names: the name of each class, when the dataset knows them.
        unlabeled: whether some samples have no label. They are a group of their own, which is no class.
    """

    values: Tensor
    names: tuple[str, ...] | None = None
    unlabeled: bool = False

    @property
    def num_classes(self) -> int:
        """Number of classes: the names that the dataset lists, or else the largest label seen plus one."""
        if self.names is not None:
            return len(self.names)
        groups = int(self.values.max()) + 1 if len(self.values) else 0
        return groups - self.unlabeled


@dataclass(frozen=True, eq=False)
class Bins:
    """Which bin each of N samples fell into, and in which order.

    Attributes:
        assignment: int16 [N], the bin of each sample, 0 <= bin < num_bins; -1 where it was left out, as a near-duplicate or
            because it could not be read.
        rank: int32 [N], the order in which a sample was picked inside its group and bin, from 0; -1 likewise.
        gain: float32 [N], the objective's gain when it was picked.
        group: int32 [N], class or stratum; zeros without labels.
        num_bins: K; the largest assignment plus one when not given.
        num_unreadable: samples that could not be read and were skipped.
    """

    assignment: Tensor
    rank: Tensor
    gain: Tensor
    group: Tensor
    num_bins: int = 0
    num_unreadable: int = 0

    def __post_init__(self) -> None:
        if self.num_bins == 0:
            object.__setattr__(self, "num_bins", int(self.assignment.max()) + 1 if len(self.assignment) else 1)

    def __len__(self) -> int:
        return len(self.assignment)


@dataclass(frozen=True, eq=False)
class Selection:
    """The samples that were kept.

    Attributes:
        index: int64 [M], positions in the source, ascending.
        bin: int16 [M], the bin that each of them came from.
        num_unreadable: samples of the source that could not be read and were skipped.
    """

    index: Tensor
    bin: Tensor
    num_unreadable: int = 0

    def __len__(self) -> int:
        return len(self.index)

    def content_hash(self) -> str:
        """Hexadecimal digest of index and bin: equal on two machines exactly when they selected the same samples."""
        digest = hashlib.sha256()
        digest.update(self.index.to(torch.int64).numpy().tobytes())
        digest.update(self.bin.to(torch.int16).numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class PatchChoice:
    """Which patches of M images are kept. Images may differ in size.

    The patches of an image are numbered row by row over its grid of ceil(H / P) x ceil(W / P); those at the right and lower
    edge are smaller when P does not divide the size.

    Attributes:
        patch_size: P, side of a patch in pixels.
        sizes: int32 [M, 2], height and width of every image in pixels.
        packed: uint8 [sum of ceil(L_i / 8)], the masks of all images one after the other, each as `pack_mask` gives it.
    """

    patch_size: int
    sizes: Tensor
    packed: Tensor

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.sizes.ndim != 2 or self.sizes.shape[1:] != (2,):
            raise DQError(
                f"PatchChoice: sizes must be [M, 2] and P at least 1, got {tuple(self.sizes.shape)}, {self.patch_size}"
            )
        if int(self.offsets[-1]) != len(self.packed):
            raise DQError(f"PatchChoice: these images need {int(self.offsets[-1])} mask bytes, got {len(self.packed)}")

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def num_patches(self) -> Tensor:
        """int64 [M], patches L of every image."""
        return (-(-self.sizes.long() // self.patch_size)).prod(1)

    @cached_property
    def offsets(self) -> Tensor:
        """int64 [M + 1], where the mask of every image begins in `packed`."""
        return torch.cat([torch.zeros(1, dtype=torch.int64), (-(-self.num_patches // 8)).cumsum(0)])

    def mask(self, position: int) -> Tensor:
        """Mask bool [L], True where a patch of this image is kept."""
        first, last = int(self.offsets[position]), int(self.offsets[position + 1])
        return unpack_mask(self.packed[first:last], int(self.num_patches[position]))

    def kept(self, position: int) -> Tensor:
        """int64 [k], the kept patches of this image, ascending."""
        return self.mask(position).nonzero().flatten()

    @cached_property
    def counts(self) -> Tensor:
        """int64 [M], kept patches of every image."""
        bits = torch.tensor([byte.bit_count() for byte in range(256)])
        running = torch.cat([torch.zeros(1, dtype=torch.int64), bits[self.packed.long()].cumsum(0)])
        return running[self.offsets].diff()

    @property
    def keep_ratio(self) -> float:
        """Share of all patches that is kept."""
        return int(self.counts.sum()) / max(1, int(self.num_patches.sum()))

    def content_hash(self) -> str:
        """Hexadecimal digest: equal exactly when the same patches of images of the same sizes are kept."""
        digest = hashlib.sha256(str(self.patch_size).encode())
        digest.update(self.sizes.to(torch.int32).numpy().tobytes())
        digest.update(self.packed.numpy().tobytes())
        return digest.hexdigest()


def pack_mask(mask: Tensor) -> Tensor:
    """Bits of a mask, bool [..., L], as uint8 [..., ceil(L / 8)]: patch j is bit j % 8 of byte j // 8, unused bits are 0."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.view(*mask.shape[:-1], padded.shape[-1] // 8, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, num_patches: int) -> Tensor:
    """The inverse of `pack_mask`: uint8 [..., ceil(L / 8)] to bool [..., L]."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).flatten(-2)[..., :num_patches].bool()


@dataclass(frozen=True)
class EncodedImage:
    """The bytes of an image as its owner stored them, and how the dataset turns them into pixels.

    Attributes:
        data: the encoded file (JPEG, PNG, WebP, ...).
        decoder: `"pil_rgb"` (Pillow, converted to RGB: torchvision's default loader), `"hf"` / `"hf:MODE"` (Pillow in the
            file's own or the given mode, with the EXIF rotation applied: Hugging Face `Image`), or `"pil"` (Pillow alone).
    """

    data: bytes
    decoder: str


class DigestMemory(Protocol):
    """Remembers content digests, so that an unchanged file or table is read once. See `cache/digests.py`."""

    def file(self, path: str | Path) -> str:
        """Hexadecimal digest of a file's content, remembered under its path, size and modification time."""
        ...

    def files(self, paths: list[str]) -> list[str]:
        """The same for many files, in order."""
        ...

    def recall(self, key: str) -> str | None:
        """The digest remembered under a key, or None."""
        ...

    def remember(self, key: str, digest: str) -> None:
        """Keep a digest under a key for later runs and other processes."""
        ...


@dataclass(frozen=True)
class StoreInfo:
    """What a compact set is and what it costs.

    Attributes:
        path: folder of the entry.
        kind: `"indices"` (nothing copied) or `"packed"` (self-contained).
        num_samples: M, samples kept.
        num_source_samples: N, samples of the whole dataset.
        bytes: bytes on the disk of the entry, everything included.
        content_hash: digest of the selection; equal on all ranks and across runs.
        num_classes: number of classes, or None when the targets are no classes.
        reused: whether the entry was found in the cache.
        seconds: wall time of every station that ran, by name.
        patch_keep_ratio: share of the patches of the kept samples that is stored.
        original_bytes: of the same samples as their owner stores them (files, or raw pixels); known for packed patches.
        source_bytes: likewise of the whole dataset; from evenly spaced samples when it is no folder of files.
        unpatched_bytes: of the same samples, whole, in the same codec and quality; from at most 1,000 of them.
        num_unreadable: samples of the whole dataset that could not be read and were skipped, with `on_error="skip"`.
    """

    path: str
    kind: str
    num_samples: int
    num_source_samples: int
    bytes: int
    content_hash: str
    num_classes: int | None = None
    reused: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    patch_keep_ratio: float = 1.0
    original_bytes: int | None = None
    source_bytes: int | None = None
    unpatched_bytes: int | None = None
    num_unreadable: int = 0

    @property
    def data_keep_ratio(self) -> float:
        """Share of the data that is kept: samples kept over samples there were, times the share of their patches."""
        return self.num_samples / self.num_source_samples * self.patch_keep_ratio

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


ImageCodec = Literal["raw", "png", "jpeg", "webp"]
# what the dataset delivered: Pillow, numpy [H, W] or [H, W, C], torch [H, W] or [C, H, W]; with one explicit channel
ImageLayout = Literal["pil", "array", "tensor", "array_hw1", "tensor_1hw"]
CHANNELS = {"L": 1, "RGB": 3}
# of a whole image: one may claim any size while it keeps few patches, and this bounds the memory it takes
MAX_PIXELS = 1 << 27


@dataclass(frozen=True)
class Grid:
    """The patches of an image.

    Attributes:
        height: of the image, in pixels.
        width: of the image, in pixels.
        patch_size: P, side of a patch in pixels.
    """

    height: int
    width: int
    patch_size: int

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.patch_size) < 1:
            raise PatchError(f"an image and its patches need at least one pixel, got {self}")

    @property
    def rows(self) -> int:
        """Patches from top to bottom, ceil(H / P)."""
        return -(-self.height // self.patch_size)

    @property
    def columns(self) -> int:
        """Patches from left to right, ceil(W / P)."""
        return -(-self.width // self.patch_size)

    @property
    def num_patches(self) -> int:
        """L."""
        return self.rows * self.columns


@dataclass(frozen=True)
class PatchedImage:
    """An 8-bit image of which some patches are kept. The grid is that of `records.PatchChoice`.

    Attributes:
        height: of the whole image in pixels.
        width: likewise.
        mode: `"RGB"` or `"L"`.
        layout: what the dataset's own image was, so that decoding gives the same type, shape and dtype.
        patch_size: P, side of a patch in pixels.
        mask: ceil(L / 8) bytes as `records.pack_mask` gives them: patch j is bit j % 8 of byte j // 8.
        codec: how `data` is encoded.
        data: the kept patches; empty when none is kept.
        properties: format and info of a Pillow image, see `store.values.encode_properties`.
    """

    height: int
    width: int
    mode: str
    layout: str
    patch_size: int
    mask: bytes
    codec: str
    data: bytes
    properties: bytes = b""

    def __post_init__(self) -> None:
        numbers = (self.height, self.width, self.patch_size)
        if not all(type(n) is int and n >= 1 for n in numbers) or self.height * self.width > MAX_PIXELS:
            raise StoreError(
                f"a patched image has 1 to {MAX_PIXELS} pixels and patches of at least one, got {self.height!r:.20} x "
                f"{self.width!r:.20} in patches of {self.patch_size!r:.20}: resize it, or leave its patches whole"
            )
        known = self.mode in CHANNELS and self.layout in get_args(ImageLayout) and self.codec in get_args(ImageCodec)
        if not known or (self.mode == "RGB" and self.layout in ("array_hw1", "tensor_1hw")):
            raise StoreError(
                f"a patched image cannot be {self.mode!r:.20}, {self.layout!r:.20}, {self.codec!r:.20}: the modes are "
                f"{', '.join(CHANNELS)}, the layouts {', '.join(get_args(ImageLayout))}, "
                f"the codecs {', '.join(get_args(ImageCodec))}"
            )
        bits = int.from_bytes(self.mask, "little")
        if len(self.mask) != -(-self.num_patches // 8) or bits >> self.num_patches:
            raise StoreError(
                f"a mask of {len(self.mask)} bytes does not fit the {self.num_patches} patches of its image"
            )

    @property
    def grid(self) -> Grid:
        """The patches of the whole image."""
        return Grid(self.height, self.width, self.patch_size)

    @property
    def num_patches(self) -> int:
        """L."""
        return self.grid.num_patches

    @cached_property
    def num_kept(self) -> int:
        """Patches that are kept, k."""
        return int.from_bytes(self.mask, "little").bit_count()

    def mask_tensor(self) -> Tensor:
        """Mask bool [L], True where a patch is kept."""
        packed = torch.tensor(list(self.mask), dtype=torch.uint8)
        return unpack_mask(packed, self.num_patches)
