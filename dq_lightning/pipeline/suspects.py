"""Suspects: samples that are left out of the bins because their scores are low, and where the scores come from."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dq_lightning.core.arrays import as_numpy
from dq_lightning.core.config import QualityConfig
from dq_lightning.core.console import get_logger
from dq_lightning.core.devices import resolve_device
from dq_lightning.core.errors import ConfigError
from dq_lightning.core.records import Bins, Features, Labels, Suspects
from dq_lightning.quality.margin import leave_one_out
from dq_lightning.quality.mislabelled import drop_worst, find_mislabelled
from dq_lightning.sources.base import Source
from dq_lightning.sources.columns import number_column

# `drop_worst="auto"` judges no labels where classes have fewer samples than this on average: a class of a few samples cannot
# be told from its mistakes, and the regression costs time in proportion to the number of classes.
MIN_SAMPLES_A_CLASS = 5


@dataclass(frozen=True, eq=False)
class GivenScores:
    """Scores that the user gave.

    Attributes:
        values: float64 [N]; None where they are a column of the dataset, which is read when it is needed.
        identity: hexadecimal digest of the scores, or the name of the column.
    """

    values: NDArray[np.float64] | None
    identity: str


def given_scores(scores: Any, config: QualityConfig, samples: Source) -> GivenScores | None:
    """Read the scores that the user gave of N samples, or None where there are none or they have no use.

    Raises:
        ConfigError: the scores are not N finite numbers, a file cannot be read, or settings contradict each other.
    """
    if scores is None and (not config.drops or config.score == "margin"):
        return None
    if scores is not None and config.drop_worst == "auto":
        raise ConfigError(
            'drop_worst="auto" estimates from margins how many labels are wrong, which scores of your own do not allow: pass '
            "the share to leave out, such as drop_worst=0.2, or leave scores= out"
        )
    if scores is None and not config.score.endswith(".npy"):
        return GivenScores(None, f"column:{config.score}")
    name = "scores=" if scores is not None else config.score
    try:
        read = np.load(Path(config.score).expanduser(), allow_pickle=False) if scores is None else scores
        values = as_numpy(read)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{name} cannot be read as numbers [N]: {error}") from error
    total = len(samples)
    if values.shape != (total,) or values.dtype.kind not in "iuf":
        raise ConfigError(f"{name} holds {values.dtype} {list(values.shape)}, expected one number a sample, [{total}]")
    values = _finite(values.astype(np.float64), name)
    return GivenScores(values, hashlib.sha256(values.tobytes()).hexdigest())


def _finite(values: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ConfigError(
            f"{name} must be finite numbers, but {len(bad):,} of them are not, first {values[bad[0]]} for sample {bad[0]}"
        )
    return values


def find_suspects(
    config: QualityConfig,
    given: GivenScores | None,
    source: Source,
    labels: Labels | None,
    features: Features,
    *,
    device: str,
) -> Suspects | None:
    """Find the samples that are left out of the bins because of their scores, and log their number.

    The scores are those that the user gave, or margins, which are computed on the device.

    Returns:
        The suspects, or None where the settings leave nothing out, or where `"auto"` can find nothing since there are
        no classes to compare.

    Raises:
        ConfigError: margins were asked for without two classes, or given scores are not finite.
    """
    if not config.drops:
        return None
    usable = torch.ones(len(features), dtype=torch.bool)
    usable[features.unreadable] = False
    if given is None:
        if labels is not None and labels.unlabeled:
            usable &= labels.values != labels.num_classes
        if labels is None or len(set(labels.values[usable].tolist())) < 2:
            if config.drop_worst == "auto":
                return None
            raise ConfigError(
                f"drop_worst={config.drop_worst} compares labels with features, but {source.describe()} has fewer than two "
                "classes: pass scores= or labels=, or leave drop_worst= out"
            )
    place = usable.nonzero().flatten()
    if config.drop_worst == "auto" and labels is not None and len(place) < MIN_SAMPLES_A_CLASS * labels.num_classes:
        get_logger().info(
            f"the labels are not judged: {len(place):,} samples of {labels.num_classes:,} classes are fewer than "
            f"{MIN_SAMPLES_A_CLASS} a class"
        )
        return None
    classes = labels.values[place] if labels is not None else torch.full((len(place),), -1)
    suggested, noise = torch.full((len(place),), -1), None
    if given is not None:
        values = given.values
        if values is None:
            values = _finite(number_column(source, given.identity.removeprefix("column:")), given.identity)
        score = torch.from_numpy(values)[place]
    else:
        predicted = leave_one_out(features.embedding[place], classes, device=resolve_device(device))
        score, suggested = predicted.margin, predicted.suggested
    if config.drop_worst == "auto":
        shown = find_mislabelled(predicted, classes)
        found, noise = shown.found, shown.share if np.isfinite(shown.share) else None
        _log_estimate(shown.share, shown.error, int(found.sum()), len(place))
    else:
        found = torch.from_numpy(drop_worst(score.numpy(), config.drop_worst, classes.numpy()))
        get_logger().info(f"{int(found.sum()):,} of {len(place):,} samples are left out because their scores are low")
    left_out = found.nonzero().flatten()
    left_out = left_out[score[left_out].argsort(stable=True)]
    names = None if labels is None else labels.names
    return Suspects(place[left_out], score[left_out], classes[left_out], suggested[left_out], names, noise)


def _log_estimate(share: float, error: float, count: int, total: int) -> None:
    if not np.isfinite(share):
        get_logger().info(
            'no label is judged (drop_worst="auto"): these features do not tell the classes apart well enough; another '
            "encoder= may"
        )
    elif count:
        get_logger().info(
            f"about {share:.1%} (+- {error:.1%}) of {total:,} labels seem wrong: the {count:,} samples whose labels fit their "
            "features least are left out (they are listed in info.suspects)"
        )
    else:
        get_logger().info(f"the labels of {total:,} samples seem right (about {share:.1%} wrong): none is left out")


def with_enough(bins: Bins, labels: Labels | None, wanted: int) -> Bins:
    """Return bins that hold at least `wanted` samples: the suspects of highest score are put into the last bin.

    The labels are the classes of the samples where bins were made inside classes, else None.
    """
    short = wanted - int((bins.assignment >= 0).sum())
    if bins.suspects is None or short <= 0:
        return bins
    back = bins.suspects.index.flip(0)
    back = back[bins.assignment[back] < 0][:short]
    assignment, rank, group = bins.assignment.clone(), bins.rank.clone(), bins.group.clone()
    assignment[back], rank[back] = bins.num_bins - 1, len(bins) + torch.arange(len(back), dtype=torch.int32)
    group[back] = 0 if labels is None else labels.values[back].to(torch.int32)
    get_logger().warning(
        f"keep_ratio asks for {short:,} more samples than remain without the suspects, so the {len(back):,} suspects with the "
        "highest scores may be kept too: lower keep_ratio to keep none of them"
    )
    return replace(bins, assignment=assignment, rank=rank, group=group)
