"""What stands for samples that can't be read when those are left out (`on_error="skip"`)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dq_lightning.core.errors import SourceError, may_pass
from dq_lightning.core.records import DigestMemory


@dataclass(frozen=True)
class Unreadable:
    """In place of an item: its identity is the kind of failure, since messages may name places and times.

    Attributes:
        reason: name of the exception's class.
    """

    reason: str


def readable_items(source: Any, positions: Iterable[int]) -> Iterator[tuple[int, Any]]:
    """Positions and plain items of the samples that can be read.

    Every look at samples that need not be selected goes through this: which ones are left out is known to the features alone,
    and whether an unreadable sample ends the run is decided where all that are needed are read.

    Args:
        source: with `plain(position)`.
        positions: to read.

    Raises:
        SourceError: a failure that may pass, and says nothing of the sample.
    """
    for position in positions:
        try:
            item = source.plain(position)
        except SourceError as error:
            if may_pass(error):
                raise
            continue
        yield position, item


class ForgivingMemory:
    """A memory of digests in which a file that can't be opened has its kind of failure in place of a digest."""

    def __init__(self, memory: DigestMemory) -> None:
        self._memory = memory

    def file(self, path: str | Path) -> str:
        """See `DigestMemory.file`."""
        try:
            return self._memory.file(path)
        except OSError as error:
            return f"unreadable: {type(error).__name__}"

    def files(self, paths: list[str]) -> list[str]:
        """See `DigestMemory.files`."""
        try:
            return self._memory.files(paths)
        except OSError:
            return [self.file(path) for path in paths]

    def recall(self, key: str) -> str | None:
        """See `DigestMemory.recall`."""
        return self._memory.recall(key)

    def remember(self, key: str, digest: str) -> None:
        """See `DigestMemory.remember`."""
        self._memory.remember(key, digest)
