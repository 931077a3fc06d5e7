"""The training set behind a data module: a dataset, a wrapped data module, or a packed store. No Lightning here."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from dq_lightning.cache.entries import Cache
from dq_lightning.core.config import VerifyPolicy
from dq_lightning.core.errors import CacheError, ConfigError, DQError, SourceError
from dq_lightning.core.isolation import isolated_random_state
from dq_lightning.loading.batch_filling import UnfilledDataset
from dq_lightning.loading.inner import probe_train_loader
from dq_lightning.loading.loaders import LoaderSettings, check_collatable, read_loader
from dq_lightning.loading.ranks import global_rank
from dq_lightning.loading.wanted import Wanted, without_transform
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.pipeline.compact import Compact, check_same_samples, find_compact, open_packed
from dq_lightning.pipeline.filling import stored_place
from dq_lightning.pipeline.packing import check_storable
from dq_lightning.pipeline.patch_plan import PatchPlan
from dq_lightning.pipeline.plan import STORE, Plan, source_identity
from dq_lightning.pipeline.quantize import find_or_build
from dq_lightning.sources.base import Source


@dataclass
class Opened:
    """A compact set ready to load.

    Attributes:
        compact: what was kept.
        dataset: map-style, gives what the wrapped dataset gives.
        settings: of the wrapped data module's own train loader, cut down to the compact set; None without one.
        patches: the step on patches, when its images are to be filled batch by batch; else None.
    """

    compact: Compact
    dataset: Any
    settings: LoaderSettings | None = None
    patches: PatchPlan | None = None


@dataclass(frozen=True)
class BuildOptions:
    """How a compact set is made; none of it changes what comes out.

    Attributes:
        device: as in `quantize`.
        force: make what is in the cache already.
        progress: show bars.
        check: called with the whole dataset, as it is delivered, before anything is made of it; raises what is wrong with it.
        default_collate: batches for a training will be made by torch's own collate function.
    """

    device: str = "auto"
    force: bool = False
    progress: bool = True
    check: Callable[[Any], object] | None = None
    default_collate: bool = False


@dataclass(frozen=True)
class Known:
    """What one process knows of a dataset.

    Attributes:
        source: identity of its content.
        length: number of samples.
        spots: digest of a few items, by which another process sees that its dataset is the same.
    """

    source: str
    length: int
    spots: str


class TrainSet(Protocol):
    """What a data module needs of its training set."""

    def prepare(self, cache: Cache, options: BuildOptions) -> None:
        """Make the compact set if it is not cached."""
        ...

    def known(self) -> Known | None:
        """What `prepare` found the data to be; None in a process that has not prepared, or where nobody need be told."""
        ...

    def find(self, cache: Cache, peer: Known | None = None) -> None:
        """Look for the compact set; builds nothing. What was found is remembered for `open`.

        Args:
            cache: where it is.
            peer: what a process that prepared knows of the data: where a few items are the same, they are not identified anew.
        """
        ...

    def open(self, cache: Cache) -> Opened:
        """Open what was found.

        Raises:
            CacheError: nothing was.
        """
        ...

    def num_classes(self) -> int | None:
        """Known before anything is prepared, or an error."""
        ...

    @property
    def fills_late(self) -> bool:
        """Whether images are filled batch by batch."""
        ...


class _FoundTrainSet:
    """The part that finds and opens the compact set of a plan.

    Attributes:
        plan: of the data as they are now; None before `find`.
        compact: what was found, or None.
    """

    plan: Plan | None = None
    compact: Compact | None = None
    # left by prepare for the open that follows in the same process: it saves hashing the data a second time
    prepared: tuple[Plan, Compact] | None = None

    def known(self) -> Known | None:
        if self.prepared is None:
            return None
        plan, compact = self.prepared
        return None if plan.fingerprint is not None else _known(plan, str(compact.parts[STORE]["source"]))

    def take(self, cache: Cache) -> tuple[Plan, Compact]:
        """The plan and its compact set, which are forgotten here.

        Raises:
            CacheError: there is none.
        """
        plan, compact, self.plan, self.compact = self.plan, self.compact, None, None
        if plan is None or compact is None:
            raise _missing(cache)
        return plan, compact


def found_with(plan: Plan, cache: Cache, peer: Known | None) -> Compact | None:
    """The compact set of a plan, under what another process knows of the same data or else under their own identity."""
    if peer is not None and peer.spots and len(plan.source) == peer.length and _known(plan, peer.source) == peer:
        compact = find_compact(plan, cache, source=peer.source)
        if compact is not None:
            return compact
    return find_compact(plan, cache)


class DatasetTrainSet(_FoundTrainSet):
    """A dataset of the user's."""

    def __init__(self, dataset: Any, wanted: Wanted) -> None:
        self._dataset, self._wanted = dataset, without_transform(wanted)
        self.fills_late = wanted.fills_late
        self._num_classes: tuple[int | None] | None = None

    def prepare(self, cache: Cache, options: BuildOptions) -> None:
        # planned anew each time: the user may have changed the dataset since
        plan = self._wanted.plan(self._dataset)
        if options.default_collate and not self.fills_late:
            check_collatable(Delivered(plan.source), "the train set")
        check_deliverable(plan)
        self.prepared = plan, build(plan, cache, options)

    def find(self, cache: Cache, peer: Known | None = None) -> None:
        prepared, self.prepared = self.prepared, None
        self.plan, self.compact = prepared or (self._wanted.plan(self._dataset), None)
        self.compact = self.compact or found_with(self.plan, cache, peer)

    def open(self, cache: Cache) -> Opened:
        plan, compact = self.take(cache)
        return Opened(compact, compact_dataset(plan, compact, cache.verify), patches=filled_late(plan.patches))

    def num_classes(self) -> int | None:
        if self._num_classes is None:
            labels = self._wanted.plan(self._dataset).labels
            self._num_classes = (labels.num_classes if labels is not None else None,)
        return self._num_classes[0]


class DataModuleTrainSet(_FoundTrainSet):
    """The train set of a wrapped data module; it exists only after the module's own `setup("fit")`."""

    def __init__(self, datamodule: Any, wanted: Wanted) -> None:
        self._datamodule, self._wanted = datamodule, without_transform(wanted)
        self.fills_late = wanted.fills_late
        self._settings = LoaderSettings()

    def prepare(self, cache: Cache, options: BuildOptions) -> None:
        with isolated_random_state(self._wanted.seed):
            dataset, _ = read_loader(probe_train_loader(self._datamodule))
        plan = self._wanted.plan(dataset)
        check_deliverable(plan)
        self.prepared = plan, build(plan, cache, options)

    def find(self, cache: Cache, peer: Known | None = None) -> None:
        made, self.prepared = self.prepared, None
        dataset, self._settings = read_loader(self._datamodule.train_dataloader())
        self.plan = self._wanted.plan(dataset)
        # the process that prepared compares the whole split with that of its preparation
        self.compact = found_with(self.plan, cache, None if made is not None else peer)
        if made is None:
            return
        _, prepared = made
        if self.compact is None or self.compact.parts != prepared.parts:
            # the dataset may only remember what was read while it was prepared: all of it is compared
            self.compact = find_compact(self.plan, cache, source=source_identity(self.plan, cache.memory, full=True))
        if self.compact is None or self.compact.parts != prepared.parts:
            raise self._changed_split()
        self.compact = prepared

    def open(self, cache: Cache) -> Opened:
        plan, compact = self.take(cache)
        dataset = compact_dataset(plan, compact, cache.verify)
        return Opened(compact, dataset, cut_down(self._settings, compact), filled_late(plan.patches))

    def num_classes(self) -> int | None:
        known: int | None = getattr(self._datamodule, "num_classes", None)
        if known is None:
            raise ConfigError("num_classes of a wrapped data module is known after setup('fit')")
        return known

    def _changed_split(self) -> DQError:
        return SourceError(
            f"{type(self._datamodule).__name__}.setup('fit') gave another train set than in prepare_data: its split depends "
            "on more than the seeded random state. Give the split a generator with a seed of its own"
        )


class Delivered:
    """A source as a map-style dataset of what it delivers."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        return self._source.delivered(index)


def build(plan: Plan, cache: Cache, options: BuildOptions) -> Compact:
    """The compact set, found or made."""

    def check() -> None:
        if options.check is not None:
            options.check(plan.source.subset(torch.arange(len(plan.source))))

    return find_or_build(
        plan, cache, device=options.device, force=options.force, progress=options.progress, before=check
    )


def filled_late(patches: PatchPlan | None) -> PatchPlan | None:
    """The step on patches if its images are filled batch by batch."""
    return patches if patches is not None and patches.config.reconstruct == "batch" else None


def check_deliverable(plan: Plan) -> None:
    """Tell before the hours of work that packed samples could not be turned into what the dataset delivers."""
    if plan.store_kind == "packed":
        check_storable(plan, plan.source.finisher(plan.candidates))


def compact_dataset(plan: Plan, compact: Compact, verify: VerifyPolicy) -> Any:
    """The kept samples as the wrapped dataset would deliver them."""
    index = compact.selection.index
    if compact.info.kind != "packed":
        return plan.source.subset(index)
    finisher = plan.source.finisher(index)
    if plan.patches is None:
        return open_packed(compact.info.path, finisher=finisher, verify=verify)
    return patched_dataset(compact, plan.patches, finisher, verify)


def patched_dataset(compact: Compact, patches: PatchPlan, finisher: Any, verify: VerifyPolicy) -> Any:
    """The samples of a store of patches, filled ahead, to be filled by the batch, or with the mean colour."""
    if patches.fills_ahead:
        assert compact.filled is not None
        filled = PackedDataset(compact.filled, finisher=finisher, verify=verify)
        check_same_samples(filled, compact.selection)
        return filled
    if patches.config.reconstruct == "off":
        return open_packed(compact.info.path, finisher=finisher, verify=verify)
    samples = open_packed(compact.info.path, verify=verify, patches="packed")
    return UnfilledDataset(samples, stored_place(samples), finisher)


def cut_down(settings: LoaderSettings, compact: Compact) -> LoaderSettings:
    """A loader's settings on the compact set: draw weights of the kept samples, draws per epoch in proportion."""
    if settings.weights is not None:
        settings = replace(settings, weights=settings.weights[compact.selection.index])
    if settings.num_draws is not None:
        kept = compact.info.num_samples / compact.info.num_source_samples
        settings = replace(settings, num_draws=max(1, round(settings.num_draws * kept)))
    return settings


def _known(plan: Plan, source: str) -> Known:
    spots = getattr(plan.source, "spot_digest", None)
    return Known(source, len(plan.source), "" if spots is None else spots())


def _missing(cache: Cache) -> CacheError:
    return CacheError(
        f"no compact set for these data and settings in {cache.root} on rank {global_rank()}. If prepare_data ran on another "
        "node, this one cannot see that folder: pass a shared cache_dir=, or set prepare_data_per_node=True. If the train set "
        "is made by a random split, give the split a seed of its own. If the dataset keeps state that differs between "
        "processes (a time, a cache, a counter), pass fingerprint= with a name of your own for this version of the data"
    )
