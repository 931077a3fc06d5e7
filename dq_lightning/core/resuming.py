"""Through this class long-running loops save finished work, so that a killed run can continue."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


class Shards:
    """The saved pieces of one stage's work while the stage is not finished.

    A loop first restores the pieces that are there, then does the missing work, and saves what it has done whenever
    `is_due` says so. This base class saves nothing, so a killed run starts again from the beginning; the shards of the
    cache are in `cache/shards.py`.
    """

    def restore(self, total: int | None, made_from: str = "") -> Iterator[dict[str, Array]]:
        """Yield the pieces that earlier runs passed to `keep`, in the order of the work on `total` samples.

        `total` is None if their number is not known. `made_from` is what the work depends on beside the cache key, such
        as a digest of weights that were trained for it.
        """
        return iter(())

    def is_due(self) -> bool:
        """Whether enough work was done since the last call of `keep` to be worth saving. This call is cheap."""
        return False

    def keep(self, count: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Save the arrays of the next `count` samples. This never raises, because the result does not depend on it."""
