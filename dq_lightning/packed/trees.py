"""The shape of a sample: nested tuples, lists and dicts whose other values, the leaves, are numbered.

The code is pure: it reads and writes no files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dq_lightning.core.errors import StoreError
from dq_lightning.packed.values import MAX_DEPTH


@dataclass(frozen=True)
class Tree:
    """The shape of a sample, or of a part of it: a container with children, or a numbered leaf.

    Attributes:
        kind: "leaf", "tuple", "list" or "dict".
        leaf: number of a leaf, counted from 0 in the order in which the sample is traversed; -1 for a container.
        keys: keys of a dict in order; all are strings.
        children: shapes of a container's values, in order.
    """

    kind: str
    leaf: int = -1
    keys: tuple[str, ...] = ()
    children: tuple["Tree", ...] = field(default=())

    @cached_property
    def is_flat(self) -> bool:
        """Whether a sample is a tuple of its leaves, in order, as most samples are."""
        numbers = [child.leaf for child in self.children]
        return self.kind == "tuple" and numbers == list(range(len(numbers)))


def container(value: Any) -> str | None:
    """Return the kind of a container, or None for a leaf."""
    # A namedtuple would come back as a plain tuple, so it does not count as a container. As a value it is refused.
    if type(value) is tuple:
        return "tuple"
    if type(value) is list:
        return "list"
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return "dict"
    return None


def same_container(value: Any, kind: str | None, keys: tuple[str, ...], length: int) -> bool:
    """Return whether a value is a container of this kind and length, with these keys if it is a dict."""
    return container(value) == kind and len(value) == length and (kind != "dict" or tuple(value) == keys)


def map_leaves(sample: Any, change: Callable[[Any], Any]) -> Any:
    """Return a sample with `change` applied to every value in its tuples, lists and dicts that is none of these."""
    if type(sample) in (tuple, list):
        return type(sample)(map_leaves(inner, change) for inner in sample)
    if isinstance(sample, dict):
        return {key: map_leaves(inner, change) for key, inner in sample.items()}
    return change(sample)


def leaves_of(sample: Any, tree: Tree) -> Sequence[Any] | None:
    """Return the leaves of a sample in order, or None if the sample does not have the shape of this tree."""
    if tree.is_flat:
        return sample if type(sample) is tuple and len(sample) == len(tree.children) else None
    found: list[Any] = []

    def walk(value: Any, node: Tree) -> bool:
        if node.kind == "leaf":
            found.append(value)
            return True
        if not same_container(value, node.kind, node.keys, len(node.children)):
            return False
        inner = node.keys if node.kind == "dict" else range(len(value))
        return all(walk(value[key], child) for key, child in zip(inner, node.children, strict=True))

    return found if walk(sample, tree) else None


def tree_builder(root: Tree) -> Callable[[list[Any]], Any]:
    """Return a function that makes a sample from the list of all its leaves."""
    return tuple if root.is_flat else _subtree_builder(root)


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
    """Convert a tree to plain JSON."""
    if node.kind == "leaf":
        return node.leaf
    return {"kind": node.kind, "keys": list(node.keys), "children": [tree_to_json(child) for child in node.children]}


def tree_from_json(value: Any, num_leaves: int, depth: int = 0) -> Tree:
    """Convert the JSON that `tree_to_json` returned, or a part of it at some depth, to a tree.

    Raises:
        StoreError: if the JSON is no tree, or names a leaf that the store does not have.
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
