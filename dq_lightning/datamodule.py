"""What a quantized data module does: Lightning's hooks around the flow, for both packages that Lightning comes in.

`lightning` and `pytorch_lightning` are installed side by side and share no class, and a Trainer takes data modules of its own
package alone. So the hooks stand here, in a class without a base, and `lightning.py` and `pytorch.py` put one base class each
under them.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch.utils.data import DataLoader, Dataset

from dq_lightning.core.config import AnyConfig, OnError, Reconstruct, StoreKind, VerifyPolicy
from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import ConfigError
from dq_lightning.core.records import Bins, Selection, StoreInfo
from dq_lightning.loading.batch_filling import BatchFiller, check_batch_transform, is_unfilled
from dq_lightning.loading.inner import (
    AnyDataModule,
    check_given,
    check_package,
    defined_by_user,
    is_datamodule,
    not_iterable,
    overridden_transfer_hooks,
)
from dq_lightning.loading.loaders import (
    AutoBool,
    AutoInt,
    LoaderSettings,
    check_loader_numbers,
    is_one_dataset,
    make_eval_loaders,
    make_loader,
)
from dq_lightning.loading.paths import open_paths, other_splits
from dq_lightning.loading.preparation import Preparation
from dq_lightning.loading.steps import report_steps
from dq_lightning.loading.store_train_set import StoreFolder, make_train_set
from dq_lightning.loading.trainer_facts import TrainerFacts
from dq_lightning.loading.wanted import in_one_process, want
from dq_lightning.pipeline.compact import read_bins_of
from dq_lightning.selection.given import Indices
from dq_lightning.sources.strip import KEEP
from dq_lightning.tokens.loading import TokenLoading

if TYPE_CHECKING:
    from lightning import LightningDataModule as Base
else:
    Base = object

# Any takes all that `train` may be. The classes before it, Dataset without its type, let LightningCLI change one argument of a
# dataset of the YAML file on the command line
Data = Dataset | AnyDataModule | Any  # type: ignore[type-arg]
# of ours, which a model may look for in a wrapped data module
HIDING = ("config", "info", "selection", "bins", "data_keep_ratio", "eval_batch_size")


class QuantizedHooks(Base):
    """Loaders over a compact set of a training set, chosen by Dataset Quantization (Zhou et al. 2023).

    The work is done once, in `prepare_data`, and kept in a cache; later runs start training at once. What the train loader
    gives has the type, structure and transform that the wrapped dataset gives. For Trainers of the package
    `pytorch_lightning` import the class from `dq_lightning.pytorch`.

    Args:
        train: torchvision or Hugging Face dataset, any map-style dataset, a LightningDataModule (see `from_datamodule`), the
            folder of a packed compact set (see `from_store`), a folder of class folders with images, or a file of text rows.
        val: validation dataset or loader, or a list or dict of these; None: there is no validation loader. Of a Hugging Face
            `DatasetDict` the splits named validation and test are taken where `val` and `test` are None, unless `transform`
            is given.
        test: likewise.
        predict: likewise.
        keep_ratio: share of the samples that are kept, in (0, 1]; 0.125 when None.
        num_bins: K, the number of disjoint bins in each class; 10 when None.
        drop_ratio: share of the patches of every kept image that is dropped, in [0, 1); the others alone are stored, and a
            masked autoencoder fills the holes. Everything else about it is in `config.patches`. 0 when None.
        encoder: `"auto"`, `"bundled"`, a timm name, a folder or file, an `nn.Module`, or `(module, preprocessing)`; `"auto"`
            when None.
        classifier: network, or `(network, preprocessing)`, whose saliency scores the patches, in place of the name
            `config.patches.classifier`.
        reconstructor: a `ViTMAEForPreTraining` that fills dropped patches, in place of the name `config.patches.reconstructor`.
        labels: class of every sample [N], a column name, or False for bins over the whole set; None takes the dataset's own.
        indices: a choice that exists already, in place of keep_ratio and num_bins: positions in the dataset as an integer
            array, tensor or list [M], or the `.npy` file of such (the published `select_indices_*.npy`). No encoder runs.
        config: everything else; also a dict of its fields, or a YAML or JSON file. A keyword counts as not given when it is
            None; one that says something else than a setting changed here is an error.
        store: `"indices"` copies nothing, `"packed"` makes a self-contained set, `"auto"` is `"indices"` while all patches are
            kept; `"auto"` when None.
        transform: `"keep"`, or what replaces the wrapped dataset's transform in the train loader (None: none).
        target_transform: likewise.
        batch_transform: with `config.patches.reconstruct="batch"`, and only there: from filled uint8 images [B, C, H, W] on the
            device to what the training takes, in place of the dataset's own image transform.
        collate_fn: of all loaders; None is torch's.
        tokenizer: of transformers, or its name or folder. Loaders of instruction data then give batches of `input_ids`,
            `labels` (-100 over prompts) and `attention_mask`; `config.text` says how long and whether packed. A `collate_fn`
            then gets items of `input_ids` and `labels`.
        batch_size: samples per batch and process; 32 when None. Of a wrapped data module this and the next settings of
            loaders are those of its own train loader when None.
        eval_batch_size: of the val, test and predict loaders; None is `batch_size`.
        num_workers: loader processes; `"auto"`, also when None, leaves one core to each training process, and starts none for
            a dataset that holds open files. 0 also keeps features and saliency in one process, unless
            `config.features.num_workers` says more.
        pin_memory: `"auto"`, also when None, pins when batches go to a GPU.
        persistent_workers: `"auto"`, also when None, keeps workers unless loaders are reloaded every few epochs.
        drop_last: leave out the last, smaller batch of an epoch; False when None.
        cache_dir: folder of the cache; None uses `DQ_LIGHTNING_CACHE` or the platform's cache folder.
        seed: of the draw, of weighted samplers, and of a wrapped data module's own split; 0 when None.
        fingerprint: identity of the dataset, in place of the digest of its content.
        force_recompute: build again what is in the cache already.
        verify: how entries are checked before use: `"size"`, `"hash"` or `"off"`.
        on_error: `"raise"`, or `"skip"`: samples that can't be read are left out and counted in `info.num_unreadable`;
            `"raise"` when None.
        device: of the encoder and the bins; `"auto"` is the Trainer's device, or a GPU if there is one.

    Attributes:
        prepare_data_per_node: as in Lightning; True prepares on every node, which a shared cache turns into one build.
    """

    def __init__(
        self,
        train: Data,
        *,
        val: Data = None,
        test: Data = None,
        predict: Data = None,
        keep_ratio: float | None = None,
        num_bins: int | None = None,
        drop_ratio: float | None = None,
        encoder: Any = None,
        classifier: Any = None,
        reconstructor: Any = None,
        labels: Any = None,
        indices: Indices = None,
        config: AnyConfig | None = None,
        store: StoreKind | None = None,
        transform: Any = "keep",
        target_transform: Any = "keep",
        batch_transform: Callable[..., Any] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        tokenizer: Any = None,
        batch_size: int | None = None,
        eval_batch_size: int | None = None,
        num_workers: AutoInt | None = None,
        pin_memory: AutoBool | None = None,
        persistent_workers: AutoBool | None = None,
        drop_last: bool | None = None,
        cache_dir: str | Path | None = None,
        seed: int | None = None,
        fingerprint: str | None = None,
        force_recompute: bool = False,
        verify: VerifyPolicy = "size",
        on_error: OnError | None = None,
        device: str = "auto",
    ) -> None:
        super().__init__()
        check_given(train=train, val=val, test=test, predict=predict)
        check_loader_numbers(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers)
        wanted = want(
            config=config,
            keep_ratio=keep_ratio,
            num_bins=num_bins,
            seed=seed,
            store=store,
            encoder=encoder,
            labels=labels,
            indices=indices,
            transform=transform,
            target_transform=target_transform,
            fingerprint=fingerprint,
            drop_ratio=drop_ratio,
            classifier=classifier,
            reconstructor=reconstructor,
            on_error=on_error,
        )
        if num_workers == 0:
            wanted = in_one_process(wanted)
        self.config = wanted.config
        selected, seed = wanted.config.selection, wanted.seed
        # what holds, wherever it was set. Plain and small only: a dataset here would be copied into every checkpoint
        keep_ratio, num_bins = selected.keep_ratio, wanted.config.bins.num_bins
        if wanted.indices is not None:
            keep_ratio = num_bins = None
        self.save_hyperparameters("keep_ratio", "num_bins", "seed", logger=False)
        self._inner: Any = train if is_datamodule(train) else None
        # of a wrapped data module the train loader tells it
        own = None if self._inner is not None else LoaderSettings().batch_size
        self.batch_size: int | None = own if batch_size is None else batch_size
        self.eval_batch_size = eval_batch_size
        self._given: dict[str, Any] = {
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "persistent_workers": persistent_workers,
            "drop_last": drop_last,
            "collate_fn": collate_fn,
        }
        evals = {name: open_paths(one, name) for name, one in (("val", val), ("test", test), ("predict", predict))}
        kept = isinstance(transform, str) and transform == KEEP and batch_transform is None
        self._eval = other_splits(train, evals, same_form=kept)
        self._reported = False
        train_set = make_train_set(train, wanted, verify)
        check_batch_transform(batch_transform, train_set.fills_late)
        text, on_error = wanted.config.text, wanted.config.on_error
        self._tokens = None if tokenizer is None else TokenLoading(tokenizer, text, wanted.seed, on_error)
        self._preparation = Preparation(
            train_set,
            self._inner,
            cache_dir=cache_dir,
            verify=verify,
            device=device,
            force=force_recompute,
            seed=wanted.seed,
            check=None if self._tokens is None else self._check_rows,
            default_collate=tokenizer is None
            and collate_fn is None
            and type(self).train_dataloader is QuantizedHooks.train_dataloader,
        )
        if self._inner is not None:
            self._wrap(self._inner)
        self._batch_transform = batch_transform
        self._filler: BatchFiller | None = None
        if train_set.fills_late:
            # on the instance, and only then: Lightning would else skip the model's own hook
            self._next_hook = vars(self).get("on_after_batch_transfer")
            self.on_after_batch_transfer = self._fill_batch  # type: ignore[method-assign]

    @classmethod
    def from_datamodule(
        cls,
        datamodule: Any,
        *,
        keep_ratio: float | None = None,
        num_bins: int | None = None,
        drop_ratio: float | None = None,
        encoder: Any = None,
        classifier: Any = None,
        reconstructor: Any = None,
        labels: Any = None,
        indices: Indices = None,
        config: AnyConfig | None = None,
        store: StoreKind | None = None,
        transform: Any = "keep",
        target_transform: Any = "keep",
        batch_transform: Callable[..., Any] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        tokenizer: Any = None,
        batch_size: int | None = None,
        num_workers: AutoInt | None = None,
        pin_memory: AutoBool | None = None,
        persistent_workers: AutoBool | None = None,
        drop_last: bool | None = None,
        cache_dir: str | Path | None = None,
        seed: int | None = None,
        fingerprint: str | None = None,
        force_recompute: bool = False,
        verify: VerifyPolicy = "size",
        on_error: OnError | None = None,
        device: str = "auto",
    ) -> Self:
        """Quantize the train set of an existing data module of `lightning` or `pytorch_lightning`.

        Its other loaders, batch-transfer hooks, state and attributes pass through. Batch size, collate function, sampler and
        worker settings are those of its train loader unless given here. Its `setup("fit")` runs in `prepare_data` too, both
        times from the random state `seed`, so that a split made there is the same on every rank. In `prepare_data` it runs
        on one process of each node alone: a barrier or other collective call inside it would wait for ever.

        Raises:
            ConfigError: this is no data module.
        """
        if not is_datamodule(datamodule):
            raise ConfigError(f"from_datamodule takes a LightningDataModule, got {type(datamodule).__name__}")
        return cls(
            datamodule,
            keep_ratio=keep_ratio,
            num_bins=num_bins,
            drop_ratio=drop_ratio,
            encoder=encoder,
            classifier=classifier,
            reconstructor=reconstructor,
            labels=labels,
            indices=indices,
            config=config,
            store=store,
            transform=transform,
            target_transform=target_transform,
            batch_transform=batch_transform,
            collate_fn=collate_fn,
            tokenizer=tokenizer,
            batch_size=batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=persistent_workers,
            drop_last=drop_last,
            cache_dir=cache_dir,
            seed=seed,
            fingerprint=fingerprint,
            force_recompute=force_recompute,
            verify=verify,
            on_error=on_error,
            device=device,
        )

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
        batch_transform: Callable[..., Any] | None = None,
        reconstruct: Reconstruct | None = None,
        reconstructor: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        tokenizer: Any = None,
        config: AnyConfig | None = None,
        batch_size: int | None = None,
        eval_batch_size: int | None = None,
        num_workers: AutoInt | None = None,
        pin_memory: AutoBool | None = None,
        persistent_workers: AutoBool | None = None,
        drop_last: bool | None = None,
        cache_dir: str | Path | None = None,
        seed: int | None = None,
        force_recompute: bool = False,
        verify: VerifyPolicy = "size",
        device: str = "auto",
    ) -> Self:
        """Train from a packed compact set alone; the original dataset is not needed.

        `path` is the folder of the entry (`StoreInfo.path`), here or copied from another machine. `transform` is of the image
        and `target_transform` of the target of each sample: transforms are code, so a store never holds them. Of a store of
        patches, `reconstruct` (`"prepare"`, `"batch"`, `"off"`) and `reconstructor` replace what it was made with. All else is
        as in the class.

        Raises:
            StoreError: the folder holds no packed set, or a damaged one.
        """
        return cls(
            StoreFolder(Path(path), reconstruct),
            val=val,
            test=test,
            predict=predict,
            transform=transform,
            target_transform=target_transform,
            batch_transform=batch_transform,
            reconstructor=reconstructor,
            collate_fn=collate_fn,
            tokenizer=tokenizer,
            config=config,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=persistent_workers,
            drop_last=drop_last,
            cache_dir=cache_dir,
            seed=seed,
            force_recompute=force_recompute,
            verify=verify,
            device=device,
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
        evals = {"val": val_dataset, "test": test_dataset, "predict": predict_dataset}
        return cls(train_dataset, batch_size=batch_size, num_workers=num_workers, **evals)

    def prepare_data(self) -> None:
        """Make the compact set if it is not cached. Runs where Lightning says; leaves nothing of use but files behind."""
        val = self._eval["val"]
        self._preparation.prepare(self.trainer, {"val": val} if is_one_dataset(val) else None)

    def setup(self, stage: str | None = None) -> None:
        """Open the compact set on every rank and check that all ranks hold the same one.

        Raises:
            DQError: preparation failed on some rank, the entry cannot be found here, the ranks disagree, or the Trainer's
                settings cannot work with so few steps.
        """
        if not self._preparation.open(self.trainer, stage):
            return
        # the batch-size finder and a model look for it here
        self.batch_size = self._settings().batch_size
        if self._tokens is not None:
            self._tokens.rows(self._preparation.opened.dataset, self.selection.index.tolist())
        if self.trainer is not None:
            settings = self._settings()
            if self._tokens is not None:
                settings = self._tokens.for_report(self._preparation.opened.dataset, settings)
                if self.trainer.is_global_zero and not self._reported:
                    self._tokens.report(self._preparation.opened.dataset)
            report_steps(self.trainer, self.info, settings, quiet=self._reported)
            self._reported = True

    def teardown(self, stage: str) -> None:
        """Forwarded to a wrapped data module."""
        if self._inner is not None:
            self._inner.teardown(stage)

    def on_exception(self, exception: BaseException) -> None:
        """Say on every rank what ended the run; forwarded to a wrapped data module."""
        if (cause := self._preparation.explain(exception)) is not None:
            get_logger().error(cause)
        if self._inner is not None:
            self._inner.on_exception(exception)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the compact set."""
        dataset, facts = self._preparation.opened.dataset, TrainerFacts.of(self.trainer)
        if self._tokens is not None:
            return self._tokens.loader(dataset, self._settings(), facts)
        return make_loader(dataset, self._settings(), facts, self._preparation.seed)

    def val_dataloader(self) -> Any:
        """Loaders over `val`, or the wrapped data module's own; without, none while training."""
        return self._eval_loaders("val")

    def test_dataloader(self) -> Any:
        """Loaders over `test`, or the wrapped data module's own."""
        return self._eval_loaders("test")

    def predict_dataloader(self) -> Any:
        """Loaders over `predict`, or the wrapped data module's own."""
        return self._eval_loaders("predict")

    def state_dict(self) -> dict[str, Any]:
        """The compact set's content hash, and the wrapped data module's state."""
        known = self.info.content_hash if self._preparation.is_open else self._preparation.expected_hash
        state: dict[str, Any] = {"content_hash": known}
        if self._inner is not None:
            state["datamodule"] = self._inner.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that training goes on with the compact set it began with.

        Raises:
            CacheError: this run made another one.
        """
        if self._inner is not None:
            self._inner.load_state_dict(state_dict.get("datamodule", {}))
        self._preparation.expect(state_dict.get("content_hash"), self.trainer)

    @property
    def info(self) -> StoreInfo:
        """Where the compact set is and what it costs; after `setup`."""
        return self._preparation.info

    @property
    def selection(self) -> Selection:
        """Which samples were kept; after `setup`."""
        return self._preparation.compact().selection

    @property
    def bins(self) -> Bins:
        """The bins of the whole set; after `setup`."""
        return read_bins_of(self._preparation.compact(), self._preparation.cache())

    @property
    def data_keep_ratio(self) -> float:
        """Share of the data that is kept; after `setup`."""
        return self.info.data_keep_ratio

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None when the targets are no classes; samples without a label are of none.

        For a dataset it is known before `setup`; one that lists no classes is read through for it.
        """
        own = getattr(self._inner, "num_classes", None)
        return self._preparation.num_classes() if own is None else own

    @property
    def name(self) -> str | None:
        """Of a wrapped data module; else None, or what was set here."""
        named: str | None = self.__dict__.get("name", getattr(self.__dict__.get("_inner"), "name", None))
        return named

    @name.setter
    def name(self, value: str | None) -> None:
        self.__dict__["name"] = value

    @property
    def hparams(self) -> Any:
        """The wrapped data module's own when it saved any; else keep ratio, number of bins and seed."""
        return getattr(self.__dict__.get("_inner"), "hparams", None) or super().hparams

    @property
    def hparams_initial(self) -> Any:
        """Likewise, as they were saved."""
        return getattr(self.__dict__.get("_inner"), "hparams_initial", None) or super().hparams_initial

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a Trainer that this class does not fit, at the moment when it takes the data module."""
        if name == "trainer":
            check_package(self, value)
        super().__setattr__(name, value)

    def __iter__(self) -> Iterator[Any]:
        """A Trainer of the other package takes the data module for a loader.

        Raises:
            ConfigError: always.
        """
        raise not_iterable(self)

    def __getattr__(self, name: str) -> Any:
        """Attributes of a wrapped data module that a model reads through `trainer.datamodule`."""
        inner = self.__dict__.get("_inner")
        if inner is not None and not name.startswith("_"):
            return getattr(inner, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def _wrap(self, datamodule: Any) -> None:
        if any(value is not None for value in (*self._eval.values(), self.eval_batch_size)):
            raise ConfigError(
                "val=, test=, predict= and eval_batch_size= come from the wrapped data module: leave them out"
            )
        for name in ("prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices", "_log_hyperparams"):
            if hasattr(datamodule, name):
                setattr(self, name, getattr(datamodule, name))
        if hidden := [name for name in HIDING if hasattr(datamodule, name)]:
            named = ", ".join(hidden)
            get_logger().warning(
                f"{type(datamodule).__name__} has {named}, and so has QuantizedDataModule, whose own is what "
                "trainer.datamodule gives: read yours from the data module that you passed"
            )
        for name, hook in overridden_transfer_hooks(datamodule).items():
            # on the instance, and only these: Lightning asks whether they are overridden and would else skip the model's own
            setattr(self, name, hook)

    def _fill_batch(self, batch: Any, dataloader_idx: int) -> Any:
        """Fill the images of a train batch on its device, then let the hook run that would have run without this one."""
        if is_unfilled(batch):
            opened = self._preparation.opened
            if self._filler is None:
                assert opened.patches is not None
                assert self._batch_transform is not None
                self._filler = BatchFiller(opened.patches, opened.dataset.place, self._batch_transform)
            batch = self._filler(batch)
        following = self._next_hook
        if following is None and self.trainer is not None:
            following = self.trainer.lightning_module.on_after_batch_transfer
        return batch if following is None else following(batch, dataloader_idx)

    def _check_rows(self, dataset: Any) -> None:
        """Tell before the work what a tokenizer could not be given: of the whole training set, and of what validates it."""
        tokens, val = self._tokens, self._eval["val"]
        assert tokens is not None
        tokens.check(dataset)
        if val is not None and self._inner is None:

            def check(one: Any, *_: Any) -> Any:
                return tokens.check(one, "val=")

            make_eval_loaders(val, LoaderSettings(), TrainerFacts.of(None), check)

    def _settings(self) -> LoaderSettings:
        """Settings of the train loader; the batch size is read at each call, because the batch-size finder changes it."""
        return self._preparation.settings(self.batch_size, self._given)

    def _eval_loaders(self, name: str) -> Any:
        hook = f"{name}_dataloader"
        given = self._eval[name] if self._inner is None else defined_by_user(self._inner, hook) or None
        if given is None:
            if name == "val" and TrainerFacts.of(self.trainer).fits:
                return []
            raise ConfigError(
                f"there is no {hook}: pass {name}= to QuantizedDataModule, or define it in the wrapped module"
            )
        if self._inner is not None:
            return getattr(self._inner, hook)()
        settings = self._settings()
        settings = replace(
            settings, batch_size=settings.batch_size if self.eval_batch_size is None else self.eval_batch_size
        )
        make = None if self._tokens is None else partial(self._tokens.loader, name=f"{name}=")
        return make_eval_loaders(self._eval[name], settings, TrainerFacts.of(self.trainer), make)
