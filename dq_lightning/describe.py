"""A text for any Python object that changes when its behaviour does, and is equal in every process."""

import dis
import enum
import functools
import hashlib
import inspect
import logging
import os
import random
import re
import sysconfig
import types
import weakref
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dq_lightning.errors import FeatureError
from dq_lightning.tensor_bytes import tensor_bytes

_LIBRARIES = ("torch", "torchvision", "timm", "PIL", "numpy", "transformers", "builtins", "dq_lightning")
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
# of another installation that this one builds on, of the user, of a distribution
_INSTALL_FOLDERS = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
PLAIN = (bool, int, float, complex, str, bytes, np.generic, torch.dtype, PurePath, slice, range)
# what these hold is where a stream of numbers or text stands, and no setting
_BY_TYPE = (
    *(random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator, torch.Generator),
    *(torch.device, weakref.ref),
)
# bookkeeping of every module; its parts and hooks are looked at by themselves
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_MODULE_PARTS = ("_parameters", "_buffers", "_modules", *HOOKS)
MODULE_NAMES = frozenset(vars(nn.Module())) | {"forward"}
_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType)


def digest_text(*parts: object) -> str:
    """Hexadecimal SHA-256 of the parts' texts, kept apart by a separator."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode(errors="surrogatepass")).hexdigest()


def is_library(kind: Any) -> bool:
    """Whether a class, a function or a module belongs to an installed library, which its name identifies."""
    itself = isinstance(kind, types.ModuleType)
    module = kind if itself else inspect.getmodule(kind)
    name = kind.__name__ if itself else getattr(kind, "__module__", None) or "builtins"
    if name.split(".")[0] in _LIBRARIES:
        return True
    code = getattr(kind, "__code__", None)
    place = code.co_filename if code is not None else getattr(module, "__file__", None)
    # a module without a file is built in, unless it is the session that is being typed
    if place is None:
        return module is not None and module.__name__ not in ("__main__", "__mp_main__")
    return place.startswith(_INSTALLED) or any(folder in place for folder in _INSTALL_FOLDERS)


class Describer:
    """Describes objects by their type and everything they hold, functions by their code and what that refers to.

    Args:
        strict: refuse what cannot be looked into; otherwise its type stands for it.
    """

    def __init__(self, *, strict: bool = True) -> None:
        self._strict = strict
        self._open: list[int] = []
        self._known: dict[int, tuple[Any, str]] = {}  # with the object, so that its id stays taken

    def describe(self, value: Any) -> str:
        """The text.

        Raises:
            FeatureError: something cannot be looked into (a lock, an open file, a compiled object).
        """
        if isinstance(value, enum.Enum):
            return f"{type(value).__qualname__}.{value.name}={self.describe(value.value)}"
        if value is None or value is Ellipsis or isinstance(value, PLAIN):
            return f"{type(value).__qualname__}:{value!r}"
        if isinstance(value, _BY_TYPE):
            return type(value).__qualname__
        if id(value) in self._open:  # a cycle: how far up it closes
            return f"above:{len(self._open) - self._open.index(id(value))}"
        if id(value) not in self._known:
            self._open.append(id(value))
            try:
                self._known[id(value)] = value, self._compound(value)
            finally:
                self._open.pop()
        return self._known[id(value)][1]

    def _all(self, values: Any) -> list[str]:
        return [self.describe(value) for value in values]

    def _compound(self, value: Any) -> str:
        own = getattr(value, "identity", None)
        if isinstance(own, str) and not isinstance(value, type | types.ModuleType):
            return own
        if isinstance(value, Tensor | np.ndarray):
            return self._array(value)
        if isinstance(value, Image.Image):
            return digest_text("image", value.mode, value.size, hashlib.sha256(value.tobytes()).hexdigest())
        if isinstance(value, types.ModuleType) and not is_library(value):
            return digest_text("module", value.__name__, _source_of(value))
        if isinstance(value, types.ModuleType | logging.Logger):
            return f"{type(value).__name__}:{getattr(value, '__name__', None) or getattr(value, 'name', '')}"
        if isinstance(value, type):
            return self._class(value)
        if inspect.isbuiltin(value) or isinstance(value, (*_DESCRIPTORS, np.ufunc)):
            return digest_text("builtin", getattr(value, "__module__", ""), value.__name__, *self._owner(value))
        if inspect.ismethod(value):
            return digest_text("method", *self._all((value.__self__, value.__func__)))
        if inspect.isfunction(value):
            return self._function(value)
        if isinstance(value, functools.partial):
            return digest_text("partial", *self._all((value.func, value.args, value.keywords)))
        if isinstance(value, re.Pattern):
            return digest_text("pattern", repr(value.pattern), value.flags)
        if isinstance(value, staticmethod | classmethod):
            return digest_text(type(value).__name__, self.describe(value.__func__))
        if isinstance(value, property):
            return digest_text("property", self.describe(value.fget))
        if isinstance(value, functools.cached_property):
            return digest_text("property", self.describe(value.func))
        return self._object(value)

    def _owner(self, value: Any) -> list[str]:
        owner = getattr(value, "__self__", None)
        return [] if owner is None or isinstance(owner, types.ModuleType) else [self.describe(owner)]

    def _array(self, value: Any) -> str:
        if isinstance(value, Tensor):
            kind, data = str(value.dtype), tensor_bytes(value).tobytes()
        elif value.dtype.hasobject:
            return digest_text("objects", value.shape, self.describe(value.tolist()))
        else:
            kind, data = value.dtype.str, np.ascontiguousarray(value).tobytes()
        return digest_text(kind, tuple(value.shape), hashlib.sha256(data).hexdigest())

    def _object(self, value: Any) -> str:
        kind = type(value)
        parts = [self._class(kind)]
        if isinstance(value, Mapping):
            parts += [text for key in value for text in self._all((key, value[key]))]
        elif isinstance(value, set | frozenset):
            parts += sorted(self._all(value))
        elif isinstance(value, list | tuple):
            parts += self._all(value)
        elif not getattr(value, "__dict__", None) or hasattr(value, "fileno"):
            return digest_text(*parts, self._reduced(value))
        return digest_text(*parts, *self._attributes(value))

    def _attributes(self, value: Any) -> list[str]:
        held = dict(getattr(value, "__dict__", {}))
        parts = []
        if isinstance(value, nn.Module):
            for name in _MODULE_PARTS:
                # hooks are filed under numbers that count up through the process
                own = held.get(name) or {}
                parts += [name, *self._all(own.values() if "hooks" in name else own.items())]
            if not is_library(type(value)):
                parts.append(self.describe(value.training))
            held = {name: child for name, child in held.items() if name not in MODULE_NAMES}
        for name in sorted(held):
            parts += [name, self.describe(held[name])]
        return parts

    def _reduced(self, value: Any) -> str:
        """What pickle would keep of an object without attributes: slots, or what is held below Python."""
        try:
            if hasattr(value, "fileno"):
                raise TypeError("an open file")
            state = value.__reduce_ex__(4)
        except Exception as error:
            if not self._strict:
                return ""
            raise FeatureError(
                f"the preprocessing cannot be identified: it holds {value!r}, which cannot be looked into; give the "
                "preprocessing a string attribute `identity` that you change whenever its behaviour changes"
            ) from error
        if isinstance(state, str):
            return state
        lists = [list(part) for part in state[3:5] if part is not None]
        return digest_text(*self._all([*state[1:3], *lists]))

    def _class(self, kind: type) -> str:
        if is_library(kind):
            return f"{kind.__module__}.{kind.__qualname__}"
        if id(kind) in self._open[:-1]:
            return f"above:{kind.__qualname__}"
        if id(kind) not in self._known:
            self._open.append(id(kind))
            try:
                self._known[id(kind)] = kind, self._written_class(kind)
            finally:
                self._open.pop()
        return self._known[id(kind)][1]

    def _written_class(self, kind: type) -> str:
        parts = [kind.__qualname__, *(self._class(base) for base in kind.__bases__)]
        for name, value in sorted(vars(kind).items()):
            # other names of this form are Python's bookkeeping: documentation, line numbers, annotations
            if inspect.isfunction(value) or not (name.startswith("__") or name == "_abc_impl"):
                parts += [name, self.describe(value)]
        return digest_text(*parts)

    def _function(self, function: Any) -> str:
        if is_library(function):
            return f"{function.__module__}.{function.__qualname__}" + "".join(self._cells(function))
        names: set[str] = set()
        code = self._code(function.__code__, names)
        world = function.__globals__
        referred = [text for name in sorted(names & world.keys()) for text in (name, self.describe(world[name]))]
        defaults = self._all((function.__defaults__, function.__kwdefaults__, vars(function)))
        return digest_text(function.__qualname__, code, *defaults, *self._cells(function), *referred)

    def _cells(self, function: Any) -> list[str]:
        texts = []
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                texts += [name, self.describe(cell.cell_contents)]
            except ValueError:  # not filled yet
                texts += [name, "empty"]
        return texts

    def _code(self, code: types.CodeType, names: set[str]) -> str:
        # co_names alone has attributes too: `self.model` is not the script's own `model`
        names.update(step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
        constants = [
            self._code(constant, names) if isinstance(constant, types.CodeType) else self.describe(constant)
            for constant in code.co_consts
        ]
        return digest_text(code.co_code.hex(), code.co_names, code.co_varnames, *constants)


def _source_of(module: types.ModuleType) -> str:
    """Digest of a module's file: which of its functions are used does not show."""
    try:
        return hashlib.sha256(Path(module.__file__ or "").read_bytes()).hexdigest()
    except OSError:
        return ""


def describe_callable(function: Any) -> str:
    """A text that changes when a preprocessing callable does, equal in every process.

    An `identity` attribute (string) is believed, of the callable and of whatever it holds. What belongs to an installed
    library counts by its name; objects count by all their attributes; the user's functions and classes by their code, its
    defaults, its closure and the global names that it uses; modules by their files.

    Raises:
        FeatureError: something in it cannot be looked into.
    """
    return Describer().describe(function)
