"""Draws the selection: the exact number of samples from every group and bin. All functions are pure."""

from collections.abc import Iterator, Sequence
from math import isqrt

import numpy as np
import torch
from numpy.typing import NDArray

from dq_lightning.core.config import Balance, Draw, SelectionConfig
from dq_lightning.core.errors import ConfigError
from dq_lightning.core.records import Bins, Selection
from dq_lightning.selection.allocate import Shares, apportion, count_kept

# Numbers of the independent random streams: ties among groups, ties among the bins of a group, order inside a bin.
_GROUP_TIES, _BIN_TIES, _ORDER = range(3)


def select(
    bins: Bins,
    *,
    keep_ratio: float,
    seed: int = 0,
    draw: Draw = "seeded",
    bin_weights: Sequence[float] | None = None,
    balance: Balance = "proportional",
) -> Selection:
    """Draw the wanted share of samples from every bin (Zhou et al. 2023, section 3.2).

    Exactly floor(N * keep_ratio + 1/2) samples are kept, all of which are in a bin. The count of every group is within
    one of its share, and the count of every bin is within one of its share of the group's count. With the same seed the
    selection for a smaller ratio is a subset of that for a larger one. The result does not depend on library versions,
    platform or number of threads.

    Args:
        bins: bins of N samples.
        keep_ratio: share of the samples that is kept, 0 < keep_ratio <= 1.
        seed: seed of the draw and of the ties, at least 0.
        draw: `"seeded"` draws uniformly inside a bin, `"rank"` takes the samples of lowest rank.
        bin_weights: num_bins weights, not negative; the share of a bin is proportional to weight times size until the
            bin is used up. None gives all bins the same weight.
        balance: whether the groups share the kept samples in proportion to their sizes (`"proportional"`), to the square
            roots of their sizes (`"sqrt"`), or in equal numbers (`"equal"`). A group gives at most the samples that it
            has in bins; the others share the rest in the same way.

    Returns:
        Selection of M samples: `index` int64 [M] ascending, `bin` int16 [M].

    Raises:
        ConfigError: a setting is out of range, nothing would be kept, more samples are wanted than are in a bin, or the
            bins of positive weight are too small.

    Complexity: O(N log N + M log K).

    Example:
        >>> import torch
        >>> from dq_lightning import make_bins
        >>> bins = make_bins(torch.rand(100, 8), num_bins=5)
        >>> kept = select(bins, keep_ratio=0.1)
        >>> len(kept), torch.bincount(kept.bin).tolist()
        (10, [2, 2, 2, 2, 2])
    """
    SelectionConfig(keep_ratio=keep_ratio, seed=seed, draw=draw, bin_weights=None, balance=balance)
    _check_weights(bin_weights, bins.num_bins)
    wanted = _wanted(len(bins), keep_ratio)
    present = np.flatnonzero(bins.assignment.cpu().numpy() >= 0)
    if wanted > len(present):
        raise ConfigError(
            f"keep_ratio={keep_ratio} of {len(bins)} samples wants {wanted}, but only {len(present)} are left without "
            f"near-duplicates and the {bins.num_unreadable} that can't be read; lower keep_ratio, or raise deduplicate"
        )
    order, groups, sizes = _sort(bins, present)
    group_sizes = [int(n) for n in sizes.sum(axis=1)]
    quotas = apportion(_group_shares(group_sizes, balance), wanted, _ranks(seed, _GROUP_TIES, 0, 0, len(groups)))
    kept = list(_take(order, groups, sizes, quotas, seed, draw, bin_weights))
    index = np.sort(np.concatenate(kept))
    bin_of_each = bins.assignment.cpu()[torch.from_numpy(index)].to(torch.int16)
    return Selection(torch.from_numpy(index), bin_of_each, bins.num_unreadable, bins.suspects)


def _group_shares(sizes: list[int], balance: Balance) -> Shares:
    """Return the shares of groups of the given sizes, all positive."""
    if balance == "equal":
        return Shares(sizes, pulls=[1] * len(sizes))
    if balance == "sqrt":
        # Square roots to 20 binary digits after the point, so that all arithmetic stays in whole numbers.
        return Shares(sizes, pulls=[isqrt(size << 40) for size in sizes])
    return Shares(sizes)


def _check_weights(weights: Sequence[float] | None, num_bins: int) -> None:
    if weights is None:
        return
    if len(weights) != num_bins:
        raise ConfigError(f"bin_weights has {len(weights)} values for {num_bins} bins; give one a bin")
    if not all(0 <= w < float("inf") for w in weights) or not any(w > 0 for w in weights):
        raise ConfigError(f"bin_weights must be finite, not negative and not all zero, got {tuple(weights)}")


def _wanted(total: int, keep_ratio: float) -> int:
    wanted = count_kept(total, keep_ratio)
    if wanted == 0:
        raise ConfigError(
            f"keep_ratio={keep_ratio} of {total} samples keeps none; "
            + (f"pass at least {0.5 / total:.6g}" if total else "the dataset is empty")
        )
    return wanted


def _sort(bins: Bins, present: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Sort the positions `present` of the samples that are in a bin by group, bin and rank.

    The positions in the new order, the groups [G], and the number of samples [G, num_bins] are returned.
    """
    fields = (bins.group, bins.assignment, bins.rank)
    group, assignment, rank = (t.cpu().numpy()[present].astype(np.int64) for t in fields)
    groups, ordinal = np.unique(group, return_inverse=True)
    cell = ordinal * bins.num_bins + assignment
    order = np.lexsort((rank, cell)) if len(groups) * bins.num_bins >= 2**31 else np.argsort(cell << 32 | rank)
    sizes = np.bincount(cell, minlength=len(groups) * bins.num_bins).reshape(len(groups), bins.num_bins)
    return present[order], groups, sizes


def _take(
    order: NDArray[np.int64],
    groups: NDArray[np.int64],
    sizes: NDArray[np.int64],
    quotas: list[int],
    seed: int,
    draw: Draw,
    weights: Sequence[float] | None,
) -> Iterator[NDArray[np.int64]]:
    """Yield the positions that are drawn from every bin of every group, int64 [number of samples drawn]."""
    start = 0
    for group, bin_sizes, quota in zip(groups, sizes, quotas, strict=True):
        ties = _ranks(seed, _BIN_TIES, int(group), 0, len(bin_sizes))
        try:
            counts = apportion(Shares([int(n) for n in bin_sizes], weights), quota, ties)
        except ConfigError as error:
            raise ConfigError(f"group {group}: {error}") from error
        for number, (size, count) in enumerate(zip(bin_sizes, counts, strict=True)):
            members = order[start : start + size]
            start += size
            if count and draw == "seeded":
                members = members[np.argsort(_keys(seed, _ORDER, int(group), number, int(size)), kind="stable")]
            yield members[:count]


def _keys(seed: int, stream: int, group: int, number: int, count: int) -> NDArray[np.uint64]:
    """Return uniform keys, uint64 [count], from the generator's raw output, which is equal in all NumPy releases."""
    entropy = np.random.SeedSequence([seed, stream, group % 2**32, number])
    return np.asarray(np.random.PCG64(entropy).random_raw(count), dtype=np.uint64)


def _ranks(seed: int, stream: int, group: int, number: int, count: int) -> list[int]:
    return [int(r) for r in np.argsort(np.argsort(_keys(seed, stream, group, number, count), kind="stable"))]
