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
from dq_lightning.core.launch import find_launch
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
    name = f"dq_lightning/{launch.attempt}/{_digest(build, targets)}"
    helping = Sharing()
    helping.num_ranks, helping.ranks_on_node = launch.num_ranks, launch.ranks_on_node
    found: Made | None = None
    while found is None:
        one: Leader | Helper | None = None
        try:
            with meet(store, launch, name) as one:
                if isinstance(one, Leader):
                    build.sharing = one
                    one.serve(partial(_answer, build.cache))
                    found = make()
                    # What is made is made, also when the others can no longer be told.
                    with suppress(DistributedError):
                        one.finish([list(entry) for entry in build.entries(*targets)])
                else:
                    entries = one.help(_handlers(build, helping, one))
                    found = find()
                    if found is None:
                        for station, parts in entries:
                            build.cache.build(station, parts, partial(_copy, one, station, parts, lambda: True))
                        found = find()
        except LeaderLeftError as error:
            get_logger().info(f"rank {launch.rank} makes it again: {error}")
        except StoreLostError as error:
            found = find() if not isinstance(one, Leader) and not build.force else None
            if found is not None:
                break
            if distributed == "all" or isinstance(one, Helper) or (one is not None and one.has_helpers):
                raise
            get_logger().info(f"{error}. No rank helps this one, so it goes on alone")
            build.sharing = Sharing()
            return make()
    return found


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
