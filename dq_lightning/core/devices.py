"""Finds the devices that names stand for."""

from collections.abc import Sequence
from typing import Any

import torch

from dq_lightning.core.errors import ConfigError

DeviceNames = str | list[str]
"""One device, or several that share the work: `"auto"`, `"cuda:1"`, `["cuda:0", "cuda:1"]` or `"cuda:0,cuda:1"`."""


def named_device(name: str | torch.device) -> torch.device:
    """Return the torch device with a given name, such as `"cpu"`, `"cuda"` or `"cuda:0"`, but not `"auto"`.

    Raises:
        ConfigError: torch knows no such device, or it is a CUDA device that torch does not find.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"device={str(name)!r} is not a device of torch: pass auto, cpu, cuda, cuda:0, ..."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={str(name)!r} was asked for, but torch finds no CUDA device: pass device='cpu'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={str(name)!r} was asked for, but torch finds {torch.cuda.device_count()} CUDA devices, the first of "
            "which is cuda:0"
        )
    return device


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the named device; `"auto"` is the current GPU if there is one, else the CPU.

    Raises:
        ConfigError: torch knows no such device, or it is a CUDA device that torch does not find.
    """
    if str(device) != "auto":
        return named_device(device)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def device_names(device: str | torch.device | Sequence[str | torch.device]) -> tuple[str, ...]:
    """Return the names of one or several devices; the first is the one for work that several do not share.

    Args:
        device: device or its name, names with commas between them, or a sequence of devices or names. A device that is
            named twice holds two replicas.

    Raises:
        ConfigError: no device is named, or `"auto"` stands beside others.

    Example:
        >>> device_names("auto"), device_names("cuda:0, cuda:1"), device_names(["cpu", "cpu"])
        (('auto',), ('cuda:0', 'cuda:1'), ('cpu', 'cpu'))
    """
    names = str(device).split(",") if isinstance(device, str | torch.device) else [str(one) for one in device]
    names = [name.strip() for name in names]
    if not names or "" in names or (len(names) > 1 and "auto" in names):
        raise ConfigError(
            f'device={device!r} does not name devices: pass "auto", one such as "cuda:0", or several: ["cuda:0", "cuda:1"]'
        )
    return tuple(names)


def resolve_devices(device: str | torch.device | Sequence[str | torch.device]) -> list[torch.device]:
    """Return the named devices, at least one, as `resolve_device` finds each.

    Raises:
        ConfigError: no device is named, torch knows no such device, or it is a CUDA device that torch does not find.
    """
    return [resolve_device(name) for name in device_names(device)]


def device_of_rank(local_rank: int) -> str:
    """Return the name of the device that a rank uses for `"auto"`: each rank of a machine has a GPU of its own.

    A rank that has set its current GPU, or sees one alone, uses that.
    """
    if not torch.cuda.is_available():
        return "cpu"
    cuda: Any = torch.cuda
    current = cuda.current_device() if cuda.is_initialized() else 0
    return f"cuda:{current or local_rank % torch.cuda.device_count()}"


def device_kind(name: str) -> str:
    """Return the kind of a device; on two of a kind the same work gives the same bytes."""
    device = resolve_device(name)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
