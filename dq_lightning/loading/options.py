"""The keywords of a data module that its other ways in take, too: their names and types, and how they are listed.

Each keyword is described once, in the docstring of `QuantizedDataModule`.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from dq_lightning.core.config import AnyConfig, OnError, VerifyPolicy
from dq_lightning.core.devices import DeviceNames
from dq_lightning.core.sharing import Distributed
from dq_lightning.loading.loaders import AutoBool, AutoInt
from dq_lightning.pipeline.wanted import Choices, Delivery

Method = TypeVar("Method", bound=Callable[..., Any])


class RunOptions(Delivery, total=False):
    """What every way in takes: settings, what is delivered, loaders, cache and device."""

    config: AnyConfig | None
    batch_transform: Callable[..., Any] | None
    collate_fn: Callable[[list[Any]], Any] | None
    tokenizer: Any
    batch_size: int | None
    num_workers: AutoInt | None
    pin_memory: AutoBool | None
    persistent_workers: AutoBool | None
    drop_last: bool | None
    cache_dir: str | Path | None
    force_recompute: bool
    verify: VerifyPolicy
    device: DeviceNames


class DataModuleOptions(RunOptions, Choices, total=False):
    """What `from_datamodule` takes: also which samples and patches are kept, and how they are stored."""

    on_error: OnError | None
    distributed: Distributed


class StoreOptions(RunOptions, total=False):
    """What `from_store` takes: also the datasets of the other loaders, which a store does not hold."""

    val: Any
    test: Any
    predict: Any
    eval_batch_size: int | None


def listing(like: Callable[..., Any], options: type) -> Callable[[Method], Method]:
    """Return a decorator of methods with `**options`: their signatures list the options one by one.

    So `help`, editors and command lines show the names, types and defaults, and a call with any other name is a
    TypeError of the method itself.

    Args:
        like: function that has the options as keywords, and from which their types and defaults are taken.
        options: `TypedDict` of the options.
    """
    names = options.__optional_keys__  # type: ignore[attr-defined]
    listed = [one for name, one in inspect.signature(like).parameters.items() if name in names]

    def decorate(method: Method) -> Method:
        own = inspect.signature(method)
        kept = [one for one in own.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        signature = own.replace(parameters=[*kept, *listed])

        @functools.wraps(method)
        def checked(*args: Any, **kwargs: Any) -> Any:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{method.__name__}() {error}") from None
            return method(*args, **kwargs)

        checked.__signature__ = signature  # type: ignore[attr-defined]
        return cast(Method, checked)

    return decorate
