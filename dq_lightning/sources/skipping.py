"""What stands for samples that can't be read when those are left out (`on_error="skip"`)."""

from dataclasses import dataclass
from pathlib import Path

from dq_lightning.records import DigestMemory


@dataclass(frozen=True)
class Unreadable:
    """In place of an item: its identity is the kind of failure, since messages may name places and times.

    Attributes:
        reason: name of the exception's class.
    """

    reason: str


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
