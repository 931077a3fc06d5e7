"""Gathers everything that a report says, as records, from what is at hand."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dq_lightning.core.devices import DeviceNames
from dq_lightning.core.records import Bins, Features
from dq_lightning.loading.steps import steps_per_epoch
from dq_lightning.report.again import make_again
from dq_lightning.report.embedding_map import make_map
from dq_lightning.report.findings import find_oddities
from dq_lightning.report.material import NO_DATASET, Material
from dq_lightning.report.patch_step import show_patches
from dq_lightning.report.records import (
    STATES,
    BinSheet,
    ClassCount,
    ClassTable,
    DuplicateGroup,
    DuplicateList,
    GainCurve,
    Report,
    Sheets,
    Steps,
    SuspectList,
    SuspectSample,
)
from dq_lightning.report.samples import Samples, some_of
from dq_lightning.selection.select import ALL_FROM

MOST_SHEETS, PICTURES_A_SHEET, TEXTS_A_SHEET = 20, 8, 4
MOST_SUSPECTS, MOST_GROUPS, MOST_OF_A_GROUP = 60, 24, 6
MOST_CURVE_POINTS, MOST_CURVES = 600, 200
ASSUMED_BATCH_SIZE = 128


def gather(
    material: Material,
    *,
    seconds: dict[str, float] | None = None,
    batch_size: int | None = None,
    num_ranks: int = 1,
    drop_last: bool = False,
    place: dict[str, Any] | None = None,
    projection: str = "pca",
    device: DeviceNames = "auto",
) -> Report:
    """Gather what a report says.

    Args:
        material: what the report is made from.
        seconds: wall time in seconds of every step that made the set, where it is known.
        batch_size: samples a batch and process of the training; None assumes 128 and says so.
        num_ranks: number of processes that train.
        drop_last: whether the last, smaller batch is left out.
        place: where the dataset is: `dataset`, `data_path` and `split` of the command, as far as they are known.
        projection: how the map is made, `"pca"` or `"umap"`.
        device: device that fills the dropped patches of a few images.
    """
    info, samples = material.compact.info, Samples(material)
    classes = _classes(material)
    size = batch_size or ASSUMED_BATCH_SIZE
    before, after = (
        steps_per_epoch(count, size, num_ranks, drop_last) for count in (info.num_source_samples, info.num_samples)
    )
    return Report(
        dataset=str(material.described["source"]),
        num_samples=info.num_samples,
        num_source_samples=info.num_source_samples,
        content_hash=info.content_hash,
        facts=_facts(material),
        seconds=info.seconds or seconds or {},
        findings=tuple(find_oddities(material, classes)),
        classes=classes,
        map=make_map(material, samples, projection),
        sheets=_sheets(material, samples),
        curve=gain_by_bin(material.bins),
        suspects=_suspects(material, samples),
        duplicates=_duplicates(material, samples),
        patches=show_patches(material, samples, device),
        steps=Steps(size, batch_size is None, num_ranks, before, after),
        again=make_again(material, place or {}),
        settings=material.compact.config,
    )


def _facts(material: Material) -> dict[str, str]:
    """Return the table of facts: names and values, in the order in which they are shown."""
    info, config = material.compact.info, material.compact.config
    bins, selection = config.get("bins", {}), config.get("selection", {})
    encoding = info.encoding
    whole = info.num_source_samples
    facts: dict[str, Any] = {
        "Dataset": material.described["source"],
        "Kept": f"{info.num_samples:,} of {whole:,} samples ({info.num_samples / whole:.2%})",
        "Chosen by": "positions that were given" if "indices" in selection else None,
        "Bins": f"{bins['num_bins']}{_inside(material)}" if "num_bins" in bins else None,
        "Objective": f"{bins['objective']}, {bins['similarity']} similarity" if "objective" in bins else None,
        "Draw": f"{_draw(material)}, seed {selection['seed']}" if "draw" in selection else None,
        "Encoder": info.encoder,
        "Encoder digest": info.encoder_digest,
        "Features": _width(material.features),
        "Patches kept": f"{info.patch_keep_ratio:.1%} of each kept image" if info.patch_keep_ratio < 1 else None,
        "Data kept": f"{info.data_keep_ratio:.2%}" if info.patch_keep_ratio < 1 else None,
        "Images stored as": ", ".join(
            f"{name} {value}" for name, value in (encoding or {}).items() if value is not None
        ),
        "Stored": "row numbers only" if info.kind == "indices" else "samples, packed",
        "Bytes on the disk": f"{info.bytes:,}",
        "Bytes of the same samples before": _number(info.original_bytes),
        "Bytes of the whole dataset": _number(info.source_bytes),
        "Bytes of the same samples without dropped patches": _number(info.unpatched_bytes),
        "Not readable": _number(info.num_unreadable or None),
        "Content hash": info.content_hash,
        "Folder": info.path,
    }
    return {name: str(value) for name, value in facts.items() if value}


def _draws_by_scores(material: Material) -> bool:
    """Whether samples of better scores were preferred inside the bins, as far as it is known."""
    bins, info = material.bins, material.compact.info
    draw = material.compact.config.get("selection", {}).get("draw")
    if info.num_samples >= ALL_FROM * info.num_source_samples:
        return False
    return draw == "scored" or (draw == "auto" and isinstance(bins, Bins) and bins.score is not None)


def _draw(material: Material) -> str:
    draw = str(material.compact.config["selection"]["draw"])
    if _draws_by_scores(material):
        return "better scores preferred inside the bins"
    if isinstance(material.bins, str):
        return draw
    return "lowest ranks of every bin" if draw == "rank" else "uniform inside the bins"


def _inside(material: Material) -> str:
    bins = material.bins
    if isinstance(bins, Bins):
        groups = len(np.unique(bins.group[bins.assignment >= 0].numpy()))
        return "" if groups == 1 else f", inside each of {groups:,} groups"
    return ""


def _width(features: Features | str) -> str | None:
    return None if isinstance(features, str) else f"{features.embedding.shape[1]:,} numbers a sample"


def _number(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _classes(material: Material) -> ClassTable | str:
    names, index, labels = material.class_names(), material.index, material.labels
    if labels is not None:
        note = None
        if labels.members is not None:
            before, after = (members.sum(0).tolist() for members in (labels.members, labels.members[index]))
            note = "A sample may have several of these labels, so it may count more than once."
        else:
            values = (labels.values, labels.values[index])
            before, after = (torch.bincount(some, minlength=len(names)).tolist() for some in values)
            note = None if labels.are_classes else "These are groups that the samples were chosen in, not classes."
        rows = (ClassCount(*row) for row in zip(names, before, after, strict=False))
        # Classes without a sample, such as those of a list of names that a part of a dataset still has, say nothing.
        return ClassTable(tuple(row for row in rows if row.before), note)
    if material.kept_labels is not None:
        after = torch.bincount(material.kept_labels.values, minlength=len(names)).tolist()
        return ClassTable(tuple(ClassCount(name, None, count) for name, count in zip(names, after, strict=True)))
    if material.compact.info.num_classes is None:
        return "The samples have no classes."
    return NO_DATASET


def _sheets(material: Material, samples: Samples) -> Sheets | str:
    """Return some kept and some left samples of every bin, or of evenly spaced bins where there are many."""
    selection, bins = material.compact.selection, material.bins
    if samples.source is None:
        return f"The set holds row numbers, not samples. {NO_DATASET}"
    has_bins = isinstance(bins, Bins)
    count = bins.num_bins if isinstance(bins, Bins) else int(selection.bin.max()) + 1 if len(selection) else 0
    numbers = range(count) if count else range(-1, 0)
    step = max(1, -(-len(numbers) // MOST_SHEETS))
    shown = PICTURES_A_SHEET if samples.source.modality == "image" else TEXTS_A_SHEET
    is_left = material.state == STATES.index("left")
    chosen: list[tuple[int, int | None, int, list[int], list[int]]] = []
    for number in numbers[::step]:
        kept = selection.index[selection.bin == number]
        left, size = torch.empty(0, dtype=torch.int64), None
        if isinstance(bins, Bins):
            inside = bins.assignment == number
            size, left = int(inside.sum()), (inside & is_left).nonzero().flatten()
        elif number == -1:
            size, left = len(material.state), is_left.nonzero().flatten()
        if material.source is None:
            left = left[:0]
        some = [some_of(part, shown, seed=number) for part in (kept, left)]
        chosen.append((number, size, len(kept), some[0], some[1]))
    samples.read_texts(position for *_, first, second in chosen for position in (*first, *second))
    sheets = [
        BinSheet(number, size, num_kept, tuple(map(samples.show, first)), tuple(map(samples.show, second)))
        for number, size, num_kept, first, second in chosen
        if size != 0
    ]
    why = NO_DATASET if material.source is None else None if has_bins or numbers[0] == -1 else str(bins)
    return Sheets(tuple(sheets), len(chosen), max(count, 1), _draws_by_scores(material), why)


def gain_curve(bins: Bins) -> Tensor:
    """Compute the mean gain over the groups at every rank of every bin.

    Args:
        bins: bins of N samples; those that were left out of the bins do not count.

    Returns:
        float64 [num_bins, size of the largest bin]; NaN where no group has a sample of that rank.
    """
    inside = bins.assignment >= 0
    rank = bins.rank[inside].long()
    length = int(rank.max()) + 1 if len(rank) else 0
    cell = bins.assignment[inside].long() * length + rank
    total = torch.zeros(bins.num_bins * length, dtype=torch.float64).index_add_(0, cell, bins.gain[inside].double())
    count = torch.bincount(cell, minlength=bins.num_bins * length)
    return (total / count).reshape(bins.num_bins, length)


def gain_by_bin(bins: Bins | str) -> GainCurve | str:
    """Return the gain from pick to pick of every bin, or of evenly spaced ones where there are many."""
    if isinstance(bins, str):
        return bins
    curve = gain_curve(bins)
    if not curve.numel() or not bool(torch.isfinite(curve).any()):
        return "No gains were recorded."
    rows, sizes = [], []
    most, step = max(2, MOST_CURVE_POINTS // len(curve)), max(1, -(-len(curve) // MOST_CURVES))
    for number, row in enumerate(curve):
        known = torch.isfinite(row).nonzero().flatten()
        sizes.append(len(known))
        known = known[:0] if number % step else known
        places = known[torch.linspace(0, len(known) - 1, min(most, len(known))).round().long()] if len(known) else known
        rows.append(tuple((int(place), float(row[place])) for place in places))
    groups = len(np.unique(bins.group[bins.assignment >= 0].numpy()))
    return GainCurve(tuple(sizes), tuple(rows), groups)


def _suspects(material: Material, samples: Samples) -> SuspectList | str:
    suspects = material.compact.info.suspects
    if suspects is None:
        return (
            'No sample was left out for its score. With drop_worst="auto" (--drop_worst auto) the samples whose labels do not '
            "fit their features are left out and listed here."
        )
    names = suspects.names or material.class_names()
    worst = []
    samples.read_texts(suspects.index[:MOST_SUSPECTS].tolist())
    columns = (suspects.index, suspects.score, suspects.suggested)
    for position, score, other in zip(*(column[:MOST_SUSPECTS].tolist() for column in columns), strict=True):
        shown = samples.show(position)
        named = names[other] if 0 <= other < len(names) else str(other) if other >= 0 else None
        worst.append(SuspectSample(shown, score, named))
    return SuspectList(len(suspects), suspects.noise, tuple(worst))


def _duplicates(material: Material, samples: Samples) -> DuplicateList | str:
    found = material.duplicates
    if isinstance(found, str):
        return found
    if found is None:
        return (
            "Near-duplicates were not looked for. With bins.deduplicate (a cosine, such as 0.98) samples that are close to an "
            "earlier one are left out and shown here."
        )
    groups = _largest_groups(found.pairs)
    cosine = dict(zip(found.pairs[:, 0].tolist(), found.cosine.tolist(), strict=True))
    groups_shown = groups[:MOST_GROUPS]
    samples.read_texts(one for stays, left in groups_shown for one in (stays, *left[:MOST_OF_A_GROUP]))
    shown = []
    for stays, left in groups_shown:
        some = tuple((samples.show(one), cosine[one]) for one in left[:MOST_OF_A_GROUP])
        shown.append(DuplicateGroup(samples.show(stays), some, len(left)))
    threshold = material.compact.config["bins"]["deduplicate"]
    return DuplicateList(threshold, len(found), len(groups), tuple(shown))


def _largest_groups(pairs: Tensor) -> list[tuple[int, list[int]]]:
    """Return each sample that stays with those that were left out for it, the largest groups first."""
    groups: dict[int, list[int]] = {}
    for left, stays in pairs.tolist():
        groups.setdefault(stays, []).append(left)
    return sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
