"""Which samples are mislabelled: the share of wrong labels is estimated, and the lowest margins of it are found."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.quality.margin import LeaveOneOut

# Samples are left out until this share of wrong labels, as estimated, remains among the others.
TOLERATED = 0.01
# Every class keeps this share of its samples, rounded up.
KEPT_OF_A_CLASS = 0.1
# An estimate counts as more than is tolerated if it is so by this many standard errors.
_SURE = 3
# The most confident share of the samples of each suggested class; halved until the estimate is best.
_CONFIDENT = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
# Groups of fewer confident samples than this, or of fewer of a class on average, are not looked at, if a larger one can be.
_FEWEST = 100
_FEWEST_OF_A_CLASS = 2
# A class that is suggested for more than this multiple of the samples it has is left out of the estimate: classes weigh the
# same in the regression, which then predicts rare ones too often.
_OVER_SUGGESTED = 2
# Nothing is judged if the confident samples disagree with their labels more often than this share of pure chance, or if
# the disagreement still falls by more than these many standard errors, and by this share, where confidence is highest.
_CREDIBLE = 0.7
_FALL_ERRORS, _FALL = 2.5, 0.02
# Nothing is judged either if the predictions agree with the labels that are right, by the estimated share, by less than this
# share of what is beyond chance: features that hardly tell the classes apart, such as small pixels, of which most clean samples
# would be found.
_LEARNED = 0.7
# Ranks of classes by their predictions are looked at in this many groups, confidences in so many levels.
_RANK_GROUPS, _LEVELS = 5, 20


@dataclass(frozen=True, eq=False)
class Mislabelled:
    """What the margins show about the labels of N samples.

    `found`, bool [N], says which samples to leave out. `share` is the estimated share of the labels that are wrong, 0
    to 1, `error` its standard error, and `left` the share among the other samples; NaN if the features cannot tell.
    """

    found: Tensor
    share: float
    error: float
    left: float


def find_mislabelled(predicted: LeaveOneOut, labels: Tensor | NDArray[np.integer] | Sequence[int]) -> Mislabelled:
    """Estimate how many labels are wrong, and find the samples that have to go until few wrong labels remain.

    A prediction that never saw a sample knows nothing of an error in its label. So among confident predictions, which
    are nearly all true, the share that disagrees with the given labels estimates the share of wrong labels (as the
    anchor points of Liu and Tao 2016 and the confident joint of Northcutt et al. 2021 do), and the pairs of suggested
    and given label estimate which labels are mistaken for which. With these pairs wrong labels are put on the samples
    whose predictions are known: their margins show how often a wrong label would have a margin of at least t. This
    mixes wrong labels with some that are set right by accident, in a proportion that follows from the same pairs, and
    is corrected for them. Samples that belong to none of the classes, such as foreign images, are not among the confident
    ones; they are counted by their labels, which are among the least likely classes as often as anywhere. The smallest
    t is taken for which an estimated 1 % of the labels with such margins are wrong,
    and the samples below it are found; none if the estimated share is not above 1 % by three standard errors.

    Labels are assumed to be wrong independently of how hard a sample is. Features that do not tell the classes apart
    show by a disagreement that keeps falling with the confidence, or by predictions that agree too seldom with the share of
    labels that seems right; then nothing is found. Every class keeps at least
    a tenth of its samples, so none vanishes. Complexity: O(N log N + R C log(R C)) for the R rows of `predicted.outputs`.

    Args:
        predicted: result of `leave_one_out`.
        labels: the labels that it was computed for, integers [N].
    """
    given = torch.as_tensor(np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)).long()
    own = torch.searchsorted(predicted.classes, given).numpy()
    suggested = torch.searchsorted(predicted.classes, predicted.suggested).numpy()
    margin, classes = predicted.margin.numpy(), len(predicted.classes)
    nobody = torch.zeros(len(own), dtype=torch.bool)
    share, error, confident = _share_of_mistaken(own, suggested, predicted.confidence.numpy())
    if not share <= _CREDIBLE * (1 - 1 / classes):
        return Mislabelled(nobody, float("nan"), float("nan"), float("nan"))
    random_share, random_error, last = _share_of_random(predicted, own)
    levels = np.sort(margin)
    above = 1 - np.arange(len(levels)) / len(levels)
    left = np.zeros(len(levels))
    if share - _SURE * error > TOLERATED:
        pairs = np.zeros((classes, classes))
        np.add.at(pairs, (suggested[confident], own[confident]), 1)
        left = share * _mistaken_above(predicted, own, pairs, levels, above, share) / above
    if random_share - _SURE * random_error > TOLERATED:
        agree = _agreement(own == suggested, predicted.confidence.numpy())
        left = np.maximum(left, random_share * _random_above(predicted, last, levels, agree) / above)
    if random_share - 2 * random_error > share:
        share, error = random_share, random_error
    if not left.any():
        return Mislabelled(nobody, share, error, share)
    beyond_chance = (float((own == suggested).mean()) - 1 / classes) / (1 - 1 / classes)
    if beyond_chance < _LEARNED * (1 - share):
        return Mislabelled(nobody, float("nan"), float("nan"), float("nan"))
    clean_enough = np.flatnonzero(left <= TOLERATED)
    level = int(clean_enough[0]) if len(clean_enough) else int(left.argmin())
    found = (margin < levels[level]) & ~_best_of_each(margin, own, classes)
    return Mislabelled(torch.from_numpy(found), share, error, min(float(left[level]), 1.0))


def drop_worst(scores: NDArray[np.float64], share: float, groups: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Find the samples of each group that have the lowest scores.

    Args:
        scores: float64 [N]; higher is better. Of equal scores the later position is lower.
        share: share of each group, 0 <= share < 1.
        groups: int64 [N], group of each sample.

    Returns:
        bool [N]; floor(n * share + 1/2) samples of a group of n are found, but never all of them.

    >>> drop_worst(np.array([0.5, 0.1, 0.9, 0.2]), 0.5, np.array([0, 0, 1, 1])).tolist()
    [False, True, False, True]
    """
    found = np.zeros(len(scores), dtype=bool)
    order, starts = _sorted_groups(-scores, groups)
    for members in np.split(order, starts[1:]):
        count = min(int(len(members) * share + 0.5), len(members) - 1)
        found[members[len(members) - count :]] = True
    return found


def _sorted_groups(keys: NDArray[np.float64], groups: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return positions sorted by group, then key, then position [N], and the place where each group starts [G]."""
    order = np.lexsort((keys, groups))
    return order, np.flatnonzero(np.diff(groups[order], prepend=groups[order[:1]] - 1))


def _best_of_each(margin: NDArray[np.float64], own: NDArray[np.int64], classes: int) -> NDArray[np.bool_]:
    """Return which samples are among the share of their class that is always kept, bool [N]."""
    order, starts = _sorted_groups(-margin, own)
    counts = np.bincount(own, minlength=classes)
    place = np.arange(len(own)) - starts[own[order]]
    best = np.zeros(len(own), dtype=bool)
    best[order] = place < np.ceil(counts * KEPT_OF_A_CLASS)[own[order]]
    return best


def _share_of_mistaken(
    own: NDArray[np.int64], suggested: NDArray[np.int64], confidence: NDArray[np.float64]
) -> tuple[float, float, NDArray[np.bool_]]:
    """Estimate the share of wrong labels from confident samples; `own` and `suggested` are numbers of classes.

    The share (NaN if it cannot be told), its standard error, and which samples are the confident ones are returned.
    """
    order, starts = _sorted_groups(-confidence, suggested)
    sizes = np.diff(starts, append=len(order))
    rank = np.empty(len(order))
    rank[order] = (np.arange(len(order)) - np.repeat(starts, sizes) + 0.5) / np.repeat(sizes, sizes)
    # Most samples that a rare class is suggested for too often are mistakes of the prediction.
    times = np.bincount(suggested, minlength=int(own.max()) + 1) / np.maximum(np.bincount(own), 1)
    rank[times[suggested] > _OVER_SUGGESTED] = np.inf
    tried: list[tuple[float, float, NDArray[np.bool_]]] = []
    for part in _CONFIDENT:
        chosen = rank <= part
        count = int(chosen.sum())
        if tried and (count < _FEWEST or part * len(own) < _FEWEST_OF_A_CLASS * (own.max() + 1)):
            break
        differ = int((own != suggested)[chosen].sum())
        # One disagreement and one agreement more keep the error above 0 where nothing or everything disagrees.
        smooth = (differ + 1) / (count + 2)
        error = float(np.sqrt(smooth * (1 - smooth) / max(count, 1)))
        tried.append((differ / max(count, 1), error, chosen))
    best = min(tried, key=lambda one: one[0] + one[1])
    if len(tried) > 1 and best[0] - _SURE * best[1] > TOLERATED:
        (outer, _, _), (inner, error, _) = tried[-2:]
        # The less confident half of the outer group is compared with the inner group, which is the other half.
        if 2 * (outer - inner) > max(_FALL_ERRORS * error * 2**0.5, _FALL):
            return float("nan"), float("nan"), best[2]
    return best


def _mistaken_above(
    predicted: LeaveOneOut,
    own: NDArray[np.int64],
    pairs: NDArray[np.float64],
    levels: NDArray[np.float64],
    above: NDArray[np.float64],
    share: float,
) -> NDArray[np.float64]:
    """Estimate which share of the wrongly labelled samples, 0 to 1, has at least each of the ascending margins `levels`.

    `pairs` [C, C] counts the confident samples by suggested and given class, and `above` is the share of all samples
    that has at least these margins.
    """
    mistaken = pairs - np.diag(np.diag(pairs))
    rate = mistaken.sum(axis=1) / np.maximum(pairs.sum(axis=1), 1)
    mistaken /= np.maximum(mistaken.sum(axis=1, keepdims=True), 1)
    truth = pairs / np.maximum(pairs.sum(axis=0, keepdims=True), 1)
    outputs = predicted.outputs.numpy()
    first, second = -np.partition(-outputs, 1, axis=1)[:, :2].T[:, :, None]
    under_label = np.where(outputs == first, outputs - second, outputs - first).ravel()
    given = own[predicted.rows.numpy()]
    weight = (rate[given, None] * mistaken[given]).ravel()
    order = np.argsort(-under_label)
    reached = np.concatenate([[0.0], np.cumsum(weight[order])]) / weight.sum()
    changed: NDArray[np.float64] = reached[np.searchsorted(-under_label[order], -levels, side="right")]
    # Some of the changed labels are right by accident, because the label before the change was wrong.
    counts = np.bincount(own, minlength=len(pairs)) * rate
    righted = float(counts @ (mistaken * truth.T).sum(axis=1) / counts.sum())
    # changed = (1 - righted) wrong + righted right, and above = (1 - share) right + share wrong, solved for wrong
    known = 1 - righted - righted * share / (1 - share)
    if known < 0.1:
        return changed
    wrong: NDArray[np.float64] = np.clip((changed - righted * above / (1 - share)) / known, 0, 1)
    return wrong


def _share_of_random(predicted: LeaveOneOut, own: NDArray[np.int64]) -> tuple[float, float, NDArray[np.int64]]:
    """Estimate the share of labels that have nothing to do with their samples, such as those of foreign images.

    A random label is as often among the classes with the lowest predictions as anywhere, and a true label hardly ever.
    Hard samples still fall off towards the end, so the share is extrapolated from the last two groups of ranks. The
    share, its standard error (both 0 for less than 5 classes), and the rows of `predicted.outputs` whose label is among
    the lowest are returned.
    """
    outputs, given = predicted.outputs.numpy(), own[predicted.rows.numpy()]
    total, classes = outputs.shape
    group = classes // _RANK_GROUPS
    if group == 0:
        return 0.0, 0.0, np.empty(0, np.int64)
    rank = (outputs > outputs[np.arange(total), given][:, None]).sum(axis=1)
    last = np.flatnonzero(rank >= classes - group)
    before = int(((rank >= classes - 2 * group) & (rank < classes - group)).sum())
    # Of C classes a wrong label is one of C - 1.
    scale = (classes - 1) / group / total
    return max(2 * len(last) - before, 0) * scale, float(np.sqrt(4 * len(last) + before + 1)) * scale, last


def _agreement(agree: NDArray[np.bool_], confidence: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Return confidences [Q], ascending, and how often predictions of about that confidence agree with labels [Q]."""
    order = np.argsort(confidence)
    parts = np.array_split(order, min(_LEVELS, len(order)))
    return np.array([confidence[part].mean() for part in parts]), np.array([agree[part].mean() for part in parts])


def _random_above(
    predicted: LeaveOneOut,
    last: NDArray[np.int64],
    levels: NDArray[np.float64],
    agree: tuple[NDArray[np.float64], ...],
) -> NDArray[np.float64]:
    """Estimate which share of the samples with random labels, 0 to 1, has at least each of the margins `levels`.

    `last` are rows of `predicted.outputs` whose labels are random, almost all of them; `agree` is what `_agreement` gives.
    """
    outputs = predicted.outputs.numpy()[last]
    first, second = -np.partition(-outputs, 1, axis=1)[:, :2].T[:, :, None]
    best = outputs == first
    under_label = np.where(best, outputs - second, outputs - first)
    # A random label may be the suggested one, unless the suggestion is what the sample is.
    best_known = max(float(agree[1][-max(len(agree[1]) // 4, 1) :].mean()), 1e-9)
    right = np.interp((first - second).ravel(), agree[0], np.minimum(agree[1] / best_known, 1))
    weight = np.where(best, (1 - right)[:, None], 1.0).ravel()
    order = np.argsort(-under_label.ravel())
    reached = np.concatenate([[0.0], np.cumsum(weight[order])]) / weight.sum()
    above: NDArray[np.float64] = reached[np.searchsorted(-under_label.ravel()[order], -levels, side="right")]
    return above
