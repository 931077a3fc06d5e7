"""Which parts of a sample become fixed-width columns, and how they come back. PURE.

A sample is a tree of tuples, lists and dicts. A leaf that has one type, shape and dtype over the samples looked at first is a
column; a later sample that differs puts its own value beside the columns, so that any sequence can be written in one pass.
"""

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from dq_lightning.errors import StoreError
from dq_lightning.store.images import MODE_BITS, has_palette, image_from_raw, raw_bytes_of
from dq_lightning.store.values import (
    MAX_DEPTH,
    TENSOR_DTYPES,
    array_bytes,
    array_from,
    is_plain_array,
    is_plain_tensor,
    numpy_dtype,
    plain_shape,
    tensor_bytes,
    tensor_from,
)

# a larger image is smaller as PNG or as its owner's bytes
MAX_RAW_IMAGE_BYTES = 64 * 64 * 4
MAX_ROW_BYTES = 1 << 40
VALUE_KIND = "value"


@dataclass(frozen=True)
class Leaf:
    """What one place of the tree holds in every sample.

    Attributes:
        kind: "none", "bool", "int", "float", "scalar", "array", "tensor", "image", or "value" (no column).
        dtype: numpy's description, torch's name, or the image's mode.
        shape: of an array or tensor; (width, height) of an image.
    """

    kind: str
    dtype: str = ""
    shape: tuple[int, ...] = ()

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample in the column."""
        return _ROW_BYTES[self.kind](self)

    def column_type(self) -> tuple[str, tuple[int, ...]]:
        """Type and row shape of the npy file that holds the column."""
        if self.kind in ("scalar", "array"):
            return self.dtype, self.shape
        if self.kind == "image":
            width, height = self.shape
            bands = max(1, MODE_BITS[self.dtype] // 8)
            fits = self.row_bytes == width * height * bands
            return "|u1", ((height, width, bands) if bands > 1 else (height, width)) if fits else (self.row_bytes,)
        if self.kind == "tensor":
            known = _NUMPY_OF_TENSOR.get(self.dtype)
            return (known, self.shape) if known else ("|u1", (self.row_bytes,))
        return {"bool": "|b1", "int": "<i8", "float": "<f8"}[self.kind], ()


_NUMPY_OF_TENSOR = {
    name: f"<{c}{n}" for name, c, n in (("int16", "i", 2), ("int32", "i", 4), ("int64", "i", 8), ("float16", "f", 2))
}
_NUMPY_OF_TENSOR |= {"float32": "<f4", "float64": "<f8", "uint8": "|u1", "int8": "|i1", "bool": "|b1"}
_ROW_BYTES: dict[str, Callable[[Leaf], int]] = {
    "none": lambda leaf: 0,
    VALUE_KIND: lambda leaf: 0,
    "bool": lambda leaf: 1,
    "int": lambda leaf: 8,
    "float": lambda leaf: 8,
    "scalar": lambda leaf: numpy_dtype(leaf.dtype).itemsize,
    "array": lambda leaf: math.prod(leaf.shape) * numpy_dtype(leaf.dtype).itemsize,
    "tensor": lambda leaf: math.prod(leaf.shape) * TENSOR_DTYPES[leaf.dtype].itemsize,
    "image": lambda leaf: raw_bytes_of(leaf.dtype, (leaf.shape[0], leaf.shape[1])),
}


@dataclass(frozen=True)
class Tree:
    """The shape of a sample: containers down to numbered leaves.

    Attributes:
        kind: "leaf", "tuple", "list" or "dict".
        leaf: number of the leaf, from 0 in the order of reading.
        keys: of a dict, in order; text.
        children: of a container.
    """

    kind: str
    leaf: int = -1
    keys: tuple[str, ...] = ()
    children: tuple["Tree", ...] = field(default=())


def describe_leaf(value: Any) -> Leaf:
    """The narrowest description of a value; "value" when it has no fixed width."""
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
    if isinstance(value, Image.Image) and value.mode in MODE_BITS and not has_palette(value) and 0 not in value.size:
        leaf = Leaf("image", value.mode, value.size)
        return leaf if leaf.row_bytes <= MAX_RAW_IMAGE_BYTES else Leaf(VALUE_KIND)
    return Leaf(VALUE_KIND)


def leaf_bytes(value: Any, leaf: Leaf) -> bytes:
    """The bytes of one sample in the column."""
    if leaf.kind in ("bool", "int", "float"):
        return struct.pack({"bool": "<?", "int": "<q", "float": "<d"}[leaf.kind], value)
    if leaf.kind == "tensor":
        return tensor_bytes(value)
    if leaf.kind == "image":
        pixels: bytes = value.tobytes()
        return pixels
    return array_bytes(value) if leaf.kind in ("scalar", "array") else b""


def leaf_reader(leaf: Leaf) -> Callable[[Any], Any]:
    """A function from a sample's bytes in the column to the value."""
    if leaf.kind == "int":
        return lambda data: int.from_bytes(data, "little", signed=True)
    if leaf.kind == "bool":
        return lambda data: data[0] != 0
    if leaf.kind == "float":
        return lambda data: struct.unpack("<d", data)[0]
    if leaf.kind == "image":
        mode, size = leaf.dtype, (leaf.shape[0], leaf.shape[1])
        return lambda data: image_from_raw(mode, size, data)
    if leaf.kind == "tensor":
        torch_dtype, shape = TENSOR_DTYPES[leaf.dtype], leaf.shape
        return lambda data: tensor_from(data, torch_dtype, shape)
    if leaf.kind in ("scalar", "array"):
        dtype, shape, whole = numpy_dtype(leaf.dtype), leaf.shape, leaf.kind == "array"
        return lambda data: array_from(data, dtype, shape) if whole else array_from(data, dtype, shape)[()]
    return lambda data: None


def plan(samples: Sequence[Any]) -> tuple[Tree, list[Leaf]]:
    """The tree and leaves that fit the given samples: a place where they differ is a "value" leaf."""
    leaves: list[Leaf] = []

    def grow(values: Sequence[Any], depth: int) -> Tree:
        kind = _container(values[0])
        keys = tuple(values[0]) if kind == "dict" else ()
        alike = (
            kind
            and depth < MAX_DEPTH // 2
            and all(_same_container(value, kind, keys, len(values[0])) for value in values)
        )
        if alike:
            inner = keys if kind == "dict" else range(len(values[0]))
            return Tree(str(kind), -1, keys, tuple(grow([value[key] for value in values], depth + 1) for key in inner))
        described = {describe_leaf(value) for value in values}
        leaves.append(described.pop() if len(described) == 1 else Leaf(VALUE_KIND))
        return Tree("leaf", len(leaves) - 1)

    if not samples:
        return Tree("leaf", 0), [Leaf(VALUE_KIND)]
    return grow(samples, 0), leaves


def _container(value: Any) -> str | None:
    # a namedtuple would come back as a plain tuple: it is no container here, and refused as a value
    if type(value) is tuple:
        return "tuple"
    if type(value) is list:
        return "list"
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return "dict"
    return None


def _same_container(value: Any, kind: str | None, keys: tuple[str, ...], length: int) -> bool:
    return _container(value) == kind and len(value) == length and (kind != "dict" or tuple(value) == keys)


def leaves_of(sample: Any, tree: Tree) -> Iterator[Any] | None:
    """The leaves of a sample in order, or None when the sample is not such a tree."""
    found: list[Any] = []

    def walk(value: Any, node: Tree) -> bool:
        if node.kind == "leaf":
            found.append(value)
            return True
        if not _same_container(value, node.kind, node.keys, len(node.children)):
            return False
        inner = node.keys if node.kind == "dict" else range(len(value))
        return all(walk(value[key], child) for key, child in zip(inner, node.children, strict=True))

    return iter(found) if walk(sample, tree) else None


def tree_builder(root: Tree) -> Callable[[list[Any]], Any]:
    """A function that puts all leaves of a sample, in order, back into their tree."""
    # most samples are a flat tuple
    if root.kind == "tuple" and all(child.kind == "leaf" for child in root.children):
        numbers = [child.leaf for child in root.children]
        return tuple if numbers == list(range(len(numbers))) else lambda values: tuple(values[i] for i in numbers)
    return _subtree_builder(root)


def _subtree_builder(node: Tree) -> Callable[[list[Any]], Any]:
    if node.kind == "leaf":
        number = node.leaf
        return lambda values: values[number]
    children = [_subtree_builder(child) for child in node.children]
    if node.kind == "dict":
        return lambda values: {key: child(values) for key, child in zip(node.keys, children, strict=True)}
    make = tuple if node.kind == "tuple" else list
    return lambda values: make(child(values) for child in children)


def tree_to_json(node: Tree) -> Any:
    """Plain JSON for a tree."""
    if node.kind == "leaf":
        return node.leaf
    return {"kind": node.kind, "keys": list(node.keys), "children": [tree_to_json(child) for child in node.children]}


def tree_from_json(value: Any, num_leaves: int, depth: int = 0) -> Tree:
    """The inverse of `tree_to_json`.

    Raises:
        StoreError: no tree over just these leaves.
    """
    if type(value) is int and 0 <= value < num_leaves:
        return Tree("leaf", value)
    whole = isinstance(value, dict) and depth <= MAX_DEPTH and value.get("kind") in ("tuple", "list", "dict")
    children, keys = (value.get("children"), value.get("keys")) if whole else (None, None)
    if not isinstance(children, list) or not isinstance(keys, list) or not all(type(key) is str for key in keys):
        raise StoreError(f"store.json has no proper tree: {value!r:.80}")
    if value["kind"] == "dict" and len(set(keys)) != len(children):
        raise StoreError("store.json has a dict with keys that do not fit its values")
    return Tree(
        value["kind"], -1, tuple(keys), tuple(tree_from_json(child, num_leaves, depth + 1) for child in children)
    )


def leaf_from_json(value: Any) -> Leaf:
    """A leaf from its stored description.

    Raises:
        StoreError: unknown kind, dtype, mode or size.
    """
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str) or value["kind"] not in _ROW_BYTES:
        raise StoreError(f"store.json has an unknown column {value!r:.80}")
    leaf = Leaf(value["kind"], str(value.get("dtype", "")), plain_shape(value.get("shape", [])))
    image_fits = leaf.dtype in MODE_BITS and len(leaf.shape) == 2 and 0 not in leaf.shape
    proper = {
        "tensor": leaf.dtype in TENSOR_DTYPES,
        "image": image_fits,
        "scalar": leaf.shape == (),
    }.get(leaf.kind, True)
    if not proper or leaf.row_bytes > MAX_ROW_BYTES:
        raise StoreError(f"store.json has an impossible column {value!r:.80}")
    return leaf
