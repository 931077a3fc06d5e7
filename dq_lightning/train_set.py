"""The training set behind a data module: a dataset, a wrapped data module, or a packed store. No Lightning here."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from dq_lightning.compact import Compact, find_compact, open_compact, open_packed
from dq_lightning.config import QuantizeConfig, StoreKind, VerifyPolicy, with_short_forms
from dq_lightning.errors import CacheError, ConfigError, DQError, SourceError
from dq_lightning.inner import is_datamodule, probe_train_loader
from dq_lightning.loaders import LoaderSettings, read_loader
from dq_lightning.plan import Plan, make_plan
from dq_lightning.randomness import isolated_random_state
from dq_lightning.ranks import global_rank
from dq_lightning.sources.adapt import as_source
from dq_lightning.sources.strip import KEEP
from dq_lightning.store.cache import Cache


@dataclass(frozen=True)
class Wanted:
    """What the user asked for, apart from the data.

    Attributes:
        config: every setting.
        encoder: a module, or `(module, preprocessing)`; None takes the config's name.
        labels: as in `quantize`.
        transform: `"keep"` or a replacement; so is `target_transform`.
        fingerprint: identity of the data in place of their digest.
        seed: of the random state in which a wrapped data module makes its split.
    """

    config: QuantizeConfig
    encoder: Any = None
    labels: Any = None
    transform: Any = "keep"
    target_transform: Any = "keep"
    fingerprint: str | None = None
    seed: int = 0

    def plan(self, dataset: Any) -> Plan:
        """The flow over a dataset, nothing computed."""
        return make_plan(
            dataset,
            self.config,
            encoder=self.encoder,
            labels=self.labels,
            transform=self.transform,
            target_transform=self.target_transform,
            fingerprint=self.fingerprint,
        )


def want(
    *,
    config: QuantizeConfig | None,
    keep_ratio: float,
    num_bins: int,
    seed: int,
    store: StoreKind,
    encoder: Any,
    labels: Any,
    transform: Any,
    target_transform: Any,
    fingerprint: str | None,
) -> Wanted:
    """Put the keywords of a data module and its config together.

    Raises:
        ConfigError: they contradict each other.
    """
    short_forms: dict[str, Any] = {
        "selection.keep_ratio": keep_ratio,
        "selection.seed": seed,
        "bins.num_bins": num_bins,
        "store": store,
    }
    named = isinstance(encoder, str | Path)
    if named:
        short_forms["features.encoder"] = str(encoder)
    config = with_short_forms(config, short_forms)
    return Wanted(
        config,
        encoder=None if named else encoder,
        labels=labels,
        transform=transform,
        target_transform=target_transform,
        fingerprint=fingerprint,
        seed=config.selection.seed,
    )


@dataclass
class Opened:
    """A compact set ready to load.

    Attributes:
        compact: what was kept.
        dataset: map-style, gives what the wrapped dataset gives.
        settings: of the wrapped data module's own train loader, cut down to the compact set; None without one.
    """

    compact: Compact
    dataset: Any
    settings: LoaderSettings | None = None


# (plan, cache) -> the compact set, found or built
Build = Callable[[Plan, Cache], Compact]


class TrainSet(Protocol):
    """What a data module needs of its training set."""

    def prepare(self, cache: Cache, build: Build) -> None:
        """Make the compact set if it is not cached."""
        ...

    def open(self, cache: Cache) -> Opened:
        """Find the compact set; builds nothing."""
        ...

    def num_classes(self) -> int | None:
        """Known before anything is prepared, or an error."""
        ...


class DatasetTrainSet:
    """A dataset of the user's."""

    def __init__(self, dataset: Any, wanted: Wanted) -> None:
        self._dataset, self._wanted = dataset, wanted
        # left by prepare for the open that follows in the same process: it saves hashing the data a second time
        self._prepared: tuple[Plan, Compact] | None = None
        self._num_classes: tuple[int | None] | None = None

    def prepare(self, cache: Cache, build: Build) -> None:
        # planned anew each time: the user may have changed the dataset since
        plan = self._wanted.plan(self._dataset)
        check_deliverable(plan)
        self._prepared = plan, build(plan, cache)

    def open(self, cache: Cache) -> Opened:
        prepared, self._prepared = self._prepared, None
        plan, compact = prepared or (self._wanted.plan(self._dataset), None)
        compact = compact or find_compact(plan, cache)
        if compact is None:
            raise _missing(cache)
        return Opened(compact, compact_dataset(plan, compact, cache.verify))

    def num_classes(self) -> int | None:
        if self._num_classes is None:
            labels = self._wanted.plan(self._dataset).labels
            self._num_classes = (labels.num_classes if labels is not None else None,)
        return self._num_classes[0]


class DataModuleTrainSet:
    """The train set of a wrapped data module; it exists only after the module's own `setup("fit")`."""

    def __init__(self, datamodule: Any, wanted: Wanted) -> None:
        self._datamodule, self._wanted = datamodule, wanted
        self._prepared: Compact | None = None

    def prepare(self, cache: Cache, build: Build) -> None:
        with isolated_random_state(self._wanted.seed):
            dataset, _ = read_loader(probe_train_loader(self._datamodule))
        plan = self._wanted.plan(dataset)
        check_deliverable(plan)
        self._prepared = build(plan, cache)

    def open(self, cache: Cache) -> Opened:
        prepared, self._prepared = self._prepared, None
        dataset, settings = read_loader(self._datamodule.train_dataloader())
        plan = self._wanted.plan(dataset)
        compact = find_compact(plan, cache)
        if prepared is not None and (compact is None or compact.parts != prepared.parts):
            raise self._changed_split()
        if compact is None:
            raise _missing(cache)
        compact = prepared or compact
        return Opened(compact, compact_dataset(plan, compact, cache.verify), cut_down(settings, compact))

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


class StoreTrainSet:
    """A packed store; nothing has to be prepared."""

    def __init__(self, path: str | Path, wanted: Wanted, verify: VerifyPolicy) -> None:
        self._path, self._wanted = Path(path), wanted
        self._samples = open_packed(path, verify=verify)

    def prepare(self, cache: Cache, build: Build) -> None:
        """Nothing to do."""

    def open(self, cache: Cache) -> Opened:
        wanted = self._wanted
        compact = open_compact(self._path, verify=cache.verify)
        # a store holds no transforms, so there is nothing to keep; and without any, no need to tell the image apart
        given = [
            None if isinstance(one, str) and one == KEEP else one for one in (wanted.transform, wanted.target_transform)
        ]
        if given == [None, None]:
            return Opened(compact, self._samples)
        columns = {name: compact.config.get(name) for name in ("image_column", "label_column")}
        source = as_source(self._samples, transform=given[0], target_transform=given[1], **columns)
        return Opened(compact, source.subset(torch.arange(len(self._samples))))

    def num_classes(self) -> int | None:
        return open_compact(self._path).info.num_classes


def make_train_set(train: Any, wanted: Wanted, verify: VerifyPolicy) -> TrainSet:
    """Decide what `train` is: a data module, the folder of a packed set, or a dataset."""
    if is_datamodule(train):
        return DataModuleTrainSet(train, wanted)
    return StoreTrainSet(train, wanted, verify) if isinstance(train, str | Path) else DatasetTrainSet(train, wanted)


def check_deliverable(plan: Plan) -> None:
    """Tell before the hours of work that packed samples could not be turned into what the dataset delivers."""
    if plan.store_kind == "packed":
        plan.source.finisher(torch.arange(len(plan.source)))


def compact_dataset(plan: Plan, compact: Compact, verify: VerifyPolicy) -> Any:
    """The kept samples as the wrapped dataset would deliver them."""
    index = compact.selection.index
    if compact.info.kind == "packed":
        return open_packed(compact.info.path, finisher=plan.source.finisher(index), verify=verify)
    return plan.source.subset(index)


def cut_down(settings: LoaderSettings, compact: Compact) -> LoaderSettings:
    """A loader's settings on the compact set: draw weights of the kept samples, draws per epoch in proportion."""
    if settings.weights is not None:
        settings = replace(settings, weights=settings.weights[compact.selection.index])
    if settings.num_draws is not None:
        settings = replace(settings, num_draws=max(1, round(settings.num_draws * compact.info.data_keep_ratio)))
    return settings


def _missing(cache: Cache) -> CacheError:
    return CacheError(
        f"no compact set for these data and settings in {cache.root} on rank {global_rank()}. If prepare_data ran on another "
        "node, this one cannot see that folder: pass a shared cache_dir=, or set prepare_data_per_node=True. If the train set "
        "is made by a random split, give the split a seed of its own. If the dataset keeps state that differs between "
        "processes (a time, a cache, a counter), pass fingerprint= with a name of your own for this version of the data"
    )
