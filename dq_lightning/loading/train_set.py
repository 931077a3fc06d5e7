"""The training set of a data module: a protocol, and its implementations for a dataset and for a wrapped data module.

The implementation for a packed store is in `store_train_set.py`. This file does not import Lightning.
"""

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
    """A compact set that is ready to load.

    Attributes:
        compact: the compact set.
        dataset: map-style dataset of the kept samples; it delivers items as the wrapped dataset does.
        settings: settings of the wrapped data module's own train loader, adjusted to the compact set; None without a
            wrapped data module.
        patches: patch plan if the images are filled batch by batch during training, else None.
    """

    compact: Compact
    dataset: Any
    settings: LoaderSettings | None = None
    patches: PatchPlan | None = None


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build that do not change the compact set.

    Attributes:
        device: device that the networks and the bins run on, as in `quantize`.
        force: make again what is already in the cache.
        progress: show progress bars.
        check: function that is called with the whole dataset, transforms included, before anything is made of it, and
            raises an error if the dataset is unsuitable; or None.
        default_collate: whether torch's own collate function will make the batches of a training.
    """

    device: str = "auto"
    force: bool = False
    progress: bool = True
    check: Callable[[Any], object] | None = None
    default_collate: bool = False


@dataclass(frozen=True)
class Known:
    """What one process knows about a dataset and sends to the other ranks.

    Attributes:
        source: identity of the dataset's content.
        length: number of samples.
        spots: digest of a few items, with which another process checks that its dataset is the same; empty if the
            source cannot compute it.
    """

    source: str
    length: int
    spots: str


class TrainSet(Protocol):
    """The methods of a training set that a data module calls, in the order `prepare`, `known`, `find`, `open`."""

    def prepare(self, cache: Cache, options: BuildOptions) -> None:
        """Make the compact set if it is not in the cache."""
        ...

    def known(self) -> Known | None:
        """Return what `prepare` found out about the data.

        The result is None in a process that has not prepared, and where other processes do not need it because the user
        gave the identity of the data or its folder.
        """
        ...

    def find(self, cache: Cache, peer: Known | None = None) -> None:
        """Look for the compact set and remember it for `open`; nothing is built.

        Args:
            cache: cache that is searched.
            peer: what a process that prepared knows about the data, or None. If length and a few items of this
                process's dataset agree with it, its identity is used, and this process does not compute it.
        """
        ...

    def open(self, cache: Cache) -> Opened:
        """Open the compact set that `find` found.

        Raises:
            CacheError: `find` found none.
        """
        ...

    def num_classes(self) -> int | None:
        """Return the number of classes before anything is prepared; None if there are no classes.

        Raises:
            DQError: the number cannot be known yet.
        """
        ...

    @property
    def fills_late(self) -> bool:
        """Whether dropped patches are filled during training, batch by batch."""
        ...


class _FoundTrainSet:
    """Base class of training sets whose compact set is found through a plan.

    Attributes:
        plan: plan for the data as they are now; None before `find` and after `take`.
        compact: the compact set that was found, or None.
        prepared: plan and compact set that `prepare` made in this process, or None.
    """

    plan: Plan | None = None
    compact: Compact | None = None
    # `prepare` keeps its result for the `find` that follows in the same process, so that the data are not hashed again.
    prepared: tuple[Plan, Compact] | None = None

    def known(self) -> Known | None:
        if self.prepared is None:
            return None
        plan, compact = self.prepared
        return None if plan.fingerprint is not None else _known(plan, str(compact.parts[STORE]["source"]))

    def take(self, cache: Cache) -> tuple[Plan, Compact]:
        """Return the plan and its compact set, and forget both.

        Raises:
            CacheError: no compact set was found.
        """
        plan, compact, self.plan, self.compact = self.plan, self.compact, None, None
        if plan is None or compact is None:
            raise _missing(cache)
        return plan, compact


def found_with(plan: Plan, cache: Cache, peer: Known | None) -> Compact | None:
    """Return the compact set of a plan from the cache, or None if it is not there.

    If `peer` describes the same data, its identity of the data is tried first, and otherwise the identity that this
    process can look up.

    Args:
        plan: plan of the set.
        cache: cache that is searched.
        peer: what a process that prepared knows about the data, or None.
    """
    if peer is not None and peer.spots and len(plan.source) == peer.length and _known(plan, peer.source) == peer:
        compact = find_compact(plan, cache, source=peer.source)
        if compact is not None:
            return compact
    return find_compact(plan, cache)


class DatasetTrainSet(_FoundTrainSet):
    """A training set that is a dataset.

    Args:
        dataset: the user's dataset.
        wanted: everything that the user asked for.
    """

    def __init__(self, dataset: Any, wanted: Wanted) -> None:
        self._dataset, self._wanted = dataset, without_transform(wanted)
        self.fills_late = wanted.fills_late
        self._num_classes: tuple[int | None] | None = None

    def prepare(self, cache: Cache, options: BuildOptions) -> None:
        # The plan is made again at each call, because the user may have changed the dataset since the last one.
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
    """The training set of a wrapped data module; it exists only after the module's own `setup("fit")`.

    Args:
        datamodule: the wrapped data module.
        wanted: everything that the user asked for.
    """

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
        # The process that prepared ignores `peer`, because it compares this split with the split of its preparation.
        self.compact = found_with(self.plan, cache, None if made is not None else peer)
        if made is None:
            return
        _, prepared = made
        if self.compact is None or self.compact.parts != prepared.parts:
            # The state of the dataset may differ only because it remembers what was read during preparation. Therefore
            # the identity is now computed from the content of all items.
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
    """A map-style dataset of the items that a source delivers, transforms included."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        return self._source.delivered(index)


def build(plan: Plan, cache: Cache, options: BuildOptions) -> Compact:
    """Return the compact set of a plan, found in the cache or made."""

    def check() -> None:
        if options.check is not None:
            options.check(plan.source.subset(torch.arange(len(plan.source))))

    return find_or_build(
        plan, cache, device=options.device, force=options.force, progress=options.progress, before=check
    )


def filled_late(patches: PatchPlan | None) -> PatchPlan | None:
    """Return the patch plan if images are filled batch by batch during training, else None."""
    return patches if patches is not None and patches.config.reconstruct == "batch" else None


def check_deliverable(plan: Plan) -> None:
    """Check before the long work that packed samples can be turned into the items that the dataset delivers.

    Raises:
        StoreError: a sample cannot be stored.
        SourceError: the dataset's transforms give another result for a packed sample than for the original one.
    """
    if plan.store_kind == "packed":
        check_storable(plan, plan.source.finisher(plan.candidates))


def compact_dataset(plan: Plan, compact: Compact, verify: VerifyPolicy) -> Any:
    """Return the kept samples as a map-style dataset that delivers items as the wrapped dataset does."""
    index = compact.selection.index
    if compact.info.kind != "packed":
        return plan.source.subset(index)
    finisher = plan.source.finisher(index)
    if plan.patches is None:
        return open_packed(compact.info.path, finisher=finisher, verify=verify)
    return patched_dataset(compact, plan.patches, finisher, verify)


def patched_dataset(compact: Compact, patches: PatchPlan, finisher: Any, verify: VerifyPolicy) -> Any:
    """Return the samples of a store of patches as a map-style dataset.

    Their dropped patches were filled before training, will be filled by the batch, or are in the mean colour, as the
    patch plan says.

    Args:
        compact: compact set of the store.
        patches: patch plan of the store.
        finisher: applies the user's transforms to each sample, or None.
        verify: how the store is checked when it is opened: `"size"`, `"hash"` or `"off"`.

    Raises:
        StoreError: the store is damaged or belongs to another selection.
        PatchError: the images differ in size and are to be filled by the batch.
    """
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
    """Adjust a loader's settings to the compact set.

    The weights of a sampler are those of the kept samples, and its number of draws per epoch shrinks in proportion to
    the number of samples.
    """
    if settings.weights is not None:
        settings = replace(settings, weights=settings.weights[compact.selection.index])
    if settings.num_draws is not None:
        kept = compact.info.num_samples / compact.info.num_source_samples
        settings = replace(settings, num_draws=max(1, round(settings.num_draws * kept)))
    return settings


def _known(plan: Plan, source: str) -> Known:
    return Known(source, len(plan.source), plan.source.sample_digest())


def _missing(cache: Cache) -> CacheError:
    return CacheError(
        f"no compact set for these data and settings in {cache.root} on rank {global_rank()}. If prepare_data ran on another "
        "node, this one cannot see that folder: pass a shared cache_dir=, or set prepare_data_per_node=True. If the train set "
        "is made by a random split, give the split a seed of its own. If the dataset keeps state that differs between "
        "processes (a time, a cache, a counter), pass fingerprint= with a name of your own for this version of the data"
    )
