"""Compute the sizes of bins and the groups of samples that bins are made in."""

from collections.abc import Iterator, Sequence

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
    values = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    members = multi_hot(values) if len(values) == total else None
    if members is not None:
        return rarest_labels(members).astype(np.int32)
    if values.shape != (total,):
        raise DQError(f"labels must have one entry for each of {total} samples, got shape {values.shape}")
    if total and (values.dtype.kind == "U" or (values.dtype.kind == "O" and all(isinstance(v, str) for v in values))):
        return np.unique(values, return_inverse=True)[1].astype(np.int32)
    if total and not (np.issubdtype(values.dtype, np.integer) or values.dtype == np.bool_):
        raise DQError(
            f"labels must be integers, got {values.dtype}; number the classes 0, 1, ... first, or pass their names"
        )
    if total and not (int(values.min()) >= -(2**31) and int(values.max()) < 2**31):
        raise DQError(f"labels must fit 32 bits, got values from {values.min()} to {values.max()}")
    return values.astype(np.int32)


def group_members(group: NDArray[np.int32]) -> Iterator[NDArray[np.int64]]:
    """Yield the positions of the samples of each group, ascending; the groups come in ascending order."""
    order = np.argsort(group, kind="stable")
    if len(order):
        yield from np.split(order, np.flatnonzero(np.diff(group[order])) + 1)


def to_tensor(values: NDArray[np.generic]) -> Tensor:
    """Wrap an array without copying it."""
    return torch.from_numpy(values)
