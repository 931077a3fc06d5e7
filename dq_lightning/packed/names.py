"""The ids of the samples of a packed store.

The code is pure: it reads and writes no files.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_lightning.core.errors import StoreError


class PositionNames(Sequence[str]):
    """Ids that are the positions of the samples in the source (int64 [M]), as decimal numbers."""

    def __init__(self, index: NDArray[np.int64]) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, position: Any) -> Any:
        found = self._index[position]
        return list(map(str, found.tolist())) if isinstance(position, slice) else str(int(found))


class Names(Sequence[str]):
    """Sequence of M ids that decodes an id only when it is asked for, so that memory holds no Python object for each.

    `data` holds the bytes of all ids in UTF-8, one after the other; id i starts at offsets[i] and ends before offsets[i
    + 1].
    """

    def __init__(self, data: memoryview, offsets: memoryview) -> None:
        self._data = data
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        at = range(len(self))[position]
        start, end = self._offsets[at], self._offsets[at + 1]
        try:
            if not 0 <= start <= end <= len(self._data):
                raise ValueError(f"it is said to be at {start} to {end} of {len(self._data)} bytes")
            return bytes(self._data[start:end]).decode(errors="surrogatepass")
        except ValueError as error:
            raise StoreError(f"the id of sample {at} cannot be read ({error}): copy the store again") from error
