"""Ranks that make the same compact set meet: the first of them leads the work, and the others help.

The leader makes every entry of the cache, as a run alone would. The loops that take long (`core/sharing.py`) hand out
the numbers of their pieces through a counter: whoever is ready takes the next one, so that fast ranks do more, and a
rank that comes late, or not at all, holds nobody up. Helpers send the results of their pieces to the leader, which keeps
them in the shards of the entry together with its own. A rank that dies ends the others with the cause; the shards stay.

A meeting has a name, so ranks that make something else meet elsewhere. Below it, the names in the store are these:

    leader, beat/leader       text and heartbeat of the rank that leads
    joined, beat/N            number of helpers, and the heartbeat of the helper that came as number N (`Pulse`)
    left/N                    empty text, or why the helper failed
    jobs, job/J               number of jobs so far, and job J
    next/J                    number of the pieces of job J that were taken
    first/J                   number of its first piece whose result is missing, where results are wanted in order
    sent/N, result/N/R        number of the results of helper N so far, and result R, which the leader removes
    taken/N                   number of these that the leader has read
    asked, asked/N            number of the questions of all helpers, and of helper N
    question/N/R, answer/N/R  question R of helper N, and the answer, which the helper removes
    end, closed               how the work ended; the leader has left
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, cast

from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import DistributedError
from dq_lightning.core.launch import Launch
from dq_lightning.core.sharing import Arrays, Job, Result, Sharing
from dq_lightning.pipeline.exchange import POLL_SECONDS, Exchange, Pulse, StoreLostError, linger

# A helper waits while the leader has not read so many of its results.
MAX_UNREAD = 32
# A helper without work looks for some after so long.
IDLE_SECONDS = 0.1
# Each rank takes about so many times new numbers of pieces in a job. Consecutive pieces are faster to read.
CLAIMS_PER_JOB, MAX_CLAIM = 16, 32
# A leader that is done leaves if for so long no other rank takes what was made.
UNTAKEN_SECONDS = 600.0
# A helper asks so many questions before it has the answer to the first.
QUESTIONS_AHEAD = 4
# Where the number of pieces is not known, no job has so many; the leader passes over the rest when it has come to the end.
MANY_PIECES = 1 << 40

Answer = tuple[dict[str, Any], Arrays]
Handler = Callable[[Job, Iterator[int]], AbstractContextManager[Iterator[Arrays]]]


@contextmanager
def meet(store: Any, launch: Launch, name: str) -> "Iterator[Leader | Helper]":
    """Meet the ranks that make the same thing, as their leader or as a helper.

    A leader that leaves the block with an error ends the helpers with it, and a helper that does so ends the leader.
    """
    rounds = Exchange(store, name, launch.rank)
    # A meeting that is over is followed by another one, for ranks that do not find in their cache what was made.
    number = rounds.count("round")
    if rounds.read(f"{number}/closed") is not None:
        number += 1
    own = f"{launch.rank} {os.urandom(8).hex()}"
    exchange = Exchange(store, f"{name}/{number}", launch.rank)
    one: Leader | Helper
    if exchange.claim("leader", own):
        rounds.raise_count("round", number - rounds.count("round"))
        one = Leader(exchange, launch)
    else:
        one = Helper(exchange, launch)
    holds_store = launch.rank == 0 and not launch.is_hosted
    try:
        yield one
    except BaseException as error:
        one.leave(_cause(error, launch.rank), holds_store)
        raise
    one.leave(None, holds_store)


def _cause(error: BaseException, rank: int) -> str:
    if isinstance(error, DistributedError):
        return str(error)
    return f"rank {rank} failed while making the compact set: {type(error).__name__}: {error}"


def _claims(
    exchange: Exchange,
    number: int,
    job: Job,
    num_ranks: int,
    check: Callable[[], None],
    receive: Callable[[], object] = list,
) -> Iterator[int]:
    """Yield numbers of pieces of a job that no other rank has taken, as long as there are any.

    `receive` is called while this rank waits, because it may not yet begin the piece that it has taken.
    """
    pieces = MANY_PIECES if job.pieces is None else job.pieces
    size = 1 if job.ahead else max(1, min(MAX_CLAIM, pieces // (CLAIMS_PER_JOB * num_ranks)))
    held = set[int]()
    while True:
        check()
        start = exchange.raise_count(f"next/{number}", size) - size
        if start >= pieces:
            return
        for piece in range(start, min(start + size, pieces)):
            check()
            # Who waits cannot give the results that are ready, so the rank that has the first missing piece goes on.
            while job.ahead and (first := exchange.count(f"first/{number}")) + job.ahead * num_ranks <= piece:
                if first in held:
                    break
                check()
                receive()
                time.sleep(POLL_SECONDS)
            held.add(piece)
            yield piece


def _others(exchange: Exchange) -> list[str]:
    """Return the names of the heartbeats of those that have not left the meeting."""
    helpers = [number for number in range(1, exchange.count("joined") + 1) if exchange.read(f"left/{number}") is None]
    leader = ["beat/leader"] if exchange.read("closed") is None else []
    return leader + [f"beat/{number}" for number in helpers]


class LeaderLeftError(DistributedError):
    """The leader has left before a helper had what was made."""


class Leader(Sharing):
    """The rank that makes the entries, and hands out the pieces of long loops to itself and to the others.

    Attributes:
        has_helpers: whether this rank has seen that another one has come to help.
    """

    def __init__(self, exchange: Exchange, launch: Launch) -> None:
        self.num_ranks, self.ranks_on_node = launch.num_ranks, launch.ranks_on_node
        self.has_helpers = False
        self._exchange, self._jobs = exchange, 0
        self._read: dict[int, int] = {}
        self._left: set[int] = set()
        self._pulse = Pulse(exchange, "beat/leader", lambda: [f"beat/{number}" for number in self._present()])
        self._pulse.on_failure = self._end_all
        self._pulse.start()
        self._leaving = threading.Event()
        self._server: threading.Thread | None = None

    def _present(self) -> list[int]:
        """Return the numbers of the helpers that have joined and not left."""
        joined = self._exchange.count("joined")
        self.has_helpers |= joined > 0
        for number in range(1, joined + 1):
            if number not in self._left and self._exchange.read(f"left/{number}") is not None:
                self._left.add(number)
        # A helper joins before its heart beats.
        numbers = set(range(1, self._exchange.count("joined") + 1)) - self._left
        return [number for number in sorted(numbers) if self._exchange.count(f"beat/{number}")]

    def _end_all(self, cause: str) -> None:
        self._exchange.write("end", {"error": cause})

    def check(self) -> None:
        """Raise an error if a helper has failed, is dead or hangs.

        Raises:
            DistributedError: the cause.
        """
        if self._pulse.failure is not None:
            raise self._pulse.failure

    def share(
        self,
        job: Job,
        work: Callable[[Iterator[int]], Iterator[Result]],
        unpack: Callable[[Arrays], Result],
        size: Callable[[Result], int],
    ) -> Iterator[Result]:
        """See `Sharing.share`."""
        if job.pieces == 0:
            return
        number, done, by_others, first = self._jobs, 0, 0, 0
        self._jobs += 1
        facts = {
            "name": job.name,
            "facts": dict(job.facts),
            "pieces": job.pieces,
            "ahead": job.ahead,
        }
        self._exchange.send(f"job/{number}", facts, job.arrays)
        self._exchange.raise_count("jobs")
        # Pieces behind the first that is missing, of which the results are there.
        arrived, later = deque[Result](), set[int]()

        def count(result: Result) -> Result:
            nonlocal done, first
            done += size(result)
            if job.ahead:
                later.add(cast(tuple[int, Any], result)[0])
                before = first
                while first in later:
                    later.remove(first)
                    first += 1
                self._exchange.raise_count(f"first/{number}", first - before)
            return result

        def receive() -> None:
            nonlocal by_others
            for arrays in self._arrived():
                arrived.append(count(unpack(arrays)))
                by_others += size(arrived[-1])

        for result in work(_claims(self._exchange, number, job, self.num_ranks, self.check, receive)):
            yield count(result)
            receive()
            while arrived:
                yield arrived.popleft()
        if job.pieces is None:
            self._exchange.raise_count(f"next/{number}", MANY_PIECES)
        total = job.total() if callable(job.total) else job.total
        while done < total or arrived:
            self.check()
            if not arrived:
                receive()
            if not arrived:
                time.sleep(POLL_SECONDS)
            while arrived:
                yield arrived.popleft()
        get_logger().info(f"{job.name}: other ranks did {by_others:,} of {total:,}")

    def _arrived(self) -> Iterator[Arrays]:
        """Yield what helpers have sent meanwhile; the error of one that failed is raised."""
        joined = self._exchange.count("joined")
        self.has_helpers |= joined > 0
        for number in range(1, joined + 1):
            read = self._read.get(number, 0)
            for result in range(read, self._exchange.count(f"sent/{number}")):
                received = self._exchange.receive(f"result/{number}/{result}")
                assert received is not None
                self._read[number] = self._exchange.raise_count(f"taken/{number}")
                yield received[1]
            # The heartbeat may have seen already that this helper has left.
            if cause := self._exchange.read(f"left/{number}"):
                raise DistributedError(cause)

    def serve(self, answer: Callable[[Any], Answer]) -> None:
        """Answer the questions of helpers (`Helper.ask`) from now on until this rank leaves, in a thread.

        Args:
            answer: function that is called with a question, which is plain JSON, and returns plain JSON and arrays.
        """
        self._server = threading.Thread(target=self._serve, args=(answer,), name="answers", daemon=True)
        self._server.start()

    def _serve(self, answer: Callable[[Any], Answer]) -> None:
        seen, answered = 0, dict[int, int]()
        with suppress(StoreLostError):
            while not self._leaving.wait(POLL_SECONDS):
                asked = self._exchange.count("asked")
                for number in self._present() if asked > seen else ():
                    for one in range(answered.get(number, 0), self._exchange.count(f"asked/{number}")):
                        try:
                            facts, arrays = answer(self._exchange.read(f"question/{number}/{one}"))
                        except Exception as error:
                            facts, arrays = {"error": f"{type(error).__name__}: {error}"}, {}
                        self._exchange.send(f"answer/{number}/{one}", facts, arrays)
                        answered[number] = one + 1
                seen = asked

    def finish(self, entries: list[Any]) -> None:
        """Tell the helpers that the work is done, and wait until they have left.

        `entries` is plain JSON that `Helper.help` returns.
        """
        self._exchange.write("end", {"entries": entries})
        # The work is done, so a helper that dies now only ends the wait for it.
        self._pulse.on_failure = lambda cause: None
        seen, since = -1, time.monotonic()
        while (present := self._present()) and self._pulse.failure is None:
            asked = self._exchange.count("asked")
            if asked != seen:
                seen, since = asked, time.monotonic()
            if time.monotonic() - since > UNTAKEN_SECONDS:
                get_logger().warning(f"{len(present)} other ranks do not take what was made, so this one leaves")
                return
            time.sleep(POLL_SECONDS)

    def leave(self, cause: str | None, holds_store: bool) -> None:
        """Leave the meeting, which ends it; `cause` is why the work failed. One that holds the store leaves last."""
        self._leaving.set()
        if self._server is not None:
            self._server.join()
        self._pulse.stop()
        with suppress(DistributedError):
            if cause is not None and self._exchange.read("end") is None:
                self._end_all(cause)
            self._exchange.write("closed", True)
            if holds_store:
                linger(self._exchange, lambda: _others(self._exchange))


class Helper:
    """A rank that does pieces of the leader's loops."""

    def __init__(self, exchange: Exchange, launch: Launch) -> None:
        self.launch, self._exchange = launch, exchange
        self._number = exchange.raise_count("joined")
        self._pulse = Pulse(exchange, f"beat/{self._number}", self._watched)
        self._pulse.start()
        self._sent = self._asked = 0
        self._job: tuple[int, int] | None = None

    def _watched(self) -> list[str]:
        return [] if self._exchange.read("closed") is not None else ["beat/leader"]

    def check(self) -> None:
        """Raise an error if the leader has failed, is dead or hangs, or another helper because of which it has ended.

        Raises:
            DistributedError: the cause.
        """
        ended = self._exchange.read("end") or {}
        if "error" in ended:
            raise DistributedError(ended["error"])
        if self._pulse.failure is not None:
            raise self._pulse.failure

    def help(self, handlers: Mapping[str, Handler]) -> list[Any]:
        """Do pieces of jobs until the leader has done its work.

        Args:
            handlers: function for each name of a job: called with the job and the numbers of pieces to do, it gives the
                arrays of their results, an iterator inside a `with` block. An empty one leaves the job to others.

        Returns:
            What the leader passed to `finish`.

        Raises:
            DistributedError: the leader or another helper has failed.
        """
        done = 0
        while True:
            self.check()
            ended = self._exchange.read("end")
            if ended is not None:
                return list(ended["entries"])
            jobs = self._exchange.count("jobs")
            if jobs > done:
                # Earlier jobs are done, because the leader works on one after the other.
                done = jobs
                self._do(jobs - 1, handlers)
            else:
                time.sleep(IDLE_SECONDS)

    def _do(self, number: int, handlers: Mapping[str, Handler]) -> None:
        received = self._exchange.receive(f"job/{number}", keep=True)
        assert received is not None
        facts, arrays = received
        job = Job(facts["name"], facts["facts"], arrays, facts["pieces"], ahead=facts["ahead"])
        self._job = number, MANY_PIECES if job.pieces is None else job.pieces
        if not self.has_work() or job.name not in handlers:
            return
        claims = _claims(self._exchange, number, job, self.launch.num_ranks, self.check)
        with handlers[job.name](job, claims) as results:
            for result in results:
                while self._sent - self._exchange.count(f"taken/{self._number}") >= (job.ahead or MAX_UNREAD):
                    self.check()
                    time.sleep(POLL_SECONDS)
                self._exchange.send(f"result/{self._number}/{self._sent}", {}, result)
                self._sent = self._exchange.raise_count(f"sent/{self._number}")

    def has_work(self) -> bool:
        """Whether the job that this rank was called for last has pieces that no rank has taken."""
        return self._job is not None and self._exchange.count(f"next/{self._job[0]}") < self._job[1]

    def ask(self, questions: Iterable[Any]) -> Iterator[Answer]:
        """Yield the leader's answers to questions, which are plain JSON, in their order; see `Leader.serve`.

        Raises:
            LeaderLeftError: the leader has left.
            DistributedError: the leader cannot answer, or it is dead.
        """
        waiting = deque[int]()
        for question in questions:
            self._exchange.write(f"question/{self._number}/{self._asked}", question)
            waiting.append(self._asked)
            self._asked = self._exchange.raise_count(f"asked/{self._number}")
            self._exchange.raise_count("asked")
            if len(waiting) >= QUESTIONS_AHEAD:
                yield self._answer(waiting.popleft())
        while waiting:
            yield self._answer(waiting.popleft())

    def _answer(self, number: int) -> Answer:
        while (received := self._exchange.receive(f"answer/{self._number}/{number}")) is None:
            self.check()
            if self._exchange.read("closed") is not None:
                raise LeaderLeftError("the rank that has made the compact set has left before it was copied")
            time.sleep(POLL_SECONDS)
        if "error" in received[0]:
            raise DistributedError(f"the rank that leads cannot send what it has made ({received[0]['error']})")
        return received

    def leave(self, cause: str | None, holds_store: bool) -> None:
        """Leave the meeting; `cause` is why this rank failed, or None. One that holds the store leaves last."""
        self._pulse.stop()
        with suppress(DistributedError):
            self._exchange.write(f"left/{self._number}", cause or "")
            if holds_store:
                linger(self._exchange, lambda: _others(self._exchange))
