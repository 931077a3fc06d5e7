"""Decides which parts of a sample become columns of fixed width, and converts them to bytes and back.

A sample is a tree of tuples, lists and dicts. A leaf is a place of this tree that holds any other value. If a leaf has
the same type, shape and dtype in all samples that are looked at first, it becomes a column. If a later sample differs
there, its value is stored outside of the columns, so that any sequence of samples can be written in one pass.

The code is pure: it reads and writes no files.
"""

import math
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast, get_args

import numpy as np
from PIL import Image

from dq_lightning.core.arrays import TENSOR_DTYPES, plain_shape
from dq_lightning.core.errors import StoreError
from dq_lightning.core.records import Grid, ImageLayout, PatchedImage, StoredImage
from dq_lightning.packed.file_stream import MAX_START_BYTES, MAX_STARTS, Start, shared_starts
from dq_lightning.packed.images import MODE_BITS, image_from_raw, is_plain, raw_bytes_of
from dq_lightning.packed.patch_stream import MAX_PROPERTIES_BYTES, check_facts, shared_heads
from dq_lightning.packed.trees import Tree, container, same_container
from dq_lightning.packed.values import (
    MAX_DEPTH,
    array_bytes,
    array_from,
    encode_properties,
    is_plain_array,
    is_plain_tensor,
    numpy_dtype,
    properties_setter,
    tensor_bytes,
    tensor_from,
)

# A larger image takes less space as PNG or as its original file.
MAX_RAW_IMAGE_BYTES = 64 * 64 * 4
MAX_ROW_BYTES = 1 << 40
# Each column is a file. A sample of more parts, such as a long list of numbers, is stored as one value.
MAX_PLANNED_COLUMNS = 512
VALUE_KIND = "value"
STREAM_KIND = "stream"
FILE_KIND = "file"
# Kinds whose values are in values.bin or nowhere, so that they have no column.
WITHOUT_COLUMN = (VALUE_KIND, STREAM_KIND, FILE_KIND, "none")


@dataclass(frozen=True)
class Leaf:
    """Describes what one leaf of the tree holds in every sample.

    Attributes:
        kind: "none", "bool", "int", "float", "scalar", "array", "tensor", "image", "patches" (the raw pixels of equally
            many kept patches in every sample), "stream" (patched images of any length, in values.bin), "file" (image
            files, in values.bin), or "value" (no column).
        dtype: numpy's dtype string, torch's dtype name, or the image's mode; `mode/layout/codec` for patched images;
            `decoder/layout/own` for files that hold the format and info of their images, and `decoder/layout/beside`
            for files beside which they are stored.
        shape: shape of an array or tensor; (width, height) of an image; (height, width, P, bytes of pixels) of patches;
            (P,) of a stream.
        shared: dictionary that the file heads and properties of a stream's images are compressed with.
        properties: format and info that all images of the column have, see `values.encode_properties`.
        starts: properties and beginnings that many files of a column of files share, see `packed/file_stream.py`.
    """

    kind: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    shared: bytes = field(default=b"", compare=False)
    properties: bytes = b""
    starts: tuple[Start, ...] = field(default=(), compare=False)

    @property
    def row_bytes(self) -> int:
        """Number of bytes that one sample takes in the column; 0 for kinds without a column."""
        if self.kind in WITHOUT_COLUMN:
            return 0
        if self.kind == "patches":
            return _mask_bytes(self) + self.shape[3]
        if self.kind == "image":
            return raw_bytes_of(self.dtype, (self.shape[0], self.shape[1]))
        if self.kind == "tensor":
            return math.prod(self.shape) * TENSOR_DTYPES[self.dtype].itemsize
        dtype, shape = self.column_type()
        return math.prod(shape) * numpy_dtype(dtype).itemsize

    def column_type(self) -> tuple[str, tuple[int, ...]]:
        """Return the dtype and the shape of one row of the npy file that holds the column."""
        if self.kind in ("scalar", "array"):
            return self.dtype, self.shape
        if self.kind == "image":
            width, height = self.shape
            bands = max(1, MODE_BITS[self.dtype] // 8)
            fits = self.row_bytes == width * height * bands
            return "|u1", ((height, width, bands) if bands > 1 else (height, width)) if fits else (self.row_bytes,)
        if self.kind == "patches":
            return "|u1", (self.row_bytes,)
        if self.kind == "tensor":
            known = _NUMPY_OF_TENSOR.get(self.dtype)
            return (known, self.shape) if known else ("|u1", (self.row_bytes,))
        return _NUMBER_DTYPES[self.kind], ()


_NUMPY_OF_TENSOR = {
    name: f"<{c}{n}" for name, c, n in (("int16", "i", 2), ("int32", "i", 4), ("int64", "i", 8), ("float16", "f", 2))
}
_NUMPY_OF_TENSOR |= {"float32": "<f4", "float64": "<f8", "uint8": "|u1", "int8": "|i1", "bool": "|b1"}
_NUMBER_DTYPES = {"bool": "|b1", "int": "<i8", "float": "<f8"}
_KINDS = (*WITHOUT_COLUMN, *_NUMBER_DTYPES, "scalar", "array", "tensor", "image", "patches")


def describe_leaf(value: Any, raw_images: bool = False) -> Leaf:
    """Describe a value as a leaf of the most specific kind.

    The kind is "value" if the value has no fixed width, or if it is a large image and `raw_images`, which allows images
    of any size as raw pixels, is False.
    """
    kind = type(value)
    if value is None:
        return Leaf("none")
    if kind in (bool, float) or (kind is int and -(1 << 63) <= value < 1 << 63):
        return Leaf(kind.__name__)
    if isinstance(value, np.generic) and value.dtype.kind in "biufcMm":
        return Leaf("scalar", value.dtype.str)
    if is_plain_array(value) and value.dtype.kind in "biufcMm":
        return Leaf("array", value.dtype.str, value.shape)
    if is_plain_tensor(value):
        return Leaf("tensor", str(value.dtype).removeprefix("torch."), tuple(value.shape))
    if isinstance(value, PatchedImage) and value.codec == "raw":
        facts = (value.height, value.width, value.patch_size, len(value.data))
        return Leaf("patches", stream_leaf(value).dtype, facts, properties=value.properties)
    if isinstance(value, PatchedImage):
        return stream_leaf(value)
    if isinstance(value, StoredImage):
        return Leaf(FILE_KIND, f"{value.decoder}/{value.layout}/{'own' if value.properties is None else 'beside'}")
    if isinstance(value, Image.Image) and _is_raw(value, raw_images):
        try:
            return Leaf("image", value.mode, value.size, properties=encode_properties(value))
        except StoreError:
            return Leaf(VALUE_KIND)  # Encoding it as a value fails too, with a message that names its place.
    return Leaf(VALUE_KIND)


def _is_raw(image: Image.Image, raw_images: bool) -> bool:
    """Return whether an image consists of its pixels and info only, and its pixels are stored in a column."""
    if image.mode not in MODE_BITS or image.mode in ("P", "PA") or 0 in image.size or not is_plain(image):
        return False
    return raw_images or raw_bytes_of(image.mode, image.size) <= MAX_RAW_IMAGE_BYTES


def stream_leaf(image: PatchedImage) -> Leaf:
    """Return the leaf of kind "stream" that a patched image can be stored as."""
    return Leaf(STREAM_KIND, f"{image.mode}/{image.layout}/{image.codec}", (image.patch_size,))


def leaf_test(leaf: Leaf, raw_images: bool = False) -> Callable[[Any], bool]:
    """Return a function that tells whether a value can be stored as this leaf."""
    if leaf.kind == STREAM_KIND:
        return lambda value: (
            isinstance(value, PatchedImage)
            and stream_leaf(value) == leaf
            and len(value.properties) <= MAX_PROPERTIES_BYTES
        )
    if leaf.kind == FILE_KIND:
        decoder, layout, is_beside = file_facts(leaf.dtype)
        return lambda value: (
            isinstance(value, StoredImage)
            and (value.decoder, value.layout, value.properties is not None) == (decoder, layout, is_beside)
            and len(value.properties or b"") <= MAX_PROPERTIES_BYTES
        )
    if leaf.kind == "int":
        return lambda value: type(value) is int and -(1 << 63) <= value < 1 << 63
    return lambda value: leaf.kind != VALUE_KIND and describe_leaf(value, raw_images) == leaf


def file_facts(dtype: str) -> tuple[str, str, bool]:
    """Return decoder, layout, and whether properties are stored beside the files, from a description of files.

    Raises:
        StoreError: the description is none of files.
    """
    decoder, layout, kept = dtype.split("/") if dtype.count("/") == 2 else ("", "", "")
    if layout not in get_args(ImageLayout) or kept not in ("own", "beside") or (layout != "pil" and kept == "own"):
        raise StoreError(f"store.json has an impossible column of image files: {dtype!r:.40}")
    return decoder, layout, kept == "beside"


def _mask_bytes(leaf: Leaf) -> int:
    height, width, patch_size, _ = leaf.shape
    return -(-Grid(height, width, patch_size).num_patches // 8)


def leaf_writer(leaf: Leaf) -> Callable[[Any], bytes]:
    """Return a function that converts a value that fits the leaf to the bytes of one sample in the column."""
    if leaf.kind == "patches":
        return lambda value: bytes(value.mask + value.data)
    if leaf.kind in ("bool", "int", "float"):
        return struct.Struct({"bool": "<?", "int": "<q", "float": "<d"}[leaf.kind]).pack
    if leaf.kind == "tensor":
        return tensor_bytes
    if leaf.kind == "image":
        return lambda value: cast(bytes, value.tobytes())
    return array_bytes if leaf.kind in ("scalar", "array") else lambda value: b""


def leaf_reader(leaf: Leaf) -> Callable[[Any], Any]:
    """Return a function that converts the bytes of one sample in the column to the value."""
    if leaf.kind == "int":
        return lambda data: int.from_bytes(data, "little", signed=True)
    if leaf.kind == "bool":
        return lambda data: data[0] != 0
    if leaf.kind == "float":
        return lambda data: struct.unpack("<d", data)[0]
    if leaf.kind == "patches":
        height, width, patch_size, _ = leaf.shape
        (kind, layout, codec), cut = leaf.dtype.split("/"), _mask_bytes(leaf)
        properties = leaf.properties
        return lambda data: PatchedImage(
            height, width, kind, layout, patch_size, bytes(data[:cut]), codec, bytes(data[cut:]), properties
        )
    if leaf.kind == "image":
        mode, size, give = leaf.dtype, (leaf.shape[0], leaf.shape[1]), properties_setter(leaf.properties)

        def image(data: Any) -> Image.Image:
            made = image_from_raw(mode, size, data)
            give(made)
            return made

        return image
    if leaf.kind == "tensor":
        torch_dtype, shape = TENSOR_DTYPES[leaf.dtype], leaf.shape
        return lambda data: tensor_from(data, torch_dtype, shape)
    if leaf.kind in ("scalar", "array"):
        dtype, shape, whole = numpy_dtype(leaf.dtype), leaf.shape, leaf.kind == "array"
        return lambda data: array_from(data, dtype, shape) if whole else array_from(data, dtype, shape)[()]
    return lambda data: None


def plan(samples: Sequence[Any], raw_images: bool = False) -> tuple[Tree, list[Leaf]]:
    """Return the tree and the leaves, in order, that describe all given samples, the first of a store.

    A place where the samples differ is a leaf of kind "value". With `raw_images`, images of any size may be raw pixels.
    """
    leaves: list[Leaf] = []

    def grow(values: Sequence[Any], depth: int) -> Tree:
        kind = container(values[0])
        keys = tuple(values[0]) if kind == "dict" else ()
        alike = (
            kind
            and depth < MAX_DEPTH // 2
            and all(same_container(value, kind, keys, len(values[0])) for value in values)
        )
        if alike:
            inner = keys if kind == "dict" else range(len(values[0]))
            return Tree(str(kind), -1, keys, tuple(grow([value[key] for value in values], depth + 1) for key in inner))
        described = {describe_leaf(value, raw_images) for value in values}
        if len(described) > 1 and all(isinstance(value, StoredImage) for value in values):
            described = {Counter(map(describe_leaf, values)).most_common(1)[0][0]}
        if len(described) > 1 and all(isinstance(value, PatchedImage) for value in values):
            described = {stream_leaf(value) for value in values}
        leaf = described.pop() if len(described) == 1 else Leaf(VALUE_KIND)
        if leaf.kind == STREAM_KIND:
            leaf = replace(leaf, shared=shared_heads(values))
        if leaf.kind == FILE_KIND:
            leaf = replace(leaf, starts=shared_starts(list(filter(leaf_test(leaf), values))))
        leaves.append(leaf)
        return Tree("leaf", len(leaves) - 1)

    if not samples:
        return Tree("leaf", 0), [Leaf(VALUE_KIND)]
    tree = grow(samples, 0)
    return (tree, leaves) if len(leaves) <= MAX_PLANNED_COLUMNS else (Tree("leaf", 0), [Leaf(VALUE_KIND)])


def leaf_from_json(value: Any) -> Leaf:
    """Return a leaf from its description in store.json.

    Raises:
        StoreError: if the kind, dtype, mode or size is unknown or impossible.
    """
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str) or value["kind"] not in _KINDS:
        raise StoreError(f"store.json has an unknown column {value!r:.80}")
    hexadecimal = {name: _bytes_of(value, name) for name in ("shared", "properties")}
    shape = value.get("shape", [])
    if value["kind"] == "patches" and isinstance(shape, list):
        # These are facts of an image and not the sizes of one array, so their product may be large.
        shape = [plain_shape([fact])[0] for fact in shape]
    else:
        shape = plain_shape(shape)
    leaf = Leaf(value["kind"], str(value.get("dtype", "")), tuple(shape), **hexadecimal, starts=_starts_of(value))
    if leaf.kind == FILE_KIND:
        file_facts(leaf.dtype)
    if leaf.kind in ("patches", STREAM_KIND):
        check_facts(leaf.kind, leaf.dtype, leaf.shape)
    image_fits = leaf.dtype in MODE_BITS and len(leaf.shape) == 2 and 0 not in leaf.shape
    proper = {
        "tensor": leaf.dtype in TENSOR_DTYPES,
        "image": image_fits,
        "scalar": leaf.shape == (),
    }.get(leaf.kind, True)
    if not proper or leaf.row_bytes > MAX_ROW_BYTES:
        raise StoreError(f"store.json has an impossible column {value!r:.80}")
    return leaf


def leaf_to_json(leaf: Leaf) -> dict[str, Any]:
    """Return the description of a leaf as plain JSON."""
    plain = {"kind": leaf.kind, "dtype": leaf.dtype, "shape": list(leaf.shape)}
    beside = {"shared": leaf.shared, "properties": leaf.properties}
    starts = {"starts": [[part.hex() for part in start] for start in leaf.starts]} if leaf.starts else {}
    return plain | {name: data.hex() for name, data in beside.items() if data} | starts


def _starts_of(value: dict[str, Any]) -> tuple[Start, ...]:
    starts = value.get("starts", [])
    if not isinstance(starts, list) or len(starts) > MAX_STARTS:
        raise StoreError(f"store.json has impossible beginnings of files: {starts!r:.40}")
    made = []
    for start in starts:
        if not isinstance(start, list) or len(start) != 2:
            raise StoreError(f"store.json has an impossible beginning of files: {start!r:.40}")
        properties, beginning = (_bytes_of({"starts": text}, "starts") for text in start)
        if len(properties) + len(beginning) > MAX_START_BYTES:
            raise StoreError(f"store.json has a beginning of files of {len(properties) + len(beginning):,} bytes")
        made.append((properties, beginning))
    return tuple(made)


def _bytes_of(value: dict[str, Any], name: str) -> bytes:
    text = value.get(name, "")
    try:
        return bytes.fromhex(text)
    except (TypeError, ValueError) as error:
        raise StoreError(f"store.json has {name} bytes that are no hexadecimal digits: {text!r:.40}") from error
