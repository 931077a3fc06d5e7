"""Read a column of numbers of a dataset, such as scores that somebody gave its rows."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_lightning.core.errors import SourceError
from dq_lightning.sources.hub import HubSource
from dq_lightning.sources.items import quoted
from dq_lightning.sources.nested import ConcatSource, SubsetSource
from dq_lightning.sources.skipping import readable_items
from dq_lightning.sources.targets import scalar
from dq_lightning.sources.text import TextRows


def check_column(source: Any, name: str) -> None:
    """Check that samples have a column: that of a table or of rows of text, or a key of items that are dicts.

    Raises:
        SourceError: there are no columns, or none of this name.
    """
    if isinstance(source, SubsetSource):
        return check_column(source.inner, name)
    if isinstance(source, ConcatSource):
        for part in source.parts:
            check_column(part, name)
        return None
    there = _columns(source)
    if name not in there:
        held = f"its columns are {quoted(there)}" if there else "it has no columns; pass the scores as an array"
        raise SourceError(f"{source.describe()} has no column {name!r} for scores=: {held}")
    return None


def number_column(source: Any, name: str, positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Read a column of numbers of some samples, float64 [n]; where the column is no table's, each sample is read for it.

    Args:
        source: samples that `check_column` finds the column in, or parts or joins of these.
        name: name of the column.
        positions: int64 [n], ascending positions of the samples.

    Raises:
        SourceError: a sample has no finite number in this column.
    """
    if isinstance(source, HubSource):
        table = source.plain_dataset.select_columns([name]).with_format("arrow")
        values = table[:].column(0).take(positions).to_pylist()
    elif isinstance(source, SubsetSource):
        inner = source.positions.array[positions]
        order = np.argsort(inner, kind="stable")
        found = np.empty(len(inner))
        found[order] = number_column(source.inner, name, inner[order])
        return found
    elif isinstance(source, ConcatSource):
        ends = np.cumsum([len(part) for part in source.parts])
        split = np.split(positions, np.searchsorted(positions, ends[:-1]))
        starts = np.concatenate([[0], ends[:-1]])
        parts = zip(source.parts, split, starts, strict=True)
        return np.concatenate([number_column(part, name, inside - start) for part, inside, start in parts])
    else:
        values = [scalar(source.plain(index).get(name)) for index in positions.tolist()]
    wrong = (
        place
        for place, value in zip(positions.tolist(), values, strict=True)
        if not (isinstance(value, int | float) and np.isfinite(value))
    )
    if (bad := next(wrong, None)) is not None:
        held = values[int(np.searchsorted(positions, bad))]
        raise SourceError(f"the column {name!r} holds {held!r:.40} at sample {bad}, but scores= are finite numbers")
    return np.array(values, dtype=np.float64)


def _columns(source: Any) -> list[str]:
    """Return the columns of samples; none of items that the identity of the data does not cover as a whole."""
    if isinstance(source, HubSource):
        return list(source.plain_dataset.column_names)
    if isinstance(source, TextRows):
        return source.columns()
    first = next(readable_items(source, source.spread(4)), None) if source.by_items else None
    return list(map(str, first[1])) if first is not None and isinstance(first[1], Mapping) else []
