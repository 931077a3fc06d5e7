"""A cheap key for the present state of any dataset object, under which its content digest is remembered."""

import array
import collections
import datetime
import decimal
import enum
import fractions
import functools
import inspect
import logging
import os
import random
import re
import stat
import time
import types
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import PurePath
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
# described by what they are and do; what they use is visited
_CODE = (
    *(type, types.FunctionType, types.MethodType, staticmethod, classmethod, property, functools.cached_property),
    *(functools.partial, types.EllipsisType, slice, range, re.Pattern, enum.Enum, torch.dtype, torch.device),
)
# what their text says of them is all there is
_TEXTS = (
    *(np.dtype, datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo),
    *(decimal.Decimal, fractions.Fraction, uuid.UUID, bytearray),
)
# where a stream of numbers stands decides what is read next
_STREAMS = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator, torch.Generator)
# of SQLite, LMDB and their kin: what was written last may stand in another file, or show in no time at all
_DATABASES = (".db", ".db3", ".sqlite", ".sqlite3", ".mdb", ".lmdb", ".gpkg")
_CONTAINERS = (dict, list, tuple, set, frozenset)


class _CodeDescriber(Describer):
    """Describes classes and functions; the values that they use are left to `visit`."""

    def __init__(self, visit: Callable[[Any], None]) -> None:
        super().__init__()
        self._visit = visit

    def describe(self, value: Any) -> str:
        if isinstance(value, (*_CODE, logging.Logger)) or inspect.isbuiltin(value) or inspect.isdatadescriptor(value):
            return super().describe(value)
        self._visit(value)
        return "visited"


class _Walk:
    """Walks an object's attributes; remembers whether something could not be looked into.

    Args:
        root: of files whose content is known otherwise: paths below it count from there, and files are not looked at.

    Attributes:
        digester: of the object.
        used: digests of the values that the code on the way uses, each with its value: they are no part of the object, and
            may change while it does not.
    """

    def __init__(self, root: str | None = None) -> None:
        self._root = root
        self.digester = Digester()
        self.opaque = False
        self.used: list[tuple[Any, str]] = []
        self._seen: dict[int, tuple[Any, int]] = {}
        self._code = _CodeDescriber(self._visit_used)

    def _visit_used(self, value: Any) -> None:
        outer, self.digester = self.digester, Digester()
        self.visit(value)
        self.used.append((value, self.digester.hexdigest()))
        self.digester = outer

    def visit(self, value: Any, depth: int = 0) -> None:
        """Add a value's state."""
        put = self.digester.add
        if value is None or isinstance(value, bool | int | float | complex | bytes | np.generic):
            put(value)
        elif isinstance(value, str | PurePath):
            put(str(value) if self._root is None else str(value).removeprefix(self._root))
            self._file(value)
        elif isinstance(value, Tensor | np.ndarray | Image.Image):
            self._values(value, depth)
        elif isinstance(value, _TEXTS):
            put(f"{type(value).__qualname__} {value!r}")
        elif isinstance(value, logging.Logger):
            put(f"logger {value.name}")
        elif id(value) in self._seen:
            put(("the same as number", self._seen[id(value)][1]))
        elif depth > _DEEPEST:
            self.opaque = True
        else:
            self._seen[id(value)] = value, len(self._seen)  # held, so that the id stays taken
            self._compound(value, depth + 1)

    def _values(self, value: Any, depth: int) -> None:
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            self.visit(value.tolist(), depth + 1)
            return
        try:
            self.digester.add(value)
        except Exception:
            # of a layout that has no bytes, a file that is gone
            self.opaque = True

    def _file(self, value: str | PurePath) -> None:
        text = str(value)
        if self._root is not None or not text:
            return
        if _ADDRESS.match(text):
            self.opaque = True
            return
        try:
            status = os.stat(text)  # noqa: PTH116 (there may be a million of them)
        except (OSError, ValueError):
            # the beginning of file names, or a pattern of them
            self.opaque = self.opaque or ("/" in text and _is_below_a_folder(text.rpartition("/")[0]))
            return
        if stat.S_ISDIR(status.st_mode) or text.endswith(_DATABASES):
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
            self._mapping(value, depth)
        elif isinstance(value, tuple | list | collections.deque | array.array):
            self._sequence(value, depth)
        elif isinstance(value, set | frozenset):
            self.visit(sorted(value, key=repr), depth)
        elif isinstance(value, types.ModuleType):
            put(value.__name__)
            self.opaque = self.opaque or not is_library(value)
        elif isinstance(value, types.MethodType):
            self._written(value.__func__)
            self.visit(value.__self__, depth)
        elif isinstance(value, _CODE):
            self._written(value)
        elif isinstance(value, types.BuiltinFunctionType):
            put(value.__qualname__)
        elif isinstance(value, _STREAMS):
            self.opaque = True
        elif isinstance(getattr(value, "_fingerprint", None), str) and hasattr(value, "_indices"):
            # a Hugging Face dataset keeps the history of its table in this, but not of files that the table names
            put(value._fingerprint)
            self.opaque = self.opaque or "decode=" in repr(getattr(value, "features", ""))
        elif callable(getattr(value, "to_numpy", None)):
            self._table(value, depth)
        elif (hasattr(value, "__dict__") or _slots(type(value))) and not hasattr(value, "fileno"):
            self._attributes(value, depth)
        else:
            self.opaque = True

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> None:
        keys = list(value)
        in_order = sorted(keys, key=repr)
        for key in in_order:
            self.visit(key, depth)
            self.visit(value[key], depth)
        if in_order != keys:
            # items may be read in the mapping's own order
            self.digester.add([repr(key) for key in keys])

    def _sequence(self, value: Any, depth: int) -> None:
        if len(value) > 64 and all(type(child) is int for child in value):
            self.visit(np.asarray(value), depth)
            return
        self.digester.add(len(value))
        for child in value:
            self.visit(child, depth)

    def _table(self, value: Any, depth: int) -> None:
        """A table or column of pandas, polars or pyarrow, column by column: all at once, numbers would become floats."""
        try:
            if hasattr(value, "iloc"):
                self.visit(value.index.to_numpy(), depth)
                columns = [value.iloc[:, place] for place in range(value.shape[1])] if value.ndim == 2 else [value]
            else:
                columns = value.get_columns() if hasattr(value, "get_columns") else getattr(value, "columns", [value])
            for column in columns:
                self.digester.add((str(getattr(column, "name", "")), str(getattr(column, "dtype", ""))))
                # pyarrow gives what it would have to copy on request alone
                options = {"zero_copy_only": False} if type(column).__module__.startswith("pyarrow") else {}
                chunked = options and hasattr(column, "chunks")
                self.visit(column.to_numpy() if chunked else column.to_numpy(**options), depth)
        except Exception:
            self.opaque = True

    def _attributes(self, value: Any, depth: int) -> None:
        self._written(type(value))
        state = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
        state |= getattr(value, "__dict__", {})
        # an object that keeps its content below Python shows no attributes, but has its own way to be pickled
        kind: Any = type(value)
        if not state and (kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__):
            self.opaque = True
        for name in sorted(state):
            self.digester.add(name)
            self.visit(state[name], depth)


def _slots(kind: type) -> list[str]:
    """Names of the slots of a class of the user's and its bases."""
    names = []
    for owner in kind.__mro__:
        slots = vars(owner).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


@functools.lru_cache(1024)
def _is_below_a_folder(parent: str) -> bool:
    """Whether names of files may begin so: all of it is a folder, or it is up to a part with a placeholder."""
    while parent and not os.path.isdir(parent):  # noqa: PTH112 (there may be a million of them)
        if not set(parent) & set("{}%*?["):
            return False
        parent = parent.rpartition("/")[0]
    return True


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
    digests: dict[str, str] = {}
    values: dict[str, Any] = {}
    opaque = False
    for name, value in parts.items():
        walk = _Walk(root)
        walk.visit(value)
        found = [(value, walk.digester.hexdigest()), *walk.used]
        for number, (one, digest) in enumerate(found):
            place = f"{name} uses {number}" if number else name
            digests[place], values[place] = digest, one
        opaque = opaque or walk.opaque
    return digests, values, opaque


def _steady(
    view: Any, read: Callable[[bool], str], root: str | None = None, without: Collection[str] = ()
) -> tuple[str, bool]:
    """Digest of what does not change by reading and of the spots, and whether something could not be looked into."""
    read(False)  # what is opened or filled at the first read is there from now on
    before, _, _ = _walked(view, root, without)
    read(True)
    spots = read(False)
    after, values, opaque = _walked(view, root, without)
    steady = {name: digest for name, digest in after.items() if before.get(name) == digest}
    opaque = opaque or any(not isinstance(values[name], int | float) for name in after.keys() - steady.keys())
    return digest_of(steady, spots), opaque


def state_key(view: Any, read: Callable[[bool], str]) -> str:
    """Key of a dataset object's present state, without its transforms.

    Arrays, strings, numbers and containers among its attributes count, its class and others of the user's by their code and
    the values of their modules that it uses, files that are named there by size and times. Attributes that change by reading
    items (counters, memories) are left out.

    Args:
        view: the dataset without the user's transforms, or a list of such.
        read: reads a few items and gives their digest, against state that does not show; given True, a few others, so that a
            memory of what was read is seen to grow.

    Returns:
        The key; it starts with `opaque:` when something (an open file, a database, a folder, an address, a module of the
        user's, a file that was changed just now, content that changes by reading) could not be looked into, so that equal
        keys do not promise equal content.
    """
    digest, opaque = _steady(view, read)
    return f"{'opaque:' if opaque else ''}dataset-state:{digest}"


def state_beside(view: Any, read: Callable[[bool], str], root: str | None, known: Collection[str]) -> str:
    """Digest of a dataset's code and attributes, as far as they can be seen; moving its folder changes nothing.

    Args:
        view: as in `state_key`.
        read: likewise.
        root: its folder; the files in it are known otherwise.
        known: names of attributes that are known otherwise.
    """
    return _steady(view, read, root or "", known)[0]
