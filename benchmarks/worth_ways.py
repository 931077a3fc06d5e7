"""The ways of choosing samples that `worth.py` compares. Each is a function of a condition, a number of samples, and a seed."""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from worth_conditions import Condition

from dq_lightning import Bins, make_bins, select
from dq_lightning.features.whitening import whiten
from dq_lightning.quality.margin import LeaveOneOut, leave_one_out
from dq_lightning.quality.mislabelled import find_mislabelled

Index = NDArray[np.int64]
# Number of the random stream of the ways. The conditions use other streams of the same seeds: with the same one, a random
# choice would be the very permutation whose first samples got a wrong label.
DRAW = 1_000_003


class Choosing:
    """One condition with what several ways need of it, each computed once: margins, bins, near-duplicates.

    Args:
        condition: data that is chosen from.
        device: device that everything is computed on.
    """

    def __init__(self, condition: Condition, device: str) -> None:
        self.labels, self.device = np.array(condition.labels), device
        self.features = torch.from_numpy(np.array(condition.features, dtype=np.float32)).to(device)
        self.classes = [np.flatnonzero(self.labels == label) for label in np.unique(self.labels)]
        self._made: dict[tuple, Any] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def predicted(self) -> LeaveOneOut:
        """What the classifier that never saw a sample predicts for it."""
        return leave_one_out(self.features, torch.from_numpy(self.labels))

    @cached_property
    def margin(self) -> NDArray[np.float64]:
        """Leave-one-out margin of every sample, float64 [N]."""
        return self.predicted.margin.numpy()

    @cached_property
    def credible(self) -> Index:
        """Positions of the samples whose labels `drop_worst="auto"` does not find wrong."""
        return np.flatnonzero(~find_mislabelled(self.predicted, self.labels).found.numpy())

    def bins(self, kept: Index, num_bins: int, whitened: bool) -> Bins:
        """Return the bins of the samples at `kept`, class by class."""
        key = (kept.tobytes(), num_bins, whitened)
        if key not in self._made:
            features = self.features[torch.from_numpy(kept).to(self.device)]
            features = whiten(features) if whitened else features
            labels = torch.from_numpy(self.labels[kept])
            self._made[key] = make_bins(features, num_bins=num_bins, labels=labels, device=self.device, progress=False)
        return self._made[key]

    def best(self, share: float) -> Index:
        """Return the positions of this share of each class that has the largest margins."""
        kept = [m[np.argsort(-self.margin[m], kind="stable")[: max(1, round(share * len(m)))]] for m in self.classes]
        return np.sort(np.concatenate(kept))

    def without_copies(self, threshold: float) -> Index:
        """Return the positions of the samples that are no near-duplicates, by cosine, of an earlier one of their class."""
        kept = []
        for members in self.classes:
            unit = torch.nn.functional.normalize(self.features[torch.from_numpy(members).to(self.device)])
            near = (unit @ unit.T >= threshold).tril(-1).cpu().numpy()
            alone = np.ones(len(members), bool)
            for number in range(len(members)):
                alone[number] = not (near[number, :number] & alone[:number]).any()
            kept.append(members[alone])
        return np.sort(np.concatenate(kept))


def random(data: Choosing, count: int, seed: int) -> Index:
    """Draw samples with equal probability."""
    return np.sort(np.random.default_rng([seed, DRAW]).permutation(len(data))[:count])


def whole(data: Choosing, count: int, seed: int) -> Index:
    """Take all samples."""
    return np.arange(len(data))


def binned(
    data: Choosing, count: int, seed: int, *, kept: Index | None = None, whitened: bool = False, **options
) -> Index:
    """Make ten bins of the samples at `kept`, and draw from every bin."""
    kept = np.arange(len(data)) if kept is None else kept
    bins = data.bins(kept, 10, whitened)
    return kept[select(bins, keep_ratio=min(1.0, count / len(kept)), seed=seed, **options).index.numpy()]


def default(data: Choosing, count: int, seed: int, *, kept: Index | None = None) -> Index:
    """Make ten bins, and draw from the samples of every bin that have the best margins, as the library does."""
    kept = np.arange(len(data)) if kept is None else kept
    return binned(data, count, seed, kept=kept, draw="scored", scores=data.margin[kept])


def stratified(data: Choosing, count: int, seed: int, *, kept: Index | None = None, **options) -> Index:
    """Draw from every class in proportion to its size: each class is one bin."""
    kept = np.arange(len(data)) if kept is None else kept
    labels = torch.from_numpy(data.labels[kept])
    bins = Bins(torch.zeros(len(kept), dtype=torch.int16), torch.arange(len(kept)), torch.zeros(len(kept)), labels, 1)
    return kept[select(bins, keep_ratio=min(1.0, count / len(kept)), seed=seed, **options).index.numpy()]


def margin(share: float, then: Callable, **options) -> Callable:
    """Return the way that leaves out all but a share of the best margins of each class, and then goes on."""
    return lambda data, count, seed: then(data, count, seed, kept=data.best(share), **options)


def automatic(then: Callable, share: float = 1.0) -> Callable:
    """Return the way that leaves out what `drop_worst="auto"` finds and all but a share of the best margins, and goes on."""

    def way(data: Choosing, count: int, seed: int) -> Index:
        kept = data.credible if share == 1 else np.intersect1d(data.credible, data.best(share))
        return then(data, count, seed, kept=kept)

    return way


def eased(share: float) -> Callable:
    """Return the way that makes bins of all samples, and draws from the share of best margins of every bin of a class."""

    def way(data: Choosing, count: int, seed: int) -> Index:
        bins = data.bins(np.arange(len(data)), 10, whitened=False)
        drawn = select(bins, keep_ratio=count / len(data), seed=seed).index.numpy()
        places = bins.group.numpy().astype(np.int64) * 10 + bins.assignment.numpy()
        draw, kept = np.random.default_rng([seed, DRAW, 5]), []
        for place in np.unique(places):
            members = np.flatnonzero(places == place)
            wanted = int((places[drawn] == place).sum())
            best = members[np.argsort(-data.margin[members], kind="stable")]
            kept.append(draw.permutation(best[: max(wanted, round(share * len(members)))])[:wanted])
        return np.sort(np.concatenate(kept))

    return way


def hard(share: float, then: Callable) -> Callable:
    """Return the way that takes the share of worst margins of each class instead."""

    def way(data: Choosing, count: int, seed: int) -> Index:
        return then(data, count, seed, kept=np.setdiff1d(np.arange(len(data)), data.best(1 - share)))

    return way


def deduplicated(threshold: float, then: Callable, share: float = 1.0) -> Callable:
    """Return the way that leaves out near-duplicates and all but a share of the best margins, and then goes on."""

    def way(data: Choosing, count: int, seed: int) -> Index:
        kept = data.without_copies(threshold)
        return then(data, count, seed, kept=np.intersect1d(kept, data.best(share)) if share < 1 else kept)

    return way


def moderate(data: Choosing, count: int, seed: int) -> Index:
    """Take the samples of each class whose margins are nearest to the median of their class (after Xia et al. 2023)."""
    kept = []
    for members in data.classes:
        far = np.abs(data.margin[members] - np.median(data.margin[members]))
        kept.append(members[np.argsort(far, kind="stable")[: round(count * len(members) / len(data))]])
    return np.sort(np.concatenate(kept))


def _usable(data: Choosing, share: float, count: int) -> Iterator[tuple[Index, int]]:
    """Yield the share of best margins of each class, and how many of them are wanted."""
    usable = data.best(share) if share < 1 else np.arange(len(data))
    for members in data.classes:
        inside = np.intersect1d(members, usable)
        yield inside, max(1, round(count * len(inside) / len(usable)))


def spread(neighbours: int, share: float = 1.0) -> Callable:
    """Return the way that draws at random in each class and passes over the near neighbours of what it has drawn.

    A sample that is the k-th neighbour of a drawn one, k up to `neighbours`, is passed over with a probability that falls from
    1 to 0 with k (after the neighbour exclusion of BGFDQ); what was passed over comes last.
    """

    def way(data: Choosing, count: int, seed: int) -> Index:
        kept, draw = [], np.random.default_rng([seed, DRAW, 2])
        for members, quota in _usable(data, share, count):
            features = data.features[torch.from_numpy(members).to(data.device)]
            features = torch.nn.functional.normalize(features - features.mean(0))
            near = (features @ features.T).topk(min(neighbours + 1, len(members)), dim=1).indices[:, 1:].cpu().numpy()
            falling = 1 - np.arange(near.shape[1]) / max(near.shape[1], 1)
            passed, taken, later = np.zeros(len(members), bool), [], []
            for sample in draw.permutation(len(members)):
                (later if passed[sample] else taken).append(sample)
                if not passed[sample]:
                    passed[near[sample][draw.random(near.shape[1]) < falling]] = True
            kept.append(members[(taken + later)[:quota]])
        return np.sort(np.concatenate(kept))

    return way


def nearest_to_means(share: float = 1.0) -> Callable:
    """Return the way that takes the samples nearest to the k-means centres of their class, one a sample that is wanted."""

    def way(data: Choosing, count: int, seed: int) -> Index:
        kept = []
        for number, (members, quota) in enumerate(_usable(data, share, count)):
            features = torch.nn.functional.normalize(data.features[torch.from_numpy(members).to(data.device)])
            first = np.random.default_rng([seed, DRAW, 4, number]).permutation(len(members))[:quota]
            means = features[torch.from_numpy(first).to(data.device)].clone()
            for _ in range(10):
                nearest = torch.cdist(features, means).argmin(1)
                sums = torch.zeros_like(means).index_add_(0, nearest, features)
                sizes = torch.bincount(nearest, minlength=len(means))[:, None]
                means = torch.where(sizes > 0, sums / sizes.clamp(min=1), means)
            chosen = np.unique(torch.cdist(means, features).argmin(1).cpu().numpy())
            rest = np.setdiff1d(np.arange(len(members)), chosen)[: quota - len(chosen)]
            kept.append(members[np.concatenate([chosen, rest])])
        return np.sort(np.concatenate(kept))

    return way


EARLY, LATE = tuple(range(10, 0, -1)), tuple(range(1, 11))

WAYS: dict[str, Callable[[Choosing, int, int], Index]] = {
    "random": random,
    "whole": whole,
    "stratified": stratified,
    "published": binned,
    "default": default,
    "early bins": lambda data, count, seed: binned(data, count, seed, bin_weights=EARLY),
    "late bins": lambda data, count, seed: binned(data, count, seed, bin_weights=LATE),
    "whitened": lambda data, count, seed: binned(data, count, seed, whitened=True),
    "margin 50": margin(0.5, binned),
    "margin 50, late bins": margin(0.5, binned, bin_weights=LATE),
    "margin 50, stratified": margin(0.5, stratified),
    "margin 30, stratified": margin(0.3, stratified),
    "margin 70, stratified": margin(0.7, stratified),
    "margin 80, stratified": margin(0.8, stratified),
    "margin 30": margin(0.3, binned),
    "margin 70": margin(0.7, binned),
    "margin 90": margin(0.9, binned),
    "margin 90, stratified": margin(0.9, stratified),
    "bins, best 30": eased(0.3),
    "bins, best 50": eased(0.5),
    "bins, best 70": eased(0.7),
    "bins, best 80": eased(0.8),
    "bins, best 90": eased(0.9),
    "auto": automatic(binned),
    "auto, default": automatic(default),
    "auto, stratified": automatic(stratified),
    "hard 50": hard(0.5, binned),
    "moderate": moderate,
    "spread 5": spread(5),
    "spread 20": spread(20),
    "margin 50, spread 5": spread(5, 0.5),
    "k-means": nearest_to_means(),
    "margin 50, k-means": nearest_to_means(0.5),
    "no copies 0.95": deduplicated(0.95, binned),
    "no copies 0.9": deduplicated(0.9, binned),
    "no copies 0.9, margin 50": deduplicated(0.9, binned, 0.5),
    "no copies 0.9, stratified": deduplicated(0.9, stratified),
    "no copies 0.9, margin 50, stratified": deduplicated(0.9, stratified, 0.5),
    "no copies 0.95, stratified": deduplicated(0.95, stratified),
    "equal": lambda data, count, seed: binned(data, count, seed, balance="equal"),
    "sqrt": lambda data, count, seed: binned(data, count, seed, balance="sqrt"),
    "equal, stratified": lambda data, count, seed: stratified(data, count, seed, balance="equal"),
    "equal, margin 50": margin(0.5, binned, balance="equal"),
}
# Ways that only the long tail needs.
BALANCED = ("equal", "sqrt", "equal, stratified", "equal, margin 50")
# Ways that are compared in the search on every condition, and those that one condition needs beside them.
SEARCHED = (
    *("random", "stratified", "published", "auto", "auto, stratified", "margin 50", "margin 50, stratified"),
    *("bins, best 50", "margin 30, stratified", "margin 70, stratified", "margin 50, spread 5", "margin 50, k-means"),
)
DRAWS = ("early bins", "late bins", "whitened", "margin 50, late bins", "hard 50", "moderate", "spread 20", "k-means")
COPIES = tuple(name for name in WAYS if name.startswith("no copies"))
SEARCHED_TOO = {"clean": (*DRAWS, *COPIES[1:3]), "duplicates": (*COPIES, "spread 20", "k-means"), "long_tail": BALANCED}
