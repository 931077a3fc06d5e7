"""The step "store" under a budget of bytes: choose a setting and a number of samples, pack them, and check the sum.

Bytes are estimated from a few samples, and the promise is exact: where the finished store with everything beside it is
larger than the budget, it is made again with fewer samples, or coarser images where the samples are fixed. Fewer samples
of one seed are a subset of more.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dq_lightning.cache.shards import remove_shards
from dq_lightning.cache.tensors import narrow, write_selection
from dq_lightning.core.config import replace_fields
from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import ConfigError
from dq_lightning.core.records import Bins, PatchChoice, Selection, Suspects
from dq_lightning.core.sizes import budget_bytes
from dq_lightning.packed.writer import Item
from dq_lightning.patches.score import split_scores
from dq_lightning.pipeline.budget import BytePlan, plan_bytes
from dq_lightning.pipeline.compact import write_description
from dq_lightning.pipeline.encoding import described_setting
from dq_lightning.pipeline.frontier import Frontier, sizes_without_images, source_bytes
from dq_lightning.pipeline.packing import write_samples
from dq_lightning.pipeline.patch_bytes import measure_bytes
from dq_lightning.pipeline.patching import choose, in_codec, patches_of
from dq_lightning.pipeline.scoring import score_selection
from dq_lightning.pipeline.selecting import chosen_selection, drawn_selection
from dq_lightning.pipeline.step import Task, reading_again
from dq_lightning.selection.allocate import count_kept

# So many times a store is packed at most until it fits.
MAX_ROUNDS = 8
# What the manifest says of a file, and of the entry beside the parts of its key, in bytes at most.
MANIFEST_FILE_BYTES, MANIFEST_BYTES = 160, 700
# What the list of suspects takes beside its numbers.
SUSPECTS_BYTES = 2_000


def make_fitting_store(task: Task, bins: Bins | None = None) -> None:
    """Write the entry of a compact set that takes no more than `config.max_bytes`, everything counted.

    Args:
        task: task of the step.
        bins: bins of the N samples; None where the plan's samples were chosen without bins.

    Raises:
        ConfigError: the budget is too small for what is fixed.
        StoreError: a sample cannot be stored.
        SourceError: a sample cannot be read.
        ChangedError: the data changed while they were read.
        CacheError: the disk has too little space.
    """
    plan = task.plan
    assert plan.config.max_bytes is not None
    sizes = sizes_without_images(plan)
    whole = source_bytes(plan, sizes)
    budget = budget_bytes(plan.config.max_bytes, whole)
    chosen = chosen_selection(task) if bins is None else None
    ratio = plan.config.selection.keep_ratio
    fixed = len(chosen) if chosen is not None else None if ratio is None else count_kept(len(plan.source), ratio)
    present = len(plan.source) if bins is None else int((bins.assignment >= 0).sum())
    left_out = None if bins is None else bins.suspects
    beside = len(json.dumps(task.parts)) + (0 if left_out is None else SUSPECTS_BYTES + _bytes_of(narrow(left_out)))
    wanted = present if fixed is None else fixed
    frontier = Frontier(plan, budget - beside, wanted, fixed is not None, task.device, sizes)
    scores = PatchScores(task)
    beside += frontier.fixed_bytes
    settings, measured = frontier.settings, set[int]()
    # Bytes that samples took above what was expected of them, where the bytes of each are known.
    over = count = 0
    selection, total = Selection(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int16)), 0
    for round_ in range(MAX_ROUNDS):
        while True:
            byte_plan = plan_bytes(
                settings,
                budget,
                present,
                fixed_bytes=beside,
                num_samples=fixed,
                least_psnr=plan.config.encoding.least_psnr,
                closed=plan.config.encoding.closed,
            )
            at = settings.index(byte_plan.setting)
            if at in measured:
                break
            frontier.adjust(at, measured)
            measured.add(at)
        if bins is not None:
            taken = {} if fixed is not None else frontier.bytes_of(byte_plan.setting)
            count = _most(task, bins, present, taken, budget - beside - over) if taken else 0
            byte_plan = replace(byte_plan, num_samples=count or byte_plan.num_samples)
            selection = drawn_selection(task, bins, byte_plan.num_samples / len(bins))
        elif chosen is not None:
            selection = chosen
        if round_ == 0:
            dropped = frontier.with_dropped_patches(byte_plan.setting)
            get_logger().info(f"max_bytes={budget:,}: {byte_plan.describe(present)}{dropped}")
        total = _write(task, selection, byte_plan, budget, whole, scores, frontier.packed(byte_plan.setting))
        if total <= budget:
            return
        remove_shards(task.entry)
        for path in task.folder.iterdir():
            path.unlink()
        if count:
            over += total - budget
            continue
        # With what these samples took, the next plan has at least one sample less, or another setting.
        measured_bytes = (total - beside) / len(selection) * (1 + 0.001 * round_)
        more = max(1.0, measured_bytes / settings[at].sample_bytes)
        # The estimates of similar settings are too small for the same reason.
        for number, one in enumerate(settings):
            if number != at and one.family == settings[at].family:
                settings[number] = replace(one, sample_bytes=one.sample_bytes * more)
        settings[at] = replace(settings[at], sample_bytes=measured_bytes)
    raise ConfigError(
        f"max_bytes={budget:,} is too little: {len(selection):,} samples took {total:,} bytes. Raise it, or leave more open"
    )


def _most(task: Task, bins: Bins, present: int, taken: Mapping[int, float], room: int) -> int:
    """Return how many samples, drawn from bins, fit into some bytes if those of every sample are known by position.

    A plan counts with the mean, and of a few samples those that are drawn may take a tenth more or less.
    """

    def needed(count: int) -> float:
        drawn = drawn_selection(task, bins, count / len(bins), warns=False)
        return math.fsum(taken[i] for i in drawn.index.tolist())

    return bisect_right(range(1, present + 1), float(room), key=needed)


def _bytes_of(suspects: Suspects) -> int:
    return sum(numbers.nbytes for numbers in (suspects.index, suspects.score, suspects.label, suspects.suggested))


class PatchScores:
    """Scores of the patches of samples, made once where a plan drops patches and a store is packed several times.

    Args:
        task: task of the step.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def choice(self, selection: Selection) -> tuple[PatchChoice, bool]:
        """Return the kept patches of a selection, and whether all its images have one size.

        Raises:
            PatchError: the classifier cannot score patches.
            SourceError: an image cannot be read.
        """
        plan, task = self._task.plan, self._task
        new = torch.tensor([i for i in selection.index.tolist() if i not in self._known], dtype=torch.int64)
        if len(new):
            # Shards are kept of the first selection, which later ones hardly differ from.
            shards = None if self._known else task.shards("saliency", part="saliency")
            some = Selection(new, torch.zeros(len(new), dtype=torch.int16))
            scored, sizes = score_selection(
                plan, some, device=task.device, progress=task.progress, shards=shards, sharing=task.sharing
            )
            rows = split_scores(scored, sizes, patches_of(plan).patch_size)
            self._known |= dict(zip(new.tolist(), zip(rows, sizes, strict=True), strict=True))
        known = [self._known[i] for i in selection.index.tolist()]
        sizes = torch.stack([size for _, size in known])
        return choose(plan, selection, torch.cat([row for row, _ in known]), sizes), bool((sizes == sizes[:1]).all())


def _write(
    task: Task,
    selection: Selection,
    byte_plan: BytePlan,
    budget: int,
    whole: int,
    scores: PatchScores,
    packed: Mapping[int, Item],
) -> int:
    """Write the entry with a setting, and return its bytes with the manifest that is still to come.

    `whole` is the size of the whole dataset in bytes; `packed` holds samples by position that are encoded already.
    """
    plan, setting, facts = task.plan, byte_plan.setting, None
    size = round(setting.sample_bytes * len(selection))
    encoding = described_setting(setting, budget)
    made_from = f"{selection.content_hash()} {json.dumps(encoding)}"
    with reading_again(plan):
        if plan.patches is None:
            write_samples(task, selection, size, made_from=made_from, setting=setting, known=packed, squeeze=True)
        else:
            (choice, one_size), made = scores.choice(selection), in_codec(plan, setting)
            write_samples(
                task,
                selection,
                size,
                made_from=f"{made_from} {choice.content_hash()}",
                setting=setting,
                choice=choice,
                squeeze=True,
                image_place=list(plan.source.image_leaf()),
                one_size=one_size,
            )
            facts = measure_bytes(made, selection, choice)
        task.check_unchanged()
    if selection.suspects is not None:
        # The samples hold the rest of the selection.
        none = replace(selection, index=selection.index[:0], bin=selection.bin[:0], suspects=narrow(selection.suspects))
        write_selection(task.folder, none)
    kept = replace(
        plan,
        config=replace_fields(plan.config, {"selection.keep_ratio": len(selection) / len(plan.source)}),
    )
    write_description(
        task.folder, kept, facts, encoding=encoding, num_unreadable=selection.num_unreadable, source_bytes=whole
    )
    files = [path.stat().st_size for path in task.folder.iterdir()]
    return sum(files) + len(files) * MANIFEST_FILE_BYTES + MANIFEST_BYTES + len(json.dumps(task.parts))
