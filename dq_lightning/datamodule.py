"""The hooks of the quantized data module, for both packages that Lightning is published as.

The packages `lightning` and `pytorch_lightning` can be installed side by side and share no class, and a Trainer accepts
data modules of its own package only. Therefore this file defines the hooks in a class without a base class, and
`lightning.py` and `pytorch.py` each combine it with the `LightningDataModule` of one package.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

from torch.utils.data import DataLoader, Dataset

from dq_lightning.core.config import (
    AnyConfig,
    Balance,
    OnError,
    Preset,
    Reconstruct,
    StoreKind,
    VerifyPolicy,
    replace_fields,
)
from dq_lightning.core.console import get_logger
from dq_lightning.core.devices import DeviceNames
from dq_lightning.core.errors import ConfigError
from dq_lightning.core.notebook import facts_as_html
from dq_lightning.core.records import Bins, Duplicates, Features, Labels, Selection, StoreInfo
from dq_lightning.core.sharing import Distributed
from dq_lightning.loading.batch_filling import BatchFiller, check_batch_transform, is_unfilled
from dq_lightning.loading.inner import (
    TRANSFER_HOOKS,
    AnyDataModule,
    UndefinedHook,
    check_given,
    check_package,
    defined_by_user,
    lightnings_own,
    not_iterable,
)
from dq_lightning.loading.loaders import (
    AutoBool,
    AutoInt,
    LoaderSettings,
    check_loader_numbers,
    is_one_dataset,
    is_random_collate,
    make_eval_loaders,
    make_loader,
)
from dq_lightning.loading.options import DataModuleOptions, StoreOptions, listing
from dq_lightning.loading.paths import open_paths, other_splits
from dq_lightning.loading.preparation import Preparation
from dq_lightning.loading.steps import facts_for_loggers, report_steps
from dq_lightning.loading.store_train_set import StoreFolder, StoreTrainSet, make_train_set
from dq_lightning.loading.trainer_facts import TrainerFacts
from dq_lightning.pipeline.compact import read_bins_of, read_features_of
from dq_lightning.pipeline.duplicates import read_duplicates_of
from dq_lightning.pipeline.wanted import want
from dq_lightning.selection.given import Indices, read_indices
from dq_lightning.sources.strip import KEEP
from dq_lightning.tokens.loading import TokenLoading

if TYPE_CHECKING:
    from lightning import LightningDataModule as Base
else:
    Base = object

# Any covers everything that `train` may be. The classes before it (with Dataset left without its type parameter) are
# listed so that LightningCLI can change a single argument of a dataset in the YAML file from the command line.
Data = Dataset | AnyDataModule | Any  # type: ignore[type-arg]
# Attributes of QuantizedDataModule that hide attributes of the same name of a wrapped data module. A model may expect
# the wrapped module's values, so a warning names those that are hidden.
HIDING = ("config", "info", "selection", "bins", "data_keep_ratio", "eval_batch_size", "report")


class QuantizedHooks(Base):
    """Data module that trains on a compact set, chosen by Dataset Quantization (Zhou et al. 2023).

    The compact set is a part of the training set. It is made once, in `prepare_data`, and kept in a cache, so later
    runs start training at once. The train loader delivers items with the type, structure and transform of the wrapped
    dataset. For Trainers of the package `pytorch_lightning`, import the class from `dq_lightning.pytorch`.

    Args:
        train: training set: a torchvision or Hugging Face dataset, any map-style dataset, a LightningDataModule (see
            `from_datamodule`), the folder of a packed compact set (see `from_store`), a folder of class folders with
            images, or a file of text rows.
        val: validation dataset or loader, or a list or dict of these; None means that there is no validation loader. If
            `train` is a Hugging Face `DatasetDict`, its splits named validation and test are used where `val` and
            `test` are None, unless `transform` is given.
        test: test dataset or loader, or a list or dict of these; None as for `val`.
        predict: prediction dataset or loader, or a list or dict of these; None means that there is no prediction
            loader.
        keep_ratio: share of the samples that is kept, in (0, 1]; None lets `max_bytes` choose, and is
            0.125 without it.
        num_bins: K, the number of disjoint bins in each class; 10 when None.
        drop_ratio: share of the patches of every kept image that is dropped, in [0, 1). Only the other patches are
            stored, and a masked autoencoder fills the dropped ones. `config.patches` holds all further settings of this
            step. 0 when None.
        max_bytes: bytes that the compact set may take, everything counted: a number, a size (`"15MB"`), or a share of
            the dataset's bytes (`"10%"`). How many samples are kept and, for images, as which JPEG or WebP, is then
            chosen (see `config.encoding`); a `keep_ratio` is kept to. No bound when None.
        encoder: network that makes the features: `"auto"`, `"bundled"`, a timm name, `"transformers:OWNER/NAME"`, a
            folder or file, an `nn.Module`, or `(module, preprocessing)`; or ready features [N, D] or a function of one
            raw sample, for which the samples may be of any kind; `"auto"` when None.
        classifier: network, or `(network, preprocessing)`, whose saliency maps score the patches; it replaces the name
            in `config.patches.classifier`.
        reconstructor: `ViTMAEForPreTraining` that fills dropped patches; it replaces the name in
            `config.patches.reconstructor`.
        labels: class of every sample [N], the name of a column, or False to make bins over the whole set; None uses the
            dataset's own labels. 0 and 1 for several labels a sample [N, C], `"quantiles"` or `"quantiles:5"` for groups
            of a number, `"dominant"` for the class that covers most of an image; see `as_source`.
        indices: positions of the samples to keep, in place of keep_ratio and num_bins: an integer array, tensor or list
            [M], or an `.npy` file of these (such as the published `select_indices_*.npy`). No encoder runs then.
        scores: what each sample is worth, higher is better: `"margin"` (how well its label fits its features), numbers
            [N], an `.npy` file of these, or the name of a column of numbers. `"margin"` when None: images with classes
            are then drawn from the best margins of every bin. Scores of your own matter with `drop_worst`, and with
            `config.selection.draw="scored"`.
        drop_worst: share of each class that is left out for its low scores, in [0, 1), or `"auto"`, which leaves out
            the samples whose labels seem wrong; what was left out is in `info.suspects`. 0 when None.
        balance: whether classes share the kept samples in proportion to their sizes (`"proportional"`), to the square
            roots of their sizes (`"sqrt"`), or in equal numbers (`"equal"`); `"proportional"` when None.
        preset: `"published"` for the paper's way of choosing, whatever the defaults are (ten bins, a uniform draw, no
            sample or patch left out; see `QuantizeConfig`). A keyword or setting that says otherwise is an error.
        config: all further settings: a `QuantizeConfig`, a dict of its fields, or a YAML or JSON file. A keyword of
            this class that is None counts as not given; a keyword that contradicts a setting that was changed in
            `config` is an error.
        store: `"indices"` stores positions only and copies no sample, `"packed"` makes a self-contained set of the kept
            samples, and `"auto"` means `"indices"` while all patches are kept, else `"packed"`; `"auto"` when None.
        transform: `"keep"`, or the transform that replaces the wrapped dataset's transform in the train loader; None
            means no transform.
        target_transform: `"keep"`, or the transform that replaces the wrapped dataset's target transform in the train
            loader; None means no target transform.
        batch_transform: function from filled uint8 images [B, C, H, W] on the device to the input of the training, in
            place of the dataset's own image transform. It is required with `config.patches.reconstruct="batch"` and
            refused otherwise.
        collate_fn: collate function of all loaders; None uses torch's. With one for training alone, such as MixUp, pass
            `val` and `test` as loaders.
        tokenizer: tokenizer of transformers, or its name or folder. Loaders of instruction data then deliver batches of
            `input_ids`, `labels` (-100 over prompts) and `attention_mask`; `config.text` sets their length and whether
            rows are packed. A `collate_fn` then receives items of `input_ids` and `labels`.
        batch_size: samples per batch and process; 32 when None. For a wrapped data module, this and the other loader
            settings are taken from its own train loader where they are None.
        eval_batch_size: samples per batch and process of the val, test and predict loaders; None uses `batch_size`.
        num_workers: number of loader processes. `"auto"`, also when None, leaves one core to each training process, and
            starts no loader process for a dataset that holds open files. 0 also makes features and saliency read in one
            process, unless `config.features.num_workers` is set to a number.
        pin_memory: whether loaders pin memory; `"auto"`, also when None, pins it when batches go to a GPU.
        persistent_workers: whether loader processes are kept between epochs; `"auto"`, also when None, keeps them
            unless loaders are reloaded every few epochs, and starts new ones after an attribute of the dataset or of
            its transforms was changed.
        drop_last: whether the last, smaller batch of an epoch is left out; False when None.
        cache_dir: folder of the cache; None uses `DQ_LIGHTNING_CACHE` or the platform's cache folder.
        seed: seed of the draw, of weighted samplers, and of a wrapped data module's own split; 0 when None.
        fingerprint: identity of the dataset given by the user, in place of the digest of its content.
        force_recompute: build again what is already in the cache.
        verify: how cache entries are checked before use: `"size"` compares names and sizes of their files, `"hash"`
            also compares the digests of all files, and `"off"` checks the manifest only.
        on_error: what happens when a sample cannot be read: `"raise"` ends the run, `"skip"` leaves the sample out and
            counts it in `info.num_unreadable`; `"raise"` when None.
        device: device that the networks and the bins run on; several, such as `["cuda:0", "cuda:1"]`, share the batches
            of features, saliency and filling, and the result is that of one. `"auto"` is every GPU of this node that the
            Trainer was given, else the Trainer's device, or without a Trainer a GPU if there is one.
        distributed: `"all"` lets all ranks of the Trainer share the work, in `setup`; otherwise only the
            processes that Lightning picks for `prepare_data` work (on each node, or on one), and the others wait.

    Attributes:
        prepare_data_per_node: as in Lightning; True runs `prepare_data` on every node. If the nodes share the cache,
            the compact set is still built only once.

    Raises:
        ConfigError: an argument is invalid, or arguments contradict each other.

    Example:
        >>> import tempfile, torch
        >>> from dq_lightning import QuantizedDataModule
        >>> dataset = [(torch.full((3, 8, 8), i / 40), i % 2) for i in range(40)]
        >>> features = torch.rand(40, 5).numpy()  # in place of an encoder
        >>> with tempfile.TemporaryDirectory() as cache:
        ...     data = QuantizedDataModule(
        ...         dataset, keep_ratio=0.25, num_bins=5, encoder=features, batch_size=5, num_workers=0, cache_dir=cache
        ...     )
        ...     data.prepare_data()  # the Trainer calls these two
        ...     data.setup("fit")
        >>> images, targets = next(iter(data.train_dataloader()))
        >>> data.info.num_samples, images.shape
        (10, torch.Size([5, 3, 8, 8]))
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
        max_bytes: int | str | None = None,
        encoder: Any = None,
        classifier: Any = None,
        reconstructor: Any = None,
        labels: Any = None,
        indices: Indices = None,
        scores: Any = None,
        drop_worst: float | Literal["auto"] | None = None,
        balance: Balance | None = None,
        preset: Preset | None = None,
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
        device: DeviceNames = "auto",
        distributed: Distributed = "auto",
    ) -> None:
        super().__init__()
        check_given(train=train, val=val, test=test, predict=predict)
        check_loader_numbers(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers)
        wanted = want(
            config,
            keep_ratio=keep_ratio,
            num_bins=num_bins,
            seed=seed,
            store=store,
            encoder=encoder,
            labels=labels,
            # A file is read now, because it may be removed or replaced before another process reads it.
            indices=None if indices is None else read_indices(indices),
            transform=transform,
            target_transform=target_transform,
            fingerprint=fingerprint,
            drop_ratio=drop_ratio,
            max_bytes=max_bytes,
            classifier=classifier,
            reconstructor=reconstructor,
            on_error=on_error,
            scores=scores,
            drop_worst=drop_worst,
            balance=balance,
            preset=preset,
        )
        if num_workers == 0 and wanted.config.features.num_workers == "auto":
            wanted = replace(wanted, config=replace_fields(wanted.config, {"features.num_workers": 0}))
        self.config = wanted.config
        train_set = make_train_set(train, wanted, verify, cache_dir)
        check_batch_transform(batch_transform, transform, train_set.fills_late)
        selected = wanted.config.selection
        # The hyperparameters are the values in effect, whether a keyword or the config set them, and None where nothing is
        # drawn from bins. Only small plain values are saved, because a dataset among them would be copied into every
        # checkpoint.
        # Under a budget of bytes without a keep ratio, the budget decides how many samples are kept.
        keep_ratio = selected.share if wanted.config.max_bytes is None else selected.keep_ratio
        num_bins, seed = wanted.config.bins.num_bins, selected.seed
        if wanted.indices is not None or isinstance(train_set, StoreTrainSet):
            keep_ratio = num_bins = None
        try:
            self.save_hyperparameters("keep_ratio", "num_bins", "seed", logger=False)
        except KeyError:
            # LightningCLI makes a subclass, or another class that makes this one, and Lightning looks for the names among
            # the arguments of that class.
            values = {"keep_ratio": keep_ratio, "num_bins": num_bins, "seed": seed}
            self.save_hyperparameters(values, logger=False)
        inner: Any = train if isinstance(train, AnyDataModule) else None
        # The batch size of a wrapped data module is read from its train loader in setup().
        own = None if inner is not None else LoaderSettings().batch_size
        self.batch_size: int | None = own if batch_size is None else batch_size
        # The batch size that was read there last: another one was set since, by the user or the batch size finder.
        self._read_batch_size: int | None = None
        self.eval_batch_size = eval_batch_size
        # From here on attributes that only the wrapped data module has are set there.
        self._inner = inner
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
        self._tokens = None
        if tokenizer is not None:
            self._tokens = TokenLoading(tokenizer, wanted.config.text, selected.seed, wanted.config.on_error)
        self._preparation = Preparation(
            train_set,
            self._inner,
            cache_dir=cache_dir,
            verify=verify,
            device=device,
            force=force_recompute,
            seed=selected.seed,
            check=None if self._tokens is None else self._check_rows,
            default_collate=tokenizer is None
            and collate_fn is None
            and type(self).train_dataloader is QuantizedHooks.train_dataloader,
            distributed=distributed,
        )
        if self._inner is not None:
            self._wrap(self._inner)
        if not self._has("val") and type(self).val_dataloader is QuantizedHooks.val_dataloader:
            # Else Lightning would speak of a validation loader that nobody passed.
            own = lightnings_own(type(self), "val_dataloader")
            self.val_dataloader = UndefinedHook(own, self.val_dataloader)  # type: ignore[method-assign]
        self._batch_transform = batch_transform
        self._filler: BatchFiller | None = None
        if train_set.fills_late:
            # The hook is set on the instance, and only when it is needed: Lightning skips the model's own hook whenever
            # the data module overrides it.
            self._next_hook = vars(self).get("on_after_batch_transfer")
            self.on_after_batch_transfer = self._fill_batch  # type: ignore[method-assign]

    @classmethod
    @listing(__init__, DataModuleOptions)
    def from_datamodule(cls, datamodule: Any, **options: Unpack[DataModuleOptions]) -> Self:
        """Quantize the train set of an existing data module of `lightning` or `pytorch_lightning`.

        The wrapped module's other loaders, batch-transfer hooks, state and attributes are passed through. Batch size,
        collate function, sampler and worker settings are those of its train loader unless they are given here. Its
        `setup("fit")` also runs in `prepare_data`, both times from the random state `seed`, so that a split made there
        is the same on every rank. In `prepare_data` it runs in only one process of each node, so a barrier or another
        collective call inside it would wait forever. All keywords are as in the class.

        Raises:
            ConfigError: `datamodule` is not a data module, or an argument is invalid.
        """
        if not isinstance(datamodule, AnyDataModule):
            raise ConfigError(f"from_datamodule takes a LightningDataModule, got {type(datamodule).__name__}")
        return cls(datamodule, **options)

    @classmethod
    @listing(__init__, StoreOptions)
    def from_store(
        cls, path: str | Path, *, reconstruct: Reconstruct | None = None, **options: Unpack[StoreOptions]
    ) -> Self:
        """Train from a packed compact set alone; the original dataset is not needed.

        `path` is the folder of the entry (`StoreInfo.path`), in the cache or copied from another machine, or its address
        in any file system of fsspec (`"s3://bucket/set"`), which is copied into the cache once. `transform`
        is applied to the image of each sample and `target_transform` to its target; a store never holds transforms,
        because they are code, so `"keep"` and None both mean no transform. For a store of patches, `reconstruct`
        (`"prepare"`, `"batch"`, `"off"`) and `reconstructor` replace the settings that the store was made with. All
        other arguments are as in the class.

        Raises:
            StoreError: the folder holds no packed set, or a damaged one.
            ConfigError: an argument is invalid.
        """
        return cls(StoreFolder(path, reconstruct), **options)

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
        """Make a data module from datasets, with the signature of Lightning's own method, and quantize the train set.

        The class itself takes all further settings.

        Raises:
            ConfigError: `train_dataset` is None, or an argument is invalid.
        """
        if train_dataset is None:
            raise ConfigError("from_datasets needs train_dataset: there is nothing to quantize without it")
        evals = {"val": val_dataset, "test": test_dataset, "predict": predict_dataset}
        return cls(train_dataset, batch_size=batch_size, num_workers=num_workers, **evals)

    def prepare_data(self) -> None:
        """Make the compact set if it is not in the cache.

        Lightning decides which processes run this hook, so its only lasting result is files in the cache.

        Raises:
            DQError: preparation failed in a run of one process. In a run of several processes `setup` raises the error,
                on every rank.
        """
        val, collate = self._eval["val"], self._given["collate_fn"]
        val = val if is_one_dataset(val) else None
        self._preparation.prepare(self.trainer, val)
        if val is not None and collate is not None and self._tokens is None and is_random_collate(collate, val):
            get_logger().warning(
                "collate_fn= makes other batches of the same samples at each call, as MixUp does, and it makes the batches of "
                "val= too: if that is for training alone, pass val=DataLoader(val_dataset, batch_size=...)"
            )

    def setup(self, stage: str | None = None) -> None:
        """Open the compact set on every rank and check that all ranks hold the same one.

        Raises:
            DQError: preparation failed on some rank, this rank cannot find the entry, the ranks hold different compact
                sets, or the Trainer's settings cannot work with the small number of steps in an epoch.
        """
        if not self._preparation.open(self.trainer, stage):
            return
        settings, dataset = self._settings(), self._preparation.opened.dataset
        # Lightning's batch-size finder and models read this attribute.
        if self._follows_inner:
            self._read_batch_size = settings.batch_size
        self.batch_size = settings.batch_size
        if self._tokens is not None:
            rows = self._tokens.rows(dataset, self.selection.index.tolist())
            settings = self._tokens.for_report(dataset, settings)
            if self.trainer is not None and self.trainer.is_global_zero and not self._reported:
                get_logger().info(str(rows.report))
        if self.trainer is not None:
            report_steps(self.trainer, self.info, settings, quiet=self._reported)
            if not self._reported:
                if self._inner is not None and TrainerFacts.of(self.trainer).reloads and self.trainer.is_global_zero:
                    get_logger().warning(
                        "reload_dataloaders_every_n_epochs makes the train loader anew with the settings that "
                        f"{type(self._inner).__name__}.train_dataloader() gave at the start: what it would do otherwise in "
                        "later epochs has no effect"
                    )
                for logger in self.trainer.loggers:
                    logger.log_hyperparams(facts_for_loggers(self.info))
            self._reported = True

    def teardown(self, stage: str) -> None:
        """Call the wrapped data module's `teardown`, if there is a wrapped data module."""
        if self._inner is not None:
            self._inner.teardown(stage)

    def on_exception(self, exception: BaseException) -> None:
        """Log on every rank what ended the run, and call the wrapped data module's `on_exception`."""
        if (cause := self._preparation.explain(exception)) is not None:
            get_logger().error(cause)
        if self._inner is not None:
            self._inner.on_exception(exception)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader over the compact set; it shuffles, unless the train loader of a wrapped module does not.

        Raises:
            ConfigError: `setup` has not run.
        """
        dataset, facts = self._preparation.opened.dataset, TrainerFacts.of(self.trainer)
        if self._tokens is not None:
            return self._tokens.loader(dataset, self._settings(), facts)
        return make_loader(dataset, self._settings(), facts, self._preparation.seed)

    def val_dataloader(self) -> Any:
        """Return the loaders over `val`, or the wrapped data module's own; an empty list if there are none in training.

        Raises:
            ConfigError: there are none, and the Trainer only validates.
        """
        return self._eval_loaders("val")

    def test_dataloader(self) -> Any:
        """Return the loaders over `test`, or the wrapped data module's own.

        Raises:
            ConfigError: there are none.
        """
        return self._eval_loaders("test")

    def predict_dataloader(self) -> Any:
        """Return the loaders over `predict`, or the wrapped data module's own.

        Raises:
            ConfigError: there are none.
        """
        return self._eval_loaders("predict")

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: the compact set's content hash and the wrapped data module's state."""
        known = self.info.content_hash if self._preparation.is_open else self._preparation.expected_hash
        state: dict[str, Any] = {"content_hash": known}
        if self._inner is not None:
            state["datamodule"] = self._inner.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the wrapped data module's state, and check that training continues with the same compact set.

        Raises:
            CacheError: this run has a different compact set than the one that the checkpoint was trained on.
        """
        if self._inner is not None:
            self._inner.load_state_dict(state_dict.get("datamodule", {}))
        self._preparation.expect(state_dict.get("content_hash"), self.trainer)

    @property
    def info(self) -> StoreInfo:
        """Folder and size of the compact set, and further facts about it; available after `setup`.

        Raises:
            ConfigError: `setup` has not run.
        """
        return self._preparation.info

    @property
    def selection(self) -> Selection:
        """Positions and bins of the samples that were kept; available after `setup`.

        Raises:
            ConfigError: `setup` has not run.
        """
        return self._preparation.opened.compact.selection

    @property
    def bins(self) -> Bins:
        """Bins of the whole training set; available after `setup`.

        Raises:
            CacheError: the bins are not in the cache, or no bins were made because all samples were kept or given.
            ConfigError: `setup` has not run.
        """
        return read_bins_of(self._preparation.opened.compact, self._preparation.cache())

    @property
    def features(self) -> Features:
        """Features of all N samples, as the encoder made them; available after `setup`. A wrapped data module's own come first.

        Raises:
            CacheError: the features are not in the cache, or none were made because all samples were kept or given.
            ConfigError: `setup` has not run.
        """
        own: Features | None = getattr(self._inner, "features", None)
        if own is not None:
            return own
        return read_features_of(self._preparation.opened.compact, self._preparation.cache())

    @property
    def duplicates(self) -> Duplicates | None:
        """Near-duplicates that `bins.deduplicate` left out, each with the sample that stays; available after `setup`.

        None if none were looked for. A wrapped data module's own come first.

        Raises:
            CacheError: the features or the bins are not in the cache.
            ConfigError: `setup` has not run.
        """
        own: Duplicates | None = getattr(self._inner, "duplicates", None)
        if own is not None:
            return own
        opened = self._preparation.opened
        plan = opened.plan
        return read_duplicates_of(
            opened.compact,
            self._preparation.cache(),
            None if plan is None else plan.labels,
            labels_known=plan is not None,
        )

    @property
    def labels(self) -> Labels | None:
        """Classes of all N samples, or None without classes; available after `setup`. A wrapped data module's own come first.

        Raises:
            ConfigError: `setup` has not run, or the set was opened without its dataset.
        """
        own: Labels | None = getattr(self._inner, "labels", None)
        if own is not None:
            return own
        plan = self._preparation.opened.plan
        if plan is None:
            raise ConfigError("a packed set was opened without its dataset, so the labels of the whole are not known")
        return plan.labels

    def report(self, path: str | Path = "report.html", *, projection: Literal["pca", "umap"] = "pca") -> Path:
        """Write a page that shows what was kept, what was left, and what looks wrong: one HTML file that needs no network.

        Call it after `setup`, in one process.

        Args:
            path: file that is written, or a folder, which gets a `report.html`.
            projection: how the embeddings become a map: `"pca"`, or `"umap"` with the package umap-learn.

        Returns:
            The path of the file.

        Raises:
            ConfigError: `setup` has not run, or umap-learn is missing.
            StoreError: the file cannot be written.
        """
        from dq_lightning.report.make import report_of_opened

        settings = self._settings()
        return report_of_opened(
            self._preparation.opened,
            self._preparation.cache(),
            path,
            batch_size=settings.batch_size,
            num_ranks=TrainerFacts.of(self.trainer).num_shares,
            drop_last=settings.drop_last,
            projection=projection,
        )

    @property
    def data_keep_ratio(self) -> float:
        """Share of the data that is kept: share of samples times share of their patches; available after `setup`.

        Raises:
            ConfigError: `setup` has not run.
        """
        return self.info.data_keep_ratio

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None when the targets are not classes; samples without a label do not count as a class.

        If `train` is a dataset, the number is available before `setup`; a dataset that does not list its classes is
        then read once in full to count them.

        Raises:
            ConfigError: `train` is a data module without an attribute `num_classes`, and `setup` has not run.
        """
        own = getattr(self._inner, "num_classes", None)
        return self._preparation.num_classes() if own is None else own

    @property
    def name(self) -> str | None:
        """Name that was set on this object, else the name of the wrapped data module, else None."""
        named: str | None = self.__dict__.get("name", getattr(self.__dict__.get("_inner"), "name", None))
        return named

    @name.setter
    def name(self, value: str | None) -> None:
        self.__dict__["name"] = value

    @property
    def hparams(self) -> Any:
        """Hyperparameters of the wrapped data module if it saved any, else `keep_ratio`, `num_bins` and `seed`."""
        return getattr(self.__dict__.get("_inner"), "hparams", None) or super().hparams

    @property
    def hparams_initial(self) -> Any:
        """The hyperparameters of `hparams` as they were when they were saved."""
        return getattr(self.__dict__.get("_inner"), "hparams_initial", None) or super().hparams_initial

    def __repr__(self) -> str:
        """Describe in one line what is kept of what, or before `setup` what is asked for."""
        if self._preparation.is_open:
            return f"{type(self).__name__}({self.info!r})"
        asked = ", ".join(f"{name}={value}" for name, value in self._asked().items() if value is not None)
        return f"{type(self).__name__}({asked}; the compact set is known after setup)"

    def __str__(self) -> str:
        """Describe what is kept of what, and then the loaders, as Lightning does."""
        return f"{self!r}\n{super().__str__()}"

    def _repr_html_(self) -> str:
        """Return the table that notebooks show."""
        return self.info._repr_html_() if self._preparation.is_open else facts_as_html(repr(self), self._asked())

    def _asked(self) -> dict[str, Any]:
        selection = self.config.selection
        return {
            "keep_ratio": selection.share if self.config.max_bytes is None else selection.keep_ratio,
            "max_bytes": self.config.max_bytes,
            "drop_ratio": self.config.patches.drop_ratio or None,
        }

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; one that only the wrapped data module has is set there, where its own code reads it.

        A Trainer of the other Lightning package is refused when it takes the data module.

        Raises:
            ConfigError: the Trainer and this class come from different Lightning packages.
        """
        if name == "trainer":
            check_package(self, value)
        inner = self.__dict__.get("_inner")
        own = name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        if inner is not None and not own and hasattr(inner, name):
            setattr(inner, name, value)
        else:
            super().__setattr__(name, value)

    def __iter__(self) -> Iterator[Any]:
        """Refuse iteration: a Trainer of the other Lightning package takes the data module for a loader.

        Raises:
            ConfigError: always.
        """
        raise not_iterable(self)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped data module, so that a model can read it through `trainer.datamodule`.

        Raises:
            AttributeError: there is no wrapped data module, it has no such attribute, or the name begins with an
                underscore.
        """
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
        for name in TRANSFER_HOOKS:
            # Only overridden hooks are set, and on the instance: Lightning checks whether the data module overrides a
            # hook, and if it does, skips the model's own hook.
            if defined_by_user(datamodule, name):
                setattr(self, name, getattr(datamodule, name))

    def _fill_batch(self, batch: Any, dataloader_idx: int) -> Any:
        """Fill the images of a train batch on its device, then call the hook that would have run without this one."""
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
        """Raise an error before the long work if a row of the training or validation set cannot be tokenized."""
        tokens, val = self._tokens, self._eval["val"]
        assert tokens is not None
        tokens.check(dataset)
        if val is not None and self._inner is None:

            def check(one: Any, *_: Any) -> Any:
                return tokens.check(one, "val=")

            make_eval_loaders(val, LoaderSettings(), TrainerFacts.of(None), check)

    def _settings(self) -> LoaderSettings:
        """Return the settings of the train loader.

        `batch_size` is read at each call, because the batch-size finder changes it.
        """
        return self._preparation.settings(None if self._follows_inner else self.batch_size, self._given)

    @property
    def _follows_inner(self) -> bool:
        """Whether the batch size is that of the wrapped data module's train loader."""
        return self._inner is not None and self.batch_size in (None, self._read_batch_size)

    def _has(self, name: str) -> bool:
        """Whether there is something for the loaders of a name, such as `"val"`."""
        if self._inner is not None:
            return defined_by_user(self._inner, f"{name}_dataloader")
        return self._eval[name] is not None

    def _eval_loaders(self, name: str) -> Any:
        if not self._has(name):
            if name == "val" and TrainerFacts.of(self.trainer).fits:
                return []
            raise ConfigError(
                f"there is no {name}_dataloader: pass {name}= to QuantizedDataModule, or define it in the wrapped module"
            )
        if self._inner is not None:
            return getattr(self._inner, f"{name}_dataloader")()
        settings = self._preparation.settings(self.eval_batch_size or self.batch_size, self._given)
        make = None if self._tokens is None else partial(self._tokens.loader, name=f"{name}=")
        return make_eval_loaders(self._eval[name], settings, TrainerFacts.of(self.trainer), make)


# Python names this function in errors of mistyped keywords, and users know the classes that inherit it.
QuantizedHooks.__init__.__qualname__ = "QuantizedDataModule.__init__"
