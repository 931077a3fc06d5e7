"""A cheap key for the present state of any dataset object, under which its content digest is remembered."""

import enum
import functools
import inspect
import logging
import os
import re
import stat
import time
import types
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dq_lightning.describe import Describer, is_library
from dq_lightning.errors import FeatureError
from dq_lightning.sources.items import Digester, digest_of
from dq_lightning.sources.strip import TRANSFORM_NAMES

_DEEPEST = 12
# a file that was changed just now may change once more within the clock's step
_RACY_NANOSECONDS = 2_000_000_000
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_CODE = (
    *(type, types.FunctionType, types.MethodType, staticmethod, classmethod, property, functools.cached_property),
    *(
        functools.partial,
        types.EllipsisType,
        slice,
        range,
        re.Pattern,
        enum.Enum,
        torch.dtype,
        torch.device,
        logging.Logger,
    ),
)
_CONTAINERS = (dict, list, tuple, set, frozenset)


class _CodeDescriber(Describer):
    """Describes classes and functions; the values that they use are left to `visit`."""

    def __init__(self, visit: Callable[[Any], None]) -> None:
        super().__init__()
        self._visit = visit

    def describe(self, value: Any) -> str:
        if isinstance(value, _CODE) or inspect.isbuiltin(value) or inspect.isdatadescriptor(value):
            return super().describe(value)
        self._visit(value)
        return "visited"


class _Walk:
    """Walks an object's attributes; remembers whether something could not be looked into.

    Args:
        root: of files whose content is known otherwise: paths below it count from there, and files are not looked at.
    """

    def __init__(self, root: str | None = None) -> None:
        self._root = root
        self.digester = Digester()
        self.opaque = False
        self._seen: dict[int, tuple[Any, int]] = {}
        # names that follow each other are mostly of one folder
        self._is_folder = functools.lru_cache(1)(_is_folder)
        self._code = _CodeDescriber(self.visit)

    def visit(self, value: Any, depth: int = 0) -> None:
        """Add a value's state."""
        put = self.digester.add
        if value is None or isinstance(value, bool | int | float | complex | bytes | np.generic):
            put(value)
        elif isinstance(value, str | PurePath):
            put(str(value) if self._root is None else str(value).removeprefix(self._root))
            self._file(value)
        elif isinstance(value, Tensor | np.ndarray | Image.Image):
            if isinstance(value, np.ndarray) and value.dtype.hasobject:
                self.visit(value.tolist(), depth + 1)
            else:
                put(value)
        elif id(value) in self._seen:
            put(("the same as number", self._seen[id(value)][1]))
        elif depth > _DEEPEST:
            self.opaque = True
        else:
            self._seen[id(value)] = value, len(self._seen)  # held, so that the id stays taken
            self._compound(value, depth + 1)

    def _file(self, value: str | PurePath) -> None:
        text = str(value)
        if self._root is not None:
            return
        if _ADDRESS.match(text):
            self.opaque = True
            return
        try:
            status = os.stat(text) if text else None  # noqa: PTH116 (there may be a million of them)
        except (OSError, ValueError):
            # the beginning of file names, or a pattern of them
            self.opaque = self.opaque or ("/" in text and self._is_folder(text.rpartition("/")[0] or "/"))
            return
        if status is None:
            return
        if stat.S_ISDIR(status.st_mode):
            # files below it that are rewritten in place do not show in the folder's own time
            self.opaque = True
            return
        # the second time is not put back by what copies or unpacks files
        self.digester.add((status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        changed = max(status.st_mtime_ns, status.st_ctime_ns)
        self.opaque = self.opaque or changed > time.time_ns() - _RACY_NANOSECONDS

    def _written(self, code: Any) -> None:
        """Add a class or function: what it does, and what of its module it uses."""
        try:
            self.digester.add(self._code.describe(code))
        except (FeatureError, RecursionError):
            self.opaque = True

    def _compound(self, value: Any, depth: int) -> None:
        put = self.digester.add
        put(f"{type(value).__module__}.{type(value).__qualname__}")
        if isinstance(value, _CONTAINERS) and not is_library(type(value)):
            self._written(type(value))
            self.visit(getattr(value, "__dict__", None), depth)
        if isinstance(value, Mapping):
            for key in sorted(value, key=repr):
                self.visit(key, depth)
                self.visit(value[key], depth)
        elif isinstance(value, tuple | list):
            if len(value) > 64 and all(type(child) is int for child in value):
                self.visit(np.asarray(value), depth)
                return
            put(len(value))
            for child in value:
                self.visit(child, depth)
        elif isinstance(value, set | frozenset):
            self.visit(sorted(value, key=repr), depth)
        elif isinstance(value, types.ModuleType):
            put(value.__name__)
            self.opaque = self.opaque or not is_library(value)
        elif isinstance(value, type | types.FunctionType):
            self._written(value)
        elif isinstance(value, types.MethodType):
            self._written(value.__func__)
            self.visit(value.__self__, depth)
        elif isinstance(value, types.BuiltinFunctionType):
            put(value.__qualname__)
        elif isinstance(getattr(value, "_fingerprint", None), str) and hasattr(value, "_indices"):
            # a Hugging Face dataset keeps the history of its table in this, but not of files that the table names
            put(value._fingerprint)
            self.opaque = self.opaque or "decode=" in repr(getattr(value, "features", ""))
        elif callable(getattr(value, "to_numpy", None)):
            self.visit(value.to_numpy(), depth)
        elif hasattr(value, "__dict__") and not hasattr(value, "fileno"):
            self._attributes(value, depth)
        else:
            self.opaque = True

    def _attributes(self, value: Any, depth: int) -> None:
        state = vars(value)
        self._written(type(value))
        # an object that keeps its content below Python shows no attributes, but has its own way to be pickled
        kind: Any = type(value)
        if not state and (kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__):
            self.opaque = True
        for name in sorted(state):
            self.digester.add(name)
            self.visit(state[name], depth)


def _is_folder(text: str) -> bool:
    try:
        return Path(text).is_dir()
    except (OSError, ValueError):
        return False


def _parts(view: Any, prefix: str = "") -> dict[str, Any]:
    """The attributes of a dataset object, or of every object in a list of such."""
    if isinstance(view, list) and prefix.count("/") < _DEEPEST and len(view) <= 64:
        inner = [_parts(part, f"{prefix}{place}/") for place, part in enumerate(view)]
        return {name: value for part in inner for name, value in part.items()}
    if not hasattr(view, "__dict__") or hasattr(view, "_fingerprint"):
        return {prefix: view}
    kept = {f"{prefix}{name}": value for name, value in vars(view).items() if name not in TRANSFORM_NAMES}
    return {f"{prefix}class": type(view), **kept}


def _walked(view: Any, root: str | None, without: Collection[str]) -> tuple[dict[str, str], dict[str, Any], bool]:
    parts = {name: value for name, value in _parts(view).items() if name not in without}
    digests, opaque = {}, False
    for name, value in parts.items():
        walk = _Walk(root)
        walk.visit(value)
        digests[name] = walk.digester.hexdigest()
        opaque = opaque or walk.opaque
    return digests, parts, opaque


def _steady(
    view: Any, read_spots: Callable[[], str], root: str | None = None, without: Collection[str] = ()
) -> tuple[str, bool]:
    """Digest of what does not change by reading and of the spots, and whether something could not be looked into."""
    read_spots()  # what is opened or filled at the first read is there from now on
    before, _, _ = _walked(view, root, without)
    spots = read_spots()
    after, parts, opaque = _walked(view, root, without)
    steady = {name: digest for name, digest in after.items() if before.get(name) == digest}
    opaque = opaque or any(not isinstance(parts[name], int | float) for name in after.keys() - steady.keys())
    return digest_of(steady, spots), opaque


def state_key(view: Any, read_spots: Callable[[], str]) -> str:
    """Key of a dataset object's present state, without its transforms.

    Arrays, strings, numbers and containers among its attributes count, its class and others of the user's by their code and
    the values of their modules that it uses, files that are named there by size and times. Attributes that change by reading
    items (counters) are left out.

    Args:
        view: the dataset without the user's transforms, or a list of such.
        read_spots: reads a few items and gives their digest, against state that does not show.

    Returns:
        The key; it starts with `opaque:` when something (an open file, a database, a folder, an address, a module of the
        user's, a file that was changed just now, content that changes by reading) could not be looked into, so that equal
        keys do not promise equal content.
    """
    digest, opaque = _steady(view, read_spots)
    return f"{'opaque:' if opaque else ''}dataset-state:{digest}"


def state_beside(view: Any, read_spots: Callable[[], str], root: str | None, known: Collection[str]) -> str:
    """Digest of a dataset's code and attributes, as far as they can be seen; moving its folder changes nothing.

    Args:
        view: as in `state_key`.
        read_spots: likewise.
        root: its folder; the files in it are known otherwise.
        known: names of attributes that are known otherwise.
    """
    return _steady(view, read_spots, root or "", known)[0]
