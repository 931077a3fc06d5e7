"""What is read from a user's own LightningDataModule, of `lightning` or `pytorch_lightning`, by its behaviour alone."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from dq_lightning.core.errors import ConfigError

TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
BASE_PACKAGES = ("lightning.", "pytorch_lightning.")
OF_A_DATAMODULE = ("train_dataloader", "prepare_data", "setup")
# how the class is imported that Trainers of a package take
IMPORTS = {
    "lightning": "from dq_lightning import QuantizedDataModule",
    "pytorch_lightning": "from dq_lightning.pytorch import QuantizedDataModule",
}


class AnyDataModule(ABC):
    """Type of the data modules of both Lightning packages, which share no class: told by their hooks."""

    @abstractmethod
    def train_dataloader(self) -> Any:
        """As in Lightning."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return all(callable(getattr(other, name, None)) for name in OF_A_DATAMODULE)


def is_datamodule(value: Any) -> bool:
    """Whether a value is a data module of either Lightning package (they share no class)."""
    return all(callable(getattr(value, name, None)) for name in OF_A_DATAMODULE)


def check_package(datamodule: Any, trainer: Any) -> None:
    """Raise ConfigError when a data module and a Trainer come from different Lightning packages."""
    ours, its = _package(datamodule), _package(trainer)
    if its is not None and its != ours:
        raise ConfigError(
            f"this QuantizedDataModule is for Trainers of the package {ours}, and the Trainer is of {its}; the two packages "
            f"share no class. Write: {IMPORTS[its]}"
        )


def not_iterable(datamodule: Any) -> ConfigError:
    """The error for a data module that was taken for a loader."""
    ours = _package(datamodule) or "lightning"
    other = next(name for name in IMPORTS if name != ours)
    return ConfigError(
        f"a QuantizedDataModule is no loader and can't be iterated: pass it to a Trainer of the package {ours}, or take "
        f"train_dataloader() after setup('fit'). For a Trainer of the package {other} write: {IMPORTS[other]}"
    )


def _package(value: Any) -> str | None:
    """The Lightning package that an object's class comes from."""
    roots = (cls.__module__.partition(".")[0] for cls in type(value).__mro__)
    return next((root for root in roots if root in IMPORTS), None)


def check_given(**given: Any) -> None:
    """Raise ConfigError for what LightningCLI makes of a dataset whose arguments it cannot change one by one.

    It is a data module of the base class itself, which has no loaders, or the argument alone.
    """
    for name, value in given.items():
        made = type(value)
        empty = made.__name__ == "LightningDataModule" and f"{made.__module__}.".startswith(BASE_PACKAGES)
        if empty or f"{made.__module__.partition('.')[0]}.{made.__name__}" == "jsonargparse.NestedArg":
            raise ConfigError(
                f"{name}= is no dataset but a {made.__name__}. On the command line of LightningCLI a single argument can be "
                "changed of a torch Dataset or a data module; what a function makes (datasets.load_dataset) is given whole, "
                f'in the YAML file or as --data.init_args.{name}=\'{{"class_path": ..., "init_args": {{...}}}}\''
            )


def overridden_transfer_hooks(datamodule: Any) -> dict[str, Callable[..., Any]]:
    """The batch-transfer hooks that the user's class defines itself, bound, by name."""
    return {name: getattr(datamodule, name) for name in TRANSFER_HOOKS if defined_by_user(datamodule, name)}


def probe_train_loader(datamodule: Any) -> Any:
    """The train loader after `setup("fit")`, run on a shallow copy: attributes set there do not reach the user's object."""
    probe = copy.copy(datamodule)
    probe.setup("fit")
    return probe.train_dataloader()


def defined_by_user(datamodule: Any, name: str) -> bool:
    """Whether a hook is the user's own and not that of the Lightning base class."""
    if name in vars(datamodule):
        return True
    owner = next(cls for cls in type(datamodule).__mro__ if name in vars(cls))
    return not owner.__module__.startswith(BASE_PACKAGES)
