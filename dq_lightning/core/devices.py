"""Finds the device that a name stands for."""

import torch

from dq_lightning.core.errors import ConfigError


def named_device(name: str | torch.device) -> torch.device:
    """Return the torch device with a given name, such as `"cpu"`, `"cuda"` or `"cuda:0"`, but not `"auto"`.

    Raises:
        ConfigError: torch knows no such device, or it is a CUDA device and torch finds none.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"device={str(name)!r} is not a device of torch: pass auto, cpu, cuda, cuda:0, ..."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={str(name)!r} was asked for, but torch finds no CUDA device: pass device='cpu'")
    return device


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the named device; `"auto"` is the current GPU if there is one, else the CPU.

    Raises:
        ConfigError: torch knows no such device, or it is a CUDA device and torch finds none.
    """
    if str(device) != "auto":
        return named_device(device)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
