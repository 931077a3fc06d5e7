"""Reader of a packed store: a map-style dataset that verifies each sample as it reads it, and never changes the files.

A reader belongs to one store, not to a path. Checksums, offsets and positions are held in memory. Columns and values
are read by position from open files (see `packed/open_files.py`) and compared with those checksums. So if the files of
an open store are truncated, or overwritten with those of another store, the next sample that differs raises an error. A
pickled reader holds the path and the digest of its store: the process that unpickles it opens the path again and
refuses another store. Forked processes can share the open files, because reading by position does not move a file
offset.
"""

import operator
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dq_lightning.cache import files
from dq_lightning.cache.manifest import Damage, check_file, request_full_check
from dq_lightning.cache.tensors import TENSORS_FILE
from dq_lightning.core.config import VerifyPolicy
from dq_lightning.core.errors import DQError, StoreError
from dq_lightning.core.fields import check_choice, check_no_address
from dq_lightning.core.records import PatchedImage
from dq_lightning.packed.columns import (
    FILE_KIND,
    STREAM_KIND,
    VALUE_KIND,
    WITHOUT_COLUMN,
    Leaf,
    leaf_from_json,
    leaf_reader,
)
from dq_lightning.packed.description import MAX_COLUMNS, check_description
from dq_lightning.packed.names import Names, PositionNames
from dq_lightning.packed.npy import npy_header
from dq_lightning.packed.open_files import OpenFiles, Row, read_piece
from dq_lightning.packed.patch_batches import BatchDecoder
from dq_lightning.packed.patch_stream import read_stream, take_streams
from dq_lightning.packed.patches import map_patched, mean_filled, patched_images
from dq_lightning.packed.small_arrays import SmallArrays, small_from_bytes
from dq_lightning.packed.trees import tree_builder, tree_from_json
from dq_lightning.packed.values import (
    BYTES_PER_PIXEL,
    check_decoded_size,
    decode_value,
    most_decoded_bytes,
    patched_bytes,
)
from dq_lightning.packed.whole_images import FileReader
from dq_lightning.packed.writer import SMALL_FILE, STORE_FILE, VERSION_SQUEEZED, holds_patches

Patches = Literal["mean", "packed"]
# Errors that damaged or hostile bytes may raise while values are decoded from them.
DECODING_ERRORS = (StoreError, ValueError, TypeError, LookupError, RuntimeError, OverflowError, MemoryError)


class PackedDataset(Dataset[Any]):
    """Map-style dataset of the samples in a packed store, in the form in which they were written.

    Attributes:
        path: folder of the store; a store may be moved while it is not open.
        digest: hexadecimal sha256 of store.json, which holds the digests of all other files; it identifies the content.
        index: int64 [M], positions of the samples in the source.
        bin: int16 [M], bin of each sample.
        ids: M names of the samples.
        attributes: plain JSON that was given to the writer.
        has_patches: whether the store has patched images, which are images that may lack some patches.

    Example:
        >>> import tempfile, torch
        >>> from dq_lightning import quantize
        >>> dataset = [(torch.full((3, 8, 8), i / 40), i % 2) for i in range(40)]
        >>> with tempfile.TemporaryDirectory() as cache:
        ...     info = quantize(dataset, {"store": "packed"}, indices=[3, 1, 7], cache_dir=cache, progress=False)
        ...     store = PackedDataset(info.path)
        ...     len(store), store.index.tolist(), store[0][1]
        (3, [1, 3, 7], 1)
    """

    digest: str
    index: Tensor
    bin: Tensor
    ids: Sequence[str]
    attributes: dict[str, Any]
    has_patches: bool

    def __init__(
        self,
        path: str | Path,
        *,
        finisher: Callable[[int, Any], Any] | None = None,
        verify: VerifyPolicy = "size",
        patches: Patches = "mean",
    ) -> None:
        """Open a store.

        Args:
            path: folder of the store.
            finisher: function that is called with (position, sample); its result is returned in place of the sample.
            verify: "size" checks the sizes of all files and the content of the small files when the store is opened,
                and each sample's checksum when it is read; "hash" also checks the content of all files when the store
                is opened; "off" checks only what keeps the use of memory bounded.
            patches: how an image with dropped patches is returned: "mean" gives the type of image that the dataset
                delivered, with the mean colour in the dropped patches; "packed" gives the `PatchedImage`.

        Raises:
            StoreError: if there is no store, or if it is damaged or of another format.
        """
        check_choice("PackedDataset", "verify", verify, VerifyPolicy)
        check_choice("PackedDataset", "patches", patches, Patches)
        check_no_address(path)
        self.path = Path(path).absolute()
        self.finisher = finisher
        self.verify: VerifyPolicy = verify
        self.patches: Patches = patches
        self._open()

    def _open(self) -> None:
        self._files = OpenFiles(self.path)
        if (self.path / TENSORS_FILE).exists() and not (self.path / STORE_FILE).exists():
            raise StoreError(
                f"{self.path} holds indices, not samples: load_selection(path).index are their positions in the original "
                "dataset. Quantize with store='packed' to get a set that stands alone"
            )
        try:
            description = files.read_sealed(self.path / STORE_FILE)
            self.digest = files.sealed_digest(description)
            self._num_samples, self.attributes = check_description(self.path, description)
            self.has_patches = holds_patches(description)
            if self.verify == "hash":
                for name, facts in description["files"].items():
                    check_file(self.path, name, facts, hashed=True)
            self._narrow: dict[int, NDArray[np.uint8]] = {}
            squeezed = description["version"] == VERSION_SQUEEZED
            small = self._squeezed_arrays(description) if squeezed else self._plain_arrays(description["files"])
            self.index, self.bin = torch.from_numpy(small.index), torch.from_numpy(small.bin)
            self.ids = PositionNames(small.index)
            if small.ids is not None and small.id_offsets is not None:
                self.ids = Names(small.ids.data, _numbers(small.id_offsets, "q"))
            self._offsets, self._checksums = _numbers(small.offsets, "q"), _numbers(small.checksums, "I")
            self._set_columns(description)
        except StoreError:
            raise
        except (OSError, DQError, MemoryError) as error:
            raise self._unusable(str(error) or type(error).__name__) from error

    def _unusable(self, reason: str) -> StoreError:
        request_full_check(self.path)
        remedy = "A store in the cache is made again by the next run; copy any other one anew"
        return StoreError(f"the packed store {self.path} cannot be used: {reason}. {remedy}")

    def _plain_arrays(self, listed: dict[str, Any]) -> SmallArrays:
        """Read the small arrays, each from a file of its own, whose digest is compared with the one in store.json."""

        def read(name: str, size: int, header: bytes = b"") -> NDArray[np.uint8]:
            return self._files.read(name, size, header, None if self.verify == "off" else listed[name]["sha256"])

        def array(name: str, dtype: str, rows: int) -> NDArray[Any]:
            return read(name, rows * np.dtype(dtype).itemsize, npy_header(dtype, (rows,))).view(dtype)

        return SmallArrays(
            index=array("index.npy", "<i8", self._num_samples),
            bin=array("bin.npy", "<i2", self._num_samples),
            offsets=array("value_offsets.npy", "<i8", self._num_samples + 1),
            checksums=array("checksums.npy", "<u4", self._num_samples),
            id_offsets=array("id_offsets.npy", "<i8", self._num_samples + 1),
            ids=read("ids.bin", listed["ids.bin"]["size"]),
        )

    def _squeezed_arrays(self, description: dict[str, Any]) -> SmallArrays:
        """Read the small arrays and the narrow columns from their one file."""
        facts, squeezed = description["files"][SMALL_FILE], description["squeezed"]
        sha256 = None if self.verify == "off" else facts["sha256"]
        data = self._files.read(SMALL_FILE, facts["size"], sha256=sha256)
        numbers = squeezed["columns"]
        widths = [leaf_from_json(description["columns"][number]).row_bytes for number in numbers]
        try:
            small = small_from_bytes(data.data, self._num_samples, squeezed["ids_bytes"], widths)
        except StoreError as error:
            raise Damage(f"{SMALL_FILE}: {error}") from error
        self._narrow = dict(zip(numbers, small.columns, strict=True))
        return small

    def _set_columns(self, description: dict[str, Any]) -> None:
        described = description.get("columns")
        if not isinstance(described, list) or len(described) > MAX_COLUMNS:
            raise Damage(f"store.json has no columns, or more than {MAX_COLUMNS:,}")
        leaves = [leaf_from_json(value) for value in described]
        self._build = tree_builder(tree_from_json(description.get("tree"), len(leaves)))
        self._readers = [leaf_reader(leaf) for leaf in leaves]
        self._value_leaves = [number for number, leaf in enumerate(leaves) if leaf.kind == VALUE_KIND]
        # Each entry holds the number of the leaf, and the function that decodes its images.
        self._streams = [
            (number, FileReader(leaf) if leaf.kind == FILE_KIND else _stream_reader(leaf))
            for number, leaf in enumerate(leaves)
            if leaf.kind in (STREAM_KIND, FILE_KIND)
        ]
        # Each entry holds the number of the leaf, a function that reads the row at a position, and the decoder of this
        # row.
        self._columns: list[tuple[int, Callable[[int], Row], Callable[[Any], Any]]] = []
        # Each entry holds the place among the columns, the number of the leaf, and the decoder for the rows of a batch.
        self._batched: list[tuple[int, int, BatchDecoder]] = []
        together = all(BatchDecoder.fits(leaf) for leaf in leaves if leaf.kind == "patches")
        for number, leaf in enumerate(leaves):
            if leaf.kind in WITHOUT_COLUMN:
                continue
            if number in self._narrow:
                self._columns.append((number, _rows_of(self._narrow[number]), self._readers[number]))
                continue
            name = f"column-{number}.npy"
            dtype, shape = leaf.column_type()
            header = npy_header(dtype, (self._num_samples, *shape))
            if name not in description["files"]:
                raise Damage(f"store.json does not name {name}")
            if together and BatchDecoder.fits(leaf):
                self._batched.append((len(self._columns), number, BatchDecoder(leaf)))
            rows = self._files.rows(name, self._num_samples, leaf.row_bytes, header)
            self._columns.append((number, rows, self._readers[number]))
        self._num_leaves = len(leaves)
        self._values_size = description["files"]["values.bin"]["size"]
        self._values = self._files.open("values.bin", self._values_size)
        files.share(self._values)

    def __len__(self) -> int:
        return self._num_samples

    def _position(self, position: int) -> int:
        at = operator.index(position)
        if at < 0:
            at += self._num_samples
        if not 0 <= at < self._num_samples:
            raise IndexError(f"position {position} of {self._num_samples} samples")
        return at

    def __getitem__(self, position: int) -> Any:
        at = self._position(position)
        return self._finished(at, *self._verified(at), {})

    def __getitems__(self, positions: Sequence[int]) -> list[Any]:
        """Return the samples of a batch in order; DataLoader calls this method."""
        if not self._batched or self.patches != "mean":
            return [self[position] for position in positions]
        taken = [self._position(position) for position in positions]
        stored = [self._verified(at) for at in taken]
        decoded = {number: decode([rows[place] for rows, _ in stored]) for place, number, decode in self._batched}
        return [
            self._finished(at, *stored[i], {n: values[i] for n, values in decoded.items() if values[i] is not None})
            for i, at in enumerate(taken)
        ]

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(self._num_samples))

    def patched(self, position: int) -> PatchedImage:
        """Return the first patched image of a sample, with its kept patches; the finisher is not applied.

        Raises:
            StoreError: if no image of this sample was stored by patches, or if the sample is damaged.
        """
        at = self._position(position)
        found = patched_images(self._decoded(at, *self._verified(at), {}))
        if not found:
            raise StoreError(f"sample {at} ({self.ids[at]}) of {self.path} has no image that was stored by patches")
        return found[0]

    def _finished(self, at: int, rows: list[Row], value: Row, ready: dict[int, Any]) -> Any:
        """Decode a sample from its verified bytes and finish it; `ready` holds the leaves that are decoded already."""
        sample = self._decoded(at, rows, value, ready)
        # A sample whose value is empty has no patched images except those in `ready`, which are filled already.
        alone = 0 < len(self._batched) == len(ready) and not len(value)
        if self.has_patches and self.patches == "mean" and not alone:
            try:
                check_decoded_size(patched_bytes(patched_images(sample)), sum(map(len, rows)) + len(value))
                sample = map_patched(sample, mean_filled)
            except DECODING_ERRORS as error:
                raise self._unusable(f"the patches of sample {at} ({self.ids[at]}): {error}") from error
        return sample if self.finisher is None else self.finisher(at, sample)

    def _verified(self, at: int) -> tuple[list[Row], Row]:
        """Return a sample's row in each column, and its value, after comparing them with the sample's checksum."""
        try:
            rows = [row(at) for _, row, _ in self._columns]
            value = self._value(self._offsets[at], self._offsets[at + 1])
        except (Damage, OSError, OverflowError, MemoryError) as error:
            raise self._unusable(f"sample {at} ({self.ids[at]}): {error}") from error
        if self.verify != "off":
            checksum, crc32 = at & 0xFFFFFFFF, zlib.crc32
            for row in rows:
                checksum = crc32(row, checksum)
            if crc32(value, checksum) != self._checksums[at]:
                names = [f"column-{number}.npy" for number, *_ in self._columns] + ["values.bin"] * bool(value)
                raise self._unusable(f"sample {at} ({self.ids[at]}) does not match its checksum ({', '.join(names)})")
        return rows, value

    def _value(self, start: int, end: int) -> Row:
        if start == end:
            return b""
        if not 0 <= start < end <= self._values_size:
            raise Damage(f"its value is said to be at {start} to {end} of {self._values_size} bytes")
        return read_piece(self._values, end - start, start, "values.bin")

    def _decoded(self, at: int, rows: list[Row], value: Row, ready: dict[int, Any]) -> Any:
        leaves: list[Any] = [None] * self._num_leaves
        try:
            for (number, _, reader), row in zip(self._columns, rows, strict=True):
                leaves[number] = ready[number] if number in ready else reader(row)
            max_pixels = most_decoded_bytes(len(value)) // BYTES_PER_PIXEL
            rest, missing = take_streams(self._streams, leaves, bytes(value) if self._streams else value, max_pixels)
            if not rest and not self._value_leaves and not missing:
                return self._build(leaves)
            return self._with_values(leaves, rest, missing)
        except DECODING_ERRORS as error:
            raise self._unusable(f"the value of sample {at} ({self.ids[at]}): {error}") from error

    def _with_values(self, leaves: list[Any], data: Row, missing: set[int]) -> Any:
        """Decode the values that are in no column, and put them into their places among the leaves."""
        beside = decode_value(data)
        if not isinstance(beside, dict):
            raise StoreError("its values are not named by their places in the sample")
        if "whole" in beside:
            return beside["whole"]
        for number, value in beside.items():
            leaves[number] = value
        if not beside.keys() >= missing.union(self._value_leaves):
            raise StoreError("a part of the sample is missing")
        return self._build(leaves)

    def __setattr__(self, name: str, value: Any) -> None:
        # A subclass may well have transforms of its own.
        if name in ("transform", "target_transform", "transforms") and type(self) is PackedDataset:
            raise AttributeError(
                f"a packed store has no {name}, so setting it would have no effect: pass transform= to QuantizedDataModule or "
                "from_store, or let a class of your own inherit PackedDataset and apply it in __getitem__"
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("path", "digest", "finisher", "verify", "patches")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()
        self.require(state["digest"])

    def require(self, digest: str) -> None:
        """Check that this reader has opened the store with the given digest.

        Args:
            digest: expected `digest` of the store.

        Raises:
            StoreError: if the folder holds another store by now.
        """
        if self.digest != digest:
            raise StoreError(
                f"{self.path} holds another store than when it was opened first ({digest[:8]} -> {self.digest[:8]}): its files "
                "were replaced in between. Start again to train on what is there now, or put the first store back"
            )

    def __repr__(self) -> str:
        return f"PackedDataset({str(self.path)!r}, {self._num_samples} samples)"


def _rows_of(rows: NDArray[np.uint8]) -> Callable[[int], Row]:
    """Return a function that gives the bytes of a row of uint8 [M, bytes per row]."""
    held, width = (rows.reshape(-1).data if rows.size else memoryview(b"")).toreadonly(), rows.shape[1]
    return lambda at: held[at * width : (at + 1) * width]


def _stream_reader(leaf: Leaf) -> Callable[[bytes, int], tuple[Any, int]]:
    mode, layout, codec = leaf.dtype.split("/")
    facts = mode, layout, codec, leaf.shape[0]
    # The pixels of patched images are decoded, and counted, later.
    return lambda data, max_pixels: (read_stream(data, facts, leaf.shared), 0)


def _numbers(values: NDArray[Any], code: str) -> memoryview:
    """View an array as numbers that are quick to read one by one; `code` is the format character of `struct`."""
    return memoryview(values.view(np.uint8).data if len(values) else b"").cast(code)  # type: ignore[call-overload, no-any-return]
