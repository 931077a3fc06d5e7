"""Read a column of numbers of a dataset, such as scores that somebody gave its rows."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_lightning.core.errors import SourceError
from dq_lightning.sources.hub import HubSource
from dq_lightning.sources.nested import ConcatSource, SubsetSource
from dq_lightning.sources.text import TextRows


def number_column(source: Any, name: str) -> NDArray[np.float64]:
    """Read a column of numbers, float64 [N], of a Hugging Face dataset, of rows of text, or of parts or joins of these.

    Raises:
        SourceError: the dataset has no columns or no such column, or the column holds anything but numbers.
    """
    if isinstance(source, SubsetSource):
        return number_column(source.inner, name)[source.positions.array]
    if isinstance(source, ConcatSource):
        return np.concatenate([number_column(part, name) for part in source.parts])
    if isinstance(source, HubSource):
        there = list(source.plain_dataset.column_names)
    else:
        there = source.columns() if isinstance(source, TextRows) else []
    if name not in there:
        held = f"its columns are {', '.join(there)}" if there else "it has no columns; pass the scores as an array"
        raise SourceError(f"{source.describe()} has no column {name!r} for scores=: {held}")
    if isinstance(source, HubSource):
        values = source.plain_dataset.select_columns([name]).with_format("arrow")[:].column(0).to_pylist()
    else:
        values = [source.plain(index).get(name) for index in range(len(source))]
    bad = next((place for place, value in enumerate(values) if not isinstance(value, int | float)), None)
    if bad is not None:
        raise SourceError(f"the column {name!r} holds {values[bad]!r:.40} at sample {bad}, but scores= are numbers")
    return np.array(values, dtype=np.float64)
