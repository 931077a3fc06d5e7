"""Several ranks of a run make one compact set: the leader builds it, and the others help, then find it in their cache."""

import hashlib
import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dq_lightning.cache import files
from dq_lightning.cache.entries import Cache
from dq_lightning.cache.manifest import MANIFEST
from dq_lightning.cache.tensors import read_features
from dq_lightning.core.console import get_logger
from dq_lightning.core.devices import device_kind, device_of_rank
from dq_lightning.core.errors import CacheError, DistributedError
from dq_lightning.core.launch import Launch, find_launch
from dq_lightning.core.records import Features
from dq_lightning.core.sharing import Distributed, Sharing
from dq_lightning.pipeline.binning import help_to_bin
from dq_lightning.pipeline.build import Build
from dq_lightning.pipeline.exchange import PART_BYTES, Exchange, StoreLostError, find_store, finish_with_all
from dq_lightning.pipeline.extracting import help_features
from dq_lightning.pipeline.filling import help_filling
from dq_lightning.pipeline.meeting import Answer, Handler, Helper, Leader, LeaderLeftError, meet
from dq_lightning.pipeline.packing import help_packing
from dq_lightning.pipeline.plan import BINS, FEATURES, STORE
from dq_lightning.pipeline.scoring import help_scores

Made = TypeVar("Made")
Entry = tuple[str, dict[str, Any]]
# All ranks call `call_beside_all` equally often.
_rounds = itertools.count()


def call_beside_all(action: Callable[[], Made]) -> Made:
    """Call a function on every rank of the process group, and return its result once all have done so.

    So a rank that finds a set in its own cache does not wait in a collective of the group while another makes it.

    Raises:
        DistributedError: another rank is dead or silent.
    """
    launch = find_launch()
    if launch is None:
        return action()
    return finish_with_all(
        Exchange(find_store(launch, "all"), f"dq_lightning/all/{next(_rounds)}", launch.rank), launch.num_ranks, action
    )


def build_together(
    build: Build,
    distributed: Distributed,
    targets: tuple[str, ...],
    make: Callable[[], Made],
    find: Callable[[], Made | None],
) -> Made:
    """Return what a build makes, which the ranks that want the same make together.

    A rank waits for no other one to come. Where no process group or launcher holds a store it looks for that of rank 0
    for up to a minute, or until it finds in its cache what rank 0 has made. Without other ranks, or with `"off"`, this
    process makes it. A rank that nobody helps goes on alone, with `"auto"`, when the store is gone: rank 0 may have made
    something else, and ended earlier.

    Args:
        build: the build of this process.
        distributed: see `quantize`.
        targets: stations whose entries are wanted.
        make: function that runs the build.
        find: function that looks for the result in the cache of this process.

    Raises:
        DQError: the build failed on this rank.
        DistributedError: it failed on another rank, or another rank is dead.
    """
    launch = find_launch() if distributed != "off" else None
    store = None if launch is None else find_store(launch, distributed, lambda: not build.force and find() is not None)
    if launch is None or store is None:
        return make()
    if build.devices == ("auto",):
        build.devices = (device_of_rank(launch.local_rank),)
    helping = Sharing()
    helping.num_ranks, helping.ranks_on_node = launch.num_ranks, launch.ranks_on_node

    def lead(sharing: Sharing) -> tuple[Made, list[Entry]]:
        build.sharing = sharing
        return make(), build.entries(*targets)

    def help_(helper: Helper) -> Made | None:
        entries = helper.help(_handlers(build, helping, helper))
        found = find()
        if found is None:
            _copy_all(build.cache, helper, entries)
            found = find()
        return found

    def find_late() -> Made | None:
        return None if build.force else find()

    return _meet_to(launch, store, _digest(build, targets), build.cache, distributed, lead, help_, find_late)


def read_together(
    cache: Cache,
    digest: str,
    devices: tuple[str, ...],
    distributed: Distributed,
    read: Callable[[Sharing, tuple[str, ...]], list[Entry]],
    handler: Callable[[tuple[str, ...]], Handler],
) -> None:
    """Read a stream and make its features with all ranks that want the same, each of which reads the whole stream.

    The others have the entries in their caches afterwards. Nothing is shared where rank 0 would first have to open a store
    for the ranks, because the others would wait for it.

    Args:
        cache: cache of this process.
        digest: digest of what the features depend on, as far as it is known before the stream is read.
        devices: devices that were asked for; `read` and `handler` are called with those to use.
        distributed: see `quantize`.
        read: function that reads the stream, sharing its batches, and returns the entries that it has made.
        handler: function that returns what does pieces of the job `"features"` of another rank.

    Raises:
        DQError: the reading failed on this rank.
        DistributedError: it failed on another rank, or another rank is dead.
    """
    launch = find_launch() if distributed != "off" else None
    is_open = launch is not None and (launch.address is None or launch.is_hosted)
    store = find_store(launch, distributed) if launch is not None and is_open else None
    if launch is None or store is None:
        read(Sharing(), devices)
        return
    own = (device_of_rank(launch.local_rank),) if devices == ("auto",) else devices

    def help_(helper: Helper) -> bool:
        _copy_all(cache, helper, helper.help({"features": handler(own)}))
        return True

    _meet_to(
        launch,
        store,
        f"stream/{digest}-{device_kind(own[0])}",
        cache,
        distributed,
        lambda sharing: (True, read(sharing, own)),
        help_,
        lambda: None,
    )


def _meet_to(
    launch: Launch,
    store: Any,
    digest: str,
    cache: Cache,
    distributed: Distributed,
    lead: Callable[[Sharing], tuple[Made, list[Entry]]],
    help_: Callable[[Helper], Made | None],
    find_late: Callable[[], Made | None],
) -> Made:
    """Return what is made by the ranks that come to one meeting, named by a digest of all that it depends on.

    Args:
        launch: this rank.
        store: store of all ranks.
        digest: digest of what is made.
        cache: cache of this process.
        distributed: see `quantize`.
        lead: function that makes it, sharing the work, and returns it with its entries of the cache.
        help_: function that helps another rank, and returns what is made or None, if that could not be had.
        find_late: function that returns what is made if it is there although the store is gone, or None.
    """
    made: Made | None = None
    while made is None:
        one: Leader | Helper | None = None
        try:
            with meet(store, launch, f"dq_lightning/{launch.attempt}/{digest}") as one:
                if isinstance(one, Leader):
                    one.serve(partial(_answer, cache))
                    made, entries = lead(one)
                    # What is made is made, also when the others can no longer be told.
                    with suppress(DistributedError):
                        one.finish([list(entry) for entry in entries])
                else:
                    made = help_(one)
        except LeaderLeftError as error:
            get_logger().info(f"rank {launch.rank} makes it again: {error}")
        except StoreLostError as error:
            made = None if isinstance(one, Leader) else find_late()
            if made is not None:
                break
            if distributed == "all" or isinstance(one, Helper) or (one is not None and one.has_helpers):
                raise
            get_logger().info(f"{error}. No rank helps this one, so it goes on alone")
            return lead(Sharing())[0]
    return made


def _copy_all(cache: Cache, helper: Helper, entries: list[Any]) -> None:
    """Copy entries from the leader, as far as they are not in this cache."""
    for station, parts in entries:
        cache.build(station, parts, partial(_copy, helper, station, parts, lambda: True))


def _digest(build: Build, targets: tuple[str, ...]) -> str:
    """Return a digest of all that the work depends on; ranks that differ in it do not share it."""
    features = asdict(build.plan.config.features) | {"num_workers": None}
    text = files.canonical_json([build.parts, features, build.force, targets, device_kind(build.devices[0])])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _handlers(build: Build, sharing: Sharing, helper: Helper) -> dict[str, Handler]:
    plan, devices = build.plan, list(build.devices)
    handlers: dict[str, Handler] = {
        "features": partial(help_features, plan, devices, sharing),
        "packing": partial(help_packing, plan),
    }

    def needed(station: str) -> Path | None:
        """The entry that a job works on, copied from the leader if this process does not see it; None if it is too late."""
        parts = build.parts[station]
        try:
            return build.cache.build(station, parts, partial(_copy, helper, station, parts, helper.has_work))
        except _TooLateError:
            return None
        except CacheError as error:
            get_logger().warning(f"rank {helper.launch.rank} does not help with what was made before: {error}")
            return None

    def features() -> Features | None:
        return None if needed(FEATURES) is None else build.cache.read(FEATURES, build.parts[FEATURES], read_features)

    if BINS in build.parts:
        handlers["bins"] = partial(help_to_bin, plan, features, devices[0], sharing)
    if plan.patches is not None:
        handlers["saliency"] = partial(help_scores, plan, devices, sharing)
        handlers["filling"] = partial(help_filling, plan.patches, partial(needed, STORE), devices)
    return handlers


class _TooLateError(Exception):
    """All pieces of a job were taken before a helper had what it needs for it."""


def _answer(cache: Cache, question: Any) -> Answer:
    """Give the names and sizes of the files of an entry, or a part of one, as `_copy` asks."""
    station, parts, name, part = question
    folder = cache.place(station, parts)
    if name is None:
        return {
            "files": [[path.name, path.stat().st_size] for path in sorted(folder.iterdir()) if path.name != MANIFEST]
        }, {}
    with (folder / _plain_name(name)).open("rb") as file:
        file.seek(part * PART_BYTES)
        return {}, {"content": np.frombuffer(file.read(PART_BYTES), np.uint8)}


def _copy(helper: Helper, station: str, parts: dict[str, Any], is_wanted: Callable[[], bool], folder: Path) -> None:
    """Copy the files of an entry from the leader, whose cache this process cannot see, into a folder.

    Of several ranks with the same cache one copies an entry, and the others wait for it.

    Raises:
        _TooLateError: `is_wanted` says that the copy is of no use any more.
    """
    ((facts, _),) = helper.ask([[station, parts, None, 0]])
    places = [
        (_plain_name(name), part) for name, size in facts["files"] for part in range(max(1, -(-size // PART_BYTES)))
    ]
    answers = helper.ask([station, parts, *place] for place in places)
    for (name, _), (_, arrays) in zip(places, answers, strict=True):
        if not is_wanted():
            raise _TooLateError
        with (folder / name).open("ab") as file:
            file.write(arrays["content"].tobytes())


def _plain_name(name: str) -> str:
    if Path(name).name != name:
        raise ValueError(f"a file of an entry has the name {name!r}")
    return name
