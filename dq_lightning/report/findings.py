"""What should be looked at in a compact set: the list at the top of a report."""

import torch

from dq_lightning.core.records import Bins, Features
from dq_lightning.report.material import Material
from dq_lightning.report.records import ClassTable, Finding

NAMED_CLASSES = 6
_ROWS = 1 << 16


def find_oddities(material: Material, classes: ClassTable | str) -> list[Finding]:
    """Return what should be looked at; empty where nothing stands out."""
    info, whole = material.compact.info, material.compact.info.num_source_samples
    found = [
        *_left_out(material),
        *([] if isinstance(classes, str) else _of_classes(classes, info.num_samples / whole)),
    ]
    if isinstance(material.bins, Bins):
        inside = material.bins.assignment[material.bins.assignment >= 0].long()
        empty = int((torch.bincount(inside, minlength=material.bins.num_bins) == 0).sum())
        if empty:
            text = f"{empty:,} of {material.bins.num_bins:,} bins are empty, because every group has too few samples."
            found.append(Finding(text, "Bins"))
    if isinstance(material.features, Features):
        # Part by part, because features of many samples are read from the disk as they are needed.
        parts = torch.split(material.features.embedding, _ROWS)
        zero = sum(int((part == 0).all(1).sum()) for part in parts) - len(material.features.unreadable)
        if zero > 0:
            found.append(
                Finding(f"{zero:,} samples have features that are all zero, so nothing tells them apart.", "Map")
            )
    return found


def _left_out(material: Material) -> list[Finding]:
    """Return what was left out for its score, as a near-duplicate, or because it could not be read."""
    info, found = material.compact.info, list[Finding]()
    whole = info.num_source_samples
    if info.suspects is not None and len(info.suspects):
        text = f"{len(info.suspects):,} samples ({len(info.suspects) / whole:.2%}) were left out for their low scores"
        if info.suspects.noise is not None:
            text += f"; about {info.suspects.noise:.1%} of all labels seem wrong"
        found.append(Finding(f"{text}.", "Labels"))
    elif info.suspects is not None:
        found.append(Finding("The labels were judged, and none seems wrong.", "Labels"))
    if not isinstance(material.duplicates, str | None):
        count = len(material.duplicates)
        found.append(Finding(f"{count:,} near-duplicates ({count / whole:.2%}) were left out.", "Near-duplicates"))
    if info.num_unreadable:
        found.append(Finding(f"{info.num_unreadable:,} samples could not be read and were left out."))
    return found


def _of_classes(classes: ClassTable, share: float) -> list[Finding]:
    """Return the classes that lost all samples, and those that were kept in a share far from that of all samples."""
    rows, found = classes.rows, list[Finding]()
    empty = [one.name for one in rows if one.after == 0 and one.before != 0]
    if empty:
        text = f"{len(empty):,} of {len(rows):,} classes lost all their samples: {_named(empty)}."
        found.append(Finding(text, "Classes"))
    far = [
        f"{one.name} ({one.after:,} of {one.before:,})"
        for one in rows
        if one.before and one.after and abs(one.after - share * one.before) > max(2.0, 0.25 * share * one.before)
    ]
    if far:
        text = f"{len(far):,} of {len(rows):,} classes were kept in another share than the whole: {_named(far)}."
        found.append(Finding(text, "Classes"))
    return found


def _named(names: list[str]) -> str:
    return ", ".join(names[:NAMED_CLASSES]) + (" and others" if len(names) > NAMED_CLASSES else "")
