"""What happens between `prepare_data` and the loaders: build or find on one process, open and compare on all. No Lightning."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dq_lightning.cache.entries import Cache, default_cache_dir
from dq_lightning.core.config import VerifyPolicy
from dq_lightning.core.errors import CacheError, ConfigError
from dq_lightning.core.fields import check_local
from dq_lightning.core.isolation import isolated_random_state
from dq_lightning.core.records import StoreInfo
from dq_lightning.loading.batch_filling import UnfilledCollate
from dq_lightning.loading.failures import FailureNotes
from dq_lightning.loading.loaders import LoaderSettings, check_collatable
from dq_lightning.loading.ranks import call_on_all, check_equal_on_all, gather_from_all, raise_on_all, world_size
from dq_lightning.loading.train_set import BuildOptions, Known, Opened, TrainSet
from dq_lightning.loading.trainer_facts import TrainerFacts
from dq_lightning.pipeline.compact import Compact


class Preparation:
    """The compact set of one data module, from nothing to opened on every rank.

    Args:
        train: the training set.
        inner: wrapped data module, whose own hooks run at the same places; or None.
        cache_dir: as in `QuantizedDataModule`.
        verify: likewise.
        device: likewise.
        force: make once, in this process, what is in the cache already.
        seed: of the random state in which the wrapped data module makes its split.
        check: as in `BuildOptions`.
        default_collate: torch's own collate function makes the batches.
    """

    def __init__(
        self,
        train: TrainSet,
        inner: Any,
        *,
        cache_dir: str | Path | None,
        verify: VerifyPolicy,
        device: str,
        force: bool,
        seed: int,
        check: Callable[[Any], object] | None = None,
        default_collate: bool = False,
    ) -> None:
        check_local("cache_dir", cache_dir)
        self.check, self.default_collate = check, default_collate
        self.train, self.inner = train, inner
        self.cache_dir, self.verify, self.device, self.force, self.seed = cache_dir, verify, device, force, seed
        self.expected_hash: str | None = None
        self._opened: Opened | None = None
        self._failure: BaseException | None = None
        self._started = time.time()

    def cache(self) -> Cache:
        """The cache; the environment is asked at each call."""
        return Cache(self.cache_dir or default_cache_dir(), verify=self.verify)

    @property
    def is_open(self) -> bool:
        """Whether `open` has run in this process."""
        return self._opened is not None

    @property
    def opened(self) -> Opened:
        """The compact set, ready to load.

        Raises:
            ConfigError: `open` has not run.
        """
        if self._opened is None:
            raise ConfigError(
                "the compact set is known after setup('fit'): let the Trainer call it, or call prepare_data() and setup('fit')"
            )
        return self._opened

    @property
    def info(self) -> StoreInfo:
        """Where the compact set is and what it costs."""
        return self.opened.compact.info

    def prepare(self, trainer: Any, evals: dict[str, Any] | None = None) -> None:
        """Make the compact set if a train set is needed and it is not cached. Runs on the processes Lightning picks.

        Args:
            trainer: of the run, or None.
            evals: datasets of validation and the like, by name, of which batches must be possible.

        Raises:
            DQError: in a run of one process; in others `open` raises it, on every rank.
        """
        facts = TrainerFacts.of(trainer)
        try:
            if self.inner is not None:
                self.inner.trainer = trainer
                self.inner.prepare_data()
            if facts.fits:
                # without a Trainer the batches may be nobody's concern
                collates = self.default_collate and trainer is not None
                for name, dataset in (evals or {}).items() if collates else ():
                    with isolated_random_state():
                        check_collatable(dataset, f"{name}=")
                device = facts.device if self.device == "auto" else self.device
                with isolated_random_state():
                    options = BuildOptions(device, self.force, facts.progress, self.check, collates)
                    self.train.prepare(self.cache(), options)
                self.force = False
        except (Exception, SystemExit) as error:
            # Lightning's barrier lets the other ranks go on: they learn of the failure in setup and end with its cause
            if facts.num_ranks == 1:
                raise
            self._failure = error

    def open(self, trainer: Any, stage: str | None) -> bool:
        """Open the compact set on every rank and check that all ranks hold the same one.

        Returns:
            Whether the stage needs a train set.

        Raises:
            DQError: preparation failed on some rank, or the entry cannot be found here, or the ranks disagree.
        """
        failure, self._failure = self._failure, None
        raise_on_all(failure, "preparing the compact set")
        wanted = stage in (None, "fit")

        def find() -> None:
            # one random state around both, as in prepare: some modules split in setup, others in train_dataloader
            with isolated_random_state(None if self.inner is None else self.seed):
                if self.inner is not None:
                    self.inner.trainer = trainer
                    self.inner.setup(stage)
                if wanted:
                    self.train.find(self.cache(), peer)

        def open_found() -> None:
            with isolated_random_state():
                self._opened = self.train.open(self.cache())

        peer = self._known_to_peer() if wanted else None
        call_on_all(find, "looking for the compact set")
        if wanted:
            call_on_all(open_found, "opening the compact set")
            check_equal_on_all(
                self.info.content_hash,
                "compact sets",
                "Nodes without a shared cache_dir each made their own, and they came out different: share cache_dir, or copy "
                "one node's cache to the others",
            )
            if TrainerFacts.of(trainer).fits:
                self._check_resumed()
        return wanted

    def _known_to_peer(self) -> Known | None:
        """What the first rank that prepared knows of the data, so that the others need not look at every file once more."""
        known: list[Known | None] = [None]

        def tell() -> None:
            with isolated_random_state():
                known[0] = self.train.known()

        if world_size() == 1:
            return None
        call_on_all(tell, "telling what the data are")
        return next((one for one in gather_from_all(known[0]) if one is not None), None)

    def explain(self, error: BaseException) -> str | None:
        """What ended this run on another rank, if this one's error says only that it is gone."""
        return FailureNotes(self.cache().root, self._started).explain(error)

    def compact(self) -> Compact:
        """The opened set's selection, description and identity."""
        return self.opened.compact

    def settings(self, batch_size: int | None, given: dict[str, Any]) -> LoaderSettings:
        """Settings of the train loader: what was given, then the wrapped data module's own, then the defaults."""
        own = self._opened.settings if self._opened is not None else None
        known = {name: value for name, value in given.items() if value is not None}
        settings = replace(own or LoaderSettings(), **known)
        if self._opened is not None and self._opened.patches is not None:
            settings = replace(settings, collate_fn=UnfilledCollate(settings.collate_fn))
        return replace(settings, batch_size=settings.batch_size if batch_size is None else batch_size)

    def expect(self, content_hash: str | None, trainer: Any) -> None:
        """Training goes on from a checkpoint: only with the compact set it began with. Evaluation needs none.

        Raises:
            CacheError: this run has another one.
        """
        if not TrainerFacts.of(trainer).fits:
            return
        self.expected_hash = content_hash
        if self._opened is not None:
            self._check_resumed()

    def _check_resumed(self) -> None:
        """Compare the opened set with the expected one; each checkpoint is held against one run only."""
        expected, self.expected_hash = self.expected_hash, None
        if expected in (None, self.info.content_hash):
            return
        raise CacheError(
            f"the checkpoint was trained on the compact set {expected}, but this run has "
            f"{self.info.content_hash}: the data, the settings or the encoder's weights changed. Restore them, or start "
            "without ckpt_path"
        )

    def num_classes(self) -> int | None:
        """Of the opened set, or of the dataset before that."""
        if self._opened is not None:
            return self.info.num_classes
        with isolated_random_state():
            return self.train.num_classes()
