"""The inside of one item: which leaf is the image, and which is the target."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dq_lightning.core.errors import SourceError

Leaf = tuple[str | int, ...]
"""Path from an item to one of its leaves: keys of mappings and positions in sequences."""

IMAGE_NAMES = ("image", "img", "pixel_values", "pixels")
TARGET_NAMES = ("label", "labels", "target", "targets", "class", "y", "gt_label")
MISSING = object()
_LONGEST_WALKED = 64
MANY_CHANNELS = (
    "Arrays of more than 4 channels are no images for an encoder. Quantize a view of the dataset that shows three of them, "
    "info = quantize(view, config), and train on Subset(dataset, load_selection(info.path).index); or name the arrays with "
    "image_column= and pass features of your own, encoder=array [N, D]."
)
# of an array [H, W] that is taken for an image: scikit-learn's digits have 8 x 8 pixels
_SMALLEST_PLANE = 8


def evenly_spaced(length: int, count: int) -> list[int]:
    """At most `count` different positions from 0 to `length - 1`, ends included."""
    return sorted({int(p) for p in np.linspace(0, length - 1, min(count, length)).round()}) if length else []


def _is_pixels(value: Any) -> bool:
    """Whether a value is an array of real numbers that is not empty."""
    if not isinstance(value, Tensor | np.ndarray) or 0 in value.shape:
        return False
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "buif"
    return not (value.is_complex() or value.is_nested)


def may_be_image(value: Any) -> bool:
    """Whether a leaf can be an image: a PIL image, or an array [H, W], [C, H, W] or [H, W, C] with 1 to 4 channels."""
    if isinstance(value, Image.Image):
        return True
    shape: tuple[int, ...] = tuple(value.shape) if _is_pixels(value) else ()
    return len(shape) == 2 or (len(shape) == 3 and (shape[0] <= 4 or shape[-1] <= 4))


def looks_like_image(value: Any) -> bool:
    """Whether a leaf is taken for an image without being named: one that is no sound [1, N] and no small table [4, 4]."""
    if isinstance(value, Image.Image) or not may_be_image(value):
        return isinstance(value, Image.Image)
    shape = tuple(value.shape)
    if len(shape) == 2:
        unsigned = value.dtype in (torch.uint8, torch.uint16, np.uint8, np.uint16)
        return bool(min(shape) >= (2 if unsigned else _SMALLEST_PLANE))
    return bool(min(shape[1:] if shape[0] <= 4 else shape[:-1]) > 1)


def is_dataclass(value: Any) -> bool:
    """Whether a value is an object of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def at(item: Any, leaf: Leaf) -> Any:
    """The value at a leaf."""
    for key in leaf:
        item = getattr(item, str(key)) if is_dataclass(item) else item[key]
    return item


def with_value(item: Any, leaf: Leaf, value: Any) -> Any:
    """The item with another value at a leaf; every container keeps its type, and the given item is left as it was."""
    if not leaf:
        return value
    key, rest = leaf[0], leaf[1:]
    new = with_value(at(item, (key,)), rest, value)
    if isinstance(item, Mapping) or is_dataclass(item):
        # copied, since a class may want other arguments than its content (defaultdict) or check them
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
    """The values in a container, each with its key; nothing for other values and for long sequences."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif is_dataclass(value):
        for field in dataclasses.fields(value):
            if hasattr(value, field.name):
                yield field.name, getattr(value, field.name)
    elif isinstance(value, tuple | list) and len(value) <= _LONGEST_WALKED:
        yield from enumerate(value)


def plain_parts(value: Any) -> Any:
    """A value as a packed store holds it: tuples and dicts for containers of other classes, tensors for torchvision's own."""
    if isinstance(value, Tensor):
        return value.as_subclass(Tensor) if tv_tensor(value) else value
    if is_dataclass(value) or isinstance(value, dict):
        return {key: plain_parts(part) for key, part in children(value)}
    if isinstance(value, tuple):
        return tuple(map(plain_parts, value))
    return [plain_parts(part) for part in value] if type(value) is list else value


def tv_tensor(value: Any) -> str:
    """The name of torchvision's class of an image or mask that is a tensor with nothing beside; else empty."""
    kind = type(value)
    known = kind.__module__.startswith("torchvision.tv_tensors") and kind.__name__ in ("Image", "Mask")
    return kind.__name__ if known else ""


def image_leaves(item: Any, prefix: Leaf = ()) -> list[Leaf]:
    """Every leaf of an item that can be an image, in order."""
    if looks_like_image(item):
        return [prefix]
    return [leaf for key, child in children(item) for leaf in image_leaves(child, (*prefix, key))]


def outline(value: Any, depth: int = 2) -> str:
    """What an item is made of, for messages: `tuple(Image RGB 32x32, int)`."""
    if isinstance(value, Image.Image):
        return f"Image {value.mode} {value.width}x{value.height}"
    if isinstance(value, Tensor | np.ndarray):
        return f"{type(value).__name__} {value.dtype} {list(value.shape)}"
    if depth and isinstance(value, Mapping):
        kind = "dict" if type(value) is dict else type(value).__name__
        return f"{kind}(" + ", ".join(f"{k}: {outline(v, depth - 1)}" for k, v in value.items()) + ")"
    if depth and is_dataclass(value):
        return f"{type(value).__name__}(" + ", ".join(f"{k}: {outline(v, depth - 1)}" for k, v in children(value)) + ")"
    if depth and isinstance(value, tuple | list) and len(value) <= 8:
        return f"{type(value).__name__}(" + ", ".join(outline(v, depth - 1) for v in value) + ")"
    return type(value).__name__


def named_leaf(item: Any, name: str, option: str) -> Leaf:
    """The leaf that an option names: a key of a mapping, or a position in a tuple written as a number.

    Raises:
        SourceError: the item has no such key or position.
    """
    if isinstance(item, Mapping):
        if name in item:
            return (name,)
        raise SourceError(f"{option}={name!r}: the items have {', '.join(map(repr, item))}; pass one of these")
    if is_dataclass(item):
        names = [key for key, _ in children(item)]
        if name in names:
            return (name,)
        raise SourceError(f"{option}={name!r}: the items have {', '.join(map(repr, names))}; pass one of these")
    if isinstance(item, tuple | list) and name.isdigit() and int(name) < len(item):
        return (int(name),)
    raise SourceError(f"{option}={name!r} names nothing in {outline(item)}; pass a position such as {option}='0'")


def find_image(item: Any, wanted: str | None) -> Leaf:
    """The leaf that holds the image.

    With several, the first place of an (image, target) pair counts, then a leaf with an image's usual name.

    Raises:
        SourceError: there is none, or there are several.
    """
    if wanted is not None:
        return named_leaf(item, wanted, "image_column")
    leaves = image_leaves(item)
    if len(leaves) == 1:
        return leaves[0]
    if isinstance(item, tuple | list) and len(item) == 2 and (0,) in leaves:
        return (0,)
    usual = [leaf for leaf in leaves if len(leaf) == 1 and str(leaf[0]).lower() in IMAGE_NAMES]
    if len(usual) == 1:
        return usual[0]
    seen = "no image" if not leaves else f"{len(leaves)} images"
    raise SourceError(f"An item of the dataset has {seen}: {outline(item)}. {_advice(item, leaves)}")


def _advice(item: Any, leaves: list[Leaf]) -> str:
    """What to do where no single image was found in an item."""
    if leaves:
        named = ", ".join(f"'{leaf[0]}'" for leaf in leaves if leaf)
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
            f"Numbers [H, W] of a side under {_SMALLEST_PLANE} may be sound or a table. If it is an image, pass image_column= "
            "with its key or position; if not, compute features of your own and pass them to select(make_bins(features))."
        )
    return (
        "Pass image_column= with the key or position of the image (a PIL image or an array [H, W], [C, H, W] or [H, W, C]); "
        'for rows of text name their columns with config.text, as TextConfig(columns=("sentence",)).'
    )


def find_target(item: Any, image: Leaf, wanted: str | None) -> Leaf | None:
    """The leaf that holds the target, or None: the other half of a pair, the place after the image, a usual name."""
    if wanted is not None:
        return named_leaf(item, wanted, "label_column")
    if isinstance(item, Mapping) or is_dataclass(item):
        names = {key for key, _ in children(item)}
        return next(((name,) for name in TARGET_NAMES if name in names and (name,) != image[:1]), None)
    if not isinstance(item, tuple | list) or not image or len(item) < 2:
        return None
    place = int(image[0])
    if len(item) == 2:
        return (1 - place,)
    return (place + 1,) if place + 1 < len(item) else None
