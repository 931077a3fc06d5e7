"""What the loops of the long stages know of finished work that outlives a killed run."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


class Shards(Protocol):
    """Finished pieces of one stage's work, kept while it goes on. See `cache/shards.py`.

    A loop first takes what is there, does what is missing, and keeps what it has done whenever that is due.
    """

    def restore(self, total: int, made_from: str = "") -> Iterator[dict[str, Array]]:
        """What earlier runs have kept, as it was given to `keep`, in the order of the work.

        Args:
            total: samples of the whole stage.
            made_from: what the work depends on beside the key, such as weights that were trained for it.
        """
        ...

    def is_due(self) -> bool:
        """Whether enough was done since the last time to be worth keeping. Costs nothing, so ask often."""
        ...

    def keep(self, count: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep the work on the next `count` samples; never an error, because nothing depends on it."""
        ...


class NothingKept:
    """Keeps nothing: a killed run begins again."""

    def restore(self, total: int, made_from: str = "") -> Iterator[dict[str, Array]]:
        """See `Shards`."""
        return iter(())

    def is_due(self) -> bool:
        """See `Shards`."""
        return False

    def keep(self, count: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """See `Shards`."""


class PaidRows(Protocol):
    """Rows of one model that were paid for. Safe to use from several threads and processes. See `cache/paid.py`."""

    def __contains__(self, key: bytes, /) -> bool: ...

    def __getitem__(self, key: bytes, /) -> NDArray[np.float32]:
        """Row [D]."""
        ...

    def record(self, keys: Sequence[bytes], rows: NDArray[np.float32]) -> None:
        """Keep the rows of a finished request before anything else is done with them.

        Args:
            keys: sha256 of each text.
            rows: float32 [B, D].
        """
        ...


class Paid(Protocol):
    """Rows that were paid for, of every model."""

    def of(self, model: str, /) -> PaidRows:
        """Those of one model, by a name that can stand in a path."""
        ...


class NothingPaid:
    """No model's rows, and none are recorded."""

    def of(self, model: str) -> "NothingPaid":
        """See `Paid`."""
        return self

    def __contains__(self, key: bytes) -> bool:
        return False

    def __getitem__(self, key: bytes) -> NDArray[np.float32]:
        raise KeyError(key)

    def record(self, keys: Sequence[bytes], rows: NDArray[np.float32]) -> None:
        """See `PaidRows`."""
