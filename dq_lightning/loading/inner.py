"""Recognize and read a user's own data module of `lightning` or `pytorch_lightning`, without importing either."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from dq_lightning.core.errors import ConfigError

TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
BASE_PACKAGES = ("lightning.", "pytorch_lightning.")
OF_A_DATAMODULE = ("train_dataloader", "prepare_data", "setup")
# For each Lightning package, the import of the class that its Trainers accept.
IMPORTS = {
    "lightning": "from dq_lightning import QuantizedDataModule",
    "pytorch_lightning": "from dq_lightning.pytorch import QuantizedDataModule",
}


class AnyDataModule(ABC):
    """Abstract type of the data modules of both Lightning packages.

    The packages share no class, so a class counts as a data module if it has the hooks of one.
    """

    @abstractmethod
    def train_dataloader(self) -> Any:
        """As in Lightning."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return all(callable(getattr(other, name, None)) for name in OF_A_DATAMODULE)


def check_package(datamodule: Any, trainer: Any) -> None:
    """Check that a data module and a Trainer come from the same Lightning package.

    Raises:
        ConfigError: they come from different packages.
    """
    ours, its = _package(datamodule), _package(trainer)
    if its is not None and its != ours:
        raise ConfigError(
            f"this QuantizedDataModule is for Trainers of the package {ours}, and the Trainer is of {its}; the two packages "
            f"share no class. Write: {IMPORTS[its]}"
        )


def not_iterable(datamodule: Any) -> ConfigError:
    """Return the error for a data module that is iterated over as if it were a loader."""
    ours = _package(datamodule) or "lightning"
    other = next(name for name in IMPORTS if name != ours)
    return ConfigError(
        f"a QuantizedDataModule is no loader and can't be iterated: pass it to a Trainer of the package {ours}, or take "
        f"train_dataloader() after setup('fit'). For a Trainer of the package {other} write: {IMPORTS[other]}"
    )


def _package(value: Any) -> str | None:
    """Return the name of the Lightning package that an object's class comes from, or None."""
    roots = (cls.__module__.partition(".")[0] for cls in type(value).__mro__)
    return next((root for root in roots if root in IMPORTS), None)


def check_given(**given: Any) -> None:
    """Refuse what LightningCLI passes instead of a dataset when it cannot change a single argument of that dataset.

    In this case it passes either an instance of the base class of data modules, which has no loaders, or an object that
    holds the changed argument only.

    Raises:
        ConfigError: a value is such an object; the message has the name of its keyword.
    """
    for name, value in given.items():
        made = type(value)
        empty = made.__name__ == "LightningDataModule" and f"{made.__module__}.".startswith(BASE_PACKAGES)
        if empty or f"{made.__module__.partition('.')[0]}.{made.__name__}" == "jsonargparse.NestedArg":
            raise ConfigError(
                f"{name}= is no dataset but a {made.__name__}. On its command line LightningCLI changes a single argument only "
                "of a torch Dataset or a data module: what a function makes (datasets.load_dataset) has to be given whole, in "
                f'the YAML file or as --data.init_args.{name}=\'{{"class_path": ..., "init_args": {{...}}}}\''
            )


def lightnings_own(owner: type, name: str) -> Any:
    """Return the method of a Lightning base class that a data module's class inherits or overrides."""
    return next(
        vars(cls)[name] for cls in owner.__mro__ if name in vars(cls) and cls.__module__.startswith(BASE_PACKAGES)
    )


class UndefinedHook:
    """A hook that has nothing to give, and that Lightning therefore should take for undefined.

    To find out whether a hook is defined, Lightning compares the function that it wraps (`__wrapped__`) with its own.

    Args:
        own: the method of Lightning's base class.
        hook: the hook, which is still what a call runs: the batch-size finder calls hooks that are not defined.
    """

    def __init__(self, own: Any, hook: Callable[[], Any]) -> None:
        self.__wrapped__, self.hook = own, hook

    def __call__(self) -> Any:
        return self.hook()


def defined_by_user(datamodule: Any, name: str) -> bool:
    """Whether a hook is defined by the user's class or object, and not by the Lightning base class."""
    if name in vars(datamodule):
        return True
    owner = next(cls for cls in type(datamodule).__mro__ if name in vars(cls))
    return not owner.__module__.startswith(BASE_PACKAGES)
