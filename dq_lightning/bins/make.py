"""Features -> Bins: split every group into bins of falling representativeness and rising diversity. PURE."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.bins import any_objective, batched, graph_cut
from dq_lightning.bins.batched import Picked
from dq_lightning.bins.clusters import cluster_members
from dq_lightning.bins.plan import Plan, choose_device, make_plan
from dq_lightning.bins.prepare import Prepared, as_factors, prepare
from dq_lightning.bins.sizes import bin_sizes, group_members, group_of_each, to_tensor
from dq_lightning.bins.workers import block_workers
from dq_lightning.core.config import BinConfig, Maximizer, Objective, Similarity
from dq_lightning.core.console import get_logger, progress_bar
from dq_lightning.core.records import Bins, Features

# fewer samples than this are done before a bar is read
_BAR_FROM = 20_000


def make_bins(
    features: Features | Tensor | NDArray[np.floating],
    *,
    num_bins: int = 10,
    labels: NDArray[np.generic] | Tensor | Sequence[int | str] | None = None,
    objective: Objective = "graph_cut",
    maximizer: Maximizer = "naive",
    similarity: Similarity = "cosine",
    lam: float = 1.0,
    clusters: int | None = None,
    gamma: float | None = None,
    epsilon: float = 0.1,
    beta: float = 0.9,
    search_seed: int = 0,
    device: str | torch.device = "auto",
    progress: bool | None = None,
) -> Bins:
    """Split N samples into K disjoint bins by repeated greedy selection from what remains (Zhou et al. 2023, section 3.1).

    With `labels` the split is made inside each class. Of n samples of a group the first `n mod K` bins get `n // K + 1`,
    the others `n // K`. For the graph cut the picks are those of float64 arithmetic on a full similarity matrix, without the
    matrix, in memory of the order of the features: gains closer than a proved rounding bound are computed again, rounded
    once, and count as tied when equal; the lowest position wins. The answer is the same on every device.

    Args:
        features: floating [N, D] of any width, in memory, on a device, or mapped from a file; or `Features`; with
            `head_gradient` samples are compared by the last layer's gradient.
        num_bins: K, 1 to 32767.
        labels: class of every sample: N integers or strings, or None. `Bins.group` numbers strings in their sorted order.
        objective: `"graph_cut"`, `"facility_location"`, `"log_determinant"`, `"sum_redundancy"` or `"feature_based"`.
        maximizer: `"naive"`, `"lazy"`, `"stochastic"` or `"approximate_lazy"`.
        similarity: `"cosine"` is 1/2 + cos/2 (the cosine with a zero vector is 0), `"dot"` the inner product, `"rbf"`
            exp(-gamma |a - b|^2).
        lam: weight of representativeness against diversity in the graph cut.
        clusters: split every group into so many k-means clusters first, and make the bins inside each: `Bins.group` then
            numbers the clusters, 0, 1, ... through all labels.
        gamma: of `"rbf"`; one over the mean squared distance of a group when None.
        epsilon: accuracy of `"stochastic"`.
        beta: accuracy of `"approximate_lazy"`.
        search_seed: of `"stochastic"` and of the clusters.
        device: `"auto"`, `"cpu"`, `"cuda"`, ...
        progress: show a bar; None shows one on a terminal from 20,000 samples on.

    Returns:
        Bins: `assignment` int16 [N], `rank` int32 [N], `gain` float32 [N], `group` int32 [N], on the CPU.

    Raises:
        ConfigError: a setting is unknown or out of range, needs more memory than there is, or does not fit the features.
        FeatureError: features are not a finite floating matrix.
        DQError: labels are not N integers or strings.
    """
    config = BinConfig(
        num_bins, objective, maximizer, similarity, lam, True, clusters, gamma, epsilon, beta, search_seed
    )  # fmt: skip
    factors = as_factors(features)
    total = len(next(iter(factors.values())))
    group = group_of_each(labels, total)
    target = choose_device(device, factors)
    groups = list(group_members(group))
    # clusters are about even; the plan is told the size that they have then
    sizes = [len(members) for members in groups for _ in range(clusters or 1)]
    plan = make_plan(config, factors, [-(-size // (clusters or 1)) for size in sizes], target)
    assignment = np.zeros(total, dtype=np.int16)
    rank = np.zeros(total, dtype=np.int32)
    gain = np.zeros(total, dtype=np.float32)
    show = progress if progress is not None else total >= _BAR_FROM
    with block_workers(target) as workers:
        prepared = prepare(factors, unit=similarity == "cosine", device=target, workers=workers)
        if clusters is not None:
            groups = [part for members in groups for part in cluster_members(prepared, members, clusters, search_seed)]
            for number, members in enumerate(groups):
                group[members] = number
        _tell_unfilled(num_bins, [len(members) for members in groups])
        with progress_bar(show, total=total, unit=" picks", description="bins") as bar:
            for members, order, gains in _pick(prepared, groups, config, plan, bar.update):
                per_bin = bin_sizes(len(members), num_bins)
                chosen = members[order]
                assignment[chosen] = np.repeat(np.arange(num_bins), per_bin)
                rank[chosen] = np.concatenate([np.arange(size) for size in per_bin])
                gain[chosen] = gains
    return Bins(to_tensor(assignment), to_tensor(rank), to_tensor(gain), to_tensor(group), num_bins)


def _tell_unfilled(num_bins: int, sizes: list[int]) -> None:
    """Say in one line that groups have fewer samples than bins."""
    small = [size for size in sizes if size < num_bins]
    if small:
        empty = num_bins - max(sizes)
        get_logger().warning(
            f"num_bins={num_bins}, but {len(small)} of {len(sizes)} groups have fewer samples ({min(small)} in the smallest), "
            "which fill the first bins alone"
            + (f"; {empty} of the {num_bins} bins stay empty: lower num_bins" if empty > 0 else "")
        )


def _pick(
    prepared: Prepared, groups: list[NDArray[np.int64]], config: BinConfig, plan: Plan, tick: Callable[[int], object]
) -> Iterator[Picked]:
    """Yield the members of every group, their order, and their gains."""
    if not plan.exact:
        for members in groups:
            sizes = bin_sizes(len(members), config.num_bins)
            yield members, *any_objective.pick_group(prepared, members, sizes, config, tick)
        return
    lam, halved = config.lam, config.similarity == "cosine"
    small = [members for members in groups if len(members) <= plan.small_group]
    yield from batched.pick_groups(prepared, small, config.num_bins, lam=lam, halved=halved, room=plan.room, tick=tick)
    for members in groups:
        if len(members) > plan.small_group:
            sizes = bin_sizes(len(members), config.num_bins)
            yield (
                members,
                *graph_cut.pick_group(prepared, members, sizes, lam=lam, halved=halved, room=plan.room, tick=tick),
            )
