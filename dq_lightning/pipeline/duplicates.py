"""The near-duplicates that were left out behind a compact set, found again; features of two datasets that compare."""

from typing import Any

import numpy as np
import torch

from dq_lightning.bins.duplicates import find_duplicates, near_pairs
from dq_lightning.cache.entries import Cache
from dq_lightning.core.config import QuantizeConfig, replace_fields
from dq_lightning.core.errors import CacheError, ConfigError
from dq_lightning.core.records import Duplicates, Labels
from dq_lightning.features.ready_made import is_ready_made
from dq_lightning.pipeline.compact import Compact, read_bins_of, read_features_of
from dq_lightning.pipeline.plan import make_plan
from dq_lightning.pipeline.wanted import Wanted


def read_duplicates_of(
    compact: Compact, cache: Cache, labels: Labels | None, *, labels_known: bool = True
) -> Duplicates | None:
    """Return the near-duplicates that were left out, each with the sample that stays; None if none were looked for.

    Only the samples that were left out are compared with the others, which takes much less time than to search anew.

    Args:
        compact: the compact set.
        cache: cache that holds its features and bins.
        labels: classes or groups of all samples of its dataset, or None without classes.
        labels_known: whether the labels are those of the dataset; False where it is not at hand.

    Raises:
        CacheError: the features or the bins are not in the cache, or the classes are needed and not given.
    """
    settings = compact.config.get("bins", {})
    if settings.get("deduplicate") is None:
        return None
    by_label = settings.get("by_label", True)
    features, bins = read_features_of(compact, cache), read_bins_of(compact, cache)
    inside = bins.assignment >= 0
    if by_label and not labels_known and len(np.unique(bins.group[inside].numpy())) > 1:
        raise CacheError(
            "near-duplicates were compared inside each class, and the classes of what was left out are in the dataset alone: "
            "pass it as dataset="
        )
    # Suspects and samples that could not be read were left out before near-duplicates were looked for.
    compared = torch.ones(len(bins), dtype=torch.bool)
    compared[features.unreadable] = False
    if bins.suspects is not None:
        compared[bins.suspects.index] = False
    groups = torch.zeros(len(bins), dtype=torch.int64) if labels is None or not by_label else labels.values
    found = [torch.empty(0, 2, dtype=torch.int64)]
    for group in np.unique(groups[compared & ~inside].numpy()).tolist():
        left = (compared & ~inside & (groups == group)).nonzero().flatten()
        stays = (compared & inside & (groups == group)).nonzero().flatten()
        of = find_duplicates(features.embedding[left], settings["deduplicate"], against=features.embedding[stays])
        close = of >= 0
        found.append(torch.stack([left[close], stays[of[close]]], dim=1))
    pairs = torch.cat(found)
    of = torch.arange(len(bins))
    of[pairs[:, 0]] = pairs[:, 1]
    return Duplicates(*near_pairs(features.embedding, of))


def config_of_other(first: Any, second: Any, config: QuantizeConfig, against_encoder: str | None) -> QuantizeConfig:
    """Return the settings by which a second dataset gets features that compare with those of the first.

    Args:
        first: a dataset, whose features the settings `config` make.
        second: another dataset.
        config: settings of both.
        against_encoder: path of the ready-made features of the second dataset, if those of the first are ready-made.

    Raises:
        ConfigError: the features of the two would not come from the same encoder.
    """
    encoder = config.features.encoder
    if is_ready_made(encoder) or against_encoder is not None:
        if not (is_ready_made(encoder) and against_encoder is not None and is_ready_made(against_encoder)):
            raise ConfigError(
                f"encoder={encoder!r} and against_encoder={against_encoder!r}: ready-made features are those of one dataset, "
                "so two datasets need two .npy files of them, made by the same encoder; otherwise leave against_encoder= out"
            )
        return replace_fields(config, {"features.encoder": against_encoder})
    if config.features.selection_epochs:
        raise ConfigError(
            "selection_epochs trains the encoder on each dataset, so features of two datasets do not compare: leave it out"
        )
    names = [spec.name for data in (first, second) if (spec := make_plan(data, Wanted(config)).encoder) is not None]
    if len(set(names)) > 1:
        raise ConfigError(
            f"encoder={encoder!r} stands for {names[0]} for the one dataset and {names[1]} for the other, whose features do "
            "not compare: name one encoder for both"
        )
    return config
