"""Report why a run of several processes ended on the ranks that only see a closed connection.

While a compact set is prepared, ranks exchange their errors with collective calls. During training they cannot, and
neither can they where a user's own hook fails before a hook of this package is called: the rank that fails is gone, and
the others only see a closed connection. Therefore the rank that fails leaves a note in the cache folder, and the other
ranks look for it before they end too.
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
# A note is written before its writer's connections are closed, but a shared folder may show it late, so ranks wait this
# long.
PATIENCE_SECONDS = 2.0
NO_NOTE = (
    "another process of this run is gone and left no error: it was killed, ran out of memory, or its machine is gone; its own "
    "output or its system's log tells more"
)
# Environment variables that have equal values on all ranks of a run; they identify the run without communication.
RUN_VARIABLES = ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")
# Words in the error messages of torch.distributed's backends when another process is gone.
LOST_CONNECTION = ("connection", "gloo", "nccl", "broken pipe", "peer", "timed out", "heartbeat", "socket")
# Packages whose calls may wait for another rank. The empty name stands for an error without stack frames.
COLLECTIVES = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "dq_lightning", "")


def explain_failure(error: BaseException, cache_root: Path, since: float) -> str | None:
    """Leave a note about this rank's error, or return the notes of others if it is only a lost connection.

    In that case it waits up to 2 seconds for a note. It returns None when there is nothing to add to the error.

    Args:
        error: error that ends this rank.
        cache_root: folder of the cache. Notes of a rank that uses another folder are not found.
        since: time when this run began, in seconds since 1970; older notes belong to an earlier run.
    """
    if world_size() == 1 or isinstance(error, KeyboardInterrupt):
        return None
    variables = [os.environ.get(name, "") for name in RUN_VARIABLES]
    run = hashlib.sha256("\n".join([*variables, str(world_size())]).encode()).hexdigest()[:16]
    folder = cache_root / FOLDER
    if not is_lost_connection(error):
        _write(folder, run, f"rank {global_rank()} failed first: {type(error).__name__}: {error}")
        return None
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (notes := _read(folder, run, since)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return "; ".join(notes) or NO_NOTE


def _write(folder: Path, run: str, note: str) -> None:
    # A note that cannot be written is not an error, because nothing depends on it.
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            if time.time() - old.stat().st_mtime > KEPT_SECONDS:
                old.unlink()
        beside = folder / f"{run}-{global_rank()}.tmp"
        beside.write_text(note, encoding="utf-8", errors="replace")
        beside.replace(beside.with_suffix(".txt"))


def _read(folder: Path, run: str, since: float) -> list[str]:
    with contextlib.suppress(OSError):
        fresh = [path for path in sorted(folder.glob(f"{run}-*.txt")) if path.stat().st_mtime >= since]
        return [path.read_text(encoding="utf-8", errors="replace") for path in fresh]
    return []


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says only that another process is gone, and not why.

    Such an error is raised by a package through which ranks communicate. A connection that the user's own code lost is
    this rank's own failure, also if a loader process lost it, whose error torch raises again in this process.
    """
    message, frames = str(error).lower(), list(traceback.walk_tb(error.__traceback__))
    # The package of the innermost stack frame; empty when the error has no frames.
    raised_in = str(frames[-1][0].f_globals.get("__name__", "")).partition(".")[0] if frames else ""
    return (
        isinstance(error, RuntimeError | OSError)
        and "dataloader worker" not in message
        and any(word in message for word in LOST_CONNECTION)
        and raised_in in COLLECTIVES
    )
