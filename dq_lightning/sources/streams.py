"""Finds the random number generators that an object holds, and detects whether numbers were drawn from them."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dq_lightning.identity.values import digest_of

_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_VALUES = (str, bytes, int, float, complex, Tensor, np.ndarray, type)
_MAX_DEPTH = 4
_MAX_LENGTH = 64


def generators_in(value: Any) -> list[Any]:
    """The random number generators in an object's attributes and containers.

    The search goes at most 4 levels deep and skips containers of more than 64 values.
    """
    found: dict[int, Any] = {}
    seen: set[int] = set()

    def walk(inner: Any, depth: int) -> None:
        if id(inner) in seen or depth > _MAX_DEPTH or isinstance(inner, _VALUES):
            return
        seen.add(id(inner))
        if isinstance(inner, _GENERATORS):
            found[id(inner)] = inner
        elif isinstance(inner, Mapping | list | tuple):
            if len(inner) <= _MAX_LENGTH:
                for child in inner.values() if isinstance(inner, Mapping) else inner:
                    walk(child, depth + 1)
        elif isinstance(getattr(inner, "__dict__", None), dict):
            walk(vars(inner), depth + 1)

    walk(value, 0)
    return list(found.values())


def random_states(generators: list[Any]) -> str:
    """Digest of the global random states (Python, NumPy, torch on the CPU) and of the states of the generators.

    It changes when a number is drawn or a seed is set, by whichever thread.
    """
    own = generator_states(generators)
    return digest_of(random.getstate(), np.random.get_state(), torch.get_rng_state(), own)


def generator_states(generators: list[Any]) -> str:
    """Digest of the states of the generators."""
    own: list[Any] = []
    for one in generators:
        if isinstance(one, np.random.Generator):
            own.append(one.bit_generator.state)
        else:
            own.append(one.getstate() if isinstance(one, random.Random) else one.get_state())
    return digest_of(own)
