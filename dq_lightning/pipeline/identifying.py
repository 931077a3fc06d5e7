"""Ranks of a run share the hashing of a dataset's files, on whose digests the identity of the dataset depends."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np

from dq_lightning.cache.digests import STAMP_SIZE, DigestMemory, Hashed, Rows, Stamps
from dq_lightning.core.launch import Launch, find_launch
from dq_lightning.core.replicas import in_threads
from dq_lightning.core.sharing import Arrays, Distributed, Job
from dq_lightning.pipeline.exchange import StoreLostError, find_store
from dq_lightning.pipeline.meeting import Leader, LeaderLeftError, meet

HashRows = Callable[[Rows], Hashed]
PIECE_FILES = 64


@contextmanager
def shared_digests(memory: DigestMemory, distributed: Distributed) -> Iterator[None]:
    """Let the ranks that look up the same files in the block hash each file once.

    Files are the same if path, size, times and inode are. Nothing is shared where rank 0 would first have to open a store
    for the ranks (`find_store`), because the others would wait for it.
    """
    launch = find_launch() if distributed != "off" else None
    if launch is not None and (launch.address is None or launch.is_hosted):
        memory.spread = partial(_hash_together, lambda: find_store(launch, distributed), launch)
    try:
        yield
    finally:
        memory.spread = None


def _hash_together(
    find: Callable[[], Any], launch: Launch, places: list[str], stamps: Stamps, stale: Rows, hashed: HashRows
) -> list[tuple[Rows, Hashed]]:
    """Have files hashed by all ranks that need the same, see `DigestMemory.spread`; `find` finds their store."""
    store = find() if len(stale) > PIECE_FILES else None
    if store is not None:
        content = os.fsencode("\0".join(places)) + stamps.tobytes() + stale.tobytes()
        name = f"dq_lightning/{launch.attempt}/files/{hashlib.sha256(content).hexdigest()[:32]}"
        # Where the others do not need this rank any more, it hashes what it needs by itself.
        with suppress(LeaderLeftError, StoreLostError), meet(store, launch, name) as one:
            if isinstance(one, Leader):
                made = _lead(one, stale, hashed)
                one.serve(lambda number: ({}, _arrays(*made[number])))
                one.finish([len(made)])
                return made
            (count,) = one.help({"files": partial(_help, hashed)})
            return [_with_unread(*_some(arrays), hashed) for _, arrays in one.ask(range(count))]
    return list(_pieces(stale, hashed, iter(range(_num_pieces(stale)))))


def _num_pieces(stale: Rows) -> int:
    return -(-len(stale) // PIECE_FILES)


def _lead(leader: Leader, stale: Rows, hashed: HashRows) -> list[tuple[Rows, Hashed]]:
    job = Job("files", {}, {"stale": stale}, _num_pieces(stale), len(stale))
    made = leader.share(job, partial(_pieces, stale, hashed), _some, lambda some: len(some[0]))
    return [_with_unread(*some, hashed) for some in made]


@contextmanager
def _help(hashed: HashRows, job: Job, numbers: Iterator[int]) -> Iterator[Iterator[Arrays]]:
    def read(rows: Rows) -> Hashed:
        try:
            return hashed(rows)
        except OSError:
            return np.zeros((len(rows), 32), np.uint8), np.full((len(rows), STAMP_SIZE), -1, np.int64)

    yield (_arrays(*some) for some in _pieces(job.arrays["stale"].astype(np.int64), read, numbers))


def _pieces(stale: Rows, hashed: HashRows, numbers: Iterator[int]) -> Iterator[tuple[Rows, Hashed]]:
    def piece(number: int) -> tuple[Rows, Hashed]:
        rows = stale[number * PIECE_FILES : (number + 1) * PIECE_FILES]
        return rows, hashed(rows)

    return in_threads(partial(piece, number) for number in numbers)


def _with_unread(rows: Rows, some: Hashed, hashed: HashRows) -> tuple[Rows, Hashed]:
    """Hash the files that another rank could not read, so that an error comes from this one, which names the sample."""
    digests, stamps = some
    unread = ~digests.any(axis=1)
    if unread.any():
        digests, stamps = digests.copy(), stamps.copy()
        digests[unread], stamps[unread] = hashed(rows[unread])
    return rows, (digests, stamps)


def _arrays(rows: Rows, some: Hashed) -> Arrays:
    return {"rows": rows, "digests": some[0], "stamps": some[1]}


def _some(arrays: Arrays) -> tuple[Rows, Hashed]:
    digests, stamps = arrays["digests"].astype(np.uint8), arrays["stamps"].astype(np.int64)
    return arrays["rows"].astype(np.int64), (digests, stamps)
