"""Scores of samples: where they come from, and which samples are left out of the bins because theirs are low."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.core.arrays import as_numpy
from dq_lightning.core.config import QualityConfig, QuantizeConfig
from dq_lightning.core.console import get_logger
from dq_lightning.core.devices import resolve_device
from dq_lightning.core.errors import ConfigError
from dq_lightning.core.records import Bins, Features, Labels, Suspects
from dq_lightning.quality.margin import LeaveOneOut, leave_one_out
from dq_lightning.quality.mislabelled import TOLERATED, drop_worst, find_mislabelled
from dq_lightning.sources.base import Source
from dq_lightning.sources.columns import check_column, number_column

# `drop_worst="auto"` and `draw="auto"` judge no labels where classes have fewer samples than this on average: a class of a
# few samples cannot be told from its mistakes, and the regression costs time in proportion to the number of classes. The draw
# judges none of features wider than this either: time grows with the cube of the width, and memory with its square.
MIN_SAMPLES_A_CLASS = 5
MAX_WIDTH = 4096


@dataclass(frozen=True, eq=False)
class GivenScores:
    """Scores that the user gave.

    Attributes:
        values: float64 [N]; None where they are a column of the dataset, which is read when it is needed.
        identity: hexadecimal digest of the scores, or the name of the column.
    """

    values: NDArray[np.float64] | None
    identity: str


@dataclass(frozen=True, eq=False)
class Scored:
    """The scores of the samples that have one.

    Attributes:
        place: int64 [n], positions of these samples among all N, ascending.
        score: floating [n], higher is better.
        classes: int64 [n], their classes; -1 without classes.
        predicted: what the margins were computed from; None where the scores were given.
    """

    place: Tensor
    score: Tensor
    classes: Tensor
    predicted: LeaveOneOut | None

    def of_all(self, total: int) -> Tensor:
        """Return float64 [N]: the scores, and minus infinity for samples without one."""
        scores = torch.full((total,), -float("inf"), dtype=torch.float64)
        scores[self.place] = self.score.double()
        return scores


def draws_by_scores(config: QuantizeConfig, given: GivenScores | None, modality: str) -> bool:
    """Whether the draw inside the bins may use scores; `"auto"` does so where samples, but for text, may have classes."""
    if config.selection.draw != "auto":
        return config.selection.draw == "scored"
    quality = config.quality
    judged = given is None and quality.score == "margin" and quality.drop_worst in (0, "auto")
    return judged and config.bins.by_label and modality != "text"


def given_scores(scores: Any, config: QuantizeConfig, samples: Source) -> GivenScores | None:
    """Read the scores that the user gave of N samples, or None where there are none or they have no use.

    Raises:
        ConfigError: the scores are not N finite numbers, a file cannot be read, or settings contradict each other.
    """
    quality = config.quality
    if scores is None and quality.score == "none" and config.selection.draw == "scored":
        raise ConfigError(
            'draw="scored" draws by scores, and quality.score="none" allows none: leave one of them out, or pass scores='
        )
    if scores is None and (
        quality.score in ("margin", "none") or not (quality.drops or config.selection.draw == "scored")
    ):
        return None
    if scores is not None and quality.drop_worst == "auto":
        raise ConfigError(
            'drop_worst="auto" estimates from margins how many labels are wrong, which scores of your own do not allow: pass '
            "the share to leave out, such as drop_worst=0.2, or leave scores= out"
        )
    if scores is None and not quality.score.endswith(".npy"):
        check_column(samples, quality.score)
        return GivenScores(None, f"column:{quality.score}")
    name = "scores=" if scores is not None else quality.score
    try:
        read = np.load(Path(quality.score).expanduser(), allow_pickle=False) if scores is None else scores
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


def score_samples(
    config: QuantizeConfig,
    given: GivenScores | None,
    source: Source,
    labels: Labels | None,
    features: Features,
    *,
    device: str,
) -> Scored | None:
    """Return the scores that samples are left out by, or drawn by: those that the user gave, or margins.

    Returns:
        The scores, or None where the settings need none, or where only `"auto"` needs them and there are no classes to
        compare, or too few samples of each, or the features are very wide.

    Raises:
        ConfigError: margins were asked for without two classes, or given scores are not finite.
    """
    drops = config.quality.drops
    if not drops and not draws_by_scores(config, given, source.modality):
        return None
    usable = torch.ones(len(features), dtype=torch.bool)
    usable[features.unreadable] = False
    asked = _asked(config)
    if given is None:
        if labels is not None and labels.unlabeled:
            usable &= labels.values != labels.num_classes
        present = 0 if labels is None else len(np.unique(labels.values[usable].numpy()))
        if present < 2:
            if asked is None:
                if drops:
                    get_logger().warning(
                        'no label is judged (drop_worst="auto"), because the samples have fewer than two classes (several '
                        "labels a sample, or a number, are none)"
                    )
                return None
            raise _no_classes(asked, source)
        count, width = int(usable.sum()), features.embedding.shape[1]
        why = None
        if count < MIN_SAMPLES_A_CLASS * present:
            why = f"{count:,} samples of {present:,} classes are fewer than {MIN_SAMPLES_A_CLASS} a class"
        elif width > MAX_WIDTH and not drops:
            why = f'features of {width:,} numbers a sample would take long (selection.draw="scored" does it)'
        if asked is None and why is not None:
            get_logger().info(f"the labels are not judged: {why}")
            return None
    place = usable.nonzero().flatten()
    classes = labels.values[place] if labels is not None else torch.full((len(place),), -1)
    if given is None:
        predicted = leave_one_out(features.embedding[place], classes, device=resolve_device(device))
        return Scored(place, predicted.margin, classes, predicted)
    values = given.values
    if values is None:
        name = given.identity.removeprefix("column:")
        return Scored(place, torch.from_numpy(number_column(source, name, place.numpy())), classes, None)
    return Scored(place, torch.from_numpy(values)[place], classes, None)


def check_classes(
    config: QuantizeConfig, given: GivenScores | None, source: Source, classes: Callable[[], Labels | None]
) -> None:
    """Check before features are made that there are classes if margins were asked for.

    `classes` returns the class of every sample, or None; it is only called where they are needed.

    Raises:
        ConfigError: margins were asked for, and there are fewer than two classes.
    """
    asked = _asked(config)
    if given is None and asked is not None:
        labels = classes()
        if labels is None or labels.num_classes < 2:
            raise _no_classes(asked, source)


def _asked(config: QuantizeConfig) -> str | None:
    """Return the setting that asks for scores whatever the data are, or None where none does."""
    if config.quality.drops and config.quality.drop_worst != "auto":
        return f"drop_worst={config.quality.drop_worst}"
    return 'draw="scored"' if config.selection.draw == "scored" else None


def _no_classes(asked: str, source: Source) -> ConfigError:
    return ConfigError(
        f"{asked} compares labels with features, but {source.describe()} has fewer than two classes (several labels a "
        "sample, or a number, are none): pass scores= or labels=, or leave it out"
    )


def find_suspects(config: QualityConfig, scored: Scored | None, names: tuple[str, ...] | None) -> Suspects | None:
    """Find the samples that are left out of the bins because of their scores, and log their number.

    Args:
        config: which samples are left out.
        scored: the scores; None where there are none.
        names: names of the classes, or None.

    Returns:
        The suspects, or None where the settings leave nothing out or there are no scores.
    """
    if scored is None or not config.drops:
        return None
    place, score, classes, predicted = scored.place, scored.score, scored.classes, scored.predicted
    suggested, noise = torch.full((len(place),), -1) if predicted is None else predicted.suggested, None
    if config.drop_worst == "auto":
        assert predicted is not None
        shown = find_mislabelled(predicted, classes)
        found, noise = shown.found, shown.share if np.isfinite(shown.share) else None
        _log_estimate(shown.share, shown.error, int(found.sum()), len(place))
    else:
        found = torch.from_numpy(drop_worst(score.numpy(), config.drop_worst, classes.numpy()))
        get_logger().info(f"{int(found.sum()):,} of {len(place):,} samples are left out because their scores are low")
    left_out = found.nonzero().flatten()
    left_out = left_out[score[left_out].argsort(stable=True)]
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
    elif share <= TOLERATED:
        get_logger().info(f"the labels of {total:,} samples seem right (about {share:.1%} wrong): none is left out")
    else:
        get_logger().info(
            f"about {share:.1%} (+- {error:.1%}) of {total:,} labels seem wrong, which is too uncertain to leave out any"
        )


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
