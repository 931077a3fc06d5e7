"""What the loops of the long stages know of finished work that outlives a killed run."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


class Shards(Protocol):
    """Finished pieces of one stage's work, kept while it goes on. See `store/shards.py`.

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
