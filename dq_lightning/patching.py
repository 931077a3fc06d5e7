"""Station 4 over a plan: scores of the kept samples' patches, the choice among them, packed samples."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dq_lightning.errors import PatchError
from dq_lightning.features.encoders import resolve_device
from dq_lightning.features.isolation import isolated, release_memory
from dq_lightning.handles import FORK, loader_processes
from dq_lightning.loading.loaders import automatic_workers
from dq_lightning.patch_plan import PatchPlan
from dq_lightning.patch_records import PatchedImage
from dq_lightning.patches.choose import choose_patches, kept_count, make_choice, spread_budget
from dq_lightning.patches.saliency import ClassifierScorer
from dq_lightning.patches.score import score_images, split_scores
from dq_lightning.plan import Plan
from dq_lightning.records import PatchChoice, Selection
from dq_lightning.resuming import Shards
from dq_lightning.sources.items import at, plain_parts, with_value
from dq_lightning.store.packed import Item
from dq_lightning.store.patched import pack_image
from dq_lightning.threads import torch_threads

# fewer images are read faster than processes start
WORKERS_PAY_FROM = 512
BUDGET_ROUNDS = 8


def score_selection(
    plan: Plan, selection: Selection, *, device: str, progress: bool, shards: Shards | None = None
) -> tuple[Tensor, Tensor]:
    """Scores float32 [sum of L_i] and sizes int32 [M, 2] of the kept samples; see `score_images`."""
    patches = patches_of(plan)
    target = resolve_device(device)
    labels = plan.labels if patches.classifier is not None else None
    asked = plan.config.features.num_workers != "auto"
    source, workers = loader_processes(plan.source, _num_workers(plan, len(selection)), asked=asked, context=FORK)
    try:
        with isolated():
            scorer = patches.load_scorer(str(target), labels.num_classes if labels is not None else None)
            scored = score_images(
                source,
                selection.index,
                scorer,
                patches.patch_size,
                labels=labels.values[selection.index] if labels is not None else None,
                device=target,
                batch_size=patches.config.batch_size,
                num_workers=workers,
                progress=progress,
                shards=shards,
            )
            del scorer
    finally:
        release_memory()
    return scored


def check_saliency(plan: Plan, *, device: str) -> None:
    """Tell before the hours of work that the classifier cannot score patches: two images of noise are tried.

    Raises:
        PatchError: its target layer cannot be found, or it fails.
        FeatureError: its weights cannot be found.
    """
    patches = patches_of(plan)
    if patches.classifier is None:
        return
    target, labels = resolve_device(device), plan.labels
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


def choose(plan: Plan, selection: Selection, scores: Tensor, sizes: Tensor) -> PatchChoice:
    """Which patches are kept: the share that the settings ask for, or as many as the bytes allow.

    Raises:
        PatchError: not even the share that every image keeps fits into `max_bytes`.
    """
    patches = patches_of(plan)
    config, size = patches.config, patches.patch_size
    rows = split_scores(scores, sizes, size)
    pairs = [(height, width) for height, width in sizes.tolist()]
    if config.max_bytes is None:
        return choose_patches(
            rows, pairs, size, config.drop_ratio, spread=config.spread, least_ratio=config.least_ratio
        )
    counts = [kept_count(len(row), config.drop_ratio) for row in rows]
    least = [min(count, kept_count(len(row), 1 - config.least_ratio)) for row, count in zip(rows, counts, strict=True)]
    total = sum(counts)
    for _ in range(BUDGET_ROUNDS):
        choice = make_choice(spread_budget(rows, total, least), pairs, size)
        seen = sum(len(image.data) + len(image.mask) for _, image in _packed_images(plan, selection, choice))
        if seen <= config.max_bytes:
            return choice
        # a little less than in proportion, because the patches that stay are the dearer ones
        total = max(sum(least), min(total - 1, int(total * config.max_bytes / seen * 0.99)))
        if total == sum(least) == int(choice.counts.sum()):
            break
    raise PatchError(
        f"max_bytes={config.max_bytes:,} is too little: with {int(choice.counts.sum()):,} patches the {len(rows):,} images "
        f"take {seen:,} bytes. Raise it, or lower least_ratio, quality or keep_ratio"
    )


def packed_items(plan: Plan, selection: Selection, choice: PatchChoice, start: int = 0) -> Iterator[Item]:
    """The kept samples from number `start` on, each with its image's kept patches in the place of the image."""
    leaf = image_place(plan)
    for sample, image in _packed_images(plan, selection, choice, start):
        yield with_value(sample, leaf, image), None


def image_place(plan: Plan) -> tuple[str | int, ...]:
    """Where in a sample the image is."""
    source: Any = plan.source
    if not hasattr(source, "image_leaf"):
        raise PatchError(f"{source.describe()} does not tell where in its samples the image is (image_leaf)")
    place: tuple[str | int, ...] = source.image_leaf()
    return place


def check_packable(plan: Plan) -> None:
    """Tell before the hours of work that the images of a dataset cannot be stored by patches."""
    image = whole_leaf(plan, 0, plan.source.plain(0), image_place(plan))
    size = patches_of(plan).patch_size
    height, width = (image.height, image.width) if isinstance(image, Image.Image) else _array_size(image)
    count = -(-height // size) * -(-width // size)
    pack_image(image, torch.ones(count, dtype=torch.bool), size, "raw", 90)


def _array_size(image: Any) -> tuple[int, int]:
    shape = tuple(image.shape)
    return (shape[-2], shape[-1]) if isinstance(image, Tensor) else (shape[0], shape[1])


def _packed_images(
    plan: Plan, selection: Selection, choice: PatchChoice, start: int = 0
) -> Iterator[tuple[Any, PatchedImage]]:
    """Samples and their packed images, in order; read here, because datasets are seldom safe to share, packed in threads."""
    patches, place = patches_of(plan), image_place(plan)

    def read() -> Iterator[Callable[[], tuple[Any, PatchedImage]]]:
        for number, position in enumerate(selection.index[start:].tolist(), start):
            sample = plain_parts(plan.source.plain(position))
            leaf = whole_leaf(plan, position, sample, place)
            yield _Packing(sample, leaf, choice.mask(number), patches)

    yield from _in_threads(read())


@dataclass(frozen=True)
class _Packing:
    sample: Any
    leaf: Any
    mask: Tensor
    patches: PatchPlan

    def __call__(self) -> tuple[Any, PatchedImage]:
        plan = self.patches
        return self.sample, pack_image(self.leaf, self.mask, plan.patch_size, plan.codec, plan.config.quality)


def _in_threads(calls: Iterator[Callable[[], Any]]) -> Iterator[Any]:
    """The results of calls in their order, a few of them made ahead."""
    threads = max(1, min(16, (os.cpu_count() or 1)))
    waiting: deque[Future[Any]] = deque()
    with torch_threads(threads) as pool:
        try:
            for call in calls:
                waiting.append(pool.submit(call))
                if len(waiting) >= 4 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def whole_leaf(plan: Plan, position: int, sample: Any, place: tuple[str | int, ...]) -> Any:
    """The image of a sample as it is packed: palettes, alpha and other colour spaces become RGB, as the encoder sees them."""
    leaf = at(sample, place)
    if isinstance(leaf, Image.Image) and leaf.mode not in ("RGB", "L"):
        return plan.source.image(position)
    return leaf


def _num_workers(plan: Plan, count: int) -> int:
    asked = plan.config.features.num_workers
    if asked != "auto":
        return asked
    return automatic_workers() if count >= WORKERS_PAY_FROM else 0


def patches_of(plan: Plan) -> PatchPlan:
    """The step on patches of a plan that has one."""
    assert plan.patches is not None
    return plan.patches
