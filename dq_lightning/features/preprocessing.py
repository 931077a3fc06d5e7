"""From one RGB image to the tensor an encoder wants, and what identifies such a step."""

import hashlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dq_lightning.errors import FeatureError
from dq_lightning.weights import digest_text

Preprocessing = Callable[[Image.Image], Tensor]


def image_to_uint8(image: Image.Image) -> Tensor:
    """An RGB image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@dataclass(frozen=True)
class ResizeToSquare:
    """Scale the whole image to `side` x `side` pixels (Pillow's bicubic filter, which averages when it shrinks).

    Returns uint8 [3, side, side]; the encoder normalises whole batches on its device.
    """

    side: int

    def __call__(self, image: Image.Image) -> Tensor:
        if image.size != (self.side, self.side):
            image = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return image_to_uint8(image)


def describe_callable(function: Any) -> str:
    """A text that changes when a preprocessing callable does, equal in every process.

    An `identity` attribute (string) is believed. Otherwise functions are described by their source and everything they
    refer to, other objects by their type and `repr`, which must show all settings (torchvision's transforms do).

    Raises:
        FeatureError: the object's text contains a memory address, so it would differ between processes.
    """
    return _describe(function, depth=0)


def _describe(value: Any, depth: int) -> str:
    own = getattr(value, "identity", None)
    if isinstance(own, str):
        return own
    if isinstance(value, Tensor | np.ndarray):
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        return digest_text(array.dtype, array.shape, hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest())
    if inspect.ismodule(value) or inspect.isclass(value) or inspect.isbuiltin(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
    if inspect.ismethod(value):
        return f"{_describe(value.__self__, depth + 1)}.{_describe(value.__func__, depth + 1)}"
    if inspect.isfunction(value):
        return _describe_function(value, depth)
    if isinstance(value, list | tuple):
        return f"[{','.join(_describe(item, depth + 1) for item in value)}]"
    text = repr(value)
    if " at 0x" in text:
        raise FeatureError(
            f"the preprocessing cannot be identified: {text} does not show its settings; give it a __repr__ that does, "
            "or a string attribute `identity` that you change whenever its behaviour changes"
        )
    return f"{type(value).__module__}.{type(value).__qualname__}:{text}"


def _describe_function(function: Any, depth: int) -> str:
    name = f"{function.__module__}.{function.__qualname__}"
    # functions of installed libraries are identified by name; those of the user by their text and what it refers to
    if depth > 4 or function.__module__.split(".")[0] in ("torch", "torchvision", "timm", "PIL", "numpy"):
        return name
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        code = function.__code__
        source = digest_text(code.co_code.hex(), code.co_names, [c for c in code.co_consts if not inspect.iscode(c)])
    variables = inspect.getclosurevars(function)
    seen = {**variables.nonlocals, **variables.globals}
    referred = [f"{key}={_describe(seen[key], depth + 1)}" for key in sorted(seen) if seen[key] is not function]
    return digest_text(name, source, function.__defaults__, *referred)
