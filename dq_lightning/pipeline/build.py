"""The flow from a dataset to its compact set: the steps of the method, found in the cache or made in their order.

`STEPS` is the method. A run first walks back from the entry that it wants, to find the deepest entries that are there,
and then makes the missing ones forward, each under the lock of its own entry alone. Another process may make some of
them meanwhile, or remove or damage an entry between two steps; a run then walks back again. This file does not use
Lightning.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Subset

from dq_lightning.cache.entries import Cache
from dq_lightning.cache.tensors import read_bins, read_features, read_scores, read_selection
from dq_lightning.core.console import get_logger
from dq_lightning.core.devices import DeviceNames, device_names
from dq_lightning.core.errors import CacheError, StoreError
from dq_lightning.core.sharing import Sharing
from dq_lightning.features.loading import explaining_lost_loaders
from dq_lightning.pipeline.binning import check_bins, make_bins_entry
from dq_lightning.pipeline.compact import Compact, filled_key, open_compact
from dq_lightning.pipeline.extracting import make_features
from dq_lightning.pipeline.filling import make_filled
from dq_lightning.pipeline.fitting import make_fitting_store
from dq_lightning.pipeline.packing import make_store
from dq_lightning.pipeline.patch_bytes import describe_costs
from dq_lightning.pipeline.plan import (
    BINS,
    FEATURES,
    FILLED,
    PATCHES,
    SELECTION,
    STORE,
    Plan,
    scored_parts,
    usable_parts,
)
from dq_lightning.pipeline.scoring import check_saliency, make_scores
from dq_lightning.pipeline.selecting import check_selection, make_selection
from dq_lightning.pipeline.step import Step, Task

# A plan without a station (no bins where the samples were given, no scores where all patches are kept) skips its step.
STEPS = (
    Step("features", FEATURES, (), make_features, read_features),
    Step("bins", BINS, (FEATURES,), make_bins_entry, read_bins, check=check_bins),
    Step("selection", SELECTION, (BINS,), make_selection, read_selection, check=check_selection),
    Step("saliency", PATCHES, (SELECTION,), make_scores, read_scores, scored_parts, check_saliency),
    Step("store", STORE, (SELECTION, PATCHES), make_store, partial(open_compact, parts={}, reused=False)),
    Step("filling", FILLED, (STORE,), make_filled, Path, filled_key),
)
# Under a budget of bytes the number of samples follows from what they take, so that step draws them itself.
FITTING_STEPS = (
    *STEPS[:2],
    Step("store", STORE, (BINS,), make_fitting_store, STEPS[4].read, check=check_saliency),
    STEPS[5],
)
# So many times a run walks back at most, because entries keep being removed or damaged while it works.
MAX_WALKS = 5


class Build:
    """One build of a compact set, or of bins, through all the steps that it needs.

    Args:
        plan: plan of the run.
        source: identity of the data.
        cache: cache that keeps the entry of every step.
        device: device that the networks and the bins run on; several share the batches of the networks.
        force: make again what is already in the cache.
        progress: show progress bars.
        seconds: wall time in seconds that was spent before this build, by the name of the work.

    Attributes:
        sharing: how long loops are shared with other processes; with nobody, unless it is set.
        parts: parts of the plan's own entries, by station.
        steps: the steps that the plan goes through.
        has_made: whether this process made any entry, rather than finding all of them.

    Raises:
        CacheError: the identity of a network could not be written to the cache.
    """

    def __init__(
        self,
        plan: Plan,
        source: str,
        cache: Cache,
        device: DeviceNames,
        *,
        force: bool,
        progress: bool,
        seconds: dict[str, float],
    ) -> None:
        self.plan = plan.resolve(cache.memory)
        identities = self.plan.identities(cache.memory)
        if identities is None:
            raise CacheError(
                f"the digest of a network's weights could not be written to {cache.root}: pass a cache_dir= that can be written"
            )
        self.cache, self.source, self.force, self.progress = cache, source, force, progress
        self.devices = device_names(device)
        self.seconds = seconds
        self.parts, *self._equivalent = usable_parts(self.plan, source, identities)
        self.steps = [
            replace(step, needs=tuple(name for name in step.needs if name in self.parts))
            for step in (STEPS if plan.config.max_bytes is None else FITTING_STEPS)
            if step.station in self.parts
        ]
        self.has_made = False
        self.sharing = Sharing()
        self._marks = self.plan.source.marks(fresh=False)
        self._results: dict[str, Any] = {}
        self._finished: set[str] = set()

    def compact(self) -> Compact:
        """Return the compact set, found in the cache or made, and log what was kept and how long each step took."""
        # Finding the identity of the data came before the build, and its seconds count towards the total.
        started, before = time.perf_counter(), sum(self.seconds.values())
        log, total = get_logger(), len(self.plan.source)
        results = self.run(*(station for station in (STORE, FILLED) if station in self.parts))
        compact: Compact = replace(results[STORE], parts=self.parts, filled=results.get(FILLED))
        kept, whole = len(compact.selection), time.perf_counter() - started
        if not self.has_made:
            log.info(
                f"reusing the compact set of {kept:,} of {total:,} samples, which another process made while this one waited "
                f"{whole:.1f} s: {compact.info.path}"
            )
            return replace(compact, info=replace(compact.info, reused=True))
        # The seconds of each step are rounded down, so that they never sum to more than the total.
        spent = ", ".join(f"{name} {math.floor(10 * seconds) / 10:.1f} s" for name, seconds in self.seconds.items())
        log.info(f"kept {kept:,} of {total:,} samples in {before + whole:.1f} s ({spent}): {compact.info.path}")
        if self.plan.patches is not None:
            log.info(describe_costs(compact.info))
        return replace(compact, info=replace(compact.info, seconds=self.seconds))

    def run(self, *targets: str) -> dict[str, Any]:
        """Return the results of the target stations by station, after making what is missing.

        Raises:
            DQError: a step cannot be made.
            StoreError: entries were removed or damaged again and again while this run worked.
        """
        missing, walks = self._walk_back(targets), 1
        while missing:
            self.sharing.check()
            try:
                self._make(missing, targets)
            except StoreError:
                # The entry that the step was made from may have been removed or damaged meanwhile; this walk finds out.
                # If it was not, the error is about the step itself.
                again, walks = self._walk_back(targets), walks + 1
                if again[:1] == missing[:1] or walks > MAX_WALKS:
                    raise
                missing = again
            else:
                missing = missing[1:]
                # What no later step needs is released, such as the features.
                wanted = {*targets, *(name for step in missing for name in step.needs)}
                self._results = {name: result for name, result in self._results.items() if name in wanted}
        return self._results

    def entries(self, *targets: str) -> list[tuple[str, dict[str, Any]]]:
        """Return station and parts of the key of each target that `run` was called with."""
        return [(step.station, self._key(step)) for step in self.steps if step.station in targets]

    def _walk_back(self, targets: Sequence[str]) -> list[Step]:
        """Return the steps that are missing for some targets, in their order, after reading what these start from."""
        self._results = {}
        wanted, missing = set(targets), list[Step]()
        for step in reversed(self.steps):
            if step.station in wanted and not self._find(step):
                missing.insert(0, step)
                wanted.update(step.needs)
        return missing

    def _find(self, step: Step) -> bool:
        """Whether the entry of a step is there; its result is then among the results.

        A key that depends on earlier results is known only if these are there too.
        """
        if step.station in self._results:
            return True
        if self._is_forced(step):
            return False
        if step.key is not None and not all(self._find(other) for other in self.steps if other.station in step.needs):
            return False
        result = self.cache.read(step.station, self._key(step), step.read)
        if result is not None:
            self._results[step.station] = result
        return result is not None

    def _is_forced(self, step: Step) -> bool:
        """Whether the entry of a step has to be made even if it is there."""
        return self.force and step.station not in self._finished

    def _key(self, step: Step) -> dict[str, Any]:
        """Return the parts of the key of a step's entry."""
        own = self.parts[step.station]
        return own if step.key is None else step.key(own, *(self._results[name] for name in step.needs))

    def _make(self, missing: list[Step], targets: Sequence[str]) -> None:
        """Make the entry of the first missing step, unless another process makes it first, and read its result."""
        step, parts = missing[0], self._key(missing[0])

        def write(folder: Path) -> None:
            # Nothing is said earlier, because another process may make the entry while this one waits for its lock.
            if not self.has_made:
                self.has_made = True
                self._begin(missing, targets, parts)
            started = time.perf_counter()
            with explaining_lost_loaders():
                step.make(self._task(step, parts, folder), *(self._results[name] for name in step.needs))
            self._spent(step, started)

        force = self._is_forced(step)
        self._results[step.station] = self.cache.load(step.station, parts, write, step.read, force=force)
        self._finished.add(step.station)

    def _task(self, step: Step, parts: dict[str, Any], folder: Path) -> Task:
        place = partial(self.cache.place, step.station)
        # A run with on_error="raise" that stopped at an unreadable sample left shards of the samples before it. They are
        # valid here too.
        also = [place(others[step.station]) for others in self._equivalent if step.station == FEATURES]
        return Task(
            self.plan,
            self.cache,
            self.source,
            self._marks,
            folder=folder,
            entry=place(parts),
            parts=parts,
            devices=self.devices,
            progress=self.progress,
            force=self.force,
            also=next(iter(also), None),
            sharing=self.sharing,
        )

    def _begin(self, missing: list[Step], targets: Sequence[str], parts: dict[str, Any]) -> None:
        """Log, once per build, why something is made, and check that the steps which are missing can be made."""
        target = next(step for step in missing if step.station in targets)
        get_logger().info(self._reason(missing[0], target, parts))
        for step in missing:
            if step.check is not None:
                started = time.perf_counter()
                step.check(self.plan, self.devices[0])
                self._spent(step, started)

    def _reason(self, first: Step, target: Step, parts: dict[str, Any]) -> str:
        """Return a sentence that says why a target is made, and which results before the first step are reused."""
        encoder = "" if self.plan.encoder is None else f"; encoder: {self.plan.encoder.description}"
        if self.force:
            return f"computing everything because force_recompute=True{encoder}"
        part = isinstance(getattr(self.plan.source, "given", None), Subset)
        wanted = parts if target is first else self.parts[target.station]
        why = self.cache.explain_miss(target.station, wanted, maybe_split=part)
        reused = [step.name for step in self.steps[: self.steps.index(first)]]
        if first.station == FILLED:
            reused = ["the packed patches"]
        if not reused:
            return why + encoder
        *others, last = reused
        return f"{why}; reusing {', '.join(others)} and {last}" if others else f"{why}; reusing {last}"

    def _spent(self, step: Step, started: float) -> None:
        self.seconds[step.name] = round(self.seconds.get(step.name, 0.0) + time.perf_counter() - started, 3)
        # What a later step checks comes before the first step is made, and yet all are listed in the order of the flow.
        order = {other.name: number for number, other in enumerate(self.steps, start=1)}
        self.seconds = dict(sorted(self.seconds.items(), key=lambda pair: order.get(pair[0], 0)))
