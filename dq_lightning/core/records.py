"""Frozen records that the stations pass to each other. Stations share nothing else."""

import hashlib
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.core.errors import DQError, PatchError, StoreError
from dq_lightning.core.notebook import facts_as_html


@dataclass(frozen=True, eq=False)
class Features:
    """Feature vectors of N samples, made by an encoder.

    Attributes:
        embedding: floating tensor [N, D].
        head_gradient: floating tensor [N, C], the gradient of the loss with respect to the logits, or None. If it is
            given, samples are compared by the last layer's gradient `g (x) [1, h]`, whose inner product is
            `(g_i . g_j)(1 + h_i . h_j)`.
        unreadable: int64 [U], ascending positions of the samples that could not be read and were skipped; their rows
            are zero.

    Raises:
        DQError: a tensor is not a floating matrix, or the two tensors differ in their number of rows.

    Example:
        >>> import torch
        >>> features = Features(torch.rand(100, 16), head_gradient=torch.rand(100, 10))
        >>> len(features)
        100
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
        values: int64 [N], 0 <= value < num_classes; if `unlabeled` is True, the value `num_classes` means "no label".
        names: name of each class, if the dataset knows the names.
        unlabeled: whether some samples have no label. These samples form a group of their own, which is not a class.
        are_classes: whether a network can be asked for the values; False where they only group the samples, as ranges
            of a number do, or the rarest labels of samples that have several.
        members: bool [N, C], all labels of each sample, where samples may have several; else None.
    """

    values: Tensor
    names: tuple[str, ...] | None = None
    unlabeled: bool = False
    are_classes: bool = True
    members: Tensor | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes: the number of names if the dataset lists them, otherwise the largest label plus one."""
        if self.names is not None:
            return len(self.names)
        groups = int(self.values.max()) + 1 if len(self.values) else 0
        return groups - self.unlabeled


@dataclass(frozen=True, eq=False)
class Suspects:
    """Samples that were left out because of their scores, the lowest score first.

    Attributes:
        index: int64 [S], positions in the source.
        score: float64 [S], scores; higher is better.
        label: int64 [S], class of each sample as the dataset gives it; -1 where there are no classes.
        suggested: int64 [S], class that the features suggest in its place; -1 where the scores are not margins.
        names: name of each class, if the dataset knows the names.
        noise: estimated share of wrong labels in the whole dataset, if it was estimated.

    Example:
        >>> import torch
        >>> one = torch.tensor([7])
        >>> Suspects(one, torch.tensor([-0.5]), torch.tensor([0]), torch.tensor([1]), ("cat", "dog"), 0.02)
        Suspects(1 sample, about 2.0% of all labels wrong; first: position 7, score -0.50, label cat, suggested dog)
    """

    index: Tensor
    score: Tensor
    label: Tensor
    suggested: Tensor
    names: tuple[str, ...] | None = None
    noise: float | None = None

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        """Describe the suspects in one line: how many there are, and the one with the lowest score."""
        text = f"{len(self):,} sample{'' if len(self) == 1 else 's'}"
        if self.noise is not None:
            text += f", about {self.noise:.1%} of all labels wrong"
        if len(self):
            text += f"; first: position {int(self.index[0])}, score {float(self.score[0]):.2f}"
            for word, numbers in (("label", self.label), ("suggested", self.suggested)):
                number = int(numbers[0])
                if number >= 0:
                    text += f", {word} {self.names[number] if self.names is not None else number}"
        return f"Suspects({text})"


@dataclass(frozen=True, eq=False)
class Duplicates:
    """Near-duplicates that were left out, the closest pair first.

    Attributes:
        pairs: int64 [P, 2], positions in the source: a sample that was left out, and the sample that stays in its place.
        cosine: float64 [P], cosines of their features.

    Example:
        >>> import torch
        >>> Duplicates(torch.tensor([[7, 3]]), torch.tensor([0.99]))
        Duplicates(1 pair; closest: position 7 like 3, cosine 0.990)
    """

    pairs: Tensor
    cosine: Tensor

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        """Describe the near-duplicates in one line: how many pairs there are, and the closest one."""
        text = f"{len(self):,} pair{'' if len(self) == 1 else 's'}"
        if len(self):
            left, stays = self.pairs[0].tolist()
            text += f"; closest: position {left} like {stays}, cosine {float(self.cosine[0]):.3f}"
        return f"Duplicates({text})"


@dataclass(frozen=True, eq=False)
class Bins:
    """The bin of each of N samples, and the order in which the samples were picked.

    Attributes:
        assignment: int16 [N], bin of each sample, 0 <= bin < num_bins; -1 for a sample that was left out because it is
            a near-duplicate, has a low score, or could not be read.
        rank: int32 [N], order in which a sample was picked inside its group and bin, from 0; -1 for a sample that was
            left out.
        gain: float32 [N], gain of the objective when the sample was picked.
        group: int32 [N], class or stratum of each sample, or its cluster if bins were made in clusters; all zero without
            labels and clusters.
        num_bins: K, the number of bins; 0 stands for the largest assignment plus one.
        num_unreadable: number of samples that could not be read and were skipped.
        suspects: samples that were left out because of their scores; None if none were looked for.
        score: float64 [N], scores that `select` draws by, higher is better; None where it draws without scores.

    Example:
        >>> import torch
        >>> from dq_lightning import make_bins
        >>> bins = make_bins(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), num_bins=2)
        >>> bins.assignment.tolist(), bins.rank.tolist()
        ([1, 0, 1, 0], [0, 0, 1, 1])
    """

    assignment: Tensor
    rank: Tensor
    gain: Tensor
    group: Tensor
    num_bins: int = 0
    num_unreadable: int = 0
    suspects: Suspects | None = None
    score: Tensor | None = None

    def __post_init__(self) -> None:
        if self.num_bins == 0:
            object.__setattr__(self, "num_bins", int(self.assignment.max()) + 1 if len(self.assignment) else 1)

    def __len__(self) -> int:
        return len(self.assignment)

    def _facts(self) -> dict[str, int | None]:
        left_out = int((self.assignment < 0).sum())
        return {
            "samples": len(self),
            "bins": self.num_bins,
            "groups": len(np.unique(self.group[self.assignment >= 0].cpu().numpy())),
            "left out": left_out or None,
        }

    def __repr__(self) -> str:
        """Describe the bins in one line."""
        return f"Bins({_listed(self._facts())})"

    def _repr_html_(self) -> str:
        """Return the table that notebooks show."""
        return facts_as_html("Bins", self._facts())


@dataclass(frozen=True, eq=False)
class Selection:
    """The samples that are kept.

    Attributes:
        index: int64 [M], ascending positions in the source.
        bin: int16 [M], bin that each kept sample came from.
        num_unreadable: number of samples of the source that could not be read and were skipped.
        suspects: samples that were left out because of their scores; None if none were looked for.

    Example:
        >>> import torch
        >>> kept = Selection(index=torch.tensor([2, 5, 7]), bin=torch.tensor([0, 0, 1], dtype=torch.int16))
        >>> len(kept), kept.content_hash()[:8]
        (3, '25be7bad')
    """

    index: Tensor
    bin: Tensor
    num_unreadable: int = 0
    suspects: Suspects | None = None

    def __len__(self) -> int:
        return len(self.index)

    def _facts(self) -> dict[str, int | None]:
        return {
            "samples": len(self),
            "bins": len(np.unique(self.bin.cpu().numpy())),
            "unreadable": self.num_unreadable or None,
        }

    def __repr__(self) -> str:
        """Describe the selection in one line."""
        return f"Selection({_listed(self._facts())}, content hash {self.content_hash()[:8]})"

    def _repr_html_(self) -> str:
        """Return the table that notebooks show."""
        return facts_as_html("Selection", self._facts() | {"content hash": self.content_hash()[:8]})

    def content_hash(self) -> str:
        """Hexadecimal SHA-256 of index and bin, equal for two selections exactly if they hold the same samples."""
        digest = hashlib.sha256()
        digest.update(self.index.to(torch.int64).numpy().tobytes())
        digest.update(self.bin.to(torch.int16).numpy().tobytes())
        return digest.hexdigest()


def _listed(facts: dict[str, int | None]) -> str:
    return ", ".join(f"{value:,} {name}" for name, value in facts.items() if value is not None)


@dataclass(frozen=True, eq=False)
class PatchChoice:
    """The kept patches of M images, which may differ in size.

    The patches of an image are numbered row by row over its grid of ceil(H / P) x ceil(W / P); those at the right and
    lower edge are smaller if P does not divide the size.

    Attributes:
        patch_size: P, side of a patch in pixels.
        sizes: int32 [M, 2], height and width of every image in pixels.
        packed: uint8 [sum of ceil(L_i / 8)], concatenated masks of all images, each in the format of `pack_mask`.

    Raises:
        DQError: `sizes` has another shape, the patch size is below 1, or `packed` does not have the length that the
            sizes need.

    Example:
        >>> import torch
        >>> packed = torch.tensor([0b1101, 0b0100], dtype=torch.uint8)  # the masks of two images of 2 x 2 patches
        >>> choice = PatchChoice(4, torch.tensor([[8, 8], [8, 8]], dtype=torch.int32), packed)
        >>> choice.kept(0).tolist(), choice.counts.tolist(), choice.keep_ratio
        ([0, 2, 3], [3, 1], 0.5)
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
        """Number of patches L of every image, int64 [M]."""
        return (-(-self.sizes.long() // self.patch_size)).prod(1)

    @cached_property
    def offsets(self) -> Tensor:
        """Position in `packed` where the mask of every image begins, int64 [M + 1]; the last one is its length."""
        return torch.cat([torch.zeros(1, dtype=torch.int64), (-(-self.num_patches // 8)).cumsum(0)])

    def mask(self, position: int) -> Tensor:
        """Mask of image number `position`, bool [L]: True for a patch that is kept."""
        first, last = int(self.offsets[position]), int(self.offsets[position + 1])
        return torch.from_numpy(unpack_mask(self.packed[first:last].numpy(), int(self.num_patches[position])))

    def kept(self, position: int) -> Tensor:
        """Numbers of the kept patches of image number `position`, int64 [k], ascending."""
        return self.mask(position).nonzero().flatten()

    @cached_property
    def counts(self) -> Tensor:
        """Number of kept patches of every image, int64 [M]."""
        bits = torch.tensor([byte.bit_count() for byte in range(256)])
        running = torch.cat([torch.zeros(1, dtype=torch.int64), bits[self.packed.long()].cumsum(0)])
        return running[self.offsets].diff()

    @property
    def keep_ratio(self) -> float:
        """Share of the patches of all images that is kept, 0 to 1."""
        return int(self.counts.sum()) / max(1, int(self.num_patches.sum()))

    def content_hash(self) -> str:
        """Hexadecimal SHA-256, equal exactly if the same patches of images of the same sizes are kept."""
        digest = hashlib.sha256(str(self.patch_size).encode())
        digest.update(self.sizes.to(torch.int32).numpy().tobytes())
        digest.update(self.packed.numpy().tobytes())
        return digest.hexdigest()


def pack_mask(mask: Tensor) -> bytes:
    r"""Pack the mask of one image, bool [L], into ceil(L / 8) bytes, the form that masks have on the disk.

    Patch j becomes bit j % 8 of byte j // 8, where bit 0 is the least significant one. Unused bits are 0.

    >>> pack_mask(torch.tensor([True, False, True]))
    b'\x05'
    """
    return np.packbits(mask.cpu().numpy(), bitorder="little").tobytes()


def unpack_mask(packed: bytes | NDArray[np.uint8], num_patches: int) -> NDArray[np.bool_]:
    """Return masks as booleans [..., L], the form that they have in memory, True for a patch that is kept.

    This inverts `pack_mask`. Given are the bytes of one mask, or uint8 [..., ceil(L / 8)] of several.
    """
    array = packed if isinstance(packed, np.ndarray) else np.frombuffer(packed, np.uint8)
    return np.unpackbits(array, axis=-1, count=num_patches, bitorder="little").view(np.bool_)


@dataclass(frozen=True)
class EncodedImage:
    """An image file as bytes, and how the dataset decodes it to pixels.

    Attributes:
        data: content of the encoded file (JPEG, PNG, WebP, ...).
        decoder: `"pil_rgb"` (Pillow, converted to RGB: torchvision's default loader), `"hf"` / `"hf:MODE"` (Pillow in
            the file's own mode or the given one, with the EXIF rotation applied: Hugging Face `Image`), or `"pil"`
            (Pillow alone).
    """

    data: bytes
    decoder: str


@dataclass(frozen=True)
class StoredImage:
    """A whole image as a file, and how to make the dataset's own image of it.

    Attributes:
        data: content of the image file.
        decoder: how the file is decoded, as in `EncodedImage`.
        layout: type and layout of the dataset's own image.
        properties: encoded format and info of a Pillow image, see `packed.values.encode_properties`; None where the
            decoded file has the right ones itself.
    """

    data: bytes
    decoder: str
    layout: str = "pil"
    properties: bytes | None = None


@dataclass(frozen=True)
class StoreInfo:
    """What a compact set contains and how much space and time it took.

    Attributes:
        path: folder of the cache entry.
        kind: `"indices"` (no samples are copied) or `"packed"` (self-contained).
        num_samples: M, number of samples kept.
        num_source_samples: N, number of samples of the whole dataset.
        bytes: size of the entry on the disk in bytes, all files included.
        content_hash: digest of the selection; equal on all ranks and across runs.
        num_classes: number of classes; None if the targets are not classes.
        reused: whether the entry was found in the cache.
        seconds: wall time in seconds of every station that ran, by the name of the station.
        patch_keep_ratio: share of the patches of the kept samples that is stored, 0 to 1.
        original_bytes: size of the kept samples in the original dataset (its files, or raw pixels) in bytes; known for
            packed patches, otherwise None.
        source_bytes: size of the whole dataset in bytes, measured in the same way, or None; estimated from evenly
            spaced samples if the dataset is not a folder of files.
        unpatched_bytes: size in bytes that the kept samples would have if all their patches were stored in the same
            codec and quality, or None; estimated from at most 1,000 of them.
        num_unreadable: number of samples of the whole dataset that could not be read and were skipped, with
            `on_error="skip"`.
        encoding: how the images were encoded anew: `codec`, `quality`, `longest_side` in pixels, `psnr` in dB (estimated
            from a few images, of the kept pixels alone where patches are dropped; None if nothing was lost or it was
            not measured), and the budget `max_bytes` in bytes or None; None for a set whose samples are stored as the
            dataset has them.
        suspects: samples of the whole dataset that were left out because of their scores, such as those whose labels
            seem wrong; None if none were looked for.
        encoder: the encoder that made the features, by its full name, such as the timm name with its weights; None where
            no features were needed.
        encoder_digest: digest of the encoder's weights, preprocessing and architecture, or None.

    Example:
        >>> info = StoreInfo("/cache/5-store/0f", "packed", 125, 1000, 1 << 20, "9d", patch_keep_ratio=0.8)
        >>> info.data_keep_ratio
        0.1
        >>> info
        StoreInfo(125 of 1,000 samples, packed, 1,048,576 bytes, 80.0% of the patches, /cache/5-store/0f)
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
    encoding: dict[str, Any] | None = None
    suspects: Suspects | None = field(default=None, compare=False)
    encoder: str | None = None
    encoder_digest: str | None = None

    def __repr__(self) -> str:
        """Describe the set in one line; `to_dict` has all facts."""
        patches = f", {self.patch_keep_ratio:.1%} of the patches" if self.patch_keep_ratio < 1 else ""
        encoder = f", encoder {self.encoder}" if self.encoder else ""
        return (
            f"StoreInfo({self.num_samples:,} of {self.num_source_samples:,} samples, {self.kind}, {self.bytes:,} bytes"
            f"{patches}{encoder}, {self.path})"
        )

    def _repr_html_(self) -> str:
        """Return the table that notebooks show."""
        facts = {
            "samples": f"{self.num_samples:,} of {self.num_source_samples:,}",
            "patches": f"{self.patch_keep_ratio:.1%}" if self.patch_keep_ratio < 1 else None,
            "bytes": self.bytes,
            "stored as": self.kind,
            "classes": self.num_classes,
            "encoder": self.encoder,
            "suspects left out": None if self.suspects is None else len(self.suspects),
            "content hash": self.content_hash[:8],
            "folder": self.path,
        }
        return facts_as_html("Compact set", facts)

    @property
    def data_keep_ratio(self) -> float:
        """Share of the data that is kept: kept samples over all samples, times the share of their patches."""
        return self.num_samples / self.num_source_samples * self.patch_keep_ratio

    def report(
        self, path: str | Path = "report.html", *, dataset: Any = None, cache_dir: str | Path | None = None
    ) -> Path:
        """Write a page that shows what was kept, what was left, and what looks wrong: one HTML file that needs no network.

        Args:
            path: file that is written, or a folder, which gets a `report.html`.
            dataset: the dataset that the set was made from, which gives pictures and labels of what was left; without it
                the page shows of samples only those that a packed set holds.
            cache_dir: folder of the cache that holds the features and bins behind the set; None takes the cache that
                the set is in, else the default one.

        Returns:
            The path of the file.

        Raises:
            StoreError: the set cannot be read, the dataset is another one, or the file cannot be written.
        """
        # The report is made from folders above this one, so it is imported by name and at its first use.
        made: Path = import_module("dq_lightning.report.make").report_of_set(
            self.path, path, dataset=dataset, cache_dir=cache_dir, seconds=self.seconds
        )
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as a dict of plain values, which JSON can hold; of suspects only their number."""
        plain = asdict(replace(self, suspects=None))
        plain["suspects"] = None if self.suspects is None else len(self.suspects)
        return plain


ImageCodec = Literal["raw", "png", "jpeg", "webp"]
# Type and layout of the dataset's own image: Pillow, numpy [H, W] or [H, W, C], torch [H, W] or [C, H, W]. The last two
# have one explicit channel.
ImageLayout = Literal["pil", "array", "tensor", "array_hw1", "tensor_1hw"]
CHANNELS = {"L": 1, "RGB": 3}
# Upper bound on the pixels of a whole image. A stored image may claim any size while it keeps few patches, and the
# bound limits the memory that decoding takes.
MAX_PIXELS = 1 << 27


@dataclass(frozen=True)
class Grid:
    """The grid of patches over an image.

    Attributes:
        height: height of the image in pixels.
        width: width of the image in pixels.
        patch_size: P, side of a patch in pixels.

    Raises:
        PatchError: one of the three is below 1.

    >>> grid = Grid(height=32, width=30, patch_size=4)
    >>> grid.rows, grid.columns, grid.num_patches
    (8, 8, 64)
    """

    height: int
    width: int
    patch_size: int

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.patch_size) < 1:
            raise PatchError(f"an image and its patches need at least one pixel, got {self}")

    @property
    def rows(self) -> int:
        """Number of rows of patches, ceil(H / P)."""
        return -(-self.height // self.patch_size)

    @property
    def columns(self) -> int:
        """Number of columns of patches, ceil(W / P)."""
        return -(-self.width // self.patch_size)

    @property
    def num_patches(self) -> int:
        """L, the number of patches of the image."""
        return self.rows * self.columns


@dataclass(frozen=True)
class PatchedImage:
    """An 8-bit image of which only some patches are stored. Its patches are numbered as in `records.PatchChoice`.

    Attributes:
        height: height of the whole image in pixels.
        width: width of the whole image in pixels.
        mode: `"RGB"` or `"L"`.
        layout: type and layout of the dataset's own image, so that decoding gives the same type, shape and dtype.
        patch_size: P, side of a patch in pixels.
        mask: ceil(L / 8) bytes in the format of `records.pack_mask`: patch j is bit j % 8 of byte j // 8.
        codec: format in which `data` is encoded.
        data: the encoded kept patches; empty if no patch is kept.
        properties: encoded format and info of a Pillow image, see `packed.values.encode_properties`.

    Raises:
        StoreError: sizes, mode, layout, codec or mask are not valid, or do not fit together.
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
        """The grid of patches over the whole image."""
        return Grid(self.height, self.width, self.patch_size)

    @property
    def num_patches(self) -> int:
        """L, the number of patches of the whole image."""
        return self.grid.num_patches

    @cached_property
    def num_kept(self) -> int:
        """k, the number of kept patches."""
        return int.from_bytes(self.mask, "little").bit_count()

    def mask_tensor(self) -> Tensor:
        """Mask, bool [L]: True for a patch that is kept."""
        return torch.from_numpy(unpack_mask(self.mask, self.num_patches))
