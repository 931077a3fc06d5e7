"""Write the samples that were left out for their scores as a table, so that somebody can look at them."""

import csv
from pathlib import Path

from dq_lightning.core.records import Suspects
from dq_lightning.exports.rows import whole
from dq_lightning.sources.base import Source


def write_suspects(suspects: Suspects, path: str | Path, source: Source | None = None) -> Path:
    """Write suspects as a CSV file with the columns position, name, score, label and suggested.

    Args:
        suspects: the samples, the lowest score first.
        path: path of the file, which is replaced; its folder is created.
        source: source of the samples, which gives their names (relative paths in a dataset of files); None leaves the
            names empty.

    Returns:
        The path.

    Raises:
        StoreError: the file cannot be written.
    """
    names = suspects.names or ()

    def name(label: int) -> str | int:
        return "" if label < 0 else names[label] if label < len(names) else label

    def write(place: Path) -> None:
        with place.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(("position", "name", "score", "label", "suggested"))
            columns = (suspects.index, suspects.score, suspects.label, suspects.suggested)
            for position, score, label, suggested in zip(*(column.tolist() for column in columns), strict=True):
                known = "" if source is None else source.sample_id(position)
                table.writerow((position, known, f"{score:.6g}", name(label), name(suggested)))

    return whole(Path(path), write)
