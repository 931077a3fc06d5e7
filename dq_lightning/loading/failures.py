"""Why a run of several processes ended, for the ranks that only see a closed connection.

While a compact set is prepared, ranks tell each other by collectives. In training nobody can, nor where a user's own hook fails
before ours is called: a rank that fails is gone, and the others learn of a closed connection. So it leaves a note in the cache
folder, which they look for before they end too.
"""

import contextlib
import hashlib
import os
import time
import traceback
from pathlib import Path

from dq_lightning.loading.ranks import global_rank, world_size

FOLDER = ".failures"
KEPT_SECONDS = 24 * 3600.0
# a note is written before its writer's connections are closed; shared folders may be slow to show it
PATIENCE_SECONDS = 2.0
NO_NOTE = (
    "another process of this run is gone and left no error: it was killed, ran out of memory, or its machine is gone; its own "
    "output or its system's log tells more"
)
# what all ranks of a run have in common, and know without asking each other
RUN_VARIABLES = ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")
# how the backends of torch.distributed speak of a peer that is gone
LOST_CONNECTION = ("connection", "gloo", "nccl", "broken pipe", "peer", "timed out", "heartbeat", "socket")
# packages whose calls may wait for another rank; an error without frames has no package
COLLECTIVES = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "dq_lightning", "")


class FailureNotes:
    """Notes of one run.

    Args:
        cache_root: folder of the cache; notes of ranks that cannot see it are not found.
        since: seconds since 1970 when this run began: older notes are of an earlier one.
    """

    def __init__(self, cache_root: Path, since: float) -> None:
        self._folder, self._since = cache_root / FOLDER, since
        known = [os.environ.get(name, "") for name in RUN_VARIABLES]
        self._run = hashlib.sha256("\n".join([*known, str(world_size())]).encode()).hexdigest()[:16]

    def explain(self, error: BaseException) -> str | None:
        """Leave a note of this rank's error, or, if it is a lost connection, say what ended the other side.

        Returns:
            A sentence, or None when there is nothing to add to the error.
        """
        if world_size() == 1 or isinstance(error, KeyboardInterrupt):
            return None
        if not is_lost_connection(error):
            self._write(f"rank {global_rank()} failed first: {type(error).__name__}: {error}")
            return None
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (notes := self._read()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return "; ".join(notes) or NO_NOTE

    def _write(self, note: str) -> None:
        # nothing depends on a note
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            for old in self._folder.iterdir():
                if time.time() - old.stat().st_mtime > KEPT_SECONDS:
                    old.unlink()
            beside = self._folder / f"{self._run}-{global_rank()}.tmp"
            beside.write_text(note, encoding="utf-8", errors="replace")
            beside.replace(beside.with_suffix(".txt"))

    def _read(self) -> list[str]:
        with contextlib.suppress(OSError):
            found = sorted(self._folder.glob(f"{self._run}-*.txt"))
            fresh = [path for path in found if path.stat().st_mtime >= self._since]
            return [path.read_text(encoding="utf-8", errors="replace") for path in fresh]
        return []


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says that another process is gone, and not why.

    It is raised where ranks talk to each other: a connection that the user's own code has lost is that rank's failure, also
    when a loader process has lost it, whose errors torch raises again.
    """
    message = str(error).lower()
    return (
        isinstance(error, RuntimeError | OSError)
        and "dataloader worker" not in message
        and any(word in message for word in LOST_CONNECTION)
        and _raised_in(error) in COLLECTIVES
    )


def _raised_in(error: BaseException) -> str:
    """Package of the innermost frame of an error; empty when it has none."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals.get("__name__", "")).partition(".")[0] if frames else ""
