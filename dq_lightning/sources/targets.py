"""Converts the targets of a dataset to classes, where they are classes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.core.arrays import as_numpy
from dq_lightning.core.errors import SourceError
from dq_lightning.core.records import Labels
from dq_lightning.sources.items import Leaf, at

UNLABELED = -1


@dataclass(frozen=True, eq=False)
class Targets:
    """The class of every sample as the dataset gives it, and the name of each class integer, if known.

    The values are int64 [N] (a negative value means no label) or unicode strings [N], where `missing`, bool [N], marks
    those without a label; None where all have one.
    """

    values: NDArray[Any]
    names: tuple[str, ...] | None = None
    missing: NDArray[np.bool_] | None = None

    def take(self, positions: NDArray[np.int64]) -> "Targets":
        """Return the targets of the samples at the given positions."""
        missing = None if self.missing is None else self.missing[positions]
        return Targets(self.values[positions], self.names, missing)


def join(parts: Sequence[Targets | None]) -> Targets | None:
    """Targets of concatenated datasets; None when a part has none, or some are integers and others strings.

    The integers that the parts deliver stay the classes. Names of classes are kept when all parts have the same.
    """
    known = [part for part in parts if part is not None]
    if len(known) != len(parts) or len({part.values.dtype.kind for part in known}) != 1:
        return None
    names = known[0].names if all(part.names == known[0].names for part in known) else None
    missing = None
    if any(part.missing is not None for part in known):
        masks = [np.zeros(len(one.values), dtype=bool) if one.missing is None else one.missing for one in known]
        missing = np.concatenate(masks)
    return Targets(np.concatenate([part.values for part in known]), names, missing)


def scalar(value: Any) -> Any:
    """The Python value of a NumPy or torch scalar, or of an integer array of shape [1]; other values are unchanged."""
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, Tensor | np.ndarray):
        return value
    return value.item() if value.ndim == 0 or (tuple(value.shape) == (1,) and _is_integer(value)) else value


def _is_integer(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return bool(value.dtype.kind in "iu")


def as_targets(values: Any, names: Sequence[str] | None = None) -> Targets | None:
    """Read a column of targets as classes; None unless each target is an integer, a string, or missing.

    The targets are a tensor, array or sequence of length N, or integers [N, 1]. Floats, masks, boxes and multi-hot rows
    are not classes. `names` are the names of class integers.

    Raises:
        SourceError: an integer does not fit into 64 bits.
    """
    known = tuple(names) if names is not None else None
    if isinstance(values, Tensor):
        values = as_numpy(values)
    if isinstance(values, np.ndarray) and not values.dtype.hasobject:
        if values.ndim == 2 and values.shape[1] == 1 and _is_integer(values):
            values = values[:, 0]
        if values.ndim != 1:
            return None
        if values.dtype.kind in "bui":
            return Targets(_as_int64(values) if values.dtype == np.uint64 else values.astype(np.int64), known)
        return Targets(values) if values.dtype.kind == "U" else None
    scalars = [scalar(value) for value in values]
    present = [value for value in scalars if value is not None]
    if present and all(isinstance(value, int) for value in present):
        return Targets(_as_int64([UNLABELED if v is None else v for v in scalars]), known)
    if present and all(isinstance(value, str) for value in present):
        missing = np.array([v is None for v in scalars])
        texts = np.array(["" if v is None else v for v in scalars], dtype=np.str_)
        return Targets(texts, missing=missing if missing.any() else None)
    return None


def _as_int64(values: Any) -> NDArray[np.int64]:
    """Convert whole numbers to int64 [N]; SourceError if one does not fit into 64 bits."""
    bounds = np.iinfo(np.int64)
    wide = next((place for place, value in enumerate(values) if not bounds.min <= value <= bounds.max), None)
    if wide is not None:
        raise SourceError(
            f"the class of sample {wide} is {values[wide]}, which is no 64-bit integer: number the classes from 0, or pass "
            "labels= with strings"
        )
    return np.asarray(values, dtype=np.int64)


def targets_key(key: str) -> str:
    """Return the key under which the targets are remembered that items hold, given the key of the items' digest."""
    return f"{key} targets"


def targets_to_json(targets: Targets | None) -> str:
    """Return targets as JSON, which `targets_from_json` reads."""
    if targets is None:
        return "null"
    missing = None if targets.missing is None else targets.missing.tolist()
    return json.dumps({"values": targets.values.tolist(), "names": targets.names, "missing": missing})


def targets_from_json(text: str) -> Targets | None:
    """Return the targets that `targets_to_json` wrote."""
    found = json.loads(text)
    if found is None:
        return None
    missing = None if found["missing"] is None else np.array(found["missing"], dtype=np.bool_)
    names = None if found["names"] is None else tuple(found["names"])
    return Targets(np.array(found["values"]), names, missing)


def to_labels(targets: Targets) -> Labels | None:
    """Convert targets to labels with classes from 0; None when no sample has a label.

    Strings become positions in the sorted list of different strings; an empty string is a class like any other. Samples
    without a label (None, negative integers) form one extra group after the classes, so that bins are made among them.
    When the largest integer is at least 65,536 and at least twice the number of samples, as with identifiers, integers
    become positions in their sorted list too.
    """
    values, names = targets.values, targets.names
    if values.dtype.kind == "U":
        there = np.ones(len(values), dtype=bool) if targets.missing is None else ~targets.missing
        if len(values) and not there.any():
            return None
        unique, inverse = np.unique(values[there], return_inverse=True)
        placed = np.full(len(values), len(unique), dtype=np.int64)
        placed[there] = inverse
        return Labels(torch.from_numpy(placed), tuple(str(name) for name in unique), unlabeled=bool((~there).any()))
    missing = values < 0
    if len(values) and missing.all():
        return None
    largest = int(values.max()) if len(values) else -1
    if largest >= max(2 * len(values), 65536):
        unique, inverse = np.unique(values[~missing], return_inverse=True)
        values = values.copy()
        values[~missing] = inverse
        names, largest = tuple(str(number) for number in unique), len(unique) - 1
    if names is not None and largest >= len(names):
        names = None
    if missing.any():
        group = len(names) if names is not None else largest + 1
        values = np.where(missing, group, values)
    grouped = torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64).copy())
    return Labels(grouped, names, unlabeled=bool(missing.any()))


def target_of(item: Any, leaf: Leaf | None) -> Any:
    """The target of an item if it can be a class, None where there is none, and 0.5 for any other target.

    The constant takes the place of targets such as masks, because those of a whole dataset would fill the memory.
    """
    try:
        value = None if leaf is None else at(item, leaf)
    except (KeyError, IndexError, TypeError, AttributeError):
        return None  # An item without this key or position is a sample without a label.
    if value is None or isinstance(value, int | str | np.generic):
        return value
    single = scalar(value)
    return 0.5 if isinstance(single, Tensor | np.ndarray) or single is value else single
