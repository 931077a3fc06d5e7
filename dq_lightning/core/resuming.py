"""Protocols through which long-running loops save finished work, so that a killed run can continue."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


class Shards(Protocol):
    """Protocol of the saved pieces of one stage's work while the stage is not finished. See `cache/shards.py`.

    A loop first restores the pieces that are there, then does the missing work, and saves what it has done whenever
    `is_due` says so.
    """

    def restore(self, total: int, made_from: str = "") -> Iterator[dict[str, Array]]:
        """Yield the pieces that earlier runs passed to `keep`, in the order of the work.

        Args:
            total: number of samples of the whole stage.
            made_from: what the work depends on beside the cache key, such as a digest of weights that were trained for
                it.
        """
        ...

    def is_due(self) -> bool:
        """Whether enough work was done since the last call of `keep` to be worth saving. This call is cheap."""
        ...

    def keep(self, count: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Save the arrays of the next `count` samples. This never raises, because the result does not depend on it."""
        ...


class NoShards:
    """Implementation of `Shards` that saves nothing: a killed run starts again from the beginning."""

    def restore(self, total: int, made_from: str = "") -> Iterator[dict[str, Array]]:
        """Yield nothing."""
        return iter(())

    def is_due(self) -> bool:
        """Return False."""
        return False

    def keep(self, count: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Do nothing."""


class ApiEmbeddings(Protocol):
    """Protocol of the stored embeddings that an API has returned for one model. See `cache/api_embeddings.py`.

    An implementation is safe to use from several threads and processes.
    """

    def __contains__(self, key: bytes, /) -> bool: ...

    def __getitem__(self, key: bytes, /) -> NDArray[np.float32]:
        """Return the embedding with this key, float32 [D]."""
        ...

    def record(self, keys: Sequence[bytes], rows: NDArray[np.float32]) -> None:
        """Save the embeddings of a finished request, before anything else is done with them.

        Args:
            keys: SHA-256 digest of each of B texts.
            rows: float32 [B, D], the embeddings in the order of the keys.
        """
        ...


# Opens the stored embeddings of the model whose name it is given.
OpenApiEmbeddings = Callable[[str], ApiEmbeddings]
