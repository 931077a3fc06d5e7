"""Settings of a DataLoader: resolve them, read them from an existing loader, and make a loader with them."""

import copy
import multiprocessing
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
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
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from dq_lightning.core.errors import ConfigError
from dq_lightning.core.handles import loader_processes
from dq_lightning.core.isolation import isolated_random_state
from dq_lightning.core.workers import automatic_workers
from dq_lightning.identity.values import digest_of
from dq_lightning.loading.processes import CurrentLoader, OnOwnDataset
from dq_lightning.loading.trainer_facts import TrainerFacts
from dq_lightning.sources.base import KeptSamples
from dq_lightning.sources.hub import hub_kind, rows_example
from dq_lightning.sources.items import evenly_spaced
from dq_lightning.sources.shuffles import is_stream

COLLATED_SAMPLES = 3
# Settings that are not taken over from a loader as they are, because they depend on its sampler.
OWN_SETTINGS = ("shuffle", "weights", "replacement", "num_draws", "generator")
AutoInt = int | Literal["auto"]
AutoBool = bool | Literal["auto"]


@dataclass(frozen=True)
class LoaderSettings:
    """The arguments of a DataLoader, apart from its dataset.

    All attributes that are not listed here are as in `torch.utils.data.DataLoader`; `"auto"` is resolved when the
    loader is made.

    Attributes:
        weights: float [number of samples], weights of a `WeightedRandomSampler`, or None.
        replacement: whether the sampler draws with replacement.
        num_draws: samples per epoch of a sampler that draws; None means as many as the dataset has.
        generator: random generator of the user's own loader or sampler, or None.
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
    """Check numbers that the user passed for loaders; None is a number that was not given.

    Raises:
        ConfigError: a number is one that no DataLoader accepts.
    """
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
    """Check before the long work that torch's own collate function can make batches of a dataset's samples.

    At most three samples are read. The check passes if one of them can be collated, because the others may not be kept,
    and if one cannot be read, because unreadable samples are reported by the step that reads all of them.

    Raises:
        ConfigError: none of the samples can be collated; the message has the `name` of the dataset.
    """
    problem = None
    for position in evenly_spaced(len(dataset), COLLATED_SAMPLES):
        try:
            sample = dataset[position]
        except Exception:  # The step that reads every sample reports the error.
            return
        try:
            default_collate([sample])
            return
        except TypeError as error:
            problem = error
    if problem is not None:
        example = "transform=torchvision.transforms.ToTensor()"
        if name == "val=":
            example = "val=ImageFolder(path, ToTensor()) (transform= is for the train set alone)"
        if hub_kind(getattr(dataset, "dataset", dataset)) is not None:
            images = (key for key, value in sample.items() if isinstance(value, Image.Image))
            example = rows_example(next(images, "image")) + " (for val= dataset.with_transform(the same function))"
        raise ConfigError(
            f"no batch can be made of the samples of {name} ({problem}): give the dataset a transform that makes tensors, such "
            f"as {example}, or pass collate_fn=; rows of instructions need tokenizer="
        )


def is_random_collate(collate_fn: Callable[[list[Any]], Any], dataset: Any) -> bool:
    """Whether a collate function makes different batches of the same few samples of a dataset, as MixUp does."""
    try:
        with isolated_random_state(0):
            samples = [dataset[position] for position in evenly_spaced(len(dataset), COLLATED_SAMPLES)]
        batches = set()
        for seed in range(COLLATED_SAMPLES):
            with isolated_random_state(seed):
                batches.add(digest_of(collate_fn(copy.copy(samples))))
    except Exception:  # The loader reports it.
        return False
    return len(batches) > 1


def make_loader(dataset: Any, settings: LoaderSettings, facts: TrainerFacts, seed: int = 0) -> DataLoader[Any]:
    """Make a DataLoader of a map-style dataset; settings that are `"auto"` are resolved from the facts about the run.

    If `num_workers` is `"auto"`, a dataset that several processes cannot share is read in this process. The seed is
    that of a sampler that draws, so that all ranks draw the same samples. The epoch is added to it, so a loader that is
    made again in a later epoch draws other samples.
    """
    workers = automatic_workers(facts.processes_on_node) if settings.num_workers == "auto" else settings.num_workers
    pin = facts.on_cuda if settings.pin_memory == "auto" else settings.pin_memory
    persist = not facts.reloads if settings.persistent_workers == "auto" else settings.persistent_workers
    sampler = make_sampler(dataset, settings, seed + facts.epoch)
    context, start_method = settings.multiprocessing_context, multiprocessing.get_start_method(allow_none=True)
    # On Linux processes are forked unless the user or the program chose otherwise. The default of Python 3.14, forkserver,
    # has to pickle datasets and transforms, which fails for those that are defined in a notebook or hold a lambda.
    if context is None and start_method in (None, "forkserver") and sys.platform == "linux":
        context = "fork"
    asked = settings.num_workers != "auto"
    dataset, workers = loader_processes(dataset, workers, asked=asked, context=context, also=settings.collate_fn)
    options = _shared_arguments(settings) | {"num_workers": workers, "pin_memory": pin, "generator": settings.generator}
    if workers > 0:
        options |= {"persistent_workers": persist, "multiprocessing_context": context}
    else:
        # torch refuses these arguments without loader processes.
        options |= dict.fromkeys(("multiprocessing_context", "prefetch_factor"))
        options |= {"persistent_workers": False, "timeout": 0}
    kept = settings.persistent_workers == "auto" and options["persistent_workers"]
    loader = CurrentLoader if kept else DataLoader
    return loader(dataset, shuffle=None if sampler is not None else settings.shuffle, sampler=sampler, **options)


def _shared_arguments(of: DataLoader[Any] | LoaderSettings) -> dict[str, Any]:
    """Return the arguments that a loader and `LoaderSettings` hold under the same names."""
    return {one.name: getattr(of, one.name) for one in fields(LoaderSettings) if one.name not in OWN_SETTINGS}


def make_eval_loaders(
    given: Any,
    settings: LoaderSettings,
    facts: TrainerFacts,
    make: Callable[[Any, LoaderSettings, TrainerFacts], DataLoader[Any]] | None = None,
) -> Any:
    """Make loaders without shuffling for what a user passed for validation, test or prediction.

    Args:
        given: a dataset, a stream of samples, a loader of any kind (returned as it is), or a list or dict of these. A
            list of samples is a dataset.
        settings: settings of the loaders; shuffling, `drop_last` and weighted drawing are switched off.
        facts: facts about the run, as in `make_loader`.
        make: function that makes the loader of one dataset; None uses `make_loader`.

    Returns:
        One loader, or a list or dict of loaders in the structure of `given`.

    Raises:
        ConfigError: `given` is a DatasetDict, whose splits are not all meant.
    """
    if (kind := hub_kind(given)) in ("DatasetDict", "IterableDatasetDict"):
        splits = ", ".join(map(repr, given))
        raise ConfigError(f"a {kind} holds several splits ({splits}): pass one of them, dataset[name]")
    streams = is_sample_stream(given)
    if streams or is_one_dataset(given):
        settings = replace(settings, shuffle=False, drop_last=False, weights=None, replacement=False)
        return (make or (_stream_loader if streams else make_loader))(given, settings, facts)
    if isinstance(given, list | tuple):
        return [make_eval_loaders(one, settings, facts, make) for one in given]
    if isinstance(given, dict):
        return {name: make_eval_loaders(one, settings, facts, make) for name, one in given.items()}
    return given


def is_sample_stream(given: Any) -> bool:
    """Whether `given` is a stream of samples: an `IterableDataset` of torch or Hugging Face that makes no batches.

    A pipeline of WebDataset may make batches by a step of its own, or end in a loader.
    """
    steps = getattr(given, "pipeline", None)
    for step in steps if isinstance(steps, list) else ():
        if isinstance(step, DataLoader) or getattr(getattr(step, "f", step), "__name__", "") == "batched":
            return False
    return hub_kind(given) == "IterableDataset" or is_stream(given)


def _stream_loader(stream: Any, settings: LoaderSettings, facts: TrainerFacts) -> DataLoader[Any]:
    """Make a loader of a stream of samples, each of which every rank gets.

    Several processes would deliver each sample several times unless the stream deals its samples to them, so it is read in
    this process unless a number of processes is asked for.
    """
    return DataLoader(
        stream,
        batch_size=settings.batch_size,
        collate_fn=settings.collate_fn,
        num_workers=0 if settings.num_workers == "auto" else settings.num_workers,
        pin_memory=facts.on_cuda if settings.pin_memory == "auto" else settings.pin_memory,
    )


def is_one_dataset(given: Any) -> bool:
    """Whether `given` is a single dataset, for which `make_eval_loaders` makes one loader."""
    if isinstance(given, DataLoader | dict) or (isinstance(given, list | tuple) and all(map(_is_dataset, given))):
        return False
    return hasattr(given, "__getitem__") and hasattr(given, "__len__")


def _is_dataset(value: Any) -> bool:
    """Whether an element of a list is a dataset or loader, and not a sample of a dataset."""
    if isinstance(value, tuple | Mapping | str | bytes | Tensor | np.ndarray | Image.Image):
        return hub_kind(value) is not None
    # Loaders of other libraries may only support iteration.
    return hasattr(value, "__iter__") or (hasattr(value, "__len__") and hasattr(value, "__getitem__"))


def make_sampler(dataset: Any, settings: LoaderSettings, seed: int) -> Sampler[int] | None:
    """Return the sampler that the settings ask for, or None if DataLoader's own shuffling or order is enough."""
    if settings.weights is None and not settings.replacement:
        return None
    draws = settings.num_draws or len(dataset)
    generator = torch.Generator().manual_seed(seed)
    if settings.weights is not None:
        weights = settings.weights.tolist()
        return WeightedRandomSampler(weights, draws, replacement=settings.replacement, generator=generator)
    return RandomSampler(dataset, replacement=True, num_samples=draws, generator=generator)


def read_loader(loader: Any) -> tuple[Dataset[Any], LoaderSettings]:
    """Return the dataset of a user's train loader and the settings that the loader was made with.

    Raises:
        ConfigError: the loader is a collection of loaders or of another class, or has a sampler or batch sampler that
            has no meaning for a part of the dataset.
    """
    if not isinstance(loader, DataLoader):
        raise ConfigError(
            f"the train loader is a {type(loader).__name__}, not one DataLoader: wrap the dataset that should be quantized, "
            "QuantizedDataModule(train_dataset, ...), and combine the loaders in a data module of your own"
        )
    if loader.batch_size is None and loader.batch_sampler is None:
        raise ConfigError(
            "the train loader makes no batches (batch_size=None): give it a batch size, or pass the dataset itself with "
            "batch_size="
        )
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        raise ConfigError(
            f"the train loader makes its batches by {type(loader.batch_sampler).__name__}, and a batch sampler names positions "
            "of the whole dataset: it cannot be carried over to the compact set. Pass the dataset itself and batch_size="
        )
    if type(loader).__iter__ not in (DataLoader.__iter__, CurrentLoader.__iter__):
        raise ConfigError(
            f"the train loader is a {type(loader).__name__}, which gives batches in its own way: it cannot be carried over to "
            "the compact set. Use torch's DataLoader (with collate_fn=), or pass the dataset itself"
        )
    dataset, sampler = loader.dataset, loader.sampler
    weights, replacement, draws, shuffle = None, False, None, True
    init: Any = loader.worker_init_fn
    if isinstance(sampler, SubsetRandomSampler):
        dataset = KeptSamples(dataset, np.array([int(i) for i in sampler.indices], np.int64))
        init = init and OnOwnDataset(init)
    elif isinstance(sampler, WeightedRandomSampler):
        weights, replacement, draws = sampler.weights.clone(), sampler.replacement, sampler.num_samples
        if len(weights) != len(dataset):  # type: ignore[arg-type]
            raise ConfigError(
                f"the WeightedRandomSampler has {len(weights)} weights for {len(dataset)} samples: give it one weight for each "  # type: ignore[arg-type]
                "sample of the train set"
            )
    elif type(sampler) is RandomSampler:
        replacement = sampler.replacement
        draws = sampler.num_samples if sampler.replacement or sampler.num_samples != len(dataset) else None  # type: ignore[arg-type]
    elif type(sampler) is SequentialSampler:
        shuffle = False
    elif isinstance(sampler, DistributedSampler):
        raise ConfigError(
            "the train loader has a DistributedSampler, which names positions of the whole dataset: use shuffle=True and leave "
            "use_distributed_sampler=True in the Trainer (its default), which shares the compact set out among the processes"
        )
    elif not isinstance(dataset, IterableDataset):  # The order of a stream is its own, and the compact set has another.
        raise ConfigError(
            f"the train loader has a {type(sampler).__name__}, which may depend on positions in the whole dataset: it cannot "
            "be carried over to the compact one. Use shuffle=True, a WeightedRandomSampler or a SubsetRandomSampler, or pass "
            "the dataset itself"
        )
    if draws is not None and weights is None and not replacement:
        raise ConfigError(
            f"the train loader draws {draws} samples per epoch without replacement, which has no meaning for a part of the "
            "dataset: leave num_samples= of its sampler out, and shorten epochs by Trainer(limit_train_batches=...)"
        )
    settings = LoaderSettings(
        **_shared_arguments(loader) | {"worker_init_fn": init},
        shuffle=shuffle,
        weights=weights,
        replacement=replacement,
        num_draws=draws,
        generator=loader.generator or getattr(sampler, "generator", None),
    )
    return dataset, settings
