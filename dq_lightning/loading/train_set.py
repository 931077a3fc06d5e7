"""The training set of a data module: an abstract class, and its kinds for a dataset and for a wrapped data module.

The kind for a packed store is in `store_train_set.py`. This file does not import Lightning.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from dq_lightning.cache.entries import Cache
from dq_lightning.core.config import VerifyPolicy
from dq_lightning.core.devices import DeviceNames
from dq_lightning.core.errors import CacheError, ConfigError, SourceError
from dq_lightning.core.isolation import isolated_random_state
from dq_lightning.core.sharing import Distributed
from dq_lightning.loading.batch_filling import UnfilledDataset
from dq_lightning.loading.loaders import LoaderSettings, check_collatable, read_loader
from dq_lightning.loading.processes import OnOwnDataset
from dq_lightning.loading.ranks import global_rank
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.pipeline.compact import Compact, check_same_samples, find_compact, open_packed
from dq_lightning.pipeline.filling import stored_place
from dq_lightning.pipeline.packing import check_storable
from dq_lightning.pipeline.patch_plan import PatchPlan
from dq_lightning.pipeline.plan import STORE, Plan, make_plan, source_identity
from dq_lightning.pipeline.quantize import find_or_build
from dq_lightning.pipeline.wanted import Wanted
from dq_lightning.sources.base import KeptSamples, Source


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build that do not change the compact set.

    Attributes:
        device: device that the networks and the bins run on, or several, as in `quantize`.
        force: make again what is already in the cache.
        progress: show progress bars.
        check: function that is called with the whole dataset, transforms included, before anything is made of it, and
            raises an error if the dataset is unsuitable; or None.
        default_collate: whether torch's own collate function will make the batches of a training.
        distributed: whether ranks share the work, as in `quantize`.
    """

    device: DeviceNames = "auto"
    force: bool = False
    progress: bool = True
    check: Callable[[Any], object] | None = None
    default_collate: bool = False
    distributed: Distributed = "off"


@dataclass(frozen=True)
class PeerIdentity:
    """Identity of a dataset, which a rank that prepared sends to the other ranks, so that they need not compute it.

    Attributes:
        source: identity of the dataset's content.
        length: number of samples.
        sample_digest: digest of a few items, with which another process checks that its dataset is the same; empty if
            the source cannot compute it.
    """

    source: str
    length: int
    sample_digest: str

    def fits(self, source: Source) -> bool:
        """Whether the length and a few items of a source agree with this identity."""
        same = bool(self.sample_digest) and (source.in_order or len(source) == self.length)
        if not same or source.sample_digest() != self.sample_digest:
            return False
        source.expect(self.source, self.length)
        return True


@dataclass(frozen=True)
class Located:
    """A compact set that was made or found, and what this process needs to open it.

    Attributes:
        compact: the compact set.
        plan: plan for the data of this process; None for a packed store, which is opened without its dataset.
        settings: settings of the wrapped data module's own train loader; None without a wrapped data module.
    """

    compact: Compact
    plan: Plan | None = None
    settings: LoaderSettings | None = None

    def peer_identity(self) -> PeerIdentity | None:
        """Return the identity of the data for the other ranks.

        It is None where they do not need it, because the user gave the identity of the data or the folder of a store.
        """
        if self.plan is None or self.plan.fingerprint is not None:
            return None
        source = self.plan.source
        return PeerIdentity(str(self.compact.parts[STORE]["source"]), len(source), source.sample_digest())


@dataclass(frozen=True)
class Opened(Located):
    """A compact set that is ready to load; the settings of the train loader are adjusted to it.

    Attributes:
        dataset: map-style dataset of the kept samples; it delivers items as the wrapped dataset does.
        patches: patch plan if the images are filled batch by batch during training, else None.
    """

    dataset: Any = None
    patches: PatchPlan | None = None


class TrainSet(ABC):
    """A training set of a data module.

    Processes that prepare call `prepare`; later every process calls `locate`, and then `open` with what it located.

    Attributes:
        fills_late: whether dropped patches are filled during training, batch by batch.
    """

    fills_late: bool

    @abstractmethod
    def prepare(self, cache: Cache, options: BuildOptions) -> Located:
        """Make the compact set if it is not in the cache."""

    @abstractmethod
    def locate(self, cache: Cache, prepared: Located | None = None, peer: PeerIdentity | None = None) -> Located:
        """Look for the compact set; nothing is built.

        `prepared` is what `prepare` returned, if it ran in this process. `peer` is the identity of the data from a rank
        that prepared. If it fits this process's dataset, this process does not compute the identity.

        Raises:
            CacheError: the compact set is not in the cache.
        """

    @abstractmethod
    def open(self, cache: Cache, located: Located) -> Opened:
        """Open a compact set that `locate` returned."""

    @property
    @abstractmethod
    def num_classes(self) -> int | None:
        """Number of classes before anything is prepared; None if there are no classes.

        Raises:
            DQError: the number cannot be known yet.
        """


class _PlannedTrainSet(TrainSet):
    """Base class of training sets whose compact set is found through a plan."""

    def __init__(self, wanted: Wanted) -> None:
        # Images that are filled during training get the user's batch transform, and no transform before it.
        self._wanted = replace(wanted, transform=None) if wanted.fills_late else wanted
        self.fills_late = wanted.fills_late

    def open(self, cache: Cache, located: Located) -> Opened:
        plan, compact, settings = located.plan, located.compact, located.settings
        assert plan is not None
        index = compact.selection.index
        if compact.info.kind == "packed":
            dataset = stored_dataset(compact, plan.patches, plan.source.finisher(index), cache.verify)
        else:
            dataset = plan.source.subset(index)
            if settings is not None and settings.worker_init_fn is not None and isinstance(dataset, KeptSamples):
                settings = replace(settings, worker_init_fn=OnOwnDataset(settings.worker_init_fn))
        # The weights of a sampler are those of the kept samples, and its draws per epoch shrink with their number.
        if settings is not None and settings.weights is not None:
            settings = replace(settings, weights=settings.weights[index])
        if settings is not None and settings.num_draws is not None:
            kept = compact.info.num_samples / compact.info.num_source_samples
            settings = replace(settings, num_draws=max(1, round(settings.num_draws * kept)))
        return Opened(compact, plan, settings, dataset, filled_late(plan.patches))


class DatasetTrainSet(_PlannedTrainSet):
    """A training set that is a dataset of the user's."""

    def __init__(self, dataset: Any, wanted: Wanted) -> None:
        super().__init__(wanted)
        self._dataset = dataset

    def _plan(self) -> Plan:
        # The plan is made again at each call, because the user may have changed the dataset since the last one.
        return make_plan(self._dataset, self._wanted)

    def prepare(self, cache: Cache, options: BuildOptions) -> Located:
        plan = self._plan()
        if options.default_collate and not self.fills_late:
            check_collatable(_all_samples(plan), "the train set")
        return _build(plan, cache, options)

    def locate(self, cache: Cache, prepared: Located | None = None, peer: PeerIdentity | None = None) -> Located:
        if prepared is not None:
            return prepared
        plan = self._plan()
        return Located(_find(plan, cache, peer), plan)

    @cached_property
    def num_classes(self) -> int | None:
        labels = self._plan().classes
        return labels.num_classes if labels is not None else None


class DataModuleTrainSet(_PlannedTrainSet):
    """The training set of a wrapped data module; it exists only after the module's own `setup("fit")`."""

    def __init__(self, datamodule: Any, wanted: Wanted) -> None:
        super().__init__(wanted)
        self._datamodule = datamodule

    def prepare(self, cache: Cache, options: BuildOptions) -> Located:
        # Attributes that are set on a shallow copy do not appear on the user's object.
        probe = copy.copy(self._datamodule)
        with isolated_random_state(self._wanted.config.selection.seed):
            try:
                probe.setup("fit")
                dataset, _ = read_loader(probe.train_dataloader())
            except (ValueError, RuntimeError) as error:
                if "process group" not in str(error):
                    raise
                raise ConfigError(
                    f"{type(probe).__name__} asks for the ranks of the run ({error}), but in prepare_data one process makes "
                    "the compact set before the ranks are connected: leave out DistributedSampler, which Lightning adds by "
                    "itself, or pass the dataset in place of the data module"
                ) from error
        return _build(make_plan(dataset, self._wanted), cache, options)

    def locate(self, cache: Cache, prepared: Located | None = None, peer: PeerIdentity | None = None) -> Located:
        dataset, settings = read_loader(self._datamodule.train_dataloader())
        plan = make_plan(dataset, self._wanted)
        if prepared is None:
            return Located(_find(plan, cache, peer), plan, settings)
        # The process that prepared compares this split with the split of its preparation. The networks are the same
        # objects, so their weights are not hashed again.
        assert prepared.plan is not None
        plan = plan.with_networks_of(prepared.plan)
        found = find_compact(plan, cache)
        if found is None or found.parts != prepared.compact.parts:
            # The state of the dataset may differ only because it remembers what was read during preparation. Therefore
            # the identity is now computed from the content of all items.
            found = find_compact(plan, cache, source=source_identity(plan, cache.memory))
        if found is None or found.parts != prepared.compact.parts:
            raise SourceError(
                f"{type(self._datamodule).__name__}.setup('fit') gave another train set than in prepare_data: its split "
                "depends on more than the seeded random state. Give the split a generator with a seed of its own"
            )
        return Located(prepared.compact, plan, settings)

    @property
    def num_classes(self) -> int | None:
        own: int | None = getattr(self._datamodule, "num_classes", None)
        if own is None:
            raise ConfigError(
                f"{type(self._datamodule).__name__} has no attribute num_classes, so the number of classes is known only after "
                "setup('fit'): call prepare_data() and setup('fit') first, or give the data module that attribute"
            )
        return own


def _all_samples(plan: Plan) -> Any:
    """Return the whole dataset of a plan as a map-style dataset, transforms included; of a stream its first samples."""
    plan = plan.head
    return plan.source.subset(torch.arange(len(plan.source)))


def _build(plan: Plan, cache: Cache, options: BuildOptions) -> Located:
    """Find the compact set of a plan in the cache or make it."""
    if plan.store_kind == "packed":
        # This is checked also where the set is found, because the transforms are no part of its key.
        head = plan.head
        check_storable(head, head.source.finisher(head.candidates))

    def check() -> None:
        if options.check is not None:
            options.check(_all_samples(plan))

    made = find_or_build(
        plan,
        cache,
        device=options.device,
        force=options.force,
        progress=options.progress,
        check=check,
        distributed=options.distributed,
    )
    return Located(made, plan)


def _find(plan: Plan, cache: Cache, peer: PeerIdentity | None) -> Compact:
    """Return the compact set of a plan from the cache; the identity of a peer is tried first if it fits the data."""
    compact = None
    if peer is not None and peer.fits(plan.source):
        compact = find_compact(plan, cache, source=peer.source)
    compact = compact or find_compact(plan, cache)
    if compact is None:
        raise CacheError(
            f"no compact set for these data and settings in {cache.root} on rank {global_rank()}. prepare_data makes it, which "
            "the Trainer calls: without a Trainer, call it before setup. If it ran on another node, this one cannot see that "
            "folder: pass a shared cache_dir=, or set prepare_data_per_node=True. If the train set is made by a random split, "
            "give the split a seed of its own. If the dataset keeps state that "
            "differs between processes (a time, a cache, a counter), pass fingerprint= with a name of your own for this "
            "version of the data"
        )
    return compact


def filled_late(patches: PatchPlan | None) -> PatchPlan | None:
    """Return the patch plan if images are filled batch by batch during training, else None."""
    return patches if patches is not None and patches.config.reconstruct == "batch" else None


def stored_dataset(compact: Compact, patches: PatchPlan | None, finisher: Any, verify: VerifyPolicy) -> Any:
    """Return the samples of a packed store as a map-style dataset; the finisher applies the user's transforms to each.

    Dropped patches were filled before training, will be filled by the batch, or are in the mean colour, as the patch
    plan says, which is None for a store without patches. `verify` is as in `quantize`.

    Raises:
        StoreError: the store is damaged or belongs to another selection.
        PatchError: the images differ in size and are to be filled by the batch.
    """
    if patches is not None and patches.fills_ahead:
        assert compact.filled is not None
        filled = PackedDataset(compact.filled, finisher=finisher, verify=verify)
        check_same_samples(filled, compact.selection)
        return filled
    if filled_late(patches) is None:
        return open_packed(compact.info.path, finisher=finisher, verify=verify)
    samples = open_packed(compact.info.path, verify=verify, patches="packed")
    return UnfilledDataset(samples, stored_place(samples), finisher)
