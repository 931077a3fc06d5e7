"""Which device a name stands for."""

import torch

from dq_lightning.core.errors import ConfigError


def named_device(name: str | torch.device) -> torch.device:
    """The device of a name other than `"auto"`.

    Raises:
        ConfigError: there is no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={str(name)!r} is no device of torch; pass auto, cpu, cuda, cuda:0, ...") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={str(name)!r} was asked for, but torch sees no CUDA device; pass device='cpu'")
    return device
