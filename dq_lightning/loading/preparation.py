"""Prepare the compact set of a data module: build or find it in one process, then open and compare it on all ranks.

This file does not import Lightning.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dq_lightning.cache.entries import Cache, default_cache_dir
from dq_lightning.core.config import VerifyPolicy
from dq_lightning.core.devices import DeviceNames, device_names
from dq_lightning.core.errors import CacheError, ConfigError
from dq_lightning.core.fields import check_local
from dq_lightning.core.isolation import isolated_random_state
from dq_lightning.core.records import StoreInfo
from dq_lightning.core.sharing import Distributed, check_distributed
from dq_lightning.loading.batch_filling import UnfilledCollate
from dq_lightning.loading.failures import explain_failure
from dq_lightning.loading.loaders import LoaderSettings, check_collatable
from dq_lightning.loading.ranks import call_on_all, check_equal_on_all, gather_from_all, raise_on_all, world_size
from dq_lightning.loading.train_set import BuildOptions, Located, Opened, TrainSet
from dq_lightning.loading.trainer_facts import TrainerFacts
from dq_lightning.pipeline.together import call_beside_all


class Preparation:
    """Makes the compact set of one data module and opens it on every rank.

    Args:
        train: the training set.
        inner: wrapped data module, whose hooks `prepare_data` and `setup` are called here too; or None.
        cache_dir: folder of the cache; None uses `DQ_LIGHTNING_CACHE` or the platform's cache folder.
        verify: how cache entries are checked before use, as in `quantize`.
        device: device that the networks and the bins run on; several share the batches of the networks. `"auto"` uses
            the devices of this node that the Trainer was given.
        force: make again, once in this process, what is already in the cache.
        seed: seed of the random state in which the wrapped data module makes its split.
        check: function that checks the whole dataset before anything is made of it; see `BuildOptions`.
        default_collate: whether torch's own collate function makes the batches.
        distributed: with `"all"` every rank of a run takes part, in `open`; else only those that call `prepare` work.

    Attributes:
        expected_hash: content hash of the compact set that a checkpoint was trained on, or None.

    Raises:
        ConfigError: `cache_dir` is not a local path, `device` names no devices, or `distributed` is unknown.
    """

    def __init__(
        self,
        train: TrainSet,
        inner: Any,
        *,
        cache_dir: str | Path | None,
        verify: VerifyPolicy,
        device: DeviceNames,
        force: bool,
        seed: int,
        check: Callable[[Any], object] | None = None,
        default_collate: bool = False,
        distributed: Distributed = "auto",
    ) -> None:
        check_local("cache_dir", cache_dir)
        check_distributed(distributed)
        self.distributed = distributed
        self.check, self.default_collate = check, default_collate
        self.train, self.inner = train, inner
        self.cache_dir, self.verify, self.force, self.seed = cache_dir, verify, force, seed
        self.devices = device_names(device)
        self.expected_hash: str | None = None
        self._located: Located | None = None
        self._opened: Opened | None = None
        self._failure: BaseException | None = None
        self._started = time.time()

    def cache(self) -> Cache:
        """Return the cache; the environment variable of its folder is read at each call."""
        return Cache(self.cache_dir or default_cache_dir(), verify=self.verify)

    @property
    def is_open(self) -> bool:
        """Whether `open` has run in this process."""
        return self._opened is not None

    @property
    def opened(self) -> Opened:
        """The compact set, opened and ready to load.

        Raises:
            ConfigError: `open` has not run in this process.
        """
        if self._opened is None:
            raise ConfigError(
                "the compact set is known after setup('fit'): let the Trainer call it, or call prepare_data() and setup('fit')"
            )
        return self._opened

    @property
    def info(self) -> StoreInfo:
        """Folder and size of the compact set, and further facts about it."""
        return self.opened.compact.info

    def prepare(self, trainer: Any, val: Any = None) -> None:
        """Make the compact set if a train set is needed and the cache does not hold it.

        Lightning decides which processes call this method. `val` is the validation dataset of which torch's collate
        function must be able to make batches, or None.

        Raises:
            DQError: preparation failed in a run of one process. In a run of several processes the error is kept, and
                `open` raises it on every rank.
        """
        facts = TrainerFacts.of(trainer)
        try:
            if self.inner is not None:
                self.inner.trainer = trainer
                self.inner.prepare_data()
            if facts.fits:
                with isolated_random_state():
                    # Without a Trainer nobody may ever make batches, so the check is left out.
                    if self.default_collate and trainer is not None and val is not None:
                        check_collatable(val, "val=")
                    if not self._is_shared(facts):
                        self._located = self._make(trainer, facts.node_devices or (facts.device,), "off")
        except (Exception, SystemExit) as error:
            # Lightning's barrier lets the other ranks continue after this failure, so the error is kept until `open`,
            # where every rank raises it.
            if facts.num_ranks == 1:
                raise
            self._failure = error

    def _is_shared(self, facts: TrainerFacts) -> bool:
        """Whether all ranks make the compact set together, once they have a process group."""
        return self.distributed == "all" and facts.num_ranks > 1

    def _make(self, trainer: Any, devices: tuple[str, ...], distributed: Distributed) -> Located:
        options = BuildOptions(
            list(devices if self.devices == ("auto",) else self.devices),
            self.force,
            TrainerFacts.of(trainer).progress,
            self.check,
            self.default_collate and trainer is not None,
            distributed,
        )
        made = self.train.prepare(self.cache(), options)
        self.force = False
        return made

    def open(self, trainer: Any, stage: str | None) -> bool:
        """Open the compact set, and check that all ranks hold the same one. Every rank must call this method.

        `stage` is that of Lightning's `setup`, such as `"fit"`; None means all stages. The result is whether it needs a
        train set.

        Raises:
            DQError: preparation failed on some rank, this rank cannot find the entry, or the ranks hold different
                compact sets.
        """
        failure, self._failure = self._failure, None
        raise_on_all(failure, "preparing the compact set")
        facts = TrainerFacts.of(trainer)
        with isolated_random_state():
            if self._is_shared(facts) and facts.fits and stage in (None, "fit"):
                make = partial(call_beside_all, partial(self._make, trainer, (facts.device,), "all"))
                self._located = call_on_all(make, "making the compact set")
            return self._open(trainer, stage)

    def _open(self, trainer: Any, stage: str | None) -> bool:
        wanted, prepared, peer_identity = stage in (None, "fit"), None, None
        if wanted:
            # The dataset may change before the next call, so what was prepared is used once.
            prepared, self._located = self._located, None
            if world_size() > 1:
                # With the identity from the first rank that prepared, the others need not look at every file again.
                own = call_on_all(lambda: prepared and prepared.peer_identity(), "computing the identity of the data")
                peer_identity = next((one for one in gather_from_all(own) if one is not None), None)

        def locate() -> Located | None:
            # Both calls run in one random state, as in `prepare`, because some data modules make their split in `setup`
            # and others in `train_dataloader`.
            with nullcontext() if self.inner is None else isolated_random_state(self.seed):
                if self.inner is not None:
                    self.inner.trainer = trainer
                    self.inner.setup(stage)
                return self.train.locate(self.cache(), prepared, peer_identity) if wanted else None

        located = call_on_all(locate, "looking for the compact set")
        if located is not None:
            self._opened = call_on_all(partial(self.train.open, self.cache(), located), "opening the compact set")
            check_equal_on_all(
                self.info.content_hash,
                "compact sets",
                "Nodes without a shared cache_dir each made their own, and they came out different: share cache_dir, or copy "
                "one node's cache to the others",
            )
            if TrainerFacts.of(trainer).fits:
                self._check_resumed()
        return wanted

    def explain(self, error: BaseException) -> str | None:
        """Return a sentence on what ended this run on another rank, if this rank's error is only a lost connection."""
        return explain_failure(error, self.cache().root, self._started)

    def settings(self, batch_size: int | None, given: dict[str, Any]) -> LoaderSettings:
        """Return the settings of the train loader.

        A setting that the user gave (not None) comes first, then the wrapped data module's own, then the default.
        """
        own = self._opened.settings if self._opened is not None else None
        named = {name: value for name, value in given.items() if value is not None}
        settings = replace(own or LoaderSettings(), **named)
        if self._opened is not None and self._opened.patches is not None:
            settings = replace(settings, collate_fn=UnfilledCollate(self._opened.dataset.place, settings.collate_fn))
        return replace(settings, batch_size=settings.batch_size if batch_size is None else batch_size)

    def expect(self, content_hash: str | None, trainer: Any) -> None:
        """Require the compact set of the content hash in a checkpoint, if this run trains; None requires nothing.

        Raises:
            CacheError: this run has another compact set.
        """
        if not TrainerFacts.of(trainer).fits:
            return
        self.expected_hash = content_hash
        if self._opened is not None:
            self._check_resumed()

    def _check_resumed(self) -> None:
        """Compare the opened set with the expected one, and forget the expected one."""
        expected, self.expected_hash = self.expected_hash, None
        if expected in (None, self.info.content_hash):
            return
        raise CacheError(
            f"the checkpoint was trained on the compact set {expected}, but this run has "
            f"{self.info.content_hash}: the data, the settings or the encoder's weights changed, or a random split had no "
            "seed. Restore them, or start without ckpt_path"
        )

    def num_classes(self) -> int | None:
        """Return the number of classes of the opened set, or before `open` of the dataset; None without classes."""
        if self._opened is not None:
            return self.info.num_classes
        with isolated_random_state():
            return self.train.num_classes
