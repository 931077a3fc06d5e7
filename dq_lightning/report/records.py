"""What a report says, as records without any HTML.

A part of the report that cannot be shown is a `str` in place of its record: a sentence that says why.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["kept", "left", "duplicate", "suspect", "unreadable"]
STATES: tuple[State, ...] = ("kept", "left", "duplicate", "suspect", "unreadable")


@dataclass(frozen=True)
class Shown:
    """One sample as the report shows it.

    Attributes:
        position: position in the dataset.
        name: name in the dataset, such as a relative path; empty where it is the position.
        label: name of its class, or None.
        bin: bin of the sample, or None where it is in none or the bins are not known.
        state: what became of it.
        picture: the image as a `data:` address, or None.
        text: the beginning of its text, or what stands in place of a picture; or None.
    """

    position: int
    name: str
    label: str | None
    bin: int | None
    state: State
    picture: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class ClassCount:
    """Samples of one class: in the whole dataset (None where it is not known) and among the kept ones."""

    name: str
    before: int | None
    after: int


@dataclass(frozen=True)
class ClassTable:
    """The classes, or the groups that samples were chosen by, and a sentence on what they are where they are no classes."""

    rows: tuple[ClassCount, ...]
    note: str | None = None


@dataclass(frozen=True, eq=False)
class MapPoint:
    """One point of the map: coordinates from 0 to 1000 and 0 to 640, and the sample that it stands for."""

    x: int
    y: int
    class_number: int | None
    tile: int | None
    sample: Shown


@dataclass(frozen=True, eq=False)
class EmbeddingMap:
    """A map of the embeddings in two dimensions.

    Attributes:
        points: the points, those of kept samples last.
        method: how the two dimensions were made, in words.
        total: number of all samples, of which the points are a part.
        sprite: small pictures of the points in one image, as a `data:` address; None without pictures.
        tile: side of such a picture in pixels.
        columns: number of pictures in a row of the sprite.
        num_classes: number of classes, 0 without classes.
        num_bins: number of bins, 0 where they are not known.
    """

    points: tuple[MapPoint, ...]
    method: str
    total: int
    sprite: str | None
    tile: int
    columns: int
    class_names: tuple[str, ...]
    num_bins: int


@dataclass(frozen=True)
class BinSheet:
    """Samples of one bin: how many it has and how many were kept, and some of the kept and of the left ones."""

    number: int
    size: int | None
    num_kept: int
    kept: tuple[Shown, ...]
    left: tuple[Shown, ...]


@dataclass(frozen=True)
class Sheets:
    """Sheets of some or all bins.

    Attributes:
        bins: one sheet for each bin that is shown and not empty, by number.
        num_tried: number of the bins that are shown, the empty ones counted.
        num_bins: number of all bins.
        by_scores: whether samples of better scores were preferred inside the bins.
        why_no_left: why no left samples are shown; None where they are.
    """

    bins: tuple[BinSheet, ...]
    num_tried: int
    num_bins: int
    by_scores: bool
    why_no_left: str | None = None


@dataclass(frozen=True)
class GainCurve:
    """The gain of the objective from pick to pick: for every bin its size and points (rank, mean gain over the groups).

    Of very many bins only evenly spaced ones have points.
    """

    sizes: tuple[int, ...]
    points: tuple[tuple[tuple[int, float], ...], ...]
    num_groups: int


@dataclass(frozen=True)
class SuspectSample:
    """A sample that was left out for its score, and the name of the class that its features suggest, or None."""

    sample: Shown
    score: float
    suggested: str | None


@dataclass(frozen=True)
class SuspectList:
    """What was left out for low scores: how many samples, the estimated share of wrong labels, and the worst of them."""

    total: int
    noise: float | None
    worst: tuple[SuspectSample, ...]


@dataclass(frozen=True)
class DuplicateGroup:
    """A sample that stays, and some of the near-duplicates of it that were left out, each with its cosine."""

    stays: Shown
    left: tuple[tuple[Shown, float], ...]
    num_left: int


@dataclass(frozen=True)
class DuplicateList:
    """Near-duplicates: the threshold, how many samples were left out, how many groups there are, and some of these."""

    threshold: float
    total: int
    num_groups: int
    groups: tuple[DuplicateGroup, ...]


@dataclass(frozen=True)
class PatchExample:
    """One image of the patch step, as `data:` addresses; None where a picture is not available.

    `original_bytes` and `kept_bytes` are those of the image in the dataset and of its kept patches in the store.
    """

    position: int
    original: str | None
    saliency: str | None
    kept: str
    filled: str | None
    original_bytes: int | None
    kept_bytes: int
    keep_ratio: float


@dataclass(frozen=True)
class PatchStep:
    """The patch step: some images, and sentences on pictures that are missing."""

    examples: tuple[PatchExample, ...]
    patch_size: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Steps:
    """Steps of an epoch before and after, for a batch size, whether it was assumed, and a number of processes."""

    batch_size: int
    assumed: bool
    num_ranks: int
    before: int
    after: int


@dataclass(frozen=True)
class Again:
    """How the set is made again: a shell command (or why there is none), Python code, and what has to be added to them."""

    command: str
    python: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """A sentence on what should be looked at, and the title of the part of the page that shows it, or None."""

    text: str
    part: str | None = None


@dataclass(frozen=True)
class Report:
    """Everything that a report says.

    Attributes:
        dataset: one line that names the dataset.
        facts: names and values of the table of facts.
        seconds: wall time in seconds by the name of the step; empty where it is not known.
        findings: what should be looked at.
        settings: all settings that the set was made with.
    """

    dataset: str
    num_samples: int
    num_source_samples: int
    content_hash: str
    facts: dict[str, str]
    seconds: dict[str, float]
    findings: tuple[Finding, ...]
    classes: ClassTable | str
    map: EmbeddingMap | str
    sheets: Sheets | str
    curve: GainCurve | str
    suspects: SuspectList | str
    duplicates: DuplicateList | str
    patches: PatchStep | str
    steps: Steps
    again: Again
    settings: dict[str, Any] = field(default_factory=dict)
