"""The formats of Hugging Face datasets (torch, numpy, ...), which convert a decoded row to tensors or arrays."""

from functools import lru_cache
from typing import Any


@lru_cache(maxsize=16)
def _formatter(kind: str, settings: tuple[tuple[str, Any], ...]) -> Any:
    from datasets.formatting import get_formatter

    return get_formatter(kind, **dict(settings))


def tensor_format(kind: str, settings: dict[str, Any]) -> Any:
    """The function with which a format converts one decoded row to tensors or arrays.

    Args:
        kind: name of the format.
        settings: keyword arguments of the format.
    """
    try:
        formatter = _formatter(kind, tuple(sorted(settings.items())))
    except TypeError:  # Settings that cannot be hashed cannot be cached.
        from datasets.formatting import get_formatter

        formatter = get_formatter(kind, **settings)
    return formatter.recursive_tensorize
