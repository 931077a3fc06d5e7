"""The step "bins": leave out samples of low scores and near-duplicates, and bin the rest, whitened if the settings say so."""

from dataclasses import replace

import torch

from dq_lightning.bins.duplicates import find_duplicates, spread_bins
from dq_lightning.bins.make import make_bins
from dq_lightning.cache.tensors import write_bins
from dq_lightning.core.console import get_logger
from dq_lightning.core.records import Features
from dq_lightning.features.whitening import whiten
from dq_lightning.pipeline.step import Task
from dq_lightning.pipeline.suspects import find_suspects, score_samples


def make_bins_entry(task: Task, features: Features) -> None:
    """Write the entry of the bins of all N samples.

    Samples that could not be read, samples of low scores and near-duplicates get the bin -1.
    """
    plan, settings = task.plan, task.plan.config.bins
    grouping = plan.labels if settings.by_label else None
    labels = grouping.values if grouping is not None else None
    kept, total, skipped = None, len(features), len(features.unreadable)
    by_scores = plan.config.quality.drops or plan.draws_by_scores
    classes = plan.classes if by_scores else None
    scored = score_samples(plan.config, plan.scores, plan.source, classes, features, device=task.device)
    suspects = find_suspects(plan.config.quality, scored, None if classes is None else classes.names)
    if skipped or suspects is not None:
        usable = torch.ones(total, dtype=torch.bool)
        usable[features.unreadable] = False
        if suspects is not None:
            usable[suspects.index] = False
        kept = usable.nonzero().flatten()
    if settings.deduplicate is not None:
        candidates = torch.arange(total) if kept is None else kept
        groups = None if labels is None else labels[candidates]
        of = find_duplicates(features.embedding[candidates], settings.deduplicate, labels=groups)
        kept = candidates[of == torch.arange(len(candidates))]
        get_logger().info(f"{len(candidates) - len(kept):,} of {total:,} samples are near-duplicates of others")
    labels = labels[kept] if labels is not None and kept is not None else labels
    embedding, gradient = features.embedding, features.head_gradient
    if kept is not None:
        embedding, gradient = embedding[kept], None if gradient is None else gradient[kept]
    bins = make_bins(
        Features(whiten(embedding) if plan.config.features.whiten else embedding, gradient),
        labels=labels,
        device=task.device,
        progress=None if task.progress else False,
        **{name: value for name, value in settings.to_dict().items() if name not in ("by_label", "deduplicate")},
    )
    if kept is not None:
        bins = replace(spread_bins(bins, kept, total), num_unreadable=skipped, suspects=suspects)
    if scored is not None and plan.draws_by_scores:
        bins = replace(bins, score=scored.of_all(total))
    write_bins(task.folder, bins)
