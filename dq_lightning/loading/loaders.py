"""Settings of a DataLoader: chosen, read from an existing loader, and turned into a loader again."""

import multiprocessing
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from dq_lightning.core.errors import ConfigError
from dq_lightning.core.handles import loader_processes
from dq_lightning.core.workers import automatic_workers
from dq_lightning.loading.trainer_facts import TrainerFacts
from dq_lightning.sources.hub import hub_kind
from dq_lightning.sources.items import evenly_spaced

COLLATED_SAMPLES = 3
AutoInt = int | Literal["auto"]
AutoBool = bool | Literal["auto"]


@dataclass(frozen=True)
class LoaderSettings:
    """What a DataLoader is made with, apart from its dataset.

    Attributes:
        weights: float [number of samples], draw probabilities of a weighted sampler, or None.
        replacement: draw with replacement.
        num_draws: samples per epoch of a sampler that draws; None means all.
        generator: of the user's own loader or sampler.
        Others: as in `torch.utils.data.DataLoader`; `"auto"` is resolved when the loader is made.
    """

    batch_size: int = 32
    num_workers: AutoInt = "auto"
    pin_memory: AutoBool = "auto"
    persistent_workers: AutoBool = "auto"
    drop_last: bool = False
    shuffle: bool = True
    collate_fn: Callable[[list[Any]], Any] | None = None
    worker_init_fn: Callable[[int], None] | None = None
    prefetch_factor: int | None = None
    multiprocessing_context: Any = None
    timeout: float = 0
    weights: Tensor | None = None
    replacement: bool = False
    num_draws: int | None = None
    generator: torch.Generator | None = None


def check_loader_numbers(*, batch_size: Any, eval_batch_size: Any, num_workers: Any) -> None:
    """Raise ConfigError for numbers that no DataLoader takes; None is one that was not given."""
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("eval_batch_size", eval_batch_size, 1),
        ("num_workers", num_workers, 0),
    ):
        if value is None or (name == "num_workers" and isinstance(value, str) and value == "auto"):
            continue
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_collatable(dataset: Any, name: str) -> None:
    """Tell before the work that torch's own collate function makes no batches of what a dataset delivers.

    A few samples are read. One that cannot be read is not judged, and one that fits is enough: the others may not be kept.

    Raises:
        ConfigError: it takes none of them.
    """
    problem = None
    for position in evenly_spaced(len(dataset), COLLATED_SAMPLES):
        try:
            sample = dataset[position]
        except Exception:  # it is told where everything is read
            return
        try:
            default_collate([sample])
            return
        except TypeError as error:
            problem = error
    if problem is not None:
        raise ConfigError(
            f"no batch can be made of the samples of {name} ({problem}): give the dataset a transform that makes tensors, such "
            "as transform=torchvision.transforms.ToTensor(), or pass collate_fn=; rows of instructions need tokenizer="
        )


def worker_context(given: Any, num_workers: int) -> Any:
    """How workers start.

    On Linux they are forked, as torch always did: Python 3.14's forkserver would have to pickle datasets and transforms, and
    those defined in a notebook or holding a lambda cannot be.
    """
    if num_workers == 0:
        return None
    if (
        given is None
        and sys.platform == "linux"
        and multiprocessing.get_start_method(allow_none=True) in (None, "forkserver")
    ):
        return "fork"
    return given


def make_loader(dataset: Any, settings: LoaderSettings, facts: TrainerFacts, seed: int = 0) -> DataLoader[Any]:
    """A DataLoader.

    Args:
        dataset: map-style.
        settings: how to load it.
        facts: of the run, which resolve what is `"auto"`.
        seed: of a sampler that draws, so that all ranks draw alike; loaders made anew in a later epoch draw anew.

    Where `num_workers` is `"auto"`, a dataset that processes cannot share is read in this one.
    """
    workers = automatic_workers(facts.processes_on_node) if settings.num_workers == "auto" else settings.num_workers
    pin = facts.on_cuda if settings.pin_memory == "auto" else settings.pin_memory
    persist = not facts.reloads if settings.persistent_workers == "auto" else settings.persistent_workers
    sampler = make_sampler(dataset, settings, seed + facts.epoch)
    context = worker_context(settings.multiprocessing_context, workers)
    asked = settings.num_workers != "auto"
    dataset, workers = loader_processes(dataset, workers, asked=asked, context=context, also=settings.collate_fn)
    return DataLoader(
        dataset,
        batch_size=settings.batch_size,
        shuffle=None if sampler is not None else settings.shuffle,
        sampler=sampler,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=persist and workers > 0,
        drop_last=settings.drop_last,
        collate_fn=settings.collate_fn,
        worker_init_fn=settings.worker_init_fn,
        prefetch_factor=settings.prefetch_factor if workers > 0 else None,
        multiprocessing_context=context if workers > 0 else None,
        timeout=settings.timeout if workers > 0 else 0,
        generator=settings.generator,
    )


def make_eval_loaders(
    given: Any,
    settings: LoaderSettings,
    facts: TrainerFacts,
    make: Callable[[Any, LoaderSettings, TrainerFacts], DataLoader[Any]] | None = None,
) -> Any:
    """Loaders in order over what a user passed for validation, test or prediction.

    Args:
        given: a dataset, a loader of any kind (passed through), or a list or dict of these. A list of samples is a dataset.
        settings: how to load datasets; never shuffled, never cut.
        facts: of the run.
        make: makes one loader of a dataset; `make_loader` when None.

    Raises:
        ConfigError: a DatasetDict, whose splits are not all meant.
    """
    if (kind := hub_kind(given)) in ("DatasetDict", "IterableDatasetDict"):
        splits = ", ".join(map(repr, given))
        raise ConfigError(f"a {kind} holds several splits ({splits}): pass one of them, dataset[name]")
    if isinstance(given, list | tuple) and all(map(_is_dataset, given)):
        return [make_eval_loaders(one, settings, facts, make) for one in given]
    if isinstance(given, dict):
        return {name: make_eval_loaders(one, settings, facts, make) for name, one in given.items()}
    if isinstance(given, DataLoader) or not hasattr(given, "__getitem__"):
        return given
    settings = replace(settings, shuffle=False, drop_last=False, weights=None, replacement=False)
    return (make or make_loader)(given, settings, facts)


def is_one_dataset(given: Any) -> bool:
    """Whether what was passed for validation is a dataset of which `make_eval_loaders` makes one loader."""
    return (
        hasattr(given, "__getitem__")
        and hasattr(given, "__len__")
        and not isinstance(given, DataLoader | dict)
        and not (isinstance(given, list | tuple) and all(map(_is_dataset, given)))
        and hub_kind(given) not in ("DatasetDict", "IterableDatasetDict")
    )


def _is_dataset(value: Any) -> bool:
    """Whether an element of a list is a dataset or loader, and not a sample."""
    if isinstance(value, tuple | Mapping | str | bytes | Tensor | np.ndarray | Image.Image):
        return hub_kind(value) is not None
    # loaders of other kinds are only iterated
    return hasattr(value, "__iter__") or (hasattr(value, "__len__") and hasattr(value, "__getitem__"))


def make_sampler(dataset: Any, settings: LoaderSettings, seed: int) -> Sampler[int] | None:
    """The sampler that the settings ask for; None for a plain shuffle or none."""
    if settings.weights is None and not settings.replacement:
        return None
    draws = settings.num_draws or len(dataset)
    generator = torch.Generator().manual_seed(seed)
    if settings.weights is not None:
        weights = settings.weights.tolist()
        return WeightedRandomSampler(weights, draws, replacement=settings.replacement, generator=generator)
    return RandomSampler(dataset, replacement=True, num_samples=draws, generator=generator)


def read_loader(loader: Any) -> tuple[Dataset[Any], LoaderSettings]:
    """The dataset of a user's train loader and the settings that it was made with.

    Raises:
        ConfigError: it is a collection, or has a sampler that means nothing on a part of the dataset.
    """
    if not isinstance(loader, DataLoader):
        raise ConfigError(
            f"the train loader is a {type(loader).__name__}, not one DataLoader: wrap the dataset that should be quantized, "
            "QuantizedDataModule(train_dataset, ...), and combine the loaders in a data module of your own"
        )
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        raise ConfigError(
            f"the train loader makes its batches by {type(loader.batch_sampler).__name__}: a batch sampler names positions "
            "of the whole dataset and cannot be carried over to the compact one. Pass the dataset and batch_size="
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise ConfigError(
            f"the train loader is a {type(loader).__name__}, which gives batches in its own way: it cannot be carried over to "
            "the compact set. Use torch's DataLoader (with collate_fn=), or pass the dataset itself"
        )
    dataset, sampler = loader.dataset, loader.sampler
    weights, replacement, draws, shuffle = None, False, None, True
    if isinstance(sampler, SubsetRandomSampler):
        dataset = Subset(dataset, [int(i) for i in sampler.indices])
    elif isinstance(sampler, WeightedRandomSampler):
        weights, replacement, draws = sampler.weights.clone(), sampler.replacement, sampler.num_samples
        if len(weights) != len(dataset):  # type: ignore[arg-type]
            raise ConfigError(f"the WeightedRandomSampler has {len(weights)} weights for {len(dataset)} samples")  # type: ignore[arg-type]
    elif type(sampler) is RandomSampler:
        replacement = sampler.replacement
        draws = sampler.num_samples if sampler.replacement or sampler.num_samples != len(dataset) else None  # type: ignore[arg-type]
    elif type(sampler) is SequentialSampler:
        shuffle = False
    else:
        raise ConfigError(
            f"the train loader has a {type(sampler).__name__}, which may depend on positions in the whole dataset: it cannot "
            "be carried over to the compact one. Use shuffle=True, a WeightedRandomSampler or a SubsetRandomSampler, or pass "
            "the dataset itself"
        )
    if draws is not None and weights is None and not replacement:
        raise ConfigError(
            f"the train loader draws {draws} samples per epoch without replacement: use Trainer(limit_train_batches=...)"
        )
    settings = LoaderSettings(
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        persistent_workers=loader.persistent_workers,
        drop_last=loader.drop_last,
        shuffle=shuffle,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        prefetch_factor=loader.prefetch_factor,
        multiprocessing_context=loader.multiprocessing_context,
        timeout=loader.timeout,
        weights=weights,
        replacement=replacement,
        num_draws=draws,
        generator=loader.generator or getattr(sampler, "generator", None),
    )
    return dataset, settings
