"""The step "selection": draw the same share of every bin, or take the positions that were chosen without bins."""

import torch
from torch import Tensor

from dq_lightning.cache.tensors import write_selection
from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import ConfigError
from dq_lightning.core.records import Bins, Labels, Selection
from dq_lightning.features.readable import find_unreadable
from dq_lightning.pipeline.plan import Plan, keeps_all
from dq_lightning.pipeline.step import Task
from dq_lightning.pipeline.suspects import with_enough
from dq_lightning.selection.allocate import count_kept
from dq_lightning.selection.select import ALL_FROM, check_balance, count_wanted, select


def check_selection(plan: Plan, device: str) -> None:
    """Check before the long work that the settings of the draw keep some samples, and suit the labels.

    Raises:
        ConfigError: nothing would be kept, or samples that have several labels cannot be balanced.
    """
    settings = plan.config.selection
    if plan.chosen is None:
        count_wanted(len(plan.source), settings.share)
        if settings.balance != "proportional" and plan.config.bins.by_label and plan.labels is not None:
            check_balance(plan.labels.members, settings.balance)


def make_selection(task: Task, bins: Bins | None = None) -> None:
    """Write the entry of the selection; `bins` is None where the plan's samples were chosen without bins.

    Raises:
        ConfigError: all samples were asked for, but some cannot be read.
        SourceError: two reads of one sample differ.
    """
    settings = task.plan.config.selection
    ratio = settings.share
    if bins is not None and bins.score is not None and settings.draw == "auto" and ratio < ALL_FROM:
        get_logger().info(
            "inside every bin samples are drawn from those whose labels fit their features best "
            '(preset="published" draws from all)'
        )
    write_selection(task.folder, chosen_selection(task) if bins is None else drawn_selection(task, bins, ratio))


def drawn_selection(task: Task, bins: Bins, keep_ratio: float, *, warns: bool = True) -> Selection:
    """Draw a share of the samples from bins; if `warns` is set, warn of lost classes and of a balance without effect."""
    settings = task.plan.config.selection
    grouping = task.plan.labels if task.plan.config.bins.by_label else None
    bins = with_enough(bins, grouping, count_kept(len(bins), keep_ratio))
    selection = select(
        bins,
        keep_ratio=keep_ratio,
        seed=settings.seed,
        draw=settings.draw,
        bin_weights=settings.bin_weights,
        balance=settings.balance,
        labels=_drawn_by(task.plan, grouping, len(bins)),
    )
    if warns:
        if settings.balance != "proportional" and grouping is None:
            get_logger().warning(
                f"balance={settings.balance!r} has no effect, because the samples have no classes or groups: pass labels=, for "
                "instance the name of a column (and leave bins.by_label at its default)"
            )
        _warn_of_lost_classes(task.plan, bins, selection)
    return selection


def _drawn_by(plan: Plan, grouping: Labels | None, total: int) -> Tensor | None:
    """Return what the draw has to know of labels beside the groups of the bins, or None.

    These are the labels of samples that have several, and the classes where the groups are clusters of them.
    """
    if grouping is not None and grouping.members is not None:
        return grouping.members
    if plan.config.bins.clusters is None:
        return None
    if grouping is not None:
        return grouping.values
    # Without classes the clusters have shares in proportion to their sizes, whatever the balance.
    return None if plan.config.selection.balance == "proportional" else torch.zeros(total, dtype=torch.int64)


def chosen_selection(task: Task) -> Selection:
    """Return the selection of positions that were chosen without features; their bin is -1.

    With `on_error="skip"` the samples that cannot be read are left out.

    Raises:
        ConfigError: all samples were asked for, but some cannot be read.
    """
    source, config, chosen = task.plan.source, task.plan.config, task.plan.candidates
    source.check_repeatable()
    total, unreadable = len(chosen), 0
    if config.on_error == "skip":
        left_out = find_unreadable(
            source,
            positions=chosen,
            num_workers=config.features.num_workers,
            progress=task.progress,
            shards=task.shards("reading", part="reading"),
        )
        chosen, unreadable = chosen[~torch.isin(chosen, left_out)], len(left_out)
    if unreadable and keeps_all(config):
        raise ConfigError(
            f"keep_ratio=1.0 keeps all {total:,} samples, but {unreadable:,} of them can't be read: lower keep_ratio, or pass "
            "the positions of the others as indices="
        )
    return Selection(chosen, torch.full((len(chosen),), -1, dtype=torch.int16), unreadable)


def _warn_of_lost_classes(plan: Plan, bins: Bins, selection: Selection) -> None:
    """Log a warning that names the classes of which no sample is kept."""
    labels = plan.labels
    if labels is None:
        return
    if labels.members is None:
        lost = sorted(set(labels.values[bins.assignment >= 0].tolist()) - set(labels.values[selection.index].tolist()))
    else:
        there, kept = (labels.members[places].any(dim=0) for places in (bins.assignment >= 0, selection.index))
        lost = (there & ~kept).nonzero().flatten().tolist()
    if lost:
        names = labels.names or ()
        first = ", ".join(names[group] if group < len(names) else str(group) for group in lost[:5])
        get_logger().warning(
            f"no sample is kept of {len(lost)} of {labels.num_classes} classes ({first}{', ...' if len(lost) > 5 else ''}): "
            "they are too small for this keep_ratio; raise it"
        )
