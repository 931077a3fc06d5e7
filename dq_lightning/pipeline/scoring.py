"""The step "saliency": score every patch of the kept samples."""

import torch
from torch import Tensor

from dq_lightning.cache.tensors import write_scores
from dq_lightning.core.devices import DeviceNames, resolve_device, resolve_devices
from dq_lightning.core.handles import FORK, loader_processes
from dq_lightning.core.isolation import isolated, release_memory
from dq_lightning.core.records import Selection
from dq_lightning.core.resuming import Shards
from dq_lightning.core.workers import automatic_workers
from dq_lightning.patches.saliency import ClassifierScorer
from dq_lightning.patches.score import score_images
from dq_lightning.pipeline.patching import patches_of
from dq_lightning.pipeline.plan import Plan
from dq_lightning.pipeline.step import Task, reading_again

# Fewer images than this are read faster in one process than loader processes start.
WORKERS_PAY_FROM = 512


def make_scores(task: Task, selection: Selection) -> None:
    """Write the entry of the scores of the patches of the M kept samples."""
    with reading_again(task.plan):
        shards = task.shards("saliency")
        scored = score_selection(task.plan, selection, device=list(task.devices), progress=task.progress, shards=shards)
        task.check_unchanged()
    write_scores(task.folder, *scored)


def score_selection(
    plan: Plan, selection: Selection, *, device: DeviceNames, progress: bool, shards: Shards | None = None
) -> tuple[Tensor, Tensor]:
    """Score every patch of the M kept samples; `shards` keeps finished scores, so that an interrupted run continues.

    Returns:
        Scores float32 [sum of L_i], image after image, and sizes int32 [M, 2], (height, width) of every image; see
        `score_images`.

    Raises:
        SourceError: an image cannot be read.
        PatchError: the classifier cannot score patches, or scores are not finite.
        FeatureError: the classifier's weights cannot be found or do not fit.
    """
    patches = patches_of(plan)
    devices = resolve_devices(device)
    labels = plan.classes if patches.classifier is not None else None
    source, workers = loader_processes(
        plan.source, _num_workers(plan, len(selection), len(devices)), asked=False, context=FORK
    )
    try:
        with isolated():
            scorer = patches.load_scorer(str(devices[0]), labels.num_classes if labels is not None else None)
            scored = score_images(
                source,
                selection.index,
                scorer,
                patches.patch_size,
                labels=labels.values[selection.index] if labels is not None else None,
                devices=devices,
                batch_size=patches.config.batch_size,
                num_workers=workers,
                progress=progress,
                shards=shards,
            )
            del scorer
    finally:
        release_memory()
    return scored


def check_saliency(plan: Plan, device: str) -> None:
    """Check before the long work that the classifier can score patches, by scoring two images of noise.

    Nothing is checked where all patches are kept.

    Raises:
        PatchError: the target layer of the classifier cannot be found, or the classifier fails on the images.
        FeatureError: the weights of the classifier cannot be found.
    """
    patches = plan.patches
    if patches is None or patches.classifier is None:
        return
    target, labels = resolve_device(device), plan.classes
    try:
        with isolated():
            scorer = patches.load_scorer(str(target), labels.num_classes if labels is not None else None)
            if isinstance(scorer, ClassifierScorer):
                noise = torch.randint(0, 256, (2, 3, *patches.image_size), generator=torch.Generator().manual_seed(0))
                classes = None if labels is None else torch.zeros(2, dtype=torch.int64, device=target)
                scorer.check(noise.to(target, torch.uint8), classes)
            del scorer
    finally:
        release_memory()


def _num_workers(plan: Plan, count: int, num_devices: int) -> int:
    asked = plan.config.features.num_workers
    if asked != "auto":
        return asked
    return automatic_workers(num_devices=num_devices) if count >= WORKERS_PAY_FROM else 0
