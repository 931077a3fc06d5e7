"""The ids of the samples of a packed store. PURE."""

from collections.abc import Sequence
from typing import overload


class Names(Sequence[str]):
    """The ids of the samples: text without a Python object for each."""

    def __init__(self, data: memoryview, offsets: memoryview) -> None:
        self._data = data
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, position: int) -> str: ...

    @overload
    def __getitem__(self, position: slice) -> list[str]: ...

    def __getitem__(self, position: int | slice) -> str | list[str]:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        at = range(len(self))[position]
        return bytes(self._data[self._offsets[at] : self._offsets[at + 1]]).decode(errors="surrogatepass")
