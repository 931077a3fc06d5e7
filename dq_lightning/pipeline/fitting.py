"""The step "store" under a budget of bytes: choose a setting and a number of samples, pack them, and check the sum.

Bytes are estimated from a few samples, and the promise is exact: where the finished store with everything beside it is
larger than the budget, it is made again with fewer samples, or coarser images where the samples are fixed. Fewer samples
of one seed are a subset of more.
"""

import json
from dataclasses import replace
from typing import Any

import torch

from dq_lightning.core.config import replace_fields
from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import ConfigError
from dq_lightning.core.records import Bins, Selection
from dq_lightning.core.sizes import budget_bytes
from dq_lightning.pipeline.budget import BytePlan, plan_bytes
from dq_lightning.pipeline.compact import write_description
from dq_lightning.pipeline.encoding import described_setting, encoded_items
from dq_lightning.pipeline.frontier import Frontier, measure_again, source_bytes
from dq_lightning.pipeline.packing import write_samples
from dq_lightning.pipeline.plan import Plan
from dq_lightning.pipeline.selecting import chosen_selection, drawn_selection
from dq_lightning.pipeline.step import Task, reading_again
from dq_lightning.selection.allocate import count_kept

# So many times a store is packed at most until it fits.
MAX_ROUNDS = 8
# What the manifest says of a file, and of the entry beside the parts of its key, in bytes at most.
MANIFEST_FILE_BYTES, MANIFEST_BYTES = 160, 700


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
    budget = budget_bytes(plan.config.max_bytes, source_bytes(plan))
    chosen = chosen_selection(task) if bins is None else None
    fixed = _fixed_count(plan) if chosen is None else len(chosen)
    present = len(plan.source) if bins is None else int((bins.assignment >= 0).sum())
    room = budget - len(json.dumps(task.parts))
    frontier = Frontier(plan, room, present if fixed is None else fixed, fixed is not None)
    beside = frontier.fixed_bytes + len(json.dumps(task.parts))
    settings, measured = frontier.settings, set[int]()
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
            )
            at = settings.index(byte_plan.setting)
            if at in measured:
                break
            measured.add(at)
            settings[at] = measure_again(plan, settings[at])
        if round_ == 0:
            get_logger().info(f"max_bytes={budget:,}: {byte_plan.describe(present)}")
        if bins is not None:
            selection = drawn_selection(task, bins, byte_plan.num_samples / len(bins))
        elif chosen is not None:
            selection = chosen
        total = _write(task, selection, byte_plan, budget)
        if total <= budget:
            return
        # With what these samples took, the next plan has at least one sample less, or another setting.
        settings[at] = replace(settings[at], sample_bytes=(total - beside) / len(selection) * (1 + 0.001 * round_))
        for path in task.folder.iterdir():
            path.unlink()
    raise ConfigError(
        f"max_bytes={budget:,} is too little: {len(selection):,} samples took {total:,} bytes. Raise it, or leave more open"
    )


def _fixed_count(plan: Plan) -> int | None:
    """Return the number of samples that the settings fix, or None."""
    ratio = plan.config.selection.keep_ratio
    return None if ratio is None else count_kept(len(plan.source), ratio)


def _write(task: Task, selection: Selection, byte_plan: BytePlan, budget: int) -> int:
    """Write the entry with a setting, and return its bytes with the manifest that is still to come."""
    plan, setting = task.plan, byte_plan.setting

    def items(start: int) -> Any:
        return encoded_items(plan, setting, selection.index, start)

    size = round(setting.sample_bytes * len(selection))
    encoding = described_setting(setting, budget)
    with reading_again(plan):
        made_from = f"{selection.content_hash()} {json.dumps(encoding)}"
        write_samples(task, selection, items, size, made_from=made_from, squeeze=True)
        task.check_unchanged()
    kept = replace(
        plan,
        config=replace_fields(plan.config, {"selection.keep_ratio": len(selection) / len(plan.source)}),
    )
    write_description(task.folder, kept, encoding=encoding, num_unreadable=selection.num_unreadable)
    files = [path.stat().st_size for path in task.folder.iterdir()]
    return sum(files) + len(files) * MANIFEST_FILE_BYTES + MANIFEST_BYTES + len(json.dumps(task.parts))
