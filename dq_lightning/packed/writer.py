"""Writer of a packed store: a folder that holds the samples of the compact set, so that training needs no other data.

A store of M samples consists of these files (all integers are little-endian):

    index.npy int64 [M], bin.npy int16 [M]   the selection: position in the source and bin of every sample
    ids.bin, id_offsets.npy int64 [M + 1]    the names of the samples in UTF-8, and where each one starts
    column-J.npy [M, ...]                    leaf number J of every sample, if this leaf has a fixed width
    values.bin                               for each sample first its image files and its patched images of varying
                                             length, each preceded by its length as uvarint (0: the image is stored
                                             with the other values), see `packed/file_stream.py` and
                                             `packed/patch_stream.py`; then all other values that are in no column, see
                                             `packed/values.py`
    value_offsets.npy int64 [M + 1]          where the bytes of each sample start in values.bin, and its size
    checksums.npy uint32 [M]                 crc32 over a sample's columns and values, started with its position
    small.bin                                in place of these arrays and of narrow columns, where a store is to take
                                             few bytes, see `packed/small_arrays.py`
    store.json                               tree, columns, attributes, size and sha256 of every file, its own digest
"""

import itertools
import json
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dq_lightning.cache import files
from dq_lightning.core.errors import StoreError
from dq_lightning.core.records import EncodedImage, PatchedImage, StoredImage
from dq_lightning.core.resuming import Array, Shards
from dq_lightning.core.sharing import Arrays, Job, Sharing, in_order
from dq_lightning.packed.columns import (
    FILE_KIND,
    STREAM_KIND,
    WITHOUT_COLUMN,
    Leaf,
    leaf_from_json,
    leaf_test,
    leaf_to_json,
    leaf_writer,
    plan,
)
from dq_lightning.packed.npy import npy_header
from dq_lightning.packed.packing_shards import EncodedSample, UnsavedSamples, arrays_of, facts_of, samples_of
from dq_lightning.packed.patch_stream import uvarint, write_stream
from dq_lightning.packed.patches import patched_images
from dq_lightning.packed.small_arrays import MAX_COLUMNS, SmallArrays
from dq_lightning.packed.trees import Tree, leaves_of, tree_from_json, tree_to_json
from dq_lightning.packed.values import check_decoded_size, encode_value, patched_bytes
from dq_lightning.packed.whole_images import with_files, without_array_files, write_image

STORE_FILE = "store.json"
FORMAT = "dq_lightning packed"
# Version 6 holds the small arrays in one compressed file. Version 5 adds columns of image files, and version 4 patched
# images; a store without either is written as version 3. Versions 1 and 2 stored the pixels of an image without its
# format, info and EXIF tags.
VERSION_OF_VALUES, VERSION_OF_PATCHES, VERSION_OF_FILES, VERSION_SQUEEZED = VERSIONS = (3, 4, 5, 6)
SMALL_FILE = "small.bin"
# Kinds of columns that small.bin may hold.
NARROW_KINDS = ("int", "bool", "float")
# The first samples decide which leaves become columns. So many show the rule, and the memory that they take is bounded.
LOOK_AHEAD_SAMPLES = 64
LOOK_AHEAD_BYTES = 64 << 20
# So many samples, or bytes, are gathered before they are written.
GATHERED_SAMPLES, GATHERED_BYTES = 512, 1 << 20

# Other processes are handed so many samples at once, or so many bytes of samples if these are large.
PIECE_SAMPLES, PIECE_BYTES = 256, 8 << 20
# A process may encode so many pieces before the earlier ones are written, which are held in memory meanwhile.
AHEAD = 4

Item = tuple[Any, EncodedImage | None]
_IMAGES = (Image.Image, PatchedImage, StoredImage)
# Most leaves are of these types, which hold no patched image.
_WITHOUT_PATCHES = frozenset((int, float, bool, str, bytes, type(None), StoredImage, np.ndarray, Tensor))


@dataclass(frozen=True)
class SharedItems:
    """How samples are encoded together with other processes, each of which calls `encode_pieces`.

    Attributes:
        sharing: how pieces are shared.
        items: function that takes the numbers of samples and yields their items, see `write_packed`.
        facts: plain JSON that the others need to make the same items.
        arrays: arrays that they need.
        others: function that returns the `items` of forked processes; it is called just before they are forked. None where
            there are none.
        piece_samples: number of samples that a process is handed at once, at most; None for the usual number.
    """

    sharing: Sharing
    items: Callable[[Iterator[int]], Iterator[Item]]
    facts: Mapping[str, Any]
    arrays: Mapping[str, Array]
    others: Callable[[], Callable[[Iterator[int]], Iterator[Item]]] | None = None
    piece_samples: int | None = None


def write_packed(
    folder: Path,
    items: Iterable[Item] | Callable[[int], Iterator[Item]] | SharedItems,
    *,
    ids: Sequence[str],
    index: Tensor,
    bins: Tensor,
    attributes: dict[str, Any],
    raw_images: bool = False,
    shards: Shards | None = None,
    grain: int = 1,
    squeeze: bool = False,
) -> None:
    """Write samples into a folder, one after the other; the memory that this needs does not depend on their number.

    Args:
        folder: folder of the store; it must be empty or not exist yet.
        items: M pairs (sample, original file bytes of its image or None); or a function that takes a position and yields
            the pairs from this position on; or what other processes help to encode. A sample is any tree of tuples,
            lists and dicts over None, bool, int, float, complex, str, bytes, numpy and torch values, Pillow images and
            `PatchedImage`.
        ids: M names of the samples.
        index: int64 [M], positions of the samples in the source.
        bins: int16 [M], bin of each sample.
        attributes: plain JSON that is stored unchanged and returned by the reader.
        raw_images: whether to write Pillow images of any size as raw pixels, which are read fastest and take the most
            space.
        shards: where finished samples are saved, so that a killed run continues with the rest; None saves nothing.
        grain: the number of samples in each shard is a multiple of this number.
        squeeze: whether to hold positions, offsets, checksums and narrow columns in one compressed file, which saves
            about 45 bytes a sample.

    Raises:
        StoreError: if the numbers of ids, positions, bins and samples differ, if the attributes are not plain JSON, or
            if a value cannot be stored unchanged.
        OSError: if the files cannot be written.
    """
    num_samples = len(ids)
    if len(index) != num_samples or len(bins) != num_samples:
        raise StoreError(f"{num_samples} ids, {len(index)} positions and {len(bins)} bins: they must be as many")
    try:
        if json.loads(json.dumps(attributes, allow_nan=False)) != attributes:
            raise ValueError("it changes on the way through JSON")
    except (TypeError, ValueError) as error:
        raise StoreError(f"attributes must be plain JSON: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    writer = _StoreWriter(folder, num_samples, raw_images, squeeze)
    writer.samples(items, shards, grain)
    positions, bin_of_each = index.to(torch.int64).numpy().astype("<i8"), bins.to(torch.int16).numpy().astype("<i2")
    if squeeze:
        writer.squeezed(positions, bin_of_each, ids)
    else:
        writer.plain(positions, bin_of_each, ids)
    writer.finish(attributes)


def estimate_bytes(items: Iterable[Item], num_samples: int) -> int:
    """Estimate the size in bytes of a store of `num_samples` samples from a few of its items."""
    sizes = [
        len(encoded.data) if encoded is not None and not patched_images(sample) else rough_bytes(sample)
        for sample, encoded in items
    ]
    return sum(sizes) * num_samples // max(1, len(sizes))


class _Encoder:
    """Encodes samples that have the same layout, which is known before.

    Attributes:
        tree: tree of the samples.
        leaves: leaves of this tree.
        has_patches: whether any sample so far has patched images.
    """

    def __init__(self, raw_images: bool, squeeze: bool) -> None:
        self.raw_images, self.squeeze = raw_images, squeeze
        self.tree = Tree("leaf", 0)
        self.leaves: list[Leaf] = []
        # For each leaf, whether a value can be stored as it, and what converts one to its row.
        self._tests: list[Callable[[Any], bool]] = []
        self._writers: list[Callable[[Any], bytes]] = []
        self.has_patches = False

    def lay_out(self, tree: Tree, leaves: list[Leaf]) -> None:
        """Encode samples in this layout from now on."""
        self.tree, self.leaves = tree, leaves
        self._tests = [leaf_test(leaf, self.raw_images) for leaf in leaves]
        self._writers = [leaf_writer(leaf) for leaf in leaves]

    def pieces(
        self, items: Callable[[Iterator[int]], Iterator[Item]], facts: Mapping[str, Any], numbers: Iterator[int]
    ) -> Iterator[tuple[int, "_Piece"]]:
        """Yield numbered pieces of the samples, each after its number; `facts` are those of the job."""
        asked = deque[tuple[int, range]]()

        def samples_of_pieces() -> Iterator[int]:
            for number in numbers:
                first = facts["start"] + number * facts["size"]
                asked.append((number, range(first, min(first + facts["size"], facts["stop"]))))
                yield from asked[-1][1]

        done: list[EncodedSample] = []
        for item in items(samples_of_pieces()):
            number, samples = asked[0]
            done.append(self.encode(item, samples[len(done)]))
            if len(done) == len(samples):
                asked.popleft()
                yield number, (self.has_patches, done)
                done = []

    def encode(self, item: Item, number: int) -> EncodedSample:
        """Return the row of a sample in each column, and the encoding of everything that is in no column.

        Raises:
            StoreError: the sample, whose number is named, cannot be stored.
        """
        try:
            return self._encode(*self.with_files(item, every_image(self.raw_images, self.leaves)))
        except StoreError as error:
            raise StoreError(f"sample {number}: {error}") from error

    def with_files(self, item: Item, every: bool) -> Item:
        """Return a sample with its images as files, where a file holds an image exactly."""
        return with_files(*item, self.raw_images, every), item[1]

    def _encode(self, sample: Any, encoded: EncodedImage | None) -> tuple[list[bytes], bytes]:
        """Return a sample's row in each column, and the encoding of everything that is in no column."""
        found = leaves_of(sample, self.tree)
        is_plain = found is not None and all(type(value) in _WITHOUT_PATCHES for value in found)
        patched = [] if is_plain else patched_images(sample)
        if patched:
            self.has_patches = True
        if found is None:
            no_streams = bytes(sum(leaf.kind in (STREAM_KIND, FILE_KIND) for leaf in self.leaves))
            value = no_streams + encode_value({"whole": without_array_files(sample)}, encoded, self.raw_images)
            return [bytes(leaf.row_bytes) for leaf in self.leaves], value
        rows, streams, beside, decoded_bytes, first_image = [], b"", {}, 0, True
        for number, (value, leaf, test, write) in enumerate(
            zip(found, self.leaves, self._tests, self._writers, strict=True)
        ):
            image = isinstance(value, _IMAGES)
            fitting = test(value)
            if leaf.kind == STREAM_KIND:
                stream = write_stream(value, leaf.shared) if fitting else b""
                streams += uvarint(len(stream)) + stream
            if leaf.kind == FILE_KIND:
                stream, size = write_image(value, leaf.starts) if fitting else (b"", 0)
                streams += uvarint(len(stream)) + stream
                decoded_bytes += size
            if fitting:
                rows.append(write(value))
                # The original file bytes belong to the first image. It is stored already, so they aren't needed.
                encoded = None if image and first_image else encoded
            else:
                rows.append(bytes(leaf.row_bytes))
                beside[number] = without_array_files(value)
            first_image = first_image and not image
        value = streams + (encode_value(beside, encoded, self.raw_images) if beside else b"")
        if patched:
            check_decoded_size(patched_bytes(patched), sum(map(len, rows)) + len(value))
        check_decoded_size(decoded_bytes, len(value))
        return rows, value

    def layout(self) -> dict[str, Any]:
        """Return the layout of the samples written so far, in the form that store.json has."""
        version: dict[str, Any] = {"version": VERSION_OF_PATCHES if self.has_patches else VERSION_OF_VALUES}
        if any(leaf.kind == FILE_KIND for leaf in self.leaves):
            version = {"version": VERSION_OF_FILES, "has_patches": self.has_patches}
        if self.squeeze:
            version = {"version": VERSION_SQUEEZED, "has_patches": self.has_patches}
        columns = [leaf_to_json(leaf) for leaf in self.leaves]
        return version | {"tree": tree_to_json(self.tree), "columns": columns}


# Whether there are patched images, and the samples.
_Piece = tuple[bool, list[EncodedSample]]


def every_image(raw_images: bool, leaves: list[Leaf]) -> bool:
    """Return whether small plain images are stored as files too, since their sizes differ."""
    return not raw_images and all(leaf.kind != "image" for leaf in leaves)


def encode_pieces(
    job: Job, numbers: Iterator[int], items: Callable[[Iterator[int]], Iterator[Item]]
) -> Iterator[Arrays]:
    """Yield numbered pieces of the samples that another process writes; `items` is as in its `SharedItems`."""
    facts, layout = job.facts, job.facts["layout"]
    encoder = _Encoder(facts["raw_images"], facts["squeeze"])
    leaves = [leaf_from_json(leaf) for leaf in layout["columns"]]
    encoder.lay_out(tree_from_json(layout["tree"], len(leaves)), leaves)
    for number, (has_patches, samples) in encoder.pieces(items, facts, numbers):
        yield {"piece": np.array(number), "has_patches": np.array(has_patches), **arrays_of(samples)}


class _StoreWriter(_Encoder):
    """Open files of the store being written, and what store.json will say about them."""

    def __init__(self, folder: Path, num_samples: int, raw_images: bool, squeeze: bool) -> None:
        super().__init__(raw_images, squeeze)
        self.squeezed_facts: dict[str, Any] = {}
        self.folder = folder
        self.num_samples = num_samples
        self.files: dict[str, dict[str, Any]] = {}
        self.columns: list[files.Writer | None] = []
        self.values: files.Writer | None = None
        self.offsets = np.zeros(num_samples + 1, "<i8")
        self.checksums = np.zeros(num_samples, "<u4")
        self.count = 0
        # Samples are written many at a time, because writing and hashing a few bytes costs as much as many of them.
        self.pending: list[EncodedSample] = []
        self.pending_bytes = self.row_bytes = 0

    def samples(
        self, items: Iterable[Item] | Callable[[int], Iterator[Item]] | SharedItems, shards: Shards | None, grain: int
    ) -> None:
        """Write all samples; see `write_packed`."""
        unsaved = UnsavedSamples(shards, grain)
        with ExitStack() as stack:
            for piece in shards.restore(self.num_samples) if shards is not None else ():
                if not self._take(piece, stack):
                    break
            stream = self._own(items)
            if self.values is None:
                first = list(self._with_files(_look_ahead(stream), every=False))
                tree, leaves = plan([sample for sample, _ in first], self.raw_images)
                if every_image(self.raw_images, leaves):
                    first = list(self._with_files(iter(first), every=True))
                    tree, leaves = plan([sample for sample, _ in first], self.raw_images)
                self._open(tree, leaves, stack)
                stream = itertools.chain(first, stream)
            for item in stream:
                if self.count >= self.num_samples:
                    raise StoreError(f"there are more samples than the {self.num_samples} ids")
                self._add(self.encode(item, self.count), unsaved)
            if isinstance(items, SharedItems) and self.count < self.num_samples:
                for has_patches, encoded in in_order(self._encoded_by_all(items)):
                    self.has_patches = self.has_patches or has_patches
                    for number, sample in enumerate(encoded, 1):
                        # A shard saved in the middle of a piece would leave the rest of the piece to the next shard.
                        self._add(sample, unsaved, may_keep=grain > 1 or number == len(encoded))
            self._write_pending()
        if self.count != self.num_samples:
            raise StoreError(f"there are {self.count} samples but {self.num_samples} ids")
        for written in (*self.columns, self.values):
            if written is not None:
                self._list(written)

    def _own(self, items: Iterable[Item] | Callable[[int], Iterator[Item]] | SharedItems) -> Iterator[Item]:
        """Yield the items that follow those written so far, as far as this process alone encodes them."""
        if isinstance(items, SharedItems):
            alone = items.sharing.num_ranks == 1
            stop = self.num_samples if alone else min(self.num_samples, self.count + LOOK_AHEAD_SAMPLES)
            return items.items(iter(range(self.count, stop)))
        return items(self.count) if callable(items) else itertools.islice(items, self.count, None)

    def _encoded_by_all(self, items: SharedItems) -> Iterator[tuple[int, _Piece]]:
        """Yield the samples that follow those written so far, in pieces, each after its number, in any order."""
        mean = int(self.offsets[self.count]) // max(1, self.count) + self.row_bytes
        size = max(1, min(items.piece_samples or PIECE_SAMPLES, PIECE_SAMPLES, PIECE_BYTES // max(1, mean)))
        facts = {"start": self.count, "stop": self.num_samples, "size": size, "layout": self.layout()}
        facts |= {"raw_images": self.raw_images, "squeeze": self.squeeze, "items": dict(items.facts)}
        pieces = -(-(self.num_samples - self.count) // size)
        job = Job("packing", facts, items.arrays, pieces, pieces, ahead=AHEAD)

        def unpack(arrays: Arrays) -> tuple[int, _Piece]:
            samples = list(samples_of(arrays, [leaf.row_bytes for leaf in self.leaves]))
            return int(arrays["piece"]), (bool(arrays["has_patches"]), samples)

        # The encoder of this process's own pieces runs ahead of what is written, or it is copied into other processes.
        encoder = _Encoder(self.raw_images, self.squeeze)
        encoder.lay_out(self.tree, self.leaves)
        made = items.items if items.others is None else items.others()
        return items.sharing.share(job, partial(encoder.pieces, made, facts), unpack, lambda _: 1)

    def _add(self, sample: EncodedSample, unsaved: UnsavedSamples, *, may_keep: bool = True) -> None:
        """Take an encoded sample, and write those that were taken once they are many, or a shard of them is due."""
        self._put(sample)
        is_due = may_keep and unsaved.is_due(len(self.pending))
        if is_due or len(self.pending) >= GATHERED_SAMPLES or self.pending_bytes >= GATHERED_BYTES:
            unsaved.add(*self._write_pending())
        if is_due:
            unsaved.keep(self.layout())

    def _list(self, written: files.Writer) -> None:
        """Remember size and digest of a file that is written, for store.json."""
        self.files[written.path.name] = {"size": written.size, "sha256": written.sha256()}

    def plain(self, index: Any, bins: Any, ids: Sequence[str]) -> None:
        """Write each small array into a file of its own."""
        self.small_array("value_offsets", self.offsets)
        self.small_array("checksums", self.checksums)
        self.small_array("index", index)
        self.small_array("bin", bins)
        self.names(ids)

    def squeezed(self, index: Any, bins: Any, ids: Sequence[str]) -> None:
        """Write all small arrays, and the narrow columns in place of their own files, into one compressed file."""
        narrow = [number for number, leaf in enumerate(self.leaves) if leaf.kind in NARROW_KINDS][:MAX_COLUMNS]
        columns = []
        for number in narrow:
            path, width = self.folder / f"column-{number}.npy", self.leaves[number].row_bytes
            rows = np.frombuffer(path.read_bytes()[-self.num_samples * width :], np.uint8) if self.num_samples else b""
            columns.append(np.asarray(rows, np.uint8).reshape(self.num_samples, width))
            path.unlink()
            del self.files[path.name]
        small = SmallArrays(index, bins, self.offsets, self.checksums, tuple(columns))
        if not all(name == str(position) for name, position in zip(ids, index.tolist(), strict=True)):
            names = [str(name).encode(errors="surrogatepass") for name in ids]
            ends = np.cumsum([0, *map(len, names)], dtype=np.int64)
            small = replace(small, id_offsets=ends, ids=np.frombuffer(b"".join(names), np.uint8))
        with files.Writer(self.folder / SMALL_FILE) as file:
            file.write(small.to_bytes())
        self._list(file)
        self.squeezed_facts = {
            "squeezed": {"ids_bytes": None if small.ids is None else len(small.ids), "columns": narrow}
        }

    def _with_files(self, items: Iterator[Item], every: bool) -> Iterator[Item]:
        for number, item in enumerate(items, self.count):
            try:
                yield self.with_files(item, every)
            except StoreError as error:
                raise StoreError(f"sample {number}: {error}") from error

    def _take(self, piece: dict[str, Array], stack: ExitStack) -> bool:
        """Write the samples of a shard; return False if its samples have another layout than those before it."""
        layout = facts_of(piece)
        if self.values is None:
            leaves = [leaf_from_json(leaf) for leaf in layout["columns"]]
            self._open(tree_from_json(layout["tree"], len(leaves)), leaves, stack)
        self.has_patches = self.has_patches or holds_patches(layout)
        if layout != self.layout():
            return False
        for sample in samples_of(piece, [leaf.row_bytes for leaf in self.leaves]):
            self._put(sample)
        self._write_pending()
        return True

    def _put(self, sample: EncodedSample) -> None:
        """Take an encoded sample, which `_write_pending` writes."""
        rows, value = sample
        checksum = self.count & 0xFFFFFFFF
        for row in rows:  # A leaf without a column has an empty row.
            checksum = zlib.crc32(row, checksum)
        self.checksums[self.count] = zlib.crc32(value, checksum)
        self.offsets[self.count + 1] = self.offsets[self.count] + len(value)
        self.count += 1
        self.pending.append(sample)
        self.pending_bytes += len(value) + self.row_bytes

    def _write_pending(self) -> tuple[dict[int, bytes], bytes, list[int]]:
        """Write the samples that were taken, and return their rows by column, their values, and the length of each."""
        assert self.values is not None
        columns = {}
        for number, column in enumerate(self.columns):
            if column is not None:
                columns[number] = b"".join([rows[number] for rows, _ in self.pending])
                column.write(columns[number])
        values, lengths = b"".join([value for _, value in self.pending]), [len(value) for _, value in self.pending]
        self.values.write(values)
        self.pending, self.pending_bytes = [], 0
        return columns, values, lengths

    def _open(self, tree: Tree, leaves: list[Leaf], stack: ExitStack) -> None:
        self.lay_out(tree, leaves)
        self.row_bytes = sum(leaf.row_bytes for leaf in leaves)
        self.columns = [self._open_column(stack, number, leaf) for number, leaf in enumerate(leaves)]
        self.values = stack.enter_context(files.Writer(self.folder / "values.bin"))

    def _open_column(self, stack: ExitStack, number: int, leaf: Leaf) -> files.Writer | None:
        if leaf.kind in WITHOUT_COLUMN:
            return None
        column = stack.enter_context(files.Writer(self.folder / f"column-{number}.npy"))
        dtype, shape = leaf.column_type()
        column.write(npy_header(dtype, (self.num_samples, *shape)))
        return column

    def small_array(self, name: str, values: Any) -> None:
        """Write an array whose digest the reader verifies whenever it opens the store."""
        with files.Writer(self.folder / f"{name}.npy") as file:
            file.write(npy_header(values.dtype.str, values.shape))
            file.write(values.tobytes())
        self._list(file)

    def names(self, ids: Sequence[str]) -> None:
        offsets = np.zeros(self.num_samples + 1, "<i8")
        with files.Writer(self.folder / "ids.bin") as file:
            for number, name in enumerate(ids, start=1):
                # Ids can be file names, which may hold bytes that are not valid UTF-8.
                file.write(str(name).encode(errors="surrogatepass"))
                offsets[number] = file.size
        self._list(file)
        self.small_array("id_offsets", offsets)

    def finish(self, attributes: dict[str, Any]) -> None:
        description = {
            "format": FORMAT,
            "num_samples": self.num_samples,
            "files": self.files,
            "attributes": attributes,
        }
        description |= self.squeezed_facts | self.layout()
        files.write_bytes(self.folder / STORE_FILE, files.seal(description))


def holds_patches(description: dict[str, Any]) -> bool:
    """Return whether a store, or a shard, of this description has patched images."""
    version = description["version"]
    newer = version in (VERSION_OF_FILES, VERSION_SQUEEZED)
    return version == VERSION_OF_PATCHES or (newer and description.get("has_patches") is True)


def _look_ahead(stream: Iterator[Any]) -> Iterator[Any]:
    taken = 0
    for item in itertools.islice(stream, LOOK_AHEAD_SAMPLES):
        yield item
        taken += rough_bytes(item)
        if taken > LOOK_AHEAD_BYTES:
            return


def rough_bytes(value: Any) -> int:
    """Estimate the memory in bytes that a sample takes, including everything inside its containers."""
    if isinstance(value, tuple | list):
        return sum(map(rough_bytes, value))
    if isinstance(value, dict):
        return sum(map(rough_bytes, value.values()))
    if isinstance(value, Image.Image):
        return 4 * value.size[0] * value.size[1]
    if isinstance(value, EncodedImage | StoredImage):
        return len(value.data)
    if isinstance(value, PatchedImage):
        return len(value.mask) + len(value.data)
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return value.nbytes if isinstance(value, np.ndarray) else sys.getsizeof(value)
