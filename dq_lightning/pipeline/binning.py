"""The step "bins": leave out samples of low scores and near-duplicates, and bin the rest, whitened if the settings say so."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from dq_lightning.bins.clusters import NEEDS_EMBEDDINGS
from dq_lightning.bins.duplicates import find_duplicates, spread_bins
from dq_lightning.bins.make import help_bins, make_shared_bins
from dq_lightning.cache.tensors import write_bins
from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import ConfigError
from dq_lightning.core.records import Features
from dq_lightning.core.sharing import Arrays, Job, Sharing
from dq_lightning.features.whitening import whiten
from dq_lightning.pipeline.plan import Plan
from dq_lightning.pipeline.step import Task
from dq_lightning.pipeline.suspects import check_classes, find_suspects, score_samples


def check_bins(plan: Plan, device: str) -> None:
    """Check before the long work what the settings of bins and scores ask of features and classes.

    Raises:
        ConfigError: features of the kind that is wanted have no clusters, or there are no classes to compare.
    """
    if plan.config.features.kind == "gradient" and plan.config.bins.clusters is not None:
        raise ConfigError(NEEDS_EMBEDDINGS)
    check_classes(plan.config, plan.scores, plan.source, lambda: plan.classes)


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
    compared = _compared(plan, features, kept)
    if plan.config.features.whiten:
        _tell_equal_distances(compared, features.embedding.shape[1])
    bins = make_shared_bins(
        compared,
        settings,
        labels=labels,
        device=task.device,
        progress=None if task.progress else False,
        sharing=task.sharing,
        arrays={"kept": (torch.arange(total) if kept is None else kept).numpy()},
    )
    if kept is not None:
        bins = replace(spread_bins(bins, kept, total), num_unreadable=skipped, suspects=suspects)
    if scored is not None and plan.draws_by_scores:
        bins = replace(bins, score=scored.of_all(total))
    write_bins(task.folder, bins)


@contextmanager
def help_to_bin(
    plan: Plan, features: Callable[[], Features | None], device: str, sharing: Sharing, job: Job, numbers: Iterator[int]
) -> Iterator[Iterator[Arrays]]:
    """Give the bins of some groups, in a `with` block, to a rank that makes them with an equal plan.

    `features` returns those of all samples; None, and there are no bins, if they would come too late.
    """
    found = features()
    if found is None:
        yield iter(())
        return
    kept = torch.from_numpy(job.arrays["kept"])
    compared = _compared(plan, found, None if len(kept) == len(found) else kept)
    with help_bins(compared, plan.config.bins, device, sharing.ranks_on_node, job, numbers) as results:
        yield results


def _tell_equal_distances(compared: Features, width: int) -> None:
    """Log a warning if whitened rows fill all directions that so many rows have; then each two have the same distance."""
    total, directions = compared.embedding.shape
    if 2 < total <= directions + 1 and compared.head_gradient is None:
        get_logger().warning(
            f"whiten=True makes these {total:,} samples all equally similar, because they are no more than their features have "
            f"numbers ({width:,}), so the bins mean nothing: leave features.whiten out, or use many more samples"
        )


def _compared(plan: Plan, features: Features, kept: Tensor | None) -> Features:
    """Return the features by which the samples `kept` (int64, ascending; None for all) are compared."""
    embedding, gradient = features.embedding, features.head_gradient
    if kept is not None:
        embedding, gradient = embedding[kept], None if gradient is None else gradient[kept]
    return Features(whiten(embedding) if plan.config.features.whiten else embedding, gradient)
