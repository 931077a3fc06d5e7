"""A lock that only saves work: correctness never depends on it. Touches the disk.

One builder works while the others wait. The owner beats: it rewrites a small file every few seconds. Who waits never trusts
clocks of other machines: it watches, by its own monotonic clock, whether the beat changes, and goes ahead without the lock
once the owner is known dead (same host, no such process) or has been silent for too long. Where locks are not supported, or
succeed for everybody, the builders just work side by side.
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
    """Where process numbers mean what they mean here: this machine's name, and a digest of its boot and of the container.

    Machines and containers may share a name; where they can't be told apart (not Linux), it ends with `UNKNOWN`. No characters
    that file names or our own separators dislike.
    """
    name = "".join(c if c.isalnum() else "_" for c in socket.gethostname())[:64] or "host"
    try:
        space = BOOT.read_text(encoding="ascii") + str(PROCESS_NUMBERS.readlink())
    except (OSError, ValueError):
        return f"{name}_{UNKNOWN}"
    return f"{name}_{hashlib.sha256(space.encode()).hexdigest()[:8]}"


def process_alive(pid: int) -> bool:
    """Whether a process of this host exists; a number that was given to another process counts as alive."""
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
def economy_lock(path: Path, finished: Callable[[], bool]) -> Iterator[bool]:
    """Hold the lock at `path`, or go on without it when it cannot be had.

    Args:
        path: the lock file; its folder exists. `path` + ".owner" holds the owner's beat.
        finished: asked while waiting; True ends the wait, because the work has been done by the owner.

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
    """Wait for the lock until it is held (True), the work is finished, or the owner is given up (False)."""
    beat, since = None, time.monotonic()
    told = False
    while True:
        try:
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                return True
        except (OSError, NotImplementedError):
            # this file system has no locks, or the folder is read-only: work without
            return False
        if finished():
            return False
        seen = _read_beat(owner)
        if seen != beat:
            beat, since = seen, time.monotonic()
        if seen and not told:
            told = True
            logger.info("waiting for process %d on %s, which makes the same entry (%s)", seen[1], seen[0], owner.name)
        silent = time.monotonic() - since
        dead_here = bool(seen and seen[0] == host_name() and not process_alive(seen[1]))
        # one beat of patience, for a new owner that has not written its name yet
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
    """Rewrite the owner's file until told to stop; a full disk only makes the owner look silent."""
    count = 0
    while True:
        beside = owner.with_name(f"{owner.name}-{os.getpid()}-{threading.get_ident()}")
        with contextlib.suppress(OSError):
            beside.write_text(json.dumps({"host": host_name(), "pid": os.getpid(), "beat": count}))
            beside.replace(owner)
        count += 1
        if stop.wait(BEAT_SECONDS):
            return
