"""What a report is made from: a compact set, and what is at hand of its dataset, features and bins."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dq_lightning.cache.entries import Cache, default_cache_dir
from dq_lightning.cache.files import read_sealed
from dq_lightning.cache.manifest import read_manifest
from dq_lightning.core.errors import CacheError, DQError, StoreError
from dq_lightning.core.records import Bins, Duplicates, Features, Labels
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.pipeline.compact import (
    COMPACT_FILE,
    Compact,
    classes_are_given,
    open_compact,
    read_bins_of,
    read_features_of,
)
from dq_lightning.pipeline.duplicates import read_duplicates_of
from dq_lightning.pipeline.plan import STORE, parts_behind
from dq_lightning.report.records import STATES
from dq_lightning.sources.adapt import as_source
from dq_lightning.sources.base import Source

Made = TypeVar("Made")
# The classes of the kept samples are read from a packed set only up to this many samples, because each is decoded.
MOST_READ_LABELS = 20_000
MOST_CLASS_NAME = 80
NO_DATASET = (
    "The dataset was not at hand: pass it (dataset= in Python, --dataset and --data_path of the command) to see what was "
    "left."
)


@dataclass(frozen=True, eq=False)
class Material:
    """What a report is made from. What is not at hand is a `str` in its place: a sentence that says why.

    Attributes:
        compact: the compact set.
        described: its description, `compact.json`.
        cache: cache that holds what is behind the set.
        source: the whole dataset, or None.
        stored: the kept samples of a packed set as a source of M samples, or None.
        labels: classes of all N samples, or None.
        kept_labels: classes of the M kept samples, or None.
        features: features of all N samples.
        bins: bins of all N samples.
        duplicates: near-duplicates that were left out; None if none were looked for.
        state: uint8 [N], number in `STATES` of what became of each sample, as far as it is known.
        names_fit: whether the names of classes in the description are those of the samples' own targets.
    """

    compact: Compact
    described: dict[str, Any]
    cache: Cache
    source: Source | None
    stored: Source | None
    labels: Labels | None
    kept_labels: Labels | None
    features: Features | str
    bins: Bins | str
    duplicates: Duplicates | str | None
    state: Tensor
    names_fit: bool

    @property
    def index(self) -> Tensor:
        """Positions int64 [M] of the kept samples."""
        return self.compact.selection.index

    def class_names(self) -> tuple[str, ...]:
        """Return the name of each class, and last one for samples without a label if there are any; empty without classes."""
        labels = self.labels or self.kept_labels
        if labels is None:
            return ()
        of_set = self.described["class_names"] if self.names_fit else None
        known = labels.names or tuple(of_set or ())
        count = max(labels.num_classes, len(known))
        names = tuple(map(_short, known)) + tuple(map(str, range(len(known), count)))
        return (*names, "(no label)") if labels.unlabeled else names


def _short(name: object) -> str:
    text = str(name)
    return text if len(text) <= MOST_CLASS_NAME else text[: MOST_CLASS_NAME - 1] + "…"


def material_of_set(path: Path, cache_dir: str | Path | None) -> tuple[Compact, Cache]:
    """Open a compact set, and the cache that may hold what is behind it.

    That is `cache_dir`, else the cache that the folder is an entry of, else the default one.

    Raises:
        StoreError: the folder holds no compact set, or a damaged one.
    """
    compact = open_compact(path)
    inside = path.absolute().parent
    root = cache_dir or (inside.parent if inside.name == STORE else default_cache_dir())
    return replace(compact, parts=parts_behind(read_manifest(path)["parts"])), Cache(root)


def collect(compact: Compact, cache: Cache, source: Source | None) -> Material:
    """Collect what is at hand for a report on a compact set.

    Args:
        compact: the compact set; without parts of its own it is read what these were.
        cache: cache that may hold its features and bins.
        source: its dataset, or None.
    """
    path = Path(compact.info.path)
    described = read_sealed(path / COMPACT_FILE)
    if not compact.parts:
        compact = replace(compact, parts=parts_behind(read_manifest(path)["parts"]))
    labels = None if source is None else source.labels()
    stored = None if source is not None else _stored_source(compact)
    features = _or_why(lambda: read_features_of(compact, cache))
    if isinstance(features, Features) and len(features) != compact.info.num_source_samples:
        features = "The features in the cache are of another number of samples."
    bins = _or_why(lambda: read_bins_of(compact, cache))
    duplicates = _or_why(lambda: read_duplicates_of(compact, cache, labels, labels_known=source is not None))
    names_fit = not classes_are_given(path, described)
    kept_labels = _kept_labels(compact, stored) if labels is None and names_fit else None
    return Material(
        compact,
        described,
        cache,
        source,
        stored,
        labels,
        kept_labels,
        features,
        bins,
        duplicates,
        _state(compact, features, bins),
        names_fit,
    )


def _or_why(read: Callable[[], Made]) -> Made | str:
    try:
        return read()
    except (CacheError, StoreError) as error:
        return _sentence(str(error))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith((".", "!", "?")) else ".")


def _stored_source(compact: Compact) -> Source | None:
    if compact.info.kind != "packed":
        return None
    samples = PackedDataset(compact.info.path)
    try:
        return as_source(samples, needs_images=False, **compact.reading)
    except DQError:
        return None


def _kept_labels(compact: Compact, stored: Source | None) -> Labels | None:
    """Return the classes of the kept samples as a packed set holds them, or None where it holds none or has too many."""
    if stored is None or compact.info.num_classes is None or len(stored) > MOST_READ_LABELS:
        return None
    try:
        return stored.labels()
    except DQError:
        return None


def _state(compact: Compact, features: Features | str, bins: Bins | str) -> Tensor:
    state = torch.full((compact.info.num_source_samples,), STATES.index("left"), dtype=torch.uint8)
    if isinstance(bins, Bins):
        state[bins.assignment < 0] = STATES.index("duplicate")
    suspects = compact.selection.suspects
    if suspects is not None:
        state[suspects.index] = STATES.index("suspect")
    if isinstance(features, Features):
        state[features.unreadable] = STATES.index("unreadable")
    state[compact.selection.index] = STATES.index("kept")
    return state
