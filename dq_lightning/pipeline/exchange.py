"""Ranks of a run exchange short texts, counts and arrays through the key-value store of `torch.distributed`.

No call waits for another rank: whoever expects something looks for it again and again, and meanwhile compares the
heartbeats of the others.
"""

import functools
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed

from dq_lightning.cache.lock import host_name, process_alive
from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import DistributedError
from dq_lightning.core.launch import Launch
from dq_lightning.core.sharing import Arrays, Distributed

# The type annotations of torch do not list the stores.
_dist: Any = torch.distributed
Result = TypeVar("Result")
# The store refuses values of more than 8 MiB.
PART_BYTES = 4 << 20
BEAT_SECONDS, SILENCE_SECONDS, POLL_SECONDS = 2.0, 40.0, 0.02
# A rank hangs that has not used so much processor time, in the thread that leads or helps, for so many seconds.
WORK_SECONDS, STALLED_SECONDS = 0.01, 600.0
# The rank that holds the store leaves if for so long nobody else shows that it still needs it.
LINGER_SECONDS = 10.0
# A rank looks this long for the store of rank 0, which may have started later, so often.
CONNECT_SECONDS, LOOK_SECONDS = 60.0, 0.2
# A store that takes connections is given so long to answer the first time.
ANSWER_SECONDS = 10.0
# A rank that does the same as others is missed when it has not come after so long.
ARRIVAL_SECONDS = 60.0
# The stores of this process, by address, stay open: another rank may still need one that rank 0 has finished with.
_stores: dict[tuple[str, int], Any] = {}
# The calls of stores that have not returned, by thread: when they began, in seconds of the monotonic clock, and the store.
_calls: dict[int, tuple[float, Any]] = {}
OPEN_FILES = Path("/proc/self/fd")


def find_store(launch: Launch, distributed: Distributed, is_done: Callable[[], bool] = lambda: False) -> Any | None:
    """Return the store through which all ranks of a launch reach each other.

    It is the store of the default process group, or of the launcher; else rank 0 opens one at the address and port of
    the launch, which a process group that this process makes later uses as well. The others look for it for a minute.
    Rank 0 may have done everything and ended before they look, so `is_done` is asked meanwhile whether a store is still
    needed.

    Returns:
        The store; None if it is not needed any more, or with `"auto"` if there is none, in which case a warning says so.

    Raises:
        DistributedError: there is none, and `distributed` is `"all"`.
    """
    try:
        if launch.address is None:
            return _store_of_group()
        place = (launch.address, launch.port)
        if place not in _stores:
            opens = launch.rank == 0 and not launch.is_hosted
            if not opens and not _wait_for_port(place, is_done):
                return None
            timeout = timedelta(seconds=ANSWER_SECONDS)
            _stores[place] = _dist.TCPStore(
                *place, is_master=opens, wait_for_workers=False, timeout=timeout, multi_tenant=True
            )
        return _stores[place]
    except (RuntimeError, ValueError, AttributeError) as error:
        problem = f"the ranks of this run cannot reach each other ({error})"
        if distributed == "all":
            raise DistributedError(f'{problem}: pass distributed="off", or start the run with torchrun') from error
        get_logger().warning(f"{problem}, so each works alone")
        return None


def _wait_for_port(place: tuple[str, int], is_done: Callable[[], bool]) -> bool:
    """Return whether a process listens at an address and port, as soon as one does or `is_done` says True.

    The store's own constructor tries for twice its timeout, in growing steps, and nothing can end it.
    """
    since = time.monotonic()
    while True:
        try:
            with socket.create_connection(place, timeout=ANSWER_SECONDS):
                return True
        except OSError as error:
            if is_done():
                return False
            if time.monotonic() - since > CONNECT_SECONDS:
                raise RuntimeError(
                    f"for {CONNECT_SECONDS:.0f} s nothing answered at {place[0]}:{place[1]}: {error}"
                ) from error
        time.sleep(LOOK_SECONDS)


def _store_of_group() -> Any:
    # torch has no public name for it.
    store: Any = _dist.distributed_c10d._get_default_store()
    inner = store
    while isinstance(inner, _dist.PrefixStore):
        inner = inner.underlying_store
    if not isinstance(inner, _dist.TCPStore):
        raise RuntimeError(f"the process group keeps its addresses in a {type(inner).__name__}")
    return store


@functools.cache
def _watch_calls(pid: int) -> None:
    """Start the thread of this process, `pid`, that gives up calls of a store which is silent.

    A call waits without a limit for a process that was stopped, or whose machine is gone. The thread shuts the connection, so
    the call fails.
    """

    def watch() -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            for since, store in list(_calls.values()):
                if time.monotonic() - since > SILENCE_SECONDS:
                    _shut_connections(store)

    threading.Thread(target=watch, name="store", daemon=True).start()


def _shut_connections(store: Any) -> None:
    """Shut the connections to the process that holds a store, where the system lists the open files of a process."""
    while isinstance(store, _dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, _dist.TCPStore) or not OPEN_FILES.is_dir():
        return
    for number in [int(path.name) for path in OPEN_FILES.iterdir()]:
        with suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as connection:
                if connection.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                # Where this process holds the store, its own end of other ranks' connections has that port.
                if connection.getpeername()[1] == store.port != connection.getsockname()[1]:
                    connection.shutdown(socket.SHUT_RDWR)


class StoreLostError(DistributedError):
    """The store of the ranks cannot be reached any more."""


class Exchange:
    """What the ranks of one meeting write and read, under names of their own in a store.

    Args:
        store: store that all ranks reach.
        prefix: beginning of all names of this meeting.
        rank: number of this process.

    Raises:
        StoreLostError: by every method, if the store cannot be reached any more.
    """

    def __init__(self, store: Any, prefix: str, rank: int) -> None:
        self._store, self.rank = _dist.PrefixStore(prefix, store), rank
        _watch_calls(os.getpid())

    def _call(self, function: Callable[..., Result], *given: Any) -> Result:
        thread = threading.get_ident()
        _calls[thread] = time.monotonic(), self._store
        try:
            return function(*given)
        except RuntimeError as error:
            raise StoreLostError(
                f"rank {self.rank} has lost the store of the ranks, so the process that holds it (rank 0 or the launcher on "
                f"its machine) has ended or hangs: see its output ({str(error).splitlines()[0]})"
            ) from error
        finally:
            del _calls[thread]

    def claim(self, name: str, text: str) -> bool:
        """Write a text if no rank has written one under this name, and return whether it is this rank's own."""
        return bool(self._call(self._store.compare_set, name, "", text) == text.encode())

    def raise_count(self, name: str, by: int = 1) -> int:
        """Raise a count and return its new value; a count begins with 0."""
        return int(self._call(self._store.add, name, by))

    def count(self, name: str) -> int:
        """Return a count."""
        return self.raise_count(name, 0)

    def write(self, name: str, values: Any) -> None:
        """Write plain JSON."""
        self._call(self._store.set, name, json.dumps(values))

    def read(self, name: str) -> Any:
        """Return what was written, or None if nothing is there."""
        if not self._call(self._store.check, [name]):
            return None
        return json.loads(self._call(self._store.get, name))

    def send(self, name: str, facts: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
        """Write plain JSON and arrays, in parts that the store can hold; `read` finds nothing before all is there."""
        listed, number = {}, 0
        for key, array in arrays.items():
            content = np.ascontiguousarray(array).tobytes()
            starts = range(0, len(content), PART_BYTES)
            for start in starts:
                self._call(self._store.set, f"{name}/{number}", content[start : start + PART_BYTES])
                number += 1
            listed[key] = [array.dtype.str, list(array.shape), len(starts)]
        self.write(name, {"facts": dict(facts), "arrays": listed})

    def receive(self, name: str, *, keep: bool = False) -> tuple[dict[str, Any], Arrays] | None:
        """Return what was sent, or None if it is not there; it is removed unless it is to be kept for other ranks."""
        header = self.read(name)
        if header is None:
            return None
        arrays, number = {}, 0
        for key, (dtype, shape, parts) in header["arrays"].items():
            content = bytearray()
            for _ in range(parts):
                content += self._call(self._store.get, f"{name}/{number}")
                if not keep:
                    self._call(self._store.delete_key, f"{name}/{number}")
                number += 1
            arrays[key] = np.frombuffer(content, dtype).reshape(shape)
        if not keep:
            self._call(self._store.delete_key, name)
        return header["facts"], arrays


class Pulse:
    """A thread that shows the others that this rank works, and watches some of them.

    It shows that the process lives, and that the thread which made this object works: that it has used the processor again.
    A thread that waits for others by looking again and again does so too, but not one that waits for a lock or a disk.

    Args:
        exchange: the meeting.
        name: name of this rank's heartbeat.
        watched: function that returns the names of the heartbeats to watch.

    Attributes:
        failure: why this rank cannot go on, once another one is dead, is silent or hangs.
        on_failure: function that is then called once with the reason, in the thread, if the store can be reached.
    """

    def __init__(self, exchange: Exchange, name: str, watched: Callable[[], list[str]]) -> None:
        self.failure: DistributedError | None = None
        self.on_failure: Callable[[str], object] = id
        self._exchange, self._name, self._watched = exchange, name, watched
        self._used, self._shown = _clock_of_this_thread(), 0.0
        self._seen: dict[str, tuple[int, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)

    def start(self) -> None:
        """Start to show and to watch."""
        who = {"rank": self._exchange.rank, "host": host_name(), "pid": os.getpid()}
        self._exchange.write(f"{self._name}/who", who)
        # From the first beat on this rank is missed when it dies, so that it may take work.
        self._exchange.raise_count(self._name)
        self._thread.start()

    def stop(self) -> None:
        """Stop to show and to watch."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._exchange.raise_count(self._name)
                used = self._used()
                if used - self._shown >= WORK_SECONDS:
                    self._exchange.raise_count(f"{self._name}/work")
                    self._shown = used
                # A rank that has seen another one fail beats on, because it still works.
                names = self._watched() if self.failure is None else []
                reason = next((found for name in names if (found := self._look(name))), None)
                if reason is not None:
                    self.failure = DistributedError(reason)
                    self.on_failure(reason)
            except DistributedError as error:
                self.failure = self.failure or error
                return
            if self._stop.wait(BEAT_SECONDS):
                return

    def _look(self, name: str) -> str | None:
        """Return what is wrong with the rank that a heartbeat belongs to, or None."""
        silent, idle = self._unchanged(name), self._unchanged(f"{name}/work")
        if not silent and idle <= STALLED_SECONDS:
            return None
        who = self._exchange.read(f"{name}/who") or {"rank": "?", "host": "", "pid": 0}
        if silent and _is_dead_here(who):
            return (
                f"the process of rank {who['rank']} (number {who['pid']} on this machine) has ended without a word: it was "
                "killed, or it crashed"
            )
        if silent > SILENCE_SECONDS:
            return (
                f"rank {who['rank']} on {who['host']} has been silent for {silent:.0f} s: it was killed or stopped, or "
                "the network to it is gone"
            )
        if idle > STALLED_SECONDS:
            return (
                f"rank {who['rank']} on {who['host']} has done nothing for {idle:.0f} s, although its process lives. It hangs: "
                f'look where with "py-spy dump --pid {who["pid"]}", and start again; finished work was kept'
            )
        return None

    def _unchanged(self, name: str) -> float:
        """Return for how many seconds a count of another rank has had its value; 0 if it is another one than before."""
        count, now = self._exchange.count(name), time.monotonic()
        before, since = self._seen.get(name, (-1, now))
        if count != before:
            self._seen[name] = count, now
            return 0.0
        return now - since


def _clock_of_this_thread() -> Callable[[], float]:
    """Return a function that gives the seconds of processor time that the calling thread has used, for any thread.

    It gives the time of the day on systems that cannot tell, as if the thread always worked.
    """
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic
    return functools.partial(time.clock_gettime, time.pthread_getcpuclockid(threading.get_ident()))


def _is_dead_here(who: Mapping[str, Any]) -> bool:
    """Whether a rank ran on this machine and its process is gone."""
    return who["host"] == host_name() and not process_alive(who["pid"])


def linger(exchange: Exchange, present: Callable[[], list[str]]) -> None:
    """Wait until no other rank needs the store that this process holds.

    Args:
        exchange: the meeting.
        present: function that returns the names of the heartbeats of those that have not left.
    """
    beats, since = -1, time.monotonic()
    while time.monotonic() - since < LINGER_SECONDS:
        alive = [name for name in present() if not _is_dead_here(exchange.read(f"{name}/who") or {"host": ""})]
        if not alive:
            return
        found = sum(map(exchange.count, alive))
        if found != beats:
            beats, since = found, time.monotonic()
        time.sleep(POLL_SECONDS)


def finish_with_all(exchange: Exchange, num_ranks: int, action: Callable[[], Result]) -> Result:
    """Call a function, and return its result once all ranks have done so.

    Unlike in a collective of a process group, which fails after the group's timeout, a rank waits for the others as long
    as their hearts beat. Every rank calls this function, at about the same time: one that has not come a minute later,
    and when this rank has done its part, which is kept, is not waited for.

    Raises:
        DistributedError: another rank is dead or silent, or has not come.
    """
    others = [rank for rank in range(num_ranks) if rank != exchange.rank]

    def at_work() -> list[str]:
        beats = [f"beat/{rank}" for rank in others if exchange.read(f"done/{rank}") is None]
        return [beat for beat in beats if exchange.count(beat)]

    began = time.monotonic()
    pulse = Pulse(exchange, f"beat/{exchange.rank}", at_work)
    pulse.start()
    try:
        try:
            result = action()
        finally:
            exchange.write(f"done/{exchange.rank}", True)
            exchange.raise_count("done")
        while exchange.count("done") < num_ranks:
            if pulse.failure is not None:
                raise pulse.failure
            waited = time.monotonic() - began
            absent = [rank for rank in others if exchange.read(f"beat/{rank}/who") is None]
            if absent and waited > ARRIVAL_SECONDS:
                raise DistributedError(
                    f"rank {absent[0]} has not come for {waited:.0f} s: it was killed or stopped, or the network to it is gone"
                )
            time.sleep(POLL_SECONDS)
        return result
    finally:
        pulse.stop()
