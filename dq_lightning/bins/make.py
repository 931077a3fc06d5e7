"""Make bins of features: split every group of samples into bins that go from representative to diverse samples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.bins import any_objective
from dq_lightning.bins.clusters import cluster_members
from dq_lightning.bins.graph_cut import engine as graph_cut
from dq_lightning.bins.graph_cut.exact import Array
from dq_lightning.bins.graph_cut.workers import block_workers
from dq_lightning.bins.plan import Plan, choose_device, make_plan, tell_without_effect
from dq_lightning.bins.prepare import Prepared, as_factors, prepare
from dq_lightning.bins.sizes import bin_sizes, group_members, group_of_each, to_tensor
from dq_lightning.core.config import BinConfig, Engine, Maximizer, Objective, Similarity
from dq_lightning.core.console import get_logger, progress_bar
from dq_lightning.core.isolation import exact_products
from dq_lightning.core.records import Bins, Features
from dq_lightning.core.sharing import Arrays, Job, Sharing

Picked = tuple[NDArray[np.int64], NDArray[np.int64], Array]

# Fewer samples than this are finished before anybody could read a progress bar.
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
    engine: Engine = "auto",
    matrix_memory: int | str = "50%",
    device: str | torch.device = "auto",
    progress: bool | None = None,
) -> Bins:
    """Split N samples into K disjoint bins by repeated greedy selection (Zhou et al. 2023, section 3.1).

    Each bin is selected from the samples that the bins before it left over.

    With `labels`, every class is a group of its own and is split separately. A group of n samples gives `n // K + 1`
    samples to each of its first `n mod K` bins and `n // K` samples to each of the others.

    The graph cut picks exactly the samples that greedy selection on a full float64 similarity matrix would pick, in one
    of three regimes (see `dq_lightning.bins.graph_cut`). Gains that are closer to each other than a proved rounding
    bound are computed again with a single rounding. Gains that are then equal count as tied, and the sample at the
    lowest position wins, so the result is the same in every regime and on every device.

    Args:
        features: floating matrix [N, D] in memory, on a device or memory-mapped from a file, or a `Features` record.
            Samples of a `Features` record with `head_gradient` are compared by the gradient of the last layer.
        num_bins: number K of bins, from 1 to 32767.
        labels: class of every sample as N integers or strings, or None to treat all samples as one group. `Bins.group`
            numbers strings in their sorted order. Samples with several labels, 0 and 1 [N, C], are grouped by the label
            that the fewest samples have; those without any are group C.
        objective: set function that is maximized: `"graph_cut"`, `"facility_location"`, `"log_determinant"`,
            `"sum_redundancy"` or `"feature_based"`.
        maximizer: greedy algorithm: `"naive"`, `"lazy"`, `"stochastic"` or `"approximate_lazy"`.
        similarity: `"cosine"` is 1/2 + cos/2 (the cosine with a zero vector is 0), `"dot"` is the inner product and
            `"rbf"` is `exp(-gamma |a - b|^2)`.
        lam: weight of representativeness against diversity in the graph cut.
        clusters: number of k-means clusters that every group is split into before bins are made inside each cluster;
            `Bins.group` then numbers the clusters 0, 1, ... across all labels. None makes no clusters.
        gamma: factor in the exponent of `"rbf"`; None takes one over the mean squared distance of a group.
        epsilon: accuracy of the `"stochastic"` maximizer.
        beta: accuracy of the `"approximate_lazy"` maximizer.
        search_seed: seed of the `"stochastic"` maximizer and of the k-means clusters.
        engine: regime of the graph cut with the `"naive"` maximizer: `"dense"` keeps a matrix of n x n inner products
            of a group in 16 or 32 bits, `"candidates"` proves picks among few rows, `"stream"` makes a pass over the rows for
            each pick, and `"auto"` chooses by size, free memory and what the picks turn out to cost.
        matrix_memory: most memory that this matrix takes: a number of bytes, a size (`"2GB"`), or a share of the free
            memory (`"50%"`). Groups whose matrix does not fit use the other regimes.
        device: device that the similarities are computed on, such as `"cpu"` or `"cuda"`; `"auto"` chooses one.
        progress: whether to show a progress bar; None shows one on a terminal if there are at least 20,000 samples.

    Returns:
        Bins with `assignment` int16 [N], `rank` int32 [N], `gain` float32 [N] and `group` int32 [N], all on the CPU.

    Raises:
        ConfigError: a setting is unknown or out of range, needs more memory than is free, or does not fit the features.
        FeatureError: `features` is not a floating matrix or holds values that are not finite.
        DQError: `labels` are not N integers or strings.

    Example:
        >>> import torch
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [0.5, 0.5]])
        >>> make_bins(features, num_bins=2).assignment.tolist()
        [1, 0, 0, 1, 0]
    """
    config = BinConfig(
        num_bins, objective, maximizer, similarity, lam, True, clusters, gamma, epsilon, beta, search_seed, None, engine,
        matrix_memory,
    )  # fmt: skip
    return make_shared_bins(features, config, labels=labels, device=device, progress=progress)


def make_shared_bins(
    features: Features | Tensor | NDArray[np.floating],
    config: BinConfig,
    *,
    labels: NDArray[np.generic] | Tensor | Sequence[int | str] | None = None,
    device: str | torch.device = "auto",
    progress: bool | None = None,
    sharing: Sharing | None = None,
    arrays: Mapping[str, Array] | None = None,
) -> Bins:
    """Make the bins that a config describes, each group by one of the processes that share the work.

    `sharing` is how groups are shared with other processes, each of which calls `help_bins`, and `arrays` is what else
    they need to know. The rest is as in `make_bins`.
    """
    factors, num_bins = as_factors(features), config.num_bins
    total, clusters, sharing = len(next(iter(factors.values()))), config.clusters, sharing or Sharing()
    group = group_of_each(labels, total)
    target = choose_device(device, factors)
    groups = list(group_members(group))
    tell_without_effect(config)
    assignment = np.zeros(total, dtype=np.int16)
    rank = np.zeros(total, dtype=np.int32)
    gain = np.zeros(total, dtype=np.float32)
    show = progress if progress is not None else total >= _BAR_FROM
    with exact_products(), block_workers(target) as workers:
        prepared = prepare(factors, unit=config.similarity == "cosine", device=target, workers=workers)
        if clusters is not None:
            seed = config.search_seed
            groups = [part for members in groups for part in cluster_members(prepared, members, clusters, seed)]
            for number, members in enumerate(groups):
                group[members] = number
        # Clusters may differ much in size, so the plan is made for those that were found.
        ranks = sharing.ranks_on_node if len(groups) > 1 else 1
        plan = make_plan(config, factors, [len(members) for members in groups], target, ranks)
        _tell_unfilled(num_bins, [len(members) for members in groups])
        job = Job("bins", {}, {**(arrays or {}), "group": group}, len(groups), total)
        with progress_bar(show, total=total, unit=" picks", description="bins") as bar:

            def unpack(arrays: Mapping[str, Any]) -> Picked:
                bar.update(len(arrays["order"]))
                return arrays["members"], arrays["order"], arrays["gains"]

            work = partial(_pick, prepared, _largest_first(groups), config, plan, bar.update)
            shared = sharing if len(groups) > 1 else Sharing()
            for members, order, gains in shared.share(job, work, unpack, lambda picked: len(picked[1])):
                if (np.bincount(order, minlength=len(members)) != 1).any():
                    raise AssertionError("some samples were picked twice: please report these features and settings")
                per_bin = bin_sizes(len(members), num_bins)
                chosen = members[order]
                assignment[chosen] = np.repeat(np.arange(num_bins), per_bin)
                rank[chosen] = np.concatenate([np.arange(size) for size in per_bin])
                gain[chosen] = gains
    return Bins(to_tensor(assignment), to_tensor(rank), to_tensor(gain), to_tensor(group), num_bins)


@contextmanager
def help_bins(
    features: Features, config: BinConfig, device: str, ranks: int, job: Job, numbers: Iterator[int]
) -> Iterator[Iterator[Arrays]]:
    """Give the picks of some groups, in a `with` block, to a process that makes the bins of the same features.

    `ranks` is the number of processes that do so on this machine.
    """
    factors = as_factors(features)
    target = choose_device(device, factors)
    groups = _largest_first(list(group_members(job.arrays["group"].astype(np.int32, copy=False))))
    plan = make_plan(config, factors, [len(members) for members in groups], target, ranks)
    with exact_products(), block_workers(target) as workers:
        prepared = prepare(factors, unit=config.similarity == "cosine", device=target, workers=workers)
        picked = _pick(prepared, groups, config, plan, lambda made: None, numbers)
        yield ({"members": members, "order": order, "gains": gains} for members, order, gains in picked)


def _largest_first(groups: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Sort groups by size, so that no process is left with a large one when the others have done theirs."""
    return sorted(groups, key=len, reverse=True)


def _tell_unfilled(num_bins: int, sizes: list[int]) -> None:
    """Log one warning if some groups have fewer samples than there are bins."""
    small = [size for size in sizes if size < num_bins]
    if small:
        empty = num_bins - max(sizes)
        get_logger().warning(
            f"num_bins={num_bins}, but {len(small)} of {len(sizes)} groups have fewer samples ({min(small)} in the smallest), "
            "which fill the first bins alone"
            + (f"; {empty} of the {num_bins} bins stay empty: lower num_bins" if empty > 0 else "")
        )


def _pick(
    prepared: Prepared,
    groups: list[NDArray[np.int64]],
    config: BinConfig,
    plan: Plan,
    tick: Callable[[int], object],
    numbers: Iterator[int],
) -> Iterator[Picked]:
    """Yield for the numbered groups the members, their indices in the group in the order of picking, and their gains."""
    for number in numbers:
        members = groups[number]
        sizes = bin_sizes(len(members), config.num_bins)
        if plan.exact:
            yield members, *graph_cut.pick_group(prepared, members, sizes, config, plan.room, tick)
        else:
            yield members, *any_objective.pick_group(prepared, members, sizes, config, tick)
