"""The formats of Hugging Face datasets (torch, numpy, ...), by which a decoded row becomes tensors or arrays."""

from functools import lru_cache
from typing import Any


@lru_cache(maxsize=16)
def _formatter(kind: str, settings: tuple[tuple[str, Any], ...]) -> Any:
    from datasets.formatting import get_formatter

    return get_formatter(kind, **dict(settings))


def tensor_format(kind: str, settings: dict[str, Any]) -> Any:
    """The function by which a format turns one decoded row into tensors or arrays."""
    try:
        formatter = _formatter(kind, tuple(sorted(settings.items())))
    except TypeError:  # settings that can't be hashed
        from datasets.formatting import get_formatter

        formatter = get_formatter(kind, **settings)
    return formatter.recursive_tensorize
