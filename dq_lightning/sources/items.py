"""The structure of one item: finds the image and the target in it, and reads and replaces single values."""

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dq_lightning.core.errors import SourceError

Leaf = tuple[str | int, ...]
"""Path from an item to a value inside it: keys of mappings, fields of dataclasses and positions in sequences. The
values that such paths lead to are called leaves."""

IMAGE_NAMES = ("image", "img", "pixel_values", "pixels")
TARGET_NAMES = ("label", "labels", "target", "targets", "class", "y", "gt_label", "cls")
_MAX_WALKED = 64
# Types of values that have no parts, which are tested first because nearly all parts of items are of these.
_WITHOUT_PARTS = frozenset((int, float, bool, str, bytes, type(None), np.ndarray, Tensor, Image.Image))
MANY_CHANNELS = (
    "Arrays of more than 4 channels are no images for an encoder. Quantize a view of the dataset that shows three of them, "
    "info = quantize(view, config), and train on Subset(dataset, load_selection(info.path).index); or name the arrays with "
    "image_column= and pass features of your own, encoder=array [N, D]."
)
# The smallest side of an array [H, W] that is taken for an image: scikit-learn's digits have 8 x 8 pixels.
_MIN_PLANE_SIDE = 8


def evenly_spaced(length: int, count: int) -> list[int]:
    """At most `count` different positions from 0 to `length - 1`, with both ends included when `count` is at least 2.

    Example:
        >>> evenly_spaced(10, 4)
        [0, 3, 6, 9]
    """
    return sorted({int(p) for p in np.linspace(0, length - 1, min(count, length)).round()}) if length else []


def _is_pixels(value: Any) -> bool:
    """Whether a value is an array of real numbers that is not empty."""
    if not isinstance(value, Tensor | np.ndarray) or 0 in value.shape:
        return False
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "buif"
    return not (value.is_complex() or value.is_nested)


def may_be_image(value: Any) -> bool:
    """Whether a value can be an image: a PIL image, or an array [H, W], [C, H, W] or [H, W, C] with 1 to 4 channels."""
    if isinstance(value, Image.Image):
        return True
    shape: tuple[int, ...] = tuple(value.shape) if _is_pixels(value) else ()
    return len(shape) == 2 or (len(shape) == 3 and (shape[0] <= 4 or shape[-1] <= 4))


def looks_like_image(value: Any) -> bool:
    """Whether a value is taken for an image when the user names none.

    Arrays that may be sound (such as [1, N]) or a small table (such as [4, 4]) are not.
    """
    if isinstance(value, Image.Image) or not may_be_image(value):
        return isinstance(value, Image.Image)
    shape = tuple(value.shape)
    if len(shape) == 2:
        unsigned = value.dtype in (torch.uint8, torch.uint16, np.uint8, np.uint16)
        return bool(min(shape) >= (2 if unsigned else _MIN_PLANE_SIDE))
    return bool(min(shape[1:] if shape[0] <= 4 else shape[:-1]) > 1)


def is_dataclass(value: Any) -> bool:
    """Whether a value is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def at(item: Any, leaf: Leaf) -> Any:
    """The value that a path leads to.

    Example:
        >>> at({"pair": ("a", "b")}, ("pair", 1))
        'b'
    """
    for key in leaf:
        item = getattr(item, str(key)) if type(item) not in (tuple, dict) and is_dataclass(item) else item[key]
    return item


def with_value(item: Any, leaf: Leaf, value: Any) -> Any:
    """A copy of the item with another value at a path. Every container keeps its type; the given item is not changed.

    Example:
        >>> with_value({"pair": ("a", "b")}, ("pair", 1), "c")
        {'pair': ('a', 'c')}
    """
    if not leaf:
        return value
    key, rest = leaf[0], leaf[1:]
    if type(item) is tuple:
        new = with_value(at(item, (key,)), rest, value)
        return tuple([new if position == key else old for position, old in enumerate(item)])
    new = with_value(at(item, (key,)), rest, value)
    if isinstance(item, Mapping) or is_dataclass(item):
        # The container is copied, because its class may need other arguments than its content, or check them.
        changed: Any = copy.copy(item)
        if isinstance(item, Mapping):
            changed[key] = new
        else:
            object.__setattr__(changed, str(key), new)
        return changed
    values = [new if position == key else old for position, old in enumerate(item)]
    if hasattr(item, "_fields"):
        return type(item)(*values)
    return type(item)(values)


def children(value: Any) -> Iterator[tuple[str | int, Any]]:
    """Iterate over (key, value) of a container; over nothing for other values and for sequences longer than 64."""
    if type(value) is tuple:
        yield from enumerate(value) if len(value) <= _MAX_WALKED else ()
    elif isinstance(value, Mapping):
        yield from value.items()
    elif is_dataclass(value):
        for field in dataclasses.fields(value):
            if hasattr(value, field.name):
                yield field.name, getattr(value, field.name)
    elif isinstance(value, tuple | list) and len(value) <= _MAX_WALKED:
        yield from enumerate(value)


def plain_parts(value: Any) -> Any:
    """A value as a packed store holds it.

    Dataclasses and subclasses of dict become dicts, subclasses of tuple become tuples, and torchvision's images and
    masks become plain tensors.
    """
    if type(value) in _WITHOUT_PARTS:
        return value
    if isinstance(value, Tensor):
        return value.as_subclass(Tensor) if tv_tensor(value) else value
    if isinstance(value, tuple):
        return tuple(map(plain_parts, value))
    if is_dataclass(value) or isinstance(value, dict):
        return {key: plain_parts(part) for key, part in children(value)}
    return [plain_parts(part) for part in value] if type(value) is list else value


def tv_tensor(value: Any) -> str:
    """`"Image"` or `"Mask"` for tensors of these classes of torchvision, which hold no further data; else empty."""
    kind = type(value)
    known = kind.__module__.startswith("torchvision.tv_tensors") and kind.__name__ in ("Image", "Mask")
    return kind.__name__ if known else ""


def parts(value: Any, place: Leaf = ()) -> Iterator[tuple[Leaf, Any]]:
    """Iterate over (path, value) of a value and everything inside it, each container before its content."""
    yield place, value
    for key, part in children(value):
        yield from parts(part, (*place, key))


def pillow_images(value: Any) -> Iterator[Image.Image]:
    """Iterate over the Pillow images inside a value, in order."""
    if isinstance(value, Image.Image):
        yield value
    elif type(value) not in _WITHOUT_PARTS:
        for _, part in children(value):
            yield from pillow_images(part)


def image_leaves(item: Any) -> list[Leaf]:
    """The paths to all values of an item that are taken for images, in order."""
    return [leaf for leaf, part in parts(item) if looks_like_image(part)]


def outline(value: Any, depth: int = 2) -> str:
    """A short description of an item's structure for messages, for instance `tuple(Image RGB 32x32, int)`.

    Example:
        >>> outline(("cat", 3))
        'tuple(str, int)'
    """
    if isinstance(value, Image.Image):
        return f"Image {value.mode} {value.width}x{value.height}"
    if isinstance(value, Tensor | np.ndarray):
        return f"{type(value).__name__} {value.dtype} {list(value.shape)}"
    if depth and (isinstance(value, Mapping) or is_dataclass(value)):
        return f"{type(value).__name__}(" + ", ".join(f"{k}: {outline(v, depth - 1)}" for k, v in children(value)) + ")"
    if depth and isinstance(value, tuple | list) and len(value) <= 8:
        return f"{type(value).__name__}(" + ", ".join(outline(v, depth - 1) for v in value) + ")"
    return type(value).__name__


def quoted(names: Iterable[object]) -> str:
    """Return names in quotes as one text for messages; `none` if there are none."""
    return ", ".join(map(repr, names)) or "none"


def short_repr(value: Any) -> str:
    """Return type and representation of a value for messages, cut to 40 characters.

    Example:
        >>> short_repr([1, 2])
        'list [1, 2]'
    """
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def _named_leaf(item: Any, name: str, option: str) -> Leaf:
    """The path to the key, field or position (written as a number) of an item that `option` names.

    Names of containers and of what is in them are joined by dots, unless the item has a key with dots.
    SourceError if the item has no such part.
    """
    names = [key for key, _ in children(item)] if isinstance(item, Mapping) or is_dataclass(item) else []
    if name in names:
        return (name,)
    if isinstance(item, tuple | list) and name.isdigit() and int(name) < len(item):
        return (int(name),)
    outer, dot, inner = name.partition(".")
    if dot:
        leaf = _named_leaf(item, outer, option)
        return leaf + _named_leaf(at(item, leaf), inner, option)
    if names:
        raise SourceError(f"{option}={name!r}: the items have {quoted(names)}; pass one of these")
    raise SourceError(f"{option}={name!r} names nothing in {outline(item)}; pass a position such as {option}='0'")


def find_image(item: Any, wanted: str | None) -> Leaf:
    """The path to the image of an item; `wanted` is the key or position that the user named, if any.

    If an item holds several images, the first place of an (image, target) pair is used, else the only one under a usual
    name of images, else the first if all are one and the same object, as for several views of one image.

    Raises:
        SourceError: the item holds no image, or several of which none is preferred, or has nothing at `wanted`.
    """
    if wanted is not None:
        leaf = _named_leaf(item, wanted, "image_column")
        inside = image_leaves(at(item, leaf))
        if not inside or inside[0] == ():
            return leaf
        if _is_one_object(at(item, leaf), inside):
            return leaf + inside[0]
        raise SourceError(
            f"image_column={wanted!r} names several images: {outline(item, 3)}. {_advice(item, [leaf + one for one in inside])}"
        )
    leaves = image_leaves(item)
    if len(leaves) == 1:
        return leaves[0]
    if isinstance(item, tuple | list) and len(item) == 2 and (0,) in leaves:
        return (0,)
    usual = [leaf for leaf in leaves if len(leaf) == 1 and str(leaf[0]).lower() in IMAGE_NAMES]
    if len(usual) == 1:
        return usual[0]
    if leaves and _is_one_object(item, leaves):
        return leaves[0]
    seen = "no image" if not leaves else f"{len(leaves)} images"
    raise SourceError(f"An item of the dataset has {seen}: {outline(item)}. {_advice(item, leaves)}")


def _is_one_object(item: Any, leaves: list[Leaf]) -> bool:
    """Whether several paths lead to the same object."""
    return len({id(at(item, leaf)) for leaf in leaves}) == 1


def _advice(item: Any, leaves: list[Leaf]) -> str:
    """The advice of the error message when no single image was found in an item."""
    if leaves:
        named = ", ".join("'" + ".".join(map(str, leaf)) + "'" for leaf in leaves if leaf)
        return f"Pass image_column= with the key or position of the one that samples are compared by: {named}."
    if not list(children(item)) and not isinstance(item, Tensor | np.ndarray):
        return (
            f"Images are found in tuples, lists, dicts and dataclasses: let the dataset give one of these in place of a "
            f"{type(item).__name__}, or the image alone."
        )
    arrays = [value for _, value in [((), item), *children(item)] if _is_pixels(value)]
    if any(array.ndim == 3 and min(array.shape[0], array.shape[-1]) > 4 for array in arrays):
        return MANY_CHANNELS
    if any(may_be_image(array) for array in arrays):
        return (
            f"Numbers [H, W] of a side under {_MIN_PLANE_SIDE} may be sound or a table. If it is an image, pass image_column= "
            "with its key or position; if not, compute features of your own and pass them to select(make_bins(features))."
        )
    return (
        "Pass image_column= with the key or position of the image (a PIL image or an array [H, W], [C, H, W] or [H, W, C]); "
        'for rows of text name their columns with config.text, as TextConfig(columns=("sentence",)).'
    )


def find_target(item: Any, image: Leaf | None, wanted: str | None) -> Leaf | None:
    """The path to the target of an item, or None when there is none.

    `wanted` is the key or position that the user named, if any. Without it, in a mapping or dataclass this is the first
    usual name of targets, in a pair the place that is not the image (the second where `image` is None, because there is
    no image), and in a longer sequence the place after the image and further views of it (the same object).

    Raises:
        SourceError: the item has nothing at `wanted`.
    """
    if wanted is not None:
        try:
            return _named_leaf(item, wanted, "label_column")
        except SourceError as error:
            rules = 'labels="NAME" means label_column="NAME", except the rules "quantiles" and "dominant"'
            raise SourceError(f"{error} ({rules})") from None
    if isinstance(item, Mapping) or is_dataclass(item):
        names = {key for key, _ in children(item)}
        return next(((name,) for name in TARGET_NAMES if name in names and (name,) != (image or ())[:1]), None)
    if image is None:
        return (1,) if isinstance(item, tuple | list) and len(item) == 2 else None
    if not isinstance(item, tuple | list) or not image or len(item) < 2:
        return None
    place = int(image[0])
    if len(item) == 2:
        return (1 - place,)
    return next(((after,) for after in range(place + 1, len(item)) if item[after] is not item[place]), None)
