"""The shape of a sample: tuples, lists and dicts down to numbered leaves. PURE."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from dq_lightning.core.errors import StoreError
from dq_lightning.packed.values import MAX_DEPTH


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


def container(value: Any) -> str | None:
    """The kind of a container, or None for a leaf."""
    # a namedtuple would come back as a plain tuple: it is no container here, and refused as a value
    if type(value) is tuple:
        return "tuple"
    if type(value) is list:
        return "list"
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return "dict"
    return None


def same_container(value: Any, kind: str | None, keys: tuple[str, ...], length: int) -> bool:
    """Whether a value is such a container."""
    return container(value) == kind and len(value) == length and (kind != "dict" or tuple(value) == keys)


def leaves_of(sample: Any, tree: Tree) -> Iterator[Any] | None:
    """The leaves of a sample in order, or None when the sample is not such a tree."""
    found: list[Any] = []

    def walk(value: Any, node: Tree) -> bool:
        if node.kind == "leaf":
            found.append(value)
            return True
        if not same_container(value, node.kind, node.keys, len(node.children)):
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
