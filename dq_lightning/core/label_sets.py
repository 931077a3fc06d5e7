"""Multi-hot targets: the label by which a sample with several labels is grouped."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def multi_hot(values: Any) -> NDArray[np.bool_] | None:
    """Return an array, tensor or list of rows of 0 and 1 as bool [N, C], C >= 2; None if the values are anything else.

    >>> multi_hot([[0, 1], [1, 1]]).tolist(), multi_hot([3, 4])
    ([[False, True], [True, True]], None)
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if isinstance(values, list | tuple):
        lengths = {len(row) if hasattr(row, "__len__") and not isinstance(row, str) else -1 for row in values}
        if len(lengths) != 1 or min(lengths) < 2:
            return None
        values = [row.detach().cpu() if isinstance(row, Tensor) else row for row in values]
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):
        return None
    if array.ndim != 2 or array.shape[1] < 2 or array.dtype.kind not in "buif":
        return None
    found = array != 0
    return found if np.array_equal(array, found) else None


def rarest_labels(members: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the label of each sample that the fewest samples have, the lowest one of a tie; C for a sample without labels.

    Samples are dealt out by their rarest labels first in iterative stratification (Sechidis et al. 2011, "On the
    stratification of multi-label data"), so these are the groups that bins are made in.

    Args:
        members: bool [N, C], the labels of each sample.

    >>> rarest_labels(np.array([[True, True], [True, False], [False, False]])).tolist()
    [1, 0, 2]
    """
    total, labels = members.shape
    rarest = np.full(total, labels, dtype=np.int64)
    # From the commonest label to the rarest, so that the rarest is written last.
    counts = members.sum(axis=0)
    for label in np.lexsort((np.arange(labels), counts))[::-1]:
        rarest[members[:, label]] = label
    return rarest
