"""One step of the flow: what it makes, what of, and what it is given while it works."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dq_lightning.cache.entries import Cache
from dq_lightning.cache.shards import KeptShards, remove_shards
from dq_lightning.core.errors import ChangedError, SourceError
from dq_lightning.core.sharing import Sharing
from dq_lightning.pipeline.plan import Plan, source_identity


@dataclass(frozen=True)
class Step:
    """A step of the flow, which makes one entry of the cache from the results of earlier steps.

    Attributes:
        name: name of the work in messages.
        station: station of the entry.
        needs: stations whose results the step is made from.
        make: function that writes the entry; it is called with a `Task` and the results that the step needs.
        read: function that reads the result from the folder of the entry; it raises StoreError for a damaged one.
        key: function that gives the parts of the entry's key, called with the plan's own parts of the station and the
            results that the step needs; None where the plan's own parts are the key, whatever the results are.
        check: function that is called with the plan and the device before any work of a run that makes this entry; an
            error that it raises ends the run before the long work.
    """

    name: str
    station: str
    needs: tuple[str, ...]
    make: Callable[..., None]
    read: Callable[[Path], Any]
    key: Callable[..., dict[str, Any]] | None = None
    check: Callable[[Plan, str], None] | None = None


@dataclass(frozen=True)
class Task:
    """What a step is given to make its entry, beside the results of earlier steps.

    Attributes:
        plan: plan of the run.
        cache: cache that the entry is made in.
        source: identity of the data.
        marks: text that differs once the data were changed (`Source.marks`), as it was before the run.
        folder: empty folder that the entry is written to.
        entry: folder where the finished entry will be.
        parts: parts of the entry's key.
        devices: devices that share the batches of networks; work that one device does runs on the first.
        progress: show progress bars.
        force: remove finished work of interrupted runs instead of using it.
        also: folder of another entry whose finished work is valid for this entry too, or None.
        sharing: how long loops are shared with other processes.
    """

    plan: Plan
    cache: Cache
    source: str
    marks: str
    folder: Path
    entry: Path
    parts: dict[str, Any]
    devices: tuple[str, ...]
    progress: bool
    force: bool
    also: Path | None
    sharing: Sharing

    @property
    def device(self) -> str:
        """The device for work that several do not share, such as bins."""
        return self.devices[0]

    def shards(self, noun: str, part: str = "") -> KeptShards:
        """Return the shards of the entry: finished work that an interrupted run kept, and that this run adds to.

        Args:
            noun: name of the work in messages.
            part: name of preparatory work that has shards of its own; empty for the work on the entry itself.
        """
        return KeptShards(self.entry, noun, part=part, also=None if part else self.also, fresh=self.force)

    def check_unchanged(self) -> None:
        """Raise an error if the data changed while they were read.

        Otherwise the entry would hold results of the changed data under the key of the data before the change. Data
        whose identity is the digest of their items are not read a second time, because each item is compared as it is
        read.

        Raises:
            ChangedError: the data changed; the shards of the entry are removed.
        """
        source = self.plan.source
        if self.plan.fingerprint is not None:
            return
        changed = source.marks(fresh=True) != self.marks
        if changed or (not source.by_items and source_identity(self.plan, self.cache.memory) != self.source):
            remove_shards(self.entry)
            raise ChangedError(
                f"{source.describe()} changed while it was read, so what was made of it was not kept: start again when "
                "nothing writes to it any more"
            )


@contextmanager
def reading_again(plan: Plan) -> Iterator[None]:
    """Add to the error of an unreadable sample that it could be read before, if features were made from it.

    Raises:
        SourceError: the block raised a SourceError; the message is extended if features were made by reading the
            samples.
    """
    try:
        yield
    except SourceError as error:
        if not plan.reads_for_features:
            raise
        raise SourceError(
            "a sample that could be read for its features cannot be read now, so the dataset changed meanwhile, or another "
            f"part of the sample is damaged: {error}"
        ) from error
