"""The step "saliency": score every patch of the kept samples."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dq_lightning.cache.tensors import write_scores
from dq_lightning.core.devices import DeviceNames, resolve_devices
from dq_lightning.core.handles import FORK, loader_processes
from dq_lightning.core.isolation import isolated, release_memory
from dq_lightning.core.records import Selection
from dq_lightning.core.resuming import Shards
from dq_lightning.core.sharing import Arrays, Job, Sharing
from dq_lightning.core.workers import automatic_workers
from dq_lightning.patches.saliency import ClassifierScorer, PatchScorer
from dq_lightning.patches.score import ScoreLoop, score_images
from dq_lightning.pipeline.patching import patches_of
from dq_lightning.pipeline.plan import Plan
from dq_lightning.pipeline.step import Task, reading_again

# Fewer images than this are read faster in one process than loader processes start.
WORKERS_PAY_FROM = 512


def make_scores(task: Task, selection: Selection) -> None:
    """Write the entry of the scores of the patches of the M kept samples."""
    with reading_again(task.plan):
        scored = score_selection(
            task.plan,
            selection,
            device=list(task.devices),
            progress=task.progress,
            shards=task.shards("saliency"),
            sharing=task.sharing,
        )
        task.check_unchanged()
    write_scores(task.folder, *scored)


def score_selection(
    plan: Plan,
    selection: Selection,
    *,
    device: DeviceNames,
    progress: bool,
    shards: Shards | None = None,
    sharing: Sharing | None = None,
) -> tuple[Tensor, Tensor]:
    """Score every patch of the M kept samples; `shards` keeps finished scores, so that an interrupted run continues.

    `sharing` is how the images are shared with other processes, each of which calls `help_scores`; a stream is not
    shared, since each process would read it from its beginning.

    Returns:
        Scores float32 [sum of L_i], image after image, and sizes int32 [M, 2], (height, width) of every image; see
        `score_images`.

    Raises:
        SourceError: an image cannot be read.
        PatchError: the classifier cannot score patches, or scores are not finite.
        FeatureError: the classifier's weights cannot be found or do not fit.
    """
    shared = Sharing() if sharing is None or plan.source.in_order else sharing
    with _loop(plan, selection.index, device, shared) as loop:
        scored = score_images(loop, progress=progress, shards=shards, sharing=shared)
        del loop
    return scored


@contextmanager
def help_scores(
    plan: Plan, devices: list[str], sharing: Sharing, job: Job, numbers: Iterator[int]
) -> Iterator[Iterator[Arrays]]:
    """Give the scores of some windows of images, in a `with` block, to a rank that makes them with an equal plan."""
    index, missing = (torch.from_numpy(job.arrays[name]) for name in ("index", "missing"))
    with reading_again(plan), _loop(plan, index, devices, sharing) as loop:
        yield loop.packed(missing, numbers)
        del loop


@contextmanager
def _loop(plan: Plan, index: Tensor, device: DeviceNames, sharing: Sharing) -> Iterator[ScoreLoop]:
    """Load the scorer on the first device, in a random state and with flags of its own, and decide how images are read."""
    patches, devices = patches_of(plan), resolve_devices(device)
    labels = plan.classes if patches.classifier is not None else None
    # The processes are chosen before the GPU is used.
    workers = _num_workers(plan, len(index), len(devices), sharing)
    source, workers = loader_processes(plan.source, workers, asked=False, context=FORK)
    with _scorer(plan, devices[0]) as scorer:
        yield ScoreLoop(
            source,
            index,
            scorer,
            patches.patch_size,
            labels=labels.values[index] if labels is not None else None,
            devices=devices,
            batch_size=patches.config.batch_size,
            num_workers=workers,
        )
        del scorer


@contextmanager
def _scorer(plan: Plan, device: torch.device) -> Iterator[PatchScorer]:
    """Load the scorer, and let two images of noise decide the layer of the classifier at which it scores.

    So the layer depends neither on the images that this process happens to see first, nor on what was done before.
    """
    patches = patches_of(plan)
    labels = plan.classes if patches.classifier is not None else None
    try:
        with isolated():
            scorer = patches.load_scorer(str(device), labels.num_classes if labels is not None else None)
            if isinstance(scorer, ClassifierScorer):
                noise = torch.randint(0, 256, (2, 3, *patches.image_size), generator=torch.Generator().manual_seed(0))
                classes = None if labels is None else torch.zeros(2, dtype=torch.int64, device=device)
                scorer.check(noise.to(device, torch.uint8), classes)
            yield scorer
            del scorer
    finally:
        release_memory()


def check_saliency(plan: Plan, device: str) -> None:
    """Check before the long work that the classifier can score patches, by scoring two images of noise.

    Nothing is checked where all patches are kept.

    Raises:
        PatchError: the target layer of the classifier cannot be found, or the classifier fails on the images.
        FeatureError: the weights of the classifier cannot be found.
    """
    if plan.patches is not None and plan.patches.classifier is not None:
        with _scorer(plan, resolve_devices(device)[0]):
            pass  # Making the scorer is the check.


def _num_workers(plan: Plan, count: int, num_devices: int, sharing: Sharing) -> int:
    asked = plan.config.features.num_workers
    if asked != "auto":
        return asked
    pays = count >= WORKERS_PAY_FROM * sharing.num_ranks
    return automatic_workers(sharing.ranks_on_node, num_devices) if pays else 0
