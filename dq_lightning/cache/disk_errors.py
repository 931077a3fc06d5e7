"""Translation of errors of the disk into messages that say what to do."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from dq_lightning.core.errors import CacheError

READ_ONLY_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def explained(target: Path, only_under: Path | None = None) -> Iterator[None]:
    """Turn an OSError in the block into a CacheError.

    Args:
        target: file or folder that is being written, for the message.
        only_under: errors about paths outside of this folder are raised unchanged, unless a disk is full; None
            translates all.

    Raises:
        CacheError: the block raised an OSError that is translated.
    """
    try:
        yield
    except OSError as error:
        seen = str(error.filename or "")
        ours = only_under is None or seen.startswith(str(only_under)) or error.errno in FULL_ERRORS
        if not ours:
            raise
        advice = f"cannot write {target} ({error})"
        if error.errno in READ_ONLY_ERRORS:
            advice += ": pass cache_dir= (or set DQ_LIGHTNING_CACHE) to a folder that you may write"
        elif error.errno in FULL_ERRORS:
            advice += ": make room, or pass cache_dir= on another disk"
        raise CacheError(advice) from error
