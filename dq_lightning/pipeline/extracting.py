"""The step "features": run the encoder of a plan once over all samples."""

import math

import torch
from torch import Tensor

from dq_lightning.cache.api_embeddings import API_FOLDER
from dq_lightning.cache.entries import require_space
from dq_lightning.cache.tensors import write_features
from dq_lightning.features.extract import extract_features
from dq_lightning.features.readable import find_unreadable, without_labels
from dq_lightning.features.selection_training import with_selection_epochs
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
    plan, settings = task.plan, task.plan.config.features
    assert plan.encoder is not None
    plan.source.check_repeatable()
    shards = task.shards("features")
    labels = plan.classes if settings.kind == "gradient" or settings.selection_epochs else None
    learned, left_out = labels, None
    if plan.config.on_error == "skip":
        reading = task.shards("reading", part="reading")
        left_out = find_unreadable(
            plan.source, num_workers=settings.num_workers, progress=task.progress, shards=reading
        )
        learned = None if labels is None else without_labels(labels, left_out)

    def allocate(name: str, shape: tuple[int, int]) -> Tensor:
        # The shape is known after the first batch, so a full disk is reported before the long work.
        require_space(task.folder, 4 * math.prod(shape))
        shards.reserve_bytes += 4 * math.prod(shape)
        return torch.empty(shape, dtype=torch.float32)

    features = extract_features(
        plan.source,
        with_selection_epochs(plan.encoder, plan.source, learned, settings, task.progress),
        kind=settings.kind,
        labels=labels.values if labels is not None else None,
        num_classes=labels.num_classes if labels is not None else None,
        device=list(task.devices),
        precision=settings.precision,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        progress=task.progress,
        out=allocate,
        api_embeddings=task.cache.root / API_FOLDER,
        shards=shards,
        left_out=left_out,
    )
    task.check_unchanged()
    write_features(task.folder, features)
