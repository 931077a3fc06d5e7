"""QuantizedDataModule: the Lightning hooks around the flow. The only file that imports lightning."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import lightning as L
from torch.utils.data import DataLoader

from dq_lightning.config import QuantizeConfig, StoreKind, VerifyPolicy, with_short_forms
from dq_lightning.errors import CacheError, ConfigError
from dq_lightning.inner import is_datamodule, overridden_transfer_hooks
from dq_lightning.loaders import AutoBool, AutoInt, LoaderSettings, make_eval_loaders, make_loader
from dq_lightning.pipeline import read_bins_of
from dq_lightning.randomness import isolated_random_state
from dq_lightning.ranks import check_equal_on_all, raise_on_all
from dq_lightning.records import Bins, Selection, StoreInfo
from dq_lightning.steps import report_steps
from dq_lightning.store.cache import Cache, default_cache_dir
from dq_lightning.train_set import DataModuleTrainSet, DatasetTrainSet, Opened, StoreTrainSet, TrainSet, Wanted
from dq_lightning.trainer_facts import TrainerFacts


class QuantizedDataModule(L.LightningDataModule):
    """Loaders over a compact set of a training set, chosen by Dataset Quantization (Zhou et al. 2023).

    The work is done once, in `prepare_data`, and kept in a cache; later runs start training at once. What the train loader
    gives has the type, structure and transform that the wrapped dataset gives.

    Args:
        train: torchvision or Hugging Face dataset, any map-style dataset, a LightningDataModule (see `from_datamodule`), or the
            folder of a packed compact set (see `from_store`).
        val: validation dataset, a list of them, or loaders; passed through.
        test: likewise.
        predict: likewise.
        keep_ratio: share of the samples that are kept, in (0, 1].
        num_bins: K.
        encoder: `"auto"`, `"bundled"`, a timm name, a folder or file, an `nn.Module`, or `(module, preprocessing)`.
        labels: class of every sample [N], a column name, or False for bins over the whole set; None takes the dataset's own.
        config: everything else; a setting given here and as a keyword with another value is an error.
        store: `"indices"` copies nothing, `"packed"` makes a self-contained set, `"auto"` is `"indices"`.
        transform: `"keep"`, or what replaces the wrapped dataset's transform in the train loader (None: none).
        target_transform: likewise.
        collate_fn: of all loaders; None is torch's.
        batch_size: samples per batch and process.
        eval_batch_size: of the val, test and predict loaders; None is `batch_size`.
        num_workers: loader processes; `"auto"` leaves one core to each training process.
        pin_memory: `"auto"` pins when batches go to a GPU.
        persistent_workers: `"auto"` keeps workers unless loaders are reloaded every few epochs.
        drop_last: leave out the last, smaller batch of an epoch.
        cache_dir: folder of the cache; None uses `DQ_LIGHTNING_CACHE` or the platform's cache folder.
        seed: of the draw, of weighted samplers, and of a wrapped data module's own split.
        fingerprint: identity of the dataset, in place of the digest of its content.
        force_recompute: build again what is in the cache already.
        verify: how entries are checked before use: `"size"`, `"hash"` or `"off"`.
        device: of the encoder and the bins; `"auto"` is the Trainer's device, or a GPU if there is one.

    Attributes:
        prepare_data_per_node: as in Lightning; True prepares on every node, which a shared cache turns into one build.
    """

    def __init__(
        self,
        train: Any,
        *,
        val: Any = None,
        test: Any = None,
        predict: Any = None,
        keep_ratio: float = 0.125,
        num_bins: int = 10,
        encoder: Any = "auto",
        labels: Any = None,
        config: QuantizeConfig | None = None,
        store: StoreKind = "auto",
        transform: Any = "keep",
        target_transform: Any = "keep",
        collate_fn: Callable[[list[Any]], Any] | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: AutoInt = "auto",
        pin_memory: AutoBool = "auto",
        persistent_workers: AutoBool = "auto",
        drop_last: bool = False,
        cache_dir: str | Path | None = None,
        seed: int = 0,
        fingerprint: str | None = None,
        force_recompute: bool = False,
        verify: VerifyPolicy = "size",
        device: str = "auto",
    ) -> None:
        super().__init__()
        # plain and small only: a dataset among the hyperparameters would be copied into every checkpoint
        self.save_hyperparameters("keep_ratio", "num_bins", "seed", logger=False)
        named = isinstance(encoder, str | Path)
        short_forms = {
            "selection.keep_ratio": keep_ratio,
            "selection.seed": seed,
            "bins.num_bins": num_bins,
            "store": store,
        } | ({"features.encoder": str(encoder)} if named else {})
        wanted = Wanted(
            with_short_forms(config, short_forms),
            encoder=None if named else encoder,
            labels=labels,
            transform=transform,
            target_transform=target_transform,
            fingerprint=fingerprint,
            seed=seed,
        )
        self.config = wanted.config
        self.cache_dir, self.verify, self.device = cache_dir, verify, device
        self.force_recompute, self.seed = force_recompute, seed
        self.batch_size: int | None = batch_size
        self.eval_batch_size = eval_batch_size
        # what was given; for a wrapped data module its loader's settings fill the rest
        self._given: dict[str, Any] = {
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "persistent_workers": persistent_workers,
            "drop_last": drop_last,
            "collate_fn": collate_fn,
        }
        self._eval = {"val": val, "test": test, "predict": predict}
        self._inner: Any = None
        self._opened: Opened | None = None
        self._failure: BaseException | None = None
        self._expected_hash: str | None = None
        self._reported = False
        self._train: TrainSet
        if is_datamodule(train):
            self._wrap(train)
            self._train = DataModuleTrainSet(train, wanted)
        elif isinstance(train, str | Path):
            self._train = StoreTrainSet(train, wanted, verify)
        else:
            self._train = DatasetTrainSet(train, wanted)

    @classmethod
    def from_datamodule(
        cls,
        datamodule: Any,
        *,
        keep_ratio: float = 0.125,
        num_bins: int = 10,
        encoder: Any = "auto",
        labels: Any = None,
        config: QuantizeConfig | None = None,
        store: StoreKind = "auto",
        transform: Any = "keep",
        target_transform: Any = "keep",
        batch_size: int | None = None,
        num_workers: AutoInt | None = None,
        pin_memory: AutoBool | None = None,
        persistent_workers: AutoBool | None = None,
        drop_last: bool | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        cache_dir: str | Path | None = None,
        seed: int = 0,
        fingerprint: str | None = None,
        force_recompute: bool = False,
        verify: VerifyPolicy = "size",
        device: str = "auto",
    ) -> Self:
        """Quantize the train set of an existing data module of `lightning` or `pytorch_lightning`.

        Its other loaders, batch-transfer hooks, state and attributes pass through. Batch size, collate function, sampler and
        worker settings are those of its train loader unless given here. Its `setup("fit")` runs in `prepare_data` too, both
        times from the random state `seed`, so that a split made there is the same on every rank.
        """
        if not is_datamodule(datamodule):
            raise ConfigError(f"from_datamodule takes a LightningDataModule, got {type(datamodule).__name__}")
        made = cls(
            datamodule,
            keep_ratio=keep_ratio,
            num_bins=num_bins,
            encoder=encoder,
            labels=labels,
            config=config,
            store=store,
            transform=transform,
            target_transform=target_transform,
            cache_dir=cache_dir,
            seed=seed,
            fingerprint=fingerprint,
            force_recompute=force_recompute,
            verify=verify,
            device=device,
        )
        made.batch_size = batch_size
        made._given = {
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "persistent_workers": persistent_workers,
            "drop_last": drop_last,
            "collate_fn": collate_fn,
        }
        return made

    @classmethod
    def from_store(
        cls,
        path: str | Path,
        *,
        val: Any = None,
        test: Any = None,
        predict: Any = None,
        transform: Any = None,
        target_transform: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: AutoInt = "auto",
        pin_memory: AutoBool = "auto",
        persistent_workers: AutoBool = "auto",
        drop_last: bool = False,
        seed: int = 0,
        verify: VerifyPolicy = "size",
    ) -> Self:
        """Train from a packed compact set alone; the original dataset is not needed.

        Args:
            path: folder of the entry (`StoreInfo.path`), here or copied from another machine.
            val: and all others, as in the class.
            test: as in the class.
            predict: as in the class.
            transform: of the image of each sample; transforms are code, so a store never holds them.
            target_transform: of the target.
            collate_fn: as in the class.
            batch_size: as in the class.
            eval_batch_size: as in the class.
            num_workers: as in the class.
            pin_memory: as in the class.
            persistent_workers: as in the class.
            drop_last: as in the class.
            seed: as in the class.
            verify: as in the class.

        Raises:
            CacheError: the folder holds no packed set.
        """
        return cls(
            Path(path),
            val=val,
            test=test,
            predict=predict,
            transform=transform,
            target_transform=target_transform,
            collate_fn=collate_fn,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=persistent_workers,
            drop_last=drop_last,
            seed=seed,
            verify=verify,
        )

    @classmethod
    def from_datasets(  # type: ignore[override]
        cls,
        train_dataset: Any = None,
        val_dataset: Any = None,
        test_dataset: Any = None,
        predict_dataset: Any = None,
        batch_size: int = 1,
        num_workers: AutoInt = 0,
    ) -> Self:
        """Lightning's own short way, kept so that it quantizes too; further settings need the class itself."""
        if train_dataset is None:
            raise ConfigError("from_datasets needs train_dataset: there is nothing to quantize without it")
        return cls(
            train_dataset,
            val=val_dataset,
            test=test_dataset,
            predict=predict_dataset,
            batch_size=batch_size,
            num_workers=num_workers,
        )

    def prepare_data(self) -> None:
        """Make the compact set if it is not cached. Runs where Lightning says; leaves nothing but files behind."""
        facts = TrainerFacts.of(self.trainer)
        try:
            if self._inner is not None:
                self._inner.trainer = self.trainer
                self._inner.prepare_data()
            if facts.fits:
                with isolated_random_state():
                    self._train.prepare(
                        self._cache(),
                        device=facts.device if self.device == "auto" else self.device,
                        force=self.force_recompute,
                        progress=facts.progress,
                    )
        except (Exception, SystemExit) as error:
            # Lightning's barrier lets the other ranks go on: they learn of the failure in setup and end with its cause
            if facts.num_ranks == 1:
                raise
            self._failure = error

    def setup(self, stage: str | None = None) -> None:
        """Open the compact set on every rank and check that all ranks hold the same one.

        Raises:
            DQError: preparation failed on some rank, or the entry cannot be found here, or the ranks disagree.
        """
        failure, self._failure = self._failure, None
        raise_on_all(failure, "preparing the compact set")
        if self._inner is not None:
            self._inner.trainer = self.trainer
            with isolated_random_state(self.seed):
                self._inner.setup(stage)
        if stage not in (None, "fit"):
            return
        error: Exception | None = None
        with isolated_random_state():
            try:
                self._open()
            except Exception as caught:
                error = caught
        raise_on_all(error, "opening the compact set")
        check_equal_on_all(
            self.info.content_hash,
            "compact sets",
            "Nodes without a shared cache_dir each made their own, and they came out different: share cache_dir, or copy one "
            "node's cache to the others",
        )
        self._check_resumed()
        if self.trainer is not None:
            self._reported = report_steps(
                self.trainer, self.info, self._settings(), quiet=self._reported, num_ranks=self.trainer.world_size
            )

    def teardown(self, stage: str) -> None:
        """Forwarded to a wrapped data module."""
        if self._inner is not None:
            self._inner.teardown(stage)

    def on_exception(self, exception: BaseException) -> None:
        """Forwarded to a wrapped data module."""
        if self._inner is not None:
            self._inner.on_exception(exception)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the compact set."""
        if self._opened is None:
            raise ConfigError(
                "train_dataloader() before setup('fit'): let the Trainer call it, or call prepare_data and setup"
            )
        return make_loader(self._opened.dataset, self._settings(), TrainerFacts.of(self.trainer), seed=self.seed)

    def val_dataloader(self) -> Any:
        """Loaders over `val`, or the wrapped data module's own; none without."""
        return self._eval_loaders("val")

    def test_dataloader(self) -> Any:
        """Loaders over `test`, or the wrapped data module's own; none without."""
        return self._eval_loaders("test")

    def predict_dataloader(self) -> Any:
        """Loaders over `predict`, or the wrapped data module's own; none without."""
        return self._eval_loaders("predict")

    def state_dict(self) -> dict[str, Any]:
        """The compact set's content hash, and the wrapped data module's state."""
        state: dict[str, Any] = {"content_hash": self.info.content_hash if self._opened else self._expected_hash}
        if self._inner is not None:
            state["datamodule"] = self._inner.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that training goes on with the compact set it began with.

        Raises:
            CacheError: this run made another one.
        """
        self._expected_hash = state_dict.get("content_hash")
        if self._inner is not None:
            self._inner.load_state_dict(state_dict.get("datamodule", {}))
        self._check_resumed()

    @property
    def info(self) -> StoreInfo:
        """Where the compact set is and what it costs; after `setup`."""
        return self._compact_set().compact.info

    @property
    def selection(self) -> Selection:
        """Which samples were kept; after `setup`."""
        return self._compact_set().compact.selection

    @property
    def bins(self) -> Bins:
        """The bins of the whole set; after `setup`."""
        return read_bins_of(self._compact_set().compact, self._cache())

    @property
    def data_keep_ratio(self) -> float:
        """Share of the data that is kept; after `setup`."""
        return self.info.data_keep_ratio

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None when the targets are no classes. For a dataset it is known before `setup`."""
        return self.info.num_classes if self._opened is not None else self._train.num_classes()

    def __getattr__(self, name: str) -> Any:
        """Attributes of a wrapped data module that a model reads through `trainer.datamodule`."""
        inner = self.__dict__.get("_inner")
        if inner is not None and not name.startswith("_"):
            return getattr(inner, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def _wrap(self, datamodule: Any) -> None:
        if any(value is not None for value in self._eval.values()):
            raise ConfigError("val=, test= and predict= come from the wrapped data module: leave them out")
        self._inner = datamodule
        self.prepare_data_per_node = datamodule.prepare_data_per_node
        for name, hook in overridden_transfer_hooks(datamodule).items():
            # on the instance, and only these: Lightning asks whether they are overridden and would else skip the model's own
            setattr(self, name, hook)

    def _cache(self) -> Cache:
        return Cache(self.cache_dir or default_cache_dir(), verify=self.verify)

    def _open(self) -> None:
        self._opened = self._train.open(self._cache())
        if self._opened.settings is not None and self.batch_size is None:
            self.batch_size = self._opened.settings.batch_size

    def _settings(self) -> LoaderSettings:
        """Settings of the train loader; the batch size is read at each call, because the batch-size finder changes it."""
        own = self._opened.settings if self._opened is not None else None
        given = {name: value for name, value in self._given.items() if value is not None or own is None}
        return replace(own or LoaderSettings(), batch_size=self.batch_size or 1, **given)

    def _compact_set(self) -> Opened:
        if self._opened is None:
            raise ConfigError("the compact set is known after setup('fit'): call prepare_data() and setup('fit') first")
        return self._opened

    def _check_resumed(self) -> None:
        if self._opened is None or self._expected_hash in (None, self.info.content_hash):
            return
        raise CacheError(
            f"the checkpoint was trained on the compact set {self._expected_hash}, but this run has "
            f"{self.info.content_hash}: the data, the settings or the encoder's weights changed. Restore them, or start "
            "without ckpt_path"
        )

    def _eval_loaders(self, name: str) -> Any:
        if self._inner is not None:
            return getattr(self._inner, f"{name}_dataloader")()
        settings = replace(self._settings(), batch_size=self.eval_batch_size or self.batch_size or 1)
        return make_eval_loaders(self._eval[name], settings, TrainerFacts.of(self.trainer))
