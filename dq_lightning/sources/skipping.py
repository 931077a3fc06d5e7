"""Placeholders and helpers for samples that cannot be read and are left out (`on_error="skip"`)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dq_lightning.core.errors import SourceError, may_pass
from dq_lightning.sources.base import Source


@dataclass(frozen=True)
class Unreadable:
    """Placeholder for an unreadable item, with the name of the exception's class.

    It holds no error message, since messages may contain paths and times.
    """

    reason: str


def readable_items(source: Source, positions: Iterable[int]) -> Iterator[tuple[int, Any]]:
    """Iterate over (position, plain item) of the samples at some positions that can be read.

    Code that looks at samples which may not be selected uses this function, because only the features record which
    samples are left out. Whether an unreadable sample ends the run is decided where all needed samples are read.

    Raises:
        SourceError: reading failed for a reason that may be temporary, which says nothing about the sample.
    """
    for position in positions:
        try:
            item = source.plain(position)
        except SourceError as error:
            if may_pass(error):
                raise
            continue
        yield position, item
