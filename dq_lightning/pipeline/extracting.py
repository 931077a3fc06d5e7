"""The step "features": run the encoder of a plan once over all samples."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from dq_lightning.cache.api_embeddings import API_FOLDER
from dq_lightning.cache.entries import require_space
from dq_lightning.cache.tensors import write_features
from dq_lightning.core.records import Labels
from dq_lightning.core.sharing import Arrays, Job, Sharing
from dq_lightning.features.extract import extract_features, extract_pieces
from dq_lightning.features.origins import EncoderSpec
from dq_lightning.features.readable import find_unreadable, without_labels
from dq_lightning.features.selection_training import with_selection_epochs
from dq_lightning.pipeline.plan import Plan
from dq_lightning.pipeline.step import Task


def make_features(task: Task) -> None:
    """Write the entry of the features of all N samples.

    With `on_error="skip"` the samples that cannot be read are found first and get no features.

    Raises:
        SourceError: a sample cannot be read.
        FeatureError: the encoder cannot be loaded or fails.
        ChangedError: the data changed while they were read.
        CacheError: the disk has too little space.
    """
    plan = task.plan
    plan.source.check_repeatable()
    shards = task.shards("features")
    learned, left_out = _labels(plan), None
    if plan.config.on_error == "skip":
        reading = task.shards("reading", part="reading")
        left_out = find_unreadable(
            plan.source, num_workers=plan.config.features.num_workers, progress=task.progress, shards=reading
        )
        learned = None if learned is None else without_labels(learned, left_out)

    def allocate(name: str, shape: tuple[int, int]) -> Tensor:
        # The shape is known after the first batch, so a full disk is reported before the long work.
        require_space(task.folder, 4 * math.prod(shape))
        shards.reserve_bytes += 4 * math.prod(shape)
        return torch.empty(shape, dtype=torch.float32)

    features = extract_features(
        plan.source,
        _encoder(plan, learned, task.progress),
        **_arguments(plan, list(task.devices), task.sharing),
        progress=task.progress,
        out=allocate,
        api_embeddings=task.cache.root / API_FOLDER,
        shards=shards,
        left_out=left_out,
    )
    task.check_unchanged()
    write_features(task.folder, features)


def help_features(
    plan: Plan, devices: list[str], sharing: Sharing, job: Job, numbers: Iterator[int]
) -> AbstractContextManager[Iterator[Arrays]]:
    """Give the features of some pieces of the samples, in a `with` block, to a rank that makes them with an equal plan."""
    plan.source.check_repeatable()
    assert plan.encoder is not None
    return extract_pieces(plan.source, plan.encoder, job, numbers, **_arguments(plan, devices, sharing))


def _labels(plan: Plan) -> Labels | None:
    settings = plan.config.features
    return plan.classes if settings.kind == "gradient" or settings.selection_epochs else None


def _encoder(plan: Plan, learned: Labels | None, progress: bool) -> EncoderSpec:
    assert plan.encoder is not None
    return with_selection_epochs(plan.encoder, plan.source, learned, plan.config.features, progress)


def _arguments(plan: Plan, devices: list[str], sharing: Sharing) -> dict[str, Any]:
    """Return what the ranks that share the samples all pass to the loop over them."""
    settings, labels = plan.config.features, _labels(plan)
    return {
        "kind": settings.kind,
        "labels": labels.values if labels is not None else None,
        "num_classes": labels.num_classes if labels is not None else None,
        "device": devices,
        "precision": settings.precision,
        "batch_size": settings.batch_size,
        "num_workers": settings.num_workers,
        "sharing": sharing,
    }
