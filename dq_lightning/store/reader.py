"""Read a packed store: a map-style dataset that verifies each sample. Touches the disk, read-only.

Columns are memory-mapped, and the sizes of their files looked at before each read; values are read by position from an open
file. So a file cut under a reader is an error and not a crash. Both are dropped when pickled and opened anew in the other
process; forked processes share them safely, since neither has a position of its own.
"""

import operator
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dq_lightning.config import VerifyPolicy
from dq_lightning.errors import DQError, StoreError
from dq_lightning.fields import check_choice
from dq_lightning.patch_records import PatchedImage
from dq_lightning.store import files
from dq_lightning.store.columns import STREAM_KIND, VALUE_KIND, leaf_from_json, leaf_reader
from dq_lightning.store.description import SMALL_FILES, check_description
from dq_lightning.store.manifest import Damage, cast_doubt, check_file
from dq_lightning.store.mapped import MappedFiles
from dq_lightning.store.names import Names
from dq_lightning.store.npy import npy_header
from dq_lightning.store.packed import FORMAT_VERSION, STORE_FILE
from dq_lightning.store.patch_batches import BatchDecoder
from dq_lightning.store.patch_stream import facts_of, take_streams
from dq_lightning.store.patched import map_patched, mean_filled, patched_images
from dq_lightning.store.tensors import TENSORS_FILE
from dq_lightning.store.trees import tree_builder, tree_from_json
from dq_lightning.store.values import decode_value

Patches = Literal["mean", "packed"]
# of the small files, what each sample is read with
READ_EACH_TIME = ("checksums.npy", "value_offsets.npy")


class PackedDataset(Dataset[Any]):
    """The samples of a packed store, as they were written.

    Attributes:
        path: folder of the store; it may be moved before it is opened.
        index: int64 [M], positions in the source.
        bin: int16 [M], the bin of each sample.
        ids: names of the samples.
        attributes: what the writer kept.
        has_patches: whether images may have lost patches.
    """

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
            path: folder.
            finisher: called with (position, sample); its answer is delivered.
            verify: "size": sizes and small files when opened, each sample's checksum when read; "hash": whole files when
                opened, too; "off": nothing but what keeps memory bounded.
            patches: where patches were dropped, deliver the image as its owner had it, with the mean colour there ("mean"), or
                the `PatchedImage` itself ("packed").

        Raises:
            StoreError: no store, damaged, or of another format.
        """
        check_choice("PackedDataset", "verify", verify, VerifyPolicy)
        check_choice("PackedDataset", "patches", patches, Patches)
        self.path = Path(path).absolute()
        self.finisher = finisher
        self.verify: VerifyPolicy = verify
        self.patches: Patches = patches
        self._open()

    def _open(self) -> None:
        self._mapped = MappedFiles(self.path)
        if (self.path / TENSORS_FILE).exists() and not (self.path / STORE_FILE).exists():
            raise StoreError(
                f"{self.path} holds indices, not samples: load_selection(path).index are their positions in the original "
                "dataset. Quantize with store='packed' to get a set that stands alone"
            )
        try:
            description = files.read_sealed(self.path / STORE_FILE)
            self._num_samples, self.attributes = check_description(self.path, description)
            self.has_patches = description["version"] == FORMAT_VERSION
            small = {name: self._read_small(name, description["files"][name]) for name in SMALL_FILES}
            if self.verify == "hash":
                for name, facts in description["files"].items():
                    check_file(self.path, name, facts, hashed=True)
            self._set_small(small)
            self._set_columns(description)
        except StoreError:
            raise
        except (OSError, DQError) as error:
            raise self._unusable(str(error)) from error

    def _unusable(self, reason: str) -> StoreError:
        cast_doubt(self.path)
        remedy = "A store in the cache is made again by the next run; copy any other one anew"
        return StoreError(f"the packed store {self.path} cannot be used: {reason}. {remedy}")

    def _read_small(self, name: str, facts: dict[str, Any]) -> memoryview:
        check_file(self.path, name, facts, hashed=self.verify != "off")
        if name == "ids.bin":
            return self._mapped.open(name, facts["size"], watched=False)
        dtype, rows = {
            "index.npy": ("<i8", self._num_samples),
            "bin.npy": ("<i2", self._num_samples),
            "id_offsets.npy": ("<i8", self._num_samples + 1),
            "value_offsets.npy": ("<i8", self._num_samples + 1),
            "checksums.npy": ("<u4", self._num_samples),
        }[name]
        watched = name in READ_EACH_TIME
        return self._mapped.open(name, rows * int(dtype[2:]), npy_header(dtype, (rows,)), watched=watched)

    def _set_small(self, small: dict[str, memoryview]) -> None:
        self.index = _tensor(small["index.npy"], torch.int64)
        self.bin = _tensor(small["bin.npy"], torch.int16)
        self.ids = Names(small["ids.bin"], small["id_offsets.npy"].cast("q"))
        self._offsets = small["value_offsets.npy"].cast("q")
        self._checksums = small["checksums.npy"].cast("I")

    def _set_columns(self, description: dict[str, Any]) -> None:
        described = description.get("columns")
        if not isinstance(described, list) or len(described) > 1 << 16:
            raise Damage("store.json has no columns")
        leaves = [leaf_from_json(value) for value in described]
        self._build = tree_builder(tree_from_json(description.get("tree"), len(leaves)))
        self._readers = [leaf_reader(leaf) for leaf in leaves]
        self._value_leaves = [number for number, leaf in enumerate(leaves) if leaf.kind == VALUE_KIND]
        # number of the leaf, what all images of the stream have in common
        self._streams = [
            (number, facts_of(leaf.dtype, leaf.shape[0]), leaf.shared)
            for number, leaf in enumerate(leaves)
            if leaf.kind == STREAM_KIND
        ]
        # number of the leaf, rows of all samples, bytes of one row, reader
        self._columns: list[tuple[int, memoryview, int, Callable[[Any], Any]]] = []
        # number of the leaf, and its values of a batch as far as they can be decoded together
        self._batched: list[tuple[int, BatchDecoder]] = []
        together = all(BatchDecoder.fits(leaf) for leaf in leaves if leaf.kind == "patches")
        for number, leaf in enumerate(leaves):
            if leaf.kind in (VALUE_KIND, STREAM_KIND, "none"):
                continue
            name = f"column-{number}.npy"
            dtype, shape = leaf.column_type()
            header = npy_header(dtype, (self._num_samples, *shape))
            if name not in description["files"]:
                raise Damage(f"store.json does not name {name}")
            rows = self._mapped.open(name, self._num_samples * leaf.row_bytes, header)
            self._columns.append((number, rows, leaf.row_bytes, self._readers[number]))
            if together and BatchDecoder.fits(leaf):
                self._batched.append((number, BatchDecoder(leaf, rows)))
        self._num_leaves = len(leaves)
        self._values = os.open(self.path / "values.bin", os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._values_size = os.fstat(self._values).st_size
        files.share(self._values)

    def _check_uncut(self) -> None:
        try:
            self._mapped.check_uncut()
        except Damage as damage:
            raise self._unusable(str(damage)) from damage

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
        self._check_uncut()
        return self._get(position, {})

    def _get(self, position: int, ready: dict[int, Any]) -> Any:
        at = self._position(position)
        sample = self._read(at, ready)
        # a sample without a value of its own has no other patched image than those that are ready
        alone = 0 < len(self._batched) == len(ready) and self._offsets[at] == self._offsets[at + 1]
        if self.has_patches and self.patches == "mean" and not alone:
            try:
                sample = map_patched(sample, mean_filled)
            except StoreError as error:
                raise self._unusable(f"the patches of sample {at} ({self.ids[at]}): {error}") from error
        return sample if self.finisher is None else self.finisher(at, sample)

    def patched(self, position: int) -> PatchedImage:
        """The kept patches of a sample's first image that lost some, without the finisher.

        Raises:
            StoreError: no image of this sample was stored by patches.
        """
        self._check_uncut()
        at = self._position(position)
        found = patched_images(self._read(at, {}))
        if not found:
            raise StoreError(f"sample {at} ({self.ids[at]}) of {self.path} has no image that was stored by patches")
        return found[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Any]:
        """The samples of a batch, in order; DataLoader calls this."""
        self._check_uncut()
        ready = {number: decode(positions) for number, decode in self._batched} if self.patches == "mean" else {}
        return [
            self._get(position, {number: values[i] for number, values in ready.items() if values[i] is not None})
            for i, position in enumerate(positions)
        ]

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(self._num_samples))

    def _read(self, at: int, ready: dict[int, Any]) -> Any:
        leaves: list[Any] = [None] * self._num_leaves
        checksum = at & 0xFFFFFFFF
        crc32 = zlib.crc32
        verified = self.verify != "off"
        # decode only what has been verified: first all bytes, then all values
        rows = [view[at * size : at * size + size] for _, view, size, _ in self._columns]
        start, end = self._offsets[at], self._offsets[at + 1]
        value = self._read_value(at, start, end) if end != start else b""
        if verified:
            for row in rows:
                checksum = crc32(row, checksum)
            if crc32(value, checksum) != self._checksums[at]:
                raise self._unusable(f"sample {at} ({self.ids[at]}) does not match its checksum{self._suspects(value)}")
        try:
            for (number, _, _, reader), row in zip(self._columns, rows, strict=True):
                leaves[number] = ready[number] if number in ready else reader(row)
            value, missing = take_streams(self._streams, leaves, value)
            if not value and not self._value_leaves and not missing:
                return self._build(leaves)
            return self._with_values(leaves, value, missing)
        except (StoreError, TypeError, IndexError) as error:
            raise self._unusable(f"the value of sample {at} ({self.ids[at]}): {error}") from error

    def _read_value(self, at: int, start: int, end: int) -> bytes:
        if not 0 <= start < end <= self._values_size:
            raise self._unusable(
                f"the value of sample {at} is said to be at {start} to {end} of {self._values_size} bytes"
            )
        data = os.pread(self._values, end - start, start)
        if len(data) != end - start:
            raise self._unusable(f"values.bin ends inside the value of sample {at}")
        return data

    def _with_values(self, leaves: list[Any], data: bytes, missing: set[int]) -> Any:
        """Put the values that stand beside the columns into their places."""
        beside = decode_value(data)
        if not isinstance(beside, dict):
            raise StoreError("it is no dict")
        if "whole" in beside:
            return beside["whole"]
        for number, value in beside.items():
            leaves[number] = value
        if not beside.keys() >= missing.union(self._value_leaves):
            raise StoreError("a leaf is missing")
        return self._build(leaves)

    def _suspects(self, value: bytes) -> str:
        return f" ({', '.join([f'column-{n}.npy' for n, *_ in self._columns] + ['values.bin'] * bool(value))})"

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "finisher": self.finisher, "verify": self.verify, "patches": self.patches}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __del__(self, _close: Callable[[int], None] = os.close) -> None:
        # bound above, since modules are emptied before the last objects at the end of the interpreter
        values = self.__dict__.pop("_values", None)
        if values is not None:
            _close(values)

    def __repr__(self) -> str:
        return f"PackedDataset({str(self.path)!r}, {self._num_samples} samples)"


def _tensor(data: memoryview, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(data, dtype=dtype) if len(data) else torch.empty(0, dtype=dtype)
