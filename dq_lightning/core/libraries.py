"""Tells code of installed libraries from the user's own, and the versions of libraries."""

import functools
import importlib.metadata
import os
import sys
import sysconfig
import types
from typing import Any

_INSTALLED = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")})
# Folders of other installations: one that this one builds on, the user's, or the distribution's.
_INSTALL_FOLDERS = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
# Packages that count as libraries wherever their files are.
_LIBRARIES = ("dq_lightning", "torch", "torchvision", "numpy", "PIL")


@functools.cache
def _is_installed(place: str) -> bool:
    return place.startswith(("<frozen ", *_INSTALLED)) or any(folder in place for folder in _INSTALL_FOLDERS)


def module_of(value: Any) -> str:
    """Return the name of the module that defines a function, class or module.

    For a function it is found by where the code is, since wrappers carry the names of the functions that they wrap.
    """
    if isinstance(value, types.ModuleType):
        return value.__name__
    code = getattr(value, "__code__", None)
    if isinstance(code, types.CodeType) and not code.co_filename.startswith("<"):
        return str(value.__globals__.get("__name__", ""))
    name = getattr(value, "__module__", None)
    if name is None:  # true for methods of built-in types
        owner = getattr(value, "__objclass__", None) or getattr(value, "__self__", None)
        name = getattr(owner, "__module__", None) or getattr(owner, "__name__", None)
    return str(name or "builtins")


def is_library(value: Any) -> bool:
    """Whether an installed library or Python itself defines a function, class or module."""
    name = module_of(value)
    if name.partition(".")[0] in _LIBRARIES:
        return True
    code = getattr(value, "__code__", None)
    if isinstance(code, types.CodeType) and not code.co_filename.startswith("<"):
        return _is_installed(code.co_filename)
    module = value if isinstance(value, types.ModuleType) else sys.modules.get(name)
    place = getattr(module, "__file__", None)
    # A module without a file is built into Python, or it is the interactive session.
    return _is_installed(place) if place else name.partition(".")[0] in sys.builtin_module_names


def library_version(name: str) -> str:
    """Return the version of an installed distribution, which need not be imported; "" if it is not installed."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""
