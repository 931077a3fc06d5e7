"""Groups beyond one class a sample: sets of labels, ranges of a number, and the class that covers most of an image."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dq_lightning.core.errors import SourceError
from dq_lightning.core.label_sets import multi_hot, rarest_labels
from dq_lightning.core.records import Labels
from dq_lightning.sources.items import short_repr
from dq_lightning.sources.targets import as_targets, scalar, to_labels

QUANTILES, DOMINANT = "quantiles", "dominant"
DEFAULT_QUANTILES = 10
# Keys under which detection datasets keep the parts of an object.
_CLASS_KEYS = ("category_id", "category", "label", "labels", "class", "classes", "name", "categories")
_AREA_KEYS = ("area", "areas")
_CORNERS, _SIDES = ("boxes",), ("bbox", "bboxes")
# Value of pixels that belong to no class, in the masks of most datasets.
_VOID = 255


def is_rule(labels: Any) -> bool:
    """Whether `labels=` says how to group samples, and names no column: `"quantiles"`, `"quantiles:5"`, `"dominant"`.

    Raises:
        SourceError: the number of quantiles is not a whole number of at least 2.
    """
    if not isinstance(labels, str):
        return False
    return labels in (DOMINANT, QUANTILES) or (labels.startswith(f"{QUANTILES}:") and num_quantiles(labels) > 0)


def num_quantiles(rule: str) -> int:
    """Return the number of groups in `"quantiles"` or `"quantiles:5"`; see `is_rule`."""
    text = rule.partition(":")[2]
    if not text:
        return DEFAULT_QUANTILES
    if not text.isdecimal() or int(text) < 2:
        raise SourceError(
            f"labels={rule!r}: the number of groups must be a whole number of at least 2, as in quantiles:5"
        )
    return int(text)


def quantile_labels(values: Sequence[float | None], groups: int) -> Labels:
    """Group samples by value: the lowest N / groups first; sizes differ by at most one. NaN and None are no value.

    Equal values may fall into two neighbouring groups; earlier samples then come into the lower one.

    Raises:
        SourceError: fewer samples have a value than there are groups.

    >>> quantile_labels([5.0, 1.0, 3.0, None], 2).values.tolist()
    [1, 0, 0, 2]
    """
    numbers = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    known = np.flatnonzero(~np.isnan(numbers))
    if len(known) < groups:
        raise SourceError(
            f"labels={QUANTILES}:{groups}, but only {len(known)} of {len(numbers)} samples have a value: ask for fewer groups"
        )
    sorted_ = known[np.argsort(numbers[known], kind="stable")]
    group = np.full(len(numbers), groups, dtype=np.int64)
    parts = np.array_split(sorted_, groups)
    for number, part in enumerate(parts):
        group[part] = number
    names = tuple(f"{numbers[part[0]]:g} to {numbers[part[-1]]:g}" for part in parts)
    return Labels(torch.from_numpy(group), names, unlabeled=len(known) < len(numbers), are_classes=False)


def number_of(target: Any) -> float | None:
    """Return the number that a target is, or None where it is missing.

    Raises:
        SourceError: the target is no number.
    """
    value = scalar(target)
    if isinstance(value, Tensor | np.ndarray) and tuple(value.shape) == (1,):
        value = value.reshape(-1)[0].item()
    if value is None or isinstance(value, int | float):
        return None if value is None else float(value)
    raise SourceError(
        f"labels={QUANTILES!r} groups samples by a number, and a target is {short_repr(target)}: name the number with "
        "label_column=, or pass groups of your own as labels="
    )


def set_labels(members: Any, names: Sequence[str] | None = None) -> Labels | None:
    """Make labels of multi-hot targets, 0 or 1 [N, C]; None if `members` is anything else."""
    found = multi_hot(members)
    if found is None:
        return None
    known = tuple(names) if names is not None and len(names) == found.shape[1] else None
    known = known or tuple(map(str, range(found.shape[1])))
    rarest = torch.from_numpy(rarest_labels(found))
    unlabeled = bool((~found.any(axis=1)).any())
    return Labels(rarest, known, unlabeled, are_classes=False, members=torch.from_numpy(found))


def looks_like_set(row: Any) -> bool:
    """Whether a target may be the labels of a sample: a list or an array of one dimension."""
    return isinstance(row, list | tuple) or (isinstance(row, Tensor | np.ndarray) and row.ndim == 1)


def listed_sets(rows: Sequence[Any], names: Sequence[str] | None = None) -> Labels | None:
    """Make labels of rows that list the labels of a sample, as names or numbers from 0; None if rows hold anything else.

    Rows of equal length that hold nothing but 0 and 1 count as multi-hot, unless `names` tells what the numbers mean.

    >>> listed_sets([["dog", "cat"], [], ["dog"]]).members.tolist()
    [[True, True], [False, False], [False, True]]
    """
    if not all(row is None or looks_like_set(row) for row in rows):
        return None
    if names is None and (made := set_labels(list(rows))) is not None:
        return made
    lists = [[] if row is None else [scalar(value) for value in row] for row in rows]
    if not all(isinstance(value, int | str) for row in lists for value in row):
        return None
    seen = {value for row in lists for value in row}
    if seen and all(isinstance(value, str) for value in seen):
        names = sorted(seen)
        numbers = {name: number for number, name in enumerate(names)}
        lists = [[numbers[value] for value in row] for row in lists]
    elif not seen or not all(isinstance(value, int) and value >= 0 for value in seen):
        return None
    width = len(names) if names is not None else max(map(max, filter(None, lists))) + 1
    if width < 2 or max(map(max, filter(None, lists))) >= width:
        return None
    members = np.zeros((len(lists), width), dtype=bool)
    for place, row in enumerate(lists):
        members[place, row] = True
    return set_labels(members, names)


def given_labels(labels: Any, length: int) -> Labels:
    """Convert the grouping that the user passed as `labels=`, for `length` samples.

    It is one whole number or string for each sample, or multi-hot targets: 0 or 1 for each sample and label, or the
    list of the labels of each sample.

    Raises:
        SourceError: `labels` has another length, or holds other values, or all of its values mean no label.
    """
    try:
        count = len(labels)
    except TypeError as error:
        raise SourceError(
            f"labels= must hold one class per sample, or be False or a column name; got {type(labels).__name__}"
        ) from error
    if count != length:
        raise SourceError(f"labels= holds {count} values but the dataset has {length} samples; pass one for each")
    found = as_targets(labels)
    made = to_labels(found) if found is not None else set_labels(labels) or listed_sets(labels)
    if made is None:
        raise SourceError(
            "labels= must hold whole numbers or strings, one per sample, or 0 and 1 for several labels, [N, C]; for other "
            'numbers let labels="quantiles" make groups, or round them first'
        )
    return made


def dominant_labels(classes: Sequence[int | str | None], names: Sequence[str] | None = None) -> Labels | None:
    """Make labels of the dominant class of every sample; None where no sample has one."""
    known = sorted({name for name in classes if isinstance(name, str)})
    if known:
        # An image without objects has no class, in place of the class of the empty name.
        numbers = {name: number for number, name in enumerate(known)}
        classes, names = [None if name is None else numbers[str(name)] for name in classes], known
    found = as_targets(list(classes), names)
    return None if found is None else to_labels(found)


def dominant_class(target: Any) -> int | str | None:
    """Return the class that covers most of an image, by its mask or its boxes; None for an image without objects.

    Of a mask of class numbers this is the commonest one, 255 (no class) aside, and 0 (mostly background) only if nothing
    else is there. Objects are a list of dicts (COCO, VOC) or a dict of lists (torchvision, Hugging Face): the largest
    sum of areas counts, which are named `area`, those of `masks`, or those of boxes (`boxes` are corners, `bbox` is
    x, y, width, height); where an object has none, the number of objects counts. The lowest of a tie is taken.

    Raises:
        SourceError: the target is neither a mask nor objects with classes.

    >>> dominant_class([{"category_id": 7, "bbox": [0, 0, 2, 2]}, {"category_id": 3, "bbox": [4, 4, 5, 5]}])
    3
    """
    if isinstance(target, Image.Image | Tensor | np.ndarray):
        return _of_mask(target)
    if isinstance(target, Mapping) and "annotation" in target:
        target = target["annotation"].get("object", [])
    objects = _objects(target)
    if objects is None:
        raise SourceError(
            f"labels={DOMINANT!r} reads a mask of whole numbers, or objects with classes and boxes; a target is "
            f"{short_repr(target)}. Name the right part of an item with label_column="
        )
    amounts: dict[int | str, float] = {}
    by_area = all(area is not None for _, area in objects)
    for name, area in objects:
        amounts[name] = amounts.get(name, 0.0) + (float(area or 0.0) if by_area else 1.0)
    return min(amounts, key=lambda name: (-amounts[name], str(type(name)), name)) if amounts else None


def _of_mask(target: Any) -> int | None:
    mask = np.asarray(target.detach().cpu() if isinstance(target, Tensor) else target)
    mask = mask[0] if mask.ndim == 3 and mask.shape[0] == 1 else mask
    if mask.ndim != 2 or mask.dtype.kind not in "bui":
        raise SourceError(
            f"labels={DOMINANT!r} reads masks [H, W] of class numbers, and a mask is {mask.dtype} {list(mask.shape)}: pass one "
            "class for each sample as labels="
        )
    values, counts = np.unique(mask, return_counts=True)
    known = values != _VOID
    if (known & (values != 0)).any():
        known &= values != 0
    return int(values[known][counts[known].argmax()]) if known.any() else None


def _objects(target: Any) -> list[tuple[int | str, float | None]] | None:
    """Return (class, area or None) of every object of a target; None if the target is something else."""
    if isinstance(target, Mapping):
        key = _first(target, _CLASS_KEYS)
        classes = None if key is None else [scalar(value) for value in target[key]]
        if classes is None or not _are_names(classes):
            return None
        areas = _areas(target)
        return list(zip(classes, areas if len(areas) == len(classes) else [None] * len(classes), strict=True))
    if not isinstance(target, list | tuple) or not all(isinstance(one, Mapping) for one in target):
        return None
    found: list[tuple[int | str, float | None]] = []
    for one in target:
        key = _first(one, _CLASS_KEYS)
        if key is None or not _are_names([scalar(one[key])]):
            return None
        found.append((scalar(one[key]), _area(one)))
    return found


def _are_names(classes: Iterable[Any]) -> bool:
    return all(isinstance(value, int | str) for value in classes)


def _first(target: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    return next((key for key in keys if key in target), None)


def _areas(target: Mapping[str, Any]) -> list[float]:
    """Return the areas of the objects in a dict of lists; none where it holds none."""
    if (key := _first(target, _AREA_KEYS)) is not None:
        return [float(area) for area in target[key]]
    if "masks" in target:
        return [float((np.asarray(mask) > 0).sum()) for mask in target["masks"]]
    if (key := _first(target, (*_CORNERS, *_SIDES))) is None:
        return []
    boxes = target[key]
    # torchvision's boxes say how they are written.
    written = str(getattr(getattr(boxes, "format", None), "value", "")).upper()
    corners = written == "XYXY" if written else key in _CORNERS
    return [_box_area([float(value) for value in box], corners=corners) for box in boxes]


def _area(one: Mapping[str, Any]) -> float | None:
    """Return the area of one object, or None."""
    if (key := _first(one, _AREA_KEYS)) is not None:
        return float(one[key])
    if "bndbox" in one:
        sides = [float(one["bndbox"][name]) for name in ("xmin", "ymin", "xmax", "ymax")]
        return _box_area(sides, corners=True)
    key = _first(one, (*_CORNERS, *_SIDES))
    return None if key is None else _box_area([float(value) for value in one[key]], corners=key in _CORNERS)


def _box_area(box: Sequence[float], *, corners: bool) -> float:
    """Return the area of a box of two corners, or of a corner (or centre) and two sides."""
    first, second, third, fourth = box
    return max(third - first, 0.0) * max(fourth - second, 0.0) if corners else third * fourth
