"""Features -> Bins: split every group into bins of falling representativeness and rising diversity. PURE."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.bins.graph_cut import pick_group
from dq_lightning.bins.prepare import as_factors, prepare
from dq_lightning.bins.sizes import bin_sizes, group_members, group_of_each, to_tensor
from dq_lightning.config import BinConfig, Maximizer, Objective, Similarity
from dq_lightning.records import Bins, Features


def make_bins(
    features: Features | Tensor | NDArray[np.floating],
    *,
    num_bins: int = 10,
    labels: NDArray[np.generic] | Tensor | None = None,
    objective: Objective = "graph_cut",
    maximizer: Maximizer = "naive",
    similarity: Similarity = "cosine",
    lam: float = 1.0,
) -> Bins:
    """Split N samples into K disjoint bins by repeated greedy selection from what remains (Zhou et al. 2023, section 3.1).

    With `labels` the split is made inside each class. Of n samples of a group the first `n mod K` bins get `n // K + 1`,
    the others `n // K`. The picks are those of float64 arithmetic on a full similarity matrix, without the matrix: gains
    closer than the rounding error are computed again, rounded once, and count as tied when equal; the lowest position wins.

    Args:
        features: floating [N, D], or `Features`; with `head_gradient` samples are compared by the last layer's gradient.
        num_bins: K, 1 to 32767.
        labels: N integers, or None.
        objective: `"graph_cut"`.
        maximizer: `"naive"`.
        similarity: `"cosine"` is 1/2 + cos/2 (the cosine with a zero vector is 0), `"dot"` the inner product.
        lam: weight of representativeness against diversity.

    Returns:
        Bins: `assignment` int16 [N], `rank` int32 [N], `gain` float32 [N], `group` int32 [N].

    Raises:
        ConfigError: a setting is unknown or out of range.
        FeatureError: features are not a finite floating matrix.
        DQError: labels are not N integers.
    """
    BinConfig(num_bins=num_bins, objective=objective, maximizer=maximizer, similarity=similarity, lam=lam)
    factors = as_factors(features)
    total = len(next(iter(factors.values())))
    group = group_of_each(labels, total)
    assignment = np.zeros(total, dtype=np.int16)
    rank = np.zeros(total, dtype=np.int32)
    gain = np.zeros(total, dtype=np.float32)
    halved = similarity == "cosine"
    prepared = prepare(factors, unit=halved, device=torch.device("cpu"))
    for members in group_members(group):
        sizes = bin_sizes(len(members), num_bins)
        order, gains = pick_group(prepared, members, sizes, lam=lam, halved=halved, tick=lambda _: None)
        assignment[members[order]] = np.repeat(np.arange(num_bins), sizes)
        rank[members[order]] = np.concatenate([np.arange(size) for size in sizes])
        gain[members[order]] = gains
    return Bins(to_tensor(assignment), to_tensor(rank), to_tensor(gain), to_tensor(group), num_bins)
