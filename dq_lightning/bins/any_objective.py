"""Make the bins of one group for any objective and maximizer."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dq_lightning.bins.graph_cut.exact import Array
from dq_lightning.bins.maximizers import LAZY, MAXIMIZERS, Search
from dq_lightning.bins.objectives import OBJECTIVES, Setting
from dq_lightning.bins.plan import refuse_growing_gains
from dq_lightning.bins.prepare import Prepared
from dq_lightning.bins.similarity import Similarities, default_gamma
from dq_lightning.core.config import BinConfig


def pick_group(
    prepared: Prepared,
    members: NDArray[np.int64],
    sizes: Sequence[int],
    config: BinConfig,
    tick: Callable[[int], object],
) -> tuple[NDArray[np.int64], Array]:
    """Pick all samples of a group, bin after bin, in float64; ties go to the lowest position.

    Args:
        prepared: features of all samples.
        members: int64 [n], the samples of the group, ascending.
        sizes: number of samples in each bin.
        config: objective, maximizer, similarity and their parameters.
        tick: progress callback, called with 1 after every pick.

    Returns:
        Indices of the members (0 to n - 1) in the order of picking, int64 [n], and their gains, float64 [n].

    Raises:
        ConfigError: the maximizer is lazy and gains can grow, or the objective does not support the features.
    """
    whole = prepared.rows.only(torch.from_numpy(members))
    gamma = config.gamma if config.gamma is not None else default_gamma(whole) if config.similarity == "rbf" else 1.0
    refuse_growing_gains(config, Similarities(whole, config.similarity).can_be_negative())
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([config.search_seed, int(members[0])])))
    left = np.arange(len(members))
    order: list[NDArray[np.int64]] = [left[:0]]
    values: list[Array] = [np.empty(0)]
    every_step = config.maximizer not in LAZY | {"stochastic"}
    choice = OBJECTIVES[config.objective]
    for size in sizes:
        if size == 0:
            continue
        similarities = Similarities(whole.only(torch.from_numpy(left)), config.similarity, gamma)
        objective = choice.make(similarities, Setting(config.lam, size, every_step))
        search = Search(objective, len(left), size, generator, config.epsilon, config.beta, tick)
        picks, gains = MAXIMIZERS[config.maximizer](search)
        order.append(left[picks])
        values.append(gains)
        left = np.delete(left, picks)
        # Its matrix, if it has one, must not be there beside that of the next bin.
        del similarities, objective, search
    return np.concatenate(order), np.concatenate(values)
