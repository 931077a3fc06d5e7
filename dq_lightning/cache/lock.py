"""A lock between builders of the same entry that only saves work; correctness never depends on it.

One builder works while the others wait. The owner of the lock rewrites a small file every few seconds, as a heartbeat.
A waiting builder does not trust the clocks of other machines: it measures with its own monotonic clock whether the
heartbeat changes. It continues without the lock once the owner is known to be dead (same host, no such process) or has
been silent for too long. Where locks are not supported, or are granted to everybody, the builders simply work side by
side.
"""

import contextlib
import hashlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from dq_lightning.cache import files

logger = logging.getLogger("dq_lightning")

BEAT_SECONDS = 5.0
SILENCE_SECONDS = 60.0
POLL_SECONDS = 0.2
UNKNOWN = "unknown"
BOOT, PROCESS_NUMBERS = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")


@cache
def host_name() -> str:
    """Return a name for the place whose process ids are comparable: this machine, its boot, and the container.

    Machines and containers may share a host name, so a digest of boot and container is appended; where these are
    unknown (not on Linux), the name ends with `UNKNOWN`. It only has characters that are safe in file names, and not
    the separators used here.
    """
    name = "".join(c if c.isalnum() else "_" for c in socket.gethostname())[:64] or "host"
    try:
        space = BOOT.read_text(encoding="ascii") + str(PROCESS_NUMBERS.readlink())
    except (OSError, ValueError):
        return f"{name}_{UNKNOWN}"
    return f"{name}_{hashlib.sha256(space.encode()).hexdigest()[:8]}"


def process_alive(pid: int) -> bool:
    """Return whether a process of this host exists; an id that was given to another process counts as alive."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def work_lock(path: Path, finished: Callable[[], bool]) -> Iterator[bool]:
    """Hold the lock at `path` while an entry is made, or continue without it when it cannot be acquired.

    The folder of the lock exists; `path` + ".owner" holds the owner's heartbeat. `finished` is called while waiting;
    True ends the wait, because the owner has done the work.

    Yields:
        Whether the lock is held.
    """
    lock = FileLock(path, thread_local=False)
    held = _wait(lock, path.with_name(path.name + ".owner"), finished)
    if not held:
        yield False
        return
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path.with_name(path.name + ".owner"), stop), daemon=True)
    beat.start()
    try:
        yield True
    finally:
        stop.set()
        beat.join()
        with contextlib.suppress(OSError):
            lock.release()


def _wait(lock: FileLock, owner: Path, finished: Callable[[], bool]) -> bool:
    """Wait until the lock is held (True), or until the work is finished or the owner counts as dead (False)."""
    beat, since = None, time.monotonic()
    logged = False
    while True:
        try:
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                return True
        except (OSError, NotImplementedError):
            # This file system has no locks, or the folder is read-only, so the work is done without a lock.
            return False
        if finished():
            return False
        seen = _read_beat(owner)
        if seen != beat:
            beat, since = seen, time.monotonic()
        if seen and not logged:
            logged = True
            logger.info("waiting until process %d on %s has made the same entry (%s)", seen[1], seen[0], owner.name)
        silent = time.monotonic() - since
        dead_here = bool(seen and seen[0] == host_name() and not process_alive(seen[1]))
        # A new owner may not have written its name yet, so even a dead owner is given one heartbeat of time.
        if silent > (BEAT_SECONDS if dead_here else SILENCE_SECONDS):
            return False
        time.sleep(POLL_SECONDS)


def _read_beat(owner: Path) -> tuple[str, int, int] | None:
    try:
        with files.open_plain(owner) as file:
            values = json.loads(file.read(4096))
        return str(values["host"]), int(values["pid"]), int(values["beat"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None


def _beat(owner: Path, stop: threading.Event) -> None:
    """Rewrite the owner's file until `stop` is set; on a full disk the owner only appears to be silent."""
    count = 0
    while True:
        beside = owner.with_name(f"{owner.name}-{os.getpid()}-{threading.get_ident()}")
        with contextlib.suppress(OSError):
            beside.write_text(json.dumps({"host": host_name(), "pid": os.getpid(), "beat": count}))
            beside.replace(owner)
        count += 1
        if stop.wait(BEAT_SECONDS):
            return
