"""Station 2 over a plan: features refined as the settings ask, near-duplicates left out, bins of the rest."""

import torch
from torch import Tensor

from dq_lightning.bins.duplicates import find_duplicates, spread_bins
from dq_lightning.bins.make import make_bins
from dq_lightning.features.whitening import whiten
from dq_lightning.logs import get_logger
from dq_lightning.plan import Plan
from dq_lightning.records import Bins, Features


def bins_of(plan: Plan, features: Features, *, device: str, progress: bool) -> Bins:
    """Bins of all N samples of a plan from their features."""
    settings = plan.config.bins
    grouping = plan.labels if settings.by_label else None
    labels = grouping.values if grouping is not None else None
    kept, total = None, len(features)
    if settings.deduplicate is not None:
        originals = find_duplicates(features.embedding, settings.deduplicate)
        kept = (originals == torch.arange(total)).nonzero().flatten()
        get_logger().info(f"{total - len(kept):,} of {total:,} samples are near-duplicates of others")
        labels = None if labels is None else labels[kept]
    bins = make_bins(
        _refined(features, kept, whitened=plan.config.features.whiten),
        num_bins=settings.num_bins,
        labels=labels,
        objective=settings.objective,
        maximizer=settings.maximizer,
        similarity=settings.similarity,
        lam=settings.lam,
        clusters=settings.clusters,
        gamma=settings.gamma,
        epsilon=settings.epsilon,
        beta=settings.beta,
        search_seed=settings.search_seed,
        device=device,
        progress=None if progress else False,
    )
    return bins if kept is None else spread_bins(bins, kept, total)


def _refined(features: Features, kept: Tensor | None, *, whitened: bool) -> Features:
    """Features of the samples that go into bins, whitened where that is wanted."""
    embedding, gradient = features.embedding, features.head_gradient
    if kept is not None:
        embedding, gradient = embedding[kept], None if gradient is None else gradient[kept]
    return Features(whiten(embedding), gradient) if whitened else Features(embedding, gradient)
