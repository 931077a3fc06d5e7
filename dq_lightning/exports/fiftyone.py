"""Writing a compact set as a folder that FiftyOne imports, without that package.

The format is FiftyOne's own JSON: `samples.json` holds a list of samples (`filepath`, `tags` and further fields; labels carry
their class as `_cls`), `metadata.json` the name, the media type and what is known of the whole. Without a version in
`metadata.json` FiftyOne derives the types of the fields from their values, whatever its own version is.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dq_lightning.core.errors import SourceError
from dq_lightning.core.records import Bins, Labels, Selection
from dq_lightning.exports.rows import check_free, whole
from dq_lightning.exports.samples import KeptImages, file_of, text_of
from dq_lightning.sources.base import Source

SAMPLES, DATA = "samples.json", "data"


def write_fiftyone(images: KeptImages, folder: str | Path, facts: dict[str, Any] | None = None) -> Path:
    """Write the kept images of a set whose dataset is not at hand; see `write_fiftyone_of_source` for the fields.

    Raises:
        StoreError: the folder holds something else, or cannot be written.
    """

    def samples(place: Path) -> Iterator[dict[str, Any]]:
        for image in images:
            file = _written(place, image.position, image.data, image.suffix)
            label = None
            if image.label is not None and image.label >= 0 and images.class_names is not None:
                label = _classification(images.class_names[image.label])
            yield _sample(file, image.name, label, {"index": image.position, "bin": image.bin, "kept": True})

    return _write(Path(folder), images.name, samples, images.class_names, facts)


def write_fiftyone_of_source(
    source: Source,
    selection: Selection,
    bins: Bins | None,
    folder: str | Path,
    name: str = "dataset",
    facts: dict[str, Any] | None = None,
) -> Path:
    """Write all N samples of a source of images, with the fields that say what was kept and why.

    `fiftyone.Dataset.from_dir(folder, dataset_type=fiftyone.types.FiftyOneDataset)` reads the folder. The fields are
    `ground_truth` (a Classification, or Classifications of samples with several labels), `index` (position in the
    source), `source_id`, `kept`, `bin`, and with `bins` `rank` and `gain`, which are null for samples in no bin. Image
    files of the source are referred to where they lie; other images are written into `data/`.

    Args:
        source: the dataset.
        selection: the kept samples.
        bins: the bins of all samples; None leaves `rank` and `gain` out, and the bins of samples that are not kept.
        folder: folder that does not exist yet, is empty, or was written by this function and is then replaced.
        name: name of the dataset in FiftyOne.
        facts: further facts about the whole set, which JSON can hold.

    Raises:
        StoreError: the folder holds something else, or cannot be written.
        SourceError: an image cannot be read, and it was not left out for that when the set was made.
    """
    labels = source.labels()
    number = dict(zip(selection.index.tolist(), selection.bin.tolist(), strict=True))

    def samples(place: Path) -> Iterator[dict[str, Any]]:
        for position in range(len(source)):
            kept = position in number
            fields: dict[str, Any] = {"index": position, "kept": kept}
            if bins is not None:
                fields["bin"] = int(bins.assignment[position])
                there = fields["bin"] >= 0
                fields["rank"] = int(bins.rank[position]) if there else None
                fields["gain"] = float(bins.gain[position]) if there else None
            elif kept:
                fields["bin"] = number[position]
            try:
                path = source.path(position)
                path = os.path.abspath(path) if path is not None else None  # noqa: PTH100
                if path is None or not os.path.isfile(path):  # noqa: PTH113
                    path = _written(place, position, *file_of(source, position))
            except SourceError:
                if kept or not selection.num_unreadable:
                    raise
                continue  # One of the samples that were left out because they cannot be read.
            yield _sample(path, text_of(source.sample_id(position)), _ground_truth(labels, position), fields)

    names = None if labels is None or (not labels.are_classes and labels.members is None) else labels.names
    return _write(Path(folder), name, samples, names, facts)


def _write(
    target: Path, name: str, samples: Any, classes: tuple[str, ...] | None, facts: dict[str, Any] | None
) -> Path:
    check_free(target, SAMPLES)

    def write(place: Path) -> None:
        (place / DATA).mkdir(parents=True)
        with (place / SAMPLES).open("w", encoding="utf-8") as file:
            file.write('{"samples": [')
            for number, sample in enumerate(samples(place)):
                file.write(("\n" if number == 0 else ",\n") + json.dumps(sample, allow_nan=False))
            file.write("\n]}\n")
        info = {"dq_lightning": facts or {}} | ({} if classes is None else {"classes": list(map(text_of, classes))})
        described = {"name": name, "media_type": "image", "info": info}
        (place / "metadata.json").write_text(json.dumps(described, indent=1), encoding="utf-8")

    return whole(target, write)


def _written(place: Path, position: int, data: bytes, suffix: str) -> str:
    """Write the file of an image, and return its path relative to the folder."""
    file = f"{DATA}/{position:09d}{suffix}"
    (place / file).write_bytes(data)
    return file


def _sample(path: str, name: str, label: dict[str, Any] | None, fields: dict[str, Any]) -> dict[str, Any]:
    sample = {"filepath": path, "tags": ["kept"] if fields["kept"] else [], "source_id": name}
    return sample | ({} if label is None else {"ground_truth": label}) | fields


def _ground_truth(labels: Labels | None, position: int) -> dict[str, Any] | None:
    if labels is None:
        return None
    if labels.members is not None:
        names = labels.names or tuple(map(str, range(labels.members.shape[1])))
        several = [_classification(names[number]) for number in labels.members[position].nonzero().flatten().tolist()]
        return {"_cls": "Classifications", "classifications": several}
    number = int(labels.values[position])
    if not labels.are_classes or number >= labels.num_classes:
        return None
    return _classification(str(number) if labels.names is None else labels.names[number])


def _classification(name: str) -> dict[str, Any]:
    return {"_cls": "Classification", "label": text_of(name)}
