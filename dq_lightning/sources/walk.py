"""A digest of everything an object holds, uses and names, as far as that can be looked into."""

import array
import bisect
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
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dq_lightning.describe import Describer, is_library
from dq_lightning.errors import FeatureError
from dq_lightning.sources.items import Digester

DEEPEST = 12
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
# names by which code asks for its process's surroundings
_SURROUNDINGS = frozenset(("environ", "environb", "getenv", "getcwd", "expandvars", "expanduser"))
_CONTAINERS = (dict, list, tuple, set, frozenset)


class _CodeDescriber(Describer):
    """Describes classes and functions; the values that they use are left to `visit`.

    Attributes:
        looks_around: whether some code may ask for what is kept outside of the program.
    """

    def __init__(self, visit: Callable[[Any], None]) -> None:
        super().__init__()
        self._visit = visit
        self.looks_around = False

    def describe(self, value: Any) -> str:
        if isinstance(value, (*_CODE, logging.Logger)) or inspect.isbuiltin(value) or inspect.isdatadescriptor(value):
            return super().describe(value)
        self._visit(value)
        return "visited"

    def _code(self, code: types.CodeType, names: set[str]) -> str:
        # what is asked for at the start is in attributes afterwards
        reads = code.co_name not in ("__init__", "__new__", "__post_init__")
        self.looks_around = self.looks_around or (reads and not _SURROUNDINGS.isdisjoint(code.co_names))
        return super()._code(code, names)


class Walk:
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
        self._names: list[str] | None = None  # in the current folder
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
        elif depth > DEEPEST:
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
            self.opaque = self.opaque or (
                _is_below_a_folder(text.rpartition("/")[0]) if "/" in text else self._begins(text)
            )
            return
        if stat.S_ISDIR(status.st_mode) or text.endswith(_DATABASES):
            # files below it that are rewritten in place do not show in the folder's own time
            self.opaque = True
            return
        # the second time is not put back by what copies or unpacks files
        self.digester.add((status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        changed = max(status.st_mtime_ns, status.st_ctime_ns)
        self.opaque = self.opaque or changed > time.time_ns() - _RACY_NANOSECONDS

    def _begins(self, text: str) -> bool:
        """Whether a name in the current folder begins so: `f"image_{index}.png"`."""
        if self._names is None:
            try:
                self._names = sorted(os.listdir())  # noqa: PTH208 (names alone)
            except OSError:
                self._names = []
        place = bisect.bisect_left(self._names, text)
        found = self._names[place : place + 1]
        if len(text) < 2 or not found or not found[0].startswith(text):
            return False
        # a number or a name follows; a mere word is no beginning of a file
        return text[-1] in "_-" or found[0][len(text) :][:1].isdigit()

    def _written(self, code: Any) -> None:
        """Add a class or function: what it does, and what of its module it uses."""
        try:
            self.digester.add(self._code.describe(code))
            self.opaque = self.opaque or self._code.looks_around
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
        # where files are known otherwise this is identity, which no order of a set may change
        plain = self._root is None and all(isinstance(key, str | int) for key in keys)
        if plain and any(one is not other for one, other in zip(in_order, keys, strict=True)):
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
        own = [slots] if isinstance(slots, str) else list(slots)
        # private names are stored with the name of their class
        private = f"_{owner.__name__.lstrip('_')}"
        names += [f"{private}{n}" if n.startswith("__") and not n.endswith("__") else n for n in own]
    return [name for name in names if name not in ("__dict__", "__weakref__")]


@functools.lru_cache(1024)
def _is_below_a_folder(parent: str) -> bool:
    """Whether names of files may begin so: all of it is a folder, or it is up to a part with a placeholder."""
    while parent and not os.path.isdir(parent):  # noqa: PTH112 (there may be a million of them)
        if not set(parent) & set("{}%*?["):
            return False
        parent = parent.rpartition("/")[0]
    return bool(parent)
