"""Draws the selection: the exact number of samples from every group and bin. All functions are pure."""

from collections.abc import Sequence
from math import isqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.core.arrays import as_numpy
from dq_lightning.core.config import Balance, Draw, SelectionConfig
from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import ConfigError
from dq_lightning.core.label_sets import multi_hot
from dq_lightning.core.records import Bins, Selection
from dq_lightning.selection.allocate import Shares, apportion, count_kept
from dq_lightning.selection.exchange import Exchange

# Numbers of the independent random streams: ties among groups (or classes), ties among the bins of a group, order inside a bin,
# draws by scores, and ties among the groups of a class.
_GROUP_TIES, _BIN_TIES, _ORDER, _SCORED, _INNER_TIES = range(5)
# Where at least this share of a bin is kept, a draw by scores is from all samples of the bin.
ALL_FROM = 0.3


def select(
    bins: Bins,
    *,
    keep_ratio: float,
    seed: int = 0,
    draw: Draw = "auto",
    scores: Tensor | NDArray[np.floating] | None = None,
    bin_weights: Sequence[float] | None = None,
    balance: Balance = "proportional",
    labels: Tensor | NDArray[np.generic] | None = None,
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
        draw: `"seeded"` draws uniformly inside a bin, `"rank"` takes the samples of lowest rank. `"scored"` draws from the
            samples of a bin that have the best scores: from the best 30 % where a twentieth of the bin is kept, the best
            half where a tenth is, the best 70 % where a fifth is, and from all where 30 % or more are; each of them is
            kept with the same probability. `"auto"` is `"scored"` where there are scores, else `"seeded"`.
        scores: numbers [N], what each sample is worth, higher is better, such as `margin_scores`; equal ones are ordered
            at random. None takes `bins.score`. Bins of `make_bins` have none, those of a data module may have.
        bin_weights: num_bins weights, not negative; the share of a bin is proportional to weight times size until the
            bin is used up. None gives all bins the same weight.
        balance: whether the groups share the kept samples in proportion to their sizes (`"proportional"`), to the square
            roots of their sizes (`"sqrt"`), or in equal numbers (`"equal"`). A group gives at most the samples that it
            has in bins; the others share the rest in the same way.
        labels: multi-hot targets, 0 or 1 [N, C], of samples that have several labels. Drawn samples are then exchanged
            for others until every label, too, is within one of its share, if exchanges of one pair lead there; else a
            warning says how far they are. A smaller ratio is then not always a subset of a larger one. Needs
            `balance="proportional"`. Or the class of each sample, whole numbers [N], where the groups of the bins are
            smaller than classes, as clusters are: the kept samples are then shared out among the classes, and those of a
            class among its groups in proportion to their sizes.

    Returns:
        Selection of M samples: `index` int64 [M] ascending, `bin` int16 [M].

    Raises:
        ConfigError: a setting is out of range, nothing would be kept, more samples are wanted than are in a bin, the
            bins of positive weight are too small, or there are no scores where they are needed.

    Complexity: O(N log N + M log K).

    Example:
        >>> import torch
        >>> from dq_lightning import make_bins
        >>> bins = make_bins(torch.rand(100, 8), num_bins=5)
        >>> kept = select(bins, keep_ratio=0.1)
        >>> len(kept), torch.bincount(kept.bin).tolist()
        (10, [2, 2, 2, 2, 2])
    """
    weights = None if bin_weights is None else tuple(bin_weights)
    check_weights(SelectionConfig(keep_ratio, seed, draw, weights, balance), bins.num_bins)
    classes = _classes(labels, len(bins))
    members = _label_sets(labels, len(bins), balance) if classes is None else None
    if scores is not None and draw not in ("auto", "scored"):
        get_logger().warning(f'scores= have no effect with draw={draw!r}: pass draw="scored" or "auto" to draw by them')
    worth = _check_scores(bins.score if scores is None else scores, len(bins), draw)
    wanted = count_wanted(len(bins), keep_ratio)
    present = np.flatnonzero(bins.assignment.cpu().numpy() >= 0)
    if wanted > len(present):
        raise ConfigError(
            f"keep_ratio={keep_ratio} of {len(bins)} samples wants {wanted}, but only {len(present)} are left without "
            f"near-duplicates and the {bins.num_unreadable} that can't be read; lower keep_ratio, or raise deduplicate"
        )
    order, groups, owners, sizes = _sort(bins, present, classes)
    quotas = _quotas(sizes.sum(axis=1), owners, balance, wanted, seed)
    counts = _bin_counts(groups, sizes, quotas, seed, bin_weights)
    if draw != "rank":
        order = _drawn_first(order, groups, sizes, counts, seed, worth, every_bin=members is not None)
    if members is None:
        places = np.arange(len(order)) - np.repeat(_starts(sizes), sizes.reshape(-1))
        kept = places < np.repeat(counts, sizes.reshape(-1))
    else:
        exchange = Exchange(members[order], sizes, counts)
        kept = exchange.run(between=bin_weights is None)
        if not exchange.near:
            get_logger().warning(exchange.describe())
    index = np.sort(order[kept])
    bin_of_each = bins.assignment.cpu()[torch.from_numpy(index)].to(torch.int16)
    return Selection(torch.from_numpy(index), bin_of_each, bins.num_unreadable, bins.suspects)


def is_split_of(bins: Bins, classes: Tensor) -> bool:
    """Return whether every group of the bins lies in one of the classes, int64 [N], as clusters of a class do."""
    inside = bins.assignment >= 0
    pairs = np.unique(np.stack([bins.group[inside].numpy(), classes[inside].numpy()]), axis=1)
    return bool(len(np.unique(pairs[0])) == pairs.shape[1])


def _quotas(sizes: NDArray[np.int64], owners: NDArray[np.int64], balance: Balance, wanted: int, seed: int) -> list[int]:
    """Return the number of samples that are drawn from each of G groups of the given sizes, whose classes are `owners`."""
    classes, starts = np.unique(owners, return_index=True)
    parts = [[int(n) for n in part] for part in np.split(sizes, starts[1:])]
    totals = apportion(
        _group_shares([sum(part) for part in parts], balance), wanted, _ranks(seed, _GROUP_TIES, 0, 0, len(parts))
    )
    quotas: list[int] = []
    for number, part, total in zip(classes.tolist(), parts, totals, strict=True):
        one = len(part) == 1
        quotas += [total] if one else apportion(Shares(part), total, _ranks(seed, _INNER_TIES, number, 0, len(part)))
    return quotas


def _classes(labels: Tensor | NDArray[np.generic] | None, total: int) -> NDArray[np.int64] | None:
    """Return classes as int64 [N], or None where the labels are none, or those of samples that have several."""
    if labels is None or getattr(labels, "ndim", 1) != 1:
        return None
    try:
        values = as_numpy(labels)
    except ValueError:  # lists of different lengths
        return None
    return values.astype(np.int64) if values.dtype.kind in "bui" and values.shape == (total,) else None


def _group_shares(sizes: list[int], balance: Balance) -> Shares:
    """Return the shares of groups of the given sizes, all positive."""
    if balance == "equal":
        return Shares(sizes, pulls=[1] * len(sizes))
    if balance == "sqrt":
        # Square roots to 20 binary digits after the point, so that all arithmetic stays in whole numbers.
        return Shares(sizes, pulls=[isqrt(size << 40) for size in sizes])
    return Shares(sizes)


def check_weights(settings: SelectionConfig, num_bins: int) -> None:
    """Raise ConfigError if the weights of the bins, where there are any, are of another number of bins."""
    weights = settings.bin_weights
    if weights is not None and len(weights) != num_bins:
        raise ConfigError(f"bin_weights has {len(weights)} values for {num_bins} bins; give one a bin")


def _check_scores(scores: Tensor | NDArray[np.floating] | None, total: int, draw: Draw) -> NDArray[np.float64] | None:
    """Return the scores that a draw uses, or None where it uses none."""
    if draw not in ("auto", "scored") or (draw == "auto" and scores is None):
        return None
    if scores is None:
        raise ConfigError('draw="scored" needs the scores of the samples: pass scores=, such as those of margin_scores')
    values = as_numpy(scores)
    if values.shape != (total,) or values.dtype.kind not in "iuf" or np.isnan(values).any():
        nan = " with NaN" if values.dtype.kind == "f" and np.isnan(values).any() else ""
        raise ConfigError(f"scores must be {total} numbers, one a sample, got {values.dtype} {list(values.shape)}{nan}")
    # Unsigned numbers have no negatives, by which they are sorted.
    return values.astype(np.float64)


def count_wanted(total: int, keep_ratio: float) -> int:
    """Return how many of `total` samples are kept; ConfigError if none is."""
    wanted = count_kept(total, keep_ratio)
    if wanted == 0:
        raise ConfigError(
            f"keep_ratio={keep_ratio} of {total} samples keeps none; "
            + (f"pass at least {0.5 / total:.6g}" if total else "the dataset is empty")
        )
    return wanted


def _sort(
    bins: Bins, present: NDArray[np.int64], classes: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Sort the positions `present` of the samples that are in a bin by class, group, bin and rank.

    The positions in the new order, the groups [G], their classes [G], and the number of samples [G, num_bins] are returned.
    Without classes every group is one.
    """
    fields = (bins.group, bins.assignment, bins.rank)
    group, assignment, rank = (t.cpu().numpy()[present].astype(np.int64) for t in fields)
    if classes is None:
        groups, ordinal = np.unique(group, return_inverse=True)
        owners = groups
    else:
        pairs, ordinal = np.unique(np.stack([classes[present], group]), axis=1, return_inverse=True)
        owners, groups, ordinal = pairs[0], pairs[1], ordinal.reshape(-1)
    cell = ordinal * bins.num_bins + assignment
    order = np.lexsort((rank, cell)) if len(groups) * bins.num_bins >= 2**31 else np.argsort(cell << 32 | rank)
    sizes = np.bincount(cell, minlength=len(groups) * bins.num_bins).reshape(len(groups), bins.num_bins)
    return present[order], groups, owners, sizes


def _starts(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where each bin of each group begins in the sorted order, int64 [G * K]."""
    return np.asarray(np.cumsum(sizes) - sizes.reshape(-1))


def _bin_counts(
    groups: NDArray[np.int64],
    sizes: NDArray[np.int64],
    quotas: list[int],
    seed: int,
    weights: Sequence[float] | None,
) -> NDArray[np.int64]:
    """Return the number of samples that are drawn from every bin of every group, int64 [G, K]."""
    counts = np.zeros_like(sizes)
    for number, (group, bin_sizes, quota) in enumerate(zip(groups, sizes, quotas, strict=True)):
        ties = _ranks(seed, _BIN_TIES, int(group), 0, len(bin_sizes))
        try:
            counts[number] = apportion(Shares([int(n) for n in bin_sizes], weights), quota, ties)
        except ConfigError as error:
            raise ConfigError(f"group {group}: {error}") from error
    return counts


def _drawn_first(
    order: NDArray[np.int64],
    groups: NDArray[np.int64],
    sizes: NDArray[np.int64],
    counts: NDArray[np.int64],
    seed: int,
    worth: NDArray[np.float64] | None,
    *,
    every_bin: bool,
) -> NDArray[np.int64]:
    """Put the positions inside every bin of every group into the order in which they are drawn.

    They are shuffled; where every sample is worth something, float64 [N], the `counts` that are drawn come first, and then
    the others, best first; samples of equal worth stay shuffled. Without `every_bin` only bins are changed where some of
    the samples are drawn, but not all.
    """
    order = order.copy()
    starts = _starts(sizes).reshape(sizes.shape)
    for row, number in np.argwhere(((counts > 0) & (counts < sizes)) | every_bin):
        start, size, count = int(starts[row, number]), int(sizes[row, number]), int(counts[row, number])
        shuffled = np.argsort(_keys(seed, _ORDER, int(groups[row]), int(number), size), kind="stable")
        members = order[start : start + size][shuffled]
        if worth is not None:
            members = members[np.argsort(-worth[members], kind="stable")]
            keys = _keys(seed, _SCORED, int(groups[row]), int(number), 2 * count)
            first = np.array(_places_among_best(size, keys.tolist()), dtype=np.int64)
            members = members[np.concatenate([first, np.setdiff1d(np.arange(size), first)])]
        order[start : start + size] = members
    return order


def _label_sets(labels: Tensor | NDArray[np.generic] | None, total: int, balance: Balance) -> NDArray[np.bool_] | None:
    """Return multi-hot targets as bool [N, C], or None where there are none."""
    if labels is None:
        return None
    members = multi_hot(labels)
    if members is None or len(members) != total:
        shape = list(getattr(labels, "shape", ())) or type(labels).__name__
        raise ConfigError(
            f"labels= of select are one whole number a sample, or 0 and 1 for every sample and label, [{total}, C], "
            f"got {shape}"
        )
    check_balance(members, balance)
    return members


def check_balance(members: Tensor | NDArray[np.bool_] | None, balance: Balance) -> None:
    """Raise ConfigError if samples that have several labels, `members`, are to be balanced; None stands for others."""
    if members is not None and balance != "proportional":
        raise ConfigError(
            f"balance={balance!r} gives classes other shares than they have, but these samples have several labels each: "
            'leave it out, or group by one class of each sample, for objects by labels="dominant"'
        )


def _num_best(drawn: int, size: int) -> int:
    """Return how many of the best samples of a bin of a given size a draw of `drawn` of them is made from.

    The shares are those that were best on held-out images of CIFAR-10 (`benchmarks/worth.py`, plan candidates), with
    straight lines between them.
    """
    tenths = max(3 * size, min(size + 40 * drawn, 3 * size + 20 * drawn), size + 30 * drawn)
    return min(size, -(-tenths // 10))


def _places_among_best(size: int, keys: list[int]) -> list[int]:
    """Draw places of a bin's samples in the order of their scores, one for every two random numbers of 64 bits.

    After k draws each of the `_num_best(k, size)` best was drawn with the same probability, and a longer draw begins with
    the shorter one. So in the k-th draw one of the samples that come into the best is drawn with a probability of k times
    their share of the best, and else one of those that are left of the best of the draw before, each with the same.
    """
    drawn, left, before = list[int](), list[int](), 0
    for number, (first, second) in enumerate(zip(keys[::2], keys[1::2], strict=True), 1):
        best = _num_best(number, size)
        coming = list(range(before, best))
        from_coming = not left or first * best < number * len(coming) << 64
        pool = coming if from_coming else left
        place = second * len(pool) >> 64
        drawn.append(pool[place])
        pool[place] = pool[-1]
        pool.pop()
        left += coming
        before = best
    return drawn


def _keys(seed: int, stream: int, group: int, number: int, count: int) -> NDArray[np.uint64]:
    """Return uniform keys, uint64 [count], from the generator's raw output, which is equal in all NumPy releases."""
    entropy = np.random.SeedSequence([seed, stream, group % 2**32, number])
    return np.asarray(np.random.PCG64(entropy).random_raw(count), dtype=np.uint64)


def _ranks(seed: int, stream: int, group: int, number: int, count: int) -> list[int]:
    return [int(r) for r in np.argsort(np.argsort(_keys(seed, stream, group, number, count), kind="stable"))]
