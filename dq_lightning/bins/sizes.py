"""Compute the sizes of bins and the groups of samples that bins are made in."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.core.errors import DQError
from dq_lightning.core.label_sets import multi_hot, rarest_labels


def bin_sizes(total: int, num_bins: int) -> list[int]:
    """Return the sizes of bins that split `total` samples as evenly as possible, the larger bins first.

    >>> bin_sizes(11, 4)
    [3, 3, 3, 2]
    """
    return [total // num_bins + (number < total % num_bins) for number in range(num_bins)]


def group_of_each(labels: NDArray[np.generic] | Tensor | Sequence[int | str] | None, total: int) -> NDArray[np.int32]:
    """Return the group of each sample, int32 [N], which is its label.

    Without labels all samples are in group 0. Labels that are strings are numbered in sorted order. The group of a sample
    that may have several labels is its rarest one.

    Args:
        labels: class of each of the N samples as integers, booleans or strings, or 0 and 1 [N, C] for several labels,
            or None.
        total: number N of samples.

    Raises:
        DQError: labels are not N strings or integers that fit 32 bits.
    """
    if labels is None:
        return np.zeros(total, dtype=np.int32)
    values = _as_array(labels)
    members = multi_hot(values) if values.ndim and len(values) == total else None
    if members is not None:
        return rarest_labels(members).astype(np.int32)
    if values.shape != (total,):
        raise DQError(f"labels must have one entry for each of {total} samples, got shape {values.shape}")
    if total and (values.dtype.kind == "U" or (values.dtype.kind == "O" and all(isinstance(v, str) for v in values))):
        return np.unique(values, return_inverse=True)[1].astype(np.int32)
    if total and not (np.issubdtype(values.dtype, np.integer) or values.dtype == np.bool_):
        items = values.tolist()
        kind = str if isinstance(items[0], str) else int
        # What is missing tells more than that a column with a missing number became one of floats.
        odd = next((place for place, item in enumerate(items) if item is None or item != item), None)
        odd = next(place for place, item in enumerate(items) if not isinstance(item, kind)) if odd is None else odd
        raise DQError(
            f"labels must be all integers or all strings, got {items[odd]!r} for sample {odd} of {values.dtype}; "
            "number the classes 0, 1, ... first (-1 for no class), or pass their names"
        )
    if total and not (int(values.min()) >= -(2**31) and int(values.max()) < 2**31):
        raise DQError(f"labels must fit 32 bits, got values from {values.min()} to {values.max()}")
    return values.astype(np.int32)


def _as_array(labels: Any) -> NDArray[Any]:
    """Return labels as an array of whole numbers, strings or, where some are something else, objects."""
    if isinstance(labels, Tensor):
        return np.asarray(labels.detach().cpu().numpy())
    try:
        values = np.asarray(labels)
    except ValueError as error:
        raise DQError(f"labels must be one integer or string a sample: {error}") from error
    # NumPy writes every element of a list as a string if one is: NaN, in place of a missing name, as "nan".
    if values.dtype.kind == "U" and not hasattr(labels, "dtype"):
        objects = np.asarray(labels, dtype=object)
        values = values if all(isinstance(value, str) for value in objects.flat) else objects
    if values.dtype.kind == "O" and values.size and all(isinstance(v, int | np.integer) for v in values.flat):
        return values.astype(np.int64)
    return values


def group_members(group: NDArray[np.int32]) -> Iterator[NDArray[np.int64]]:
    """Yield the positions of the samples of each group, ascending; the groups come in ascending order."""
    order = np.argsort(group, kind="stable")
    if len(order):
        yield from np.split(order, np.flatnonzero(np.diff(group[order])) + 1)


def to_tensor(values: NDArray[np.generic]) -> Tensor:
    """Wrap an array without copying it."""
    return torch.from_numpy(values)
