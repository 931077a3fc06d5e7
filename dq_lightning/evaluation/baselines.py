"""Baseline selections: random rows, the rows with the longest responses, the rows nearest to k-means centres."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.bins.clusters import kmeans
from dq_lightning.core.arrays import as_tensor
from dq_lightning.core.errors import ConfigError, FeatureError
from dq_lightning.core.records import Features, Selection
from dq_lightning.selection.allocate import count_kept
from dq_lightning.sources.prompts import choose_template, columns_of

Baseline = Literal["random", "longest", "kmeans"]


def baseline_selection(
    name: Baseline,
    data: Any,
    *,
    keep_ratio: float,
    seed: int = 0,
) -> Selection:
    """Choose floor(N * keep_ratio + 1/2) of N rows with a baseline method that Dataset Quantization is compared with.

    Args:
        name: `"random"` draws uniformly, and with the same seed a smaller ratio gives a subset of a larger one;
            `"longest"` takes the rows whose responses have the most characters, ties by position; `"kmeans"` makes as
            many clusters as rows are kept (see `kmeans`) and takes the row nearest to each centre; for each empty
            cluster (which occurs with equal rows) it takes the row farthest from its own centre instead.
        data: what the choice is based on. For `"random"` anything with a length; for `"longest"` rows (dicts), or the N
            lengths as a tensor or array; for `"kmeans"` a floating matrix [N, D], or `Features`.
        keep_ratio: share of the rows that is kept, in (0, 1].
        seed: seed of `"random"` and `"kmeans"`.

    Returns:
        Selection with `index` int64 [M], ascending, and `bin` int16 [M], all 0.

    Raises:
        ConfigError: the name is unknown, the ratio is out of range, or nothing would be kept.
        FeatureError: `"kmeans"` was given something other than a finite floating matrix.
        SourceError: the columns of the rows fit no template, or a response is not text.
    """
    if name not in get_args(Baseline):
        raise ConfigError(f"the baseline must be one of {', '.join(map(repr, get_args(Baseline)))}, got {name!r}")
    if not 0 < keep_ratio <= 1:
        raise ConfigError(f"keep_ratio must be in (0, 1], got {keep_ratio!r}")
    wanted = count_kept(len(data), keep_ratio)
    if wanted == 0:
        raise ConfigError(f"keep_ratio={keep_ratio} of {len(data)} rows keeps none: pass a larger share")
    if name == "random":
        keys = np.random.PCG64(np.random.SeedSequence([seed])).random_raw(len(data))
        chosen = np.argsort(keys, kind="stable")[:wanted]
    elif name == "longest":
        lengths = data if isinstance(data, Tensor | np.ndarray) else response_lengths(data)
        chosen = np.argsort(-np.asarray(lengths).astype(np.int64), kind="stable")[:wanted]
    else:
        chosen = _nearest_to_centres(_matrix(data), wanted, seed)
    index = torch.from_numpy(np.sort(chosen).astype(np.int64))
    return Selection(index, torch.zeros(wanted, dtype=torch.int16))


def response_lengths(rows: Sequence[Any]) -> NDArray[np.int64]:
    """Return the number of characters of every row's response, int64 [N].

    Args:
        rows: N rows (dicts).

    Raises:
        SourceError: the columns of the rows fit no template, or a response is not text.
    """
    template = choose_template(columns_of(rows))
    return np.array([len(template.prompt_and_response(rows[i], i)[1]) for i in range(len(rows))], dtype=np.int64)


def _nearest_to_centres(rows: NDArray[np.float32], wanted: int, seed: int) -> NDArray[np.int64]:
    centres, label = kmeans(rows, wanted, seed)
    distance = np.concatenate(
        [
            np.square(rows[start : start + 4096] - centres[label[start : start + 4096]]).sum(axis=1)
            for start in range(0, len(rows), 4096)
        ]
    )
    # The order is by cluster, then by distance, then by position.
    order = np.lexsort((distance, label))
    first = np.flatnonzero(np.diff(label[order], prepend=-1))
    chosen = order[first]
    rest = np.setdiff1d(np.argsort(-distance, kind="stable"), chosen, assume_unique=True)
    # With `assume_unique=True`, setdiff1d keeps the order of its first argument, here the farthest rows first.
    return np.concatenate([chosen, rest[: wanted - len(chosen)]])


def _matrix(data: Any) -> NDArray[np.float32]:
    given = data.embedding if isinstance(data, Features) else data
    values = given if isinstance(given, Tensor) else as_tensor(np.asarray(given))
    if values.ndim != 2 or not values.is_floating_point() or not bool(torch.isfinite(values).all()):
        raise FeatureError(f"k-means needs finite floating features [N, D], got {values.dtype} {tuple(values.shape)}")
    return np.ascontiguousarray(values.float().cpu().numpy())
