"""A cheap key for the present state of any dataset object, under which its content digest is remembered."""

import stat
import types
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dq_lightning.sources.items import Digester, digest_of
from dq_lightning.sources.strip import TRANSFORM_NAMES

_DEEPEST = 12


class _Walk:
    """Walks an object's attributes; remembers whether something could not be looked into."""

    def __init__(self) -> None:
        self.digester = Digester()
        self.opaque = False
        self._seen: dict[int, Any] = {}

    def visit(self, value: Any, depth: int = 0) -> None:
        """Add a value's state."""
        put = self.digester.add
        if value is None or isinstance(value, bool | int | float | complex | bytes | np.generic):
            put(value)
        elif isinstance(value, str | PurePath):
            put(str(value))
            self._file(value)
        elif isinstance(value, Tensor | np.ndarray | Image.Image):
            if isinstance(value, np.ndarray) and value.dtype.hasobject:
                self.visit(value.tolist(), depth + 1)
            else:
                put(value)
        elif id(value) in self._seen:
            put("seen before")
        elif depth > _DEEPEST:
            self.opaque = True
        else:
            self._seen[id(value)] = value  # held, so that the id stays taken
            self._compound(value, depth + 1)

    def _file(self, value: str | PurePath) -> None:
        try:
            status = Path(value).stat() if value != "" else None
        except (OSError, ValueError):
            return
        if status is None:
            return
        if stat.S_ISDIR(status.st_mode):
            # files below it that are rewritten in place do not show in the folder's own time
            self.opaque = True
            return
        self.digester.add((status.st_size, status.st_mtime_ns))

    def _compound(self, value: Any, depth: int) -> None:
        put = self.digester.add
        put(f"{type(value).__module__}.{type(value).__qualname__}")
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
        elif isinstance(value, type | types.ModuleType):
            put(value.__name__)
        elif isinstance(value, types.FunctionType):
            constants = [c for c in value.__code__.co_consts if not isinstance(c, types.CodeType)]
            put((value.__qualname__, value.__code__.co_code, repr(constants), value.__code__.co_names))
            self.visit([cell.cell_contents for cell in value.__closure__ or ()], depth)
            self.visit(value.__defaults__, depth)
        elif isinstance(value, types.MethodType):
            put(value.__func__.__qualname__)
            self.visit(value.__self__, depth)
        elif isinstance(value, types.BuiltinFunctionType):
            put(value.__qualname__)
        elif isinstance(getattr(value, "_fingerprint", None), str) and hasattr(value, "_indices"):
            put(value._fingerprint)  # a Hugging Face dataset keeps the history of its table in this
        elif callable(getattr(value, "to_numpy", None)):
            self.visit(value.to_numpy(), depth)
        elif hasattr(value, "__dict__") and not hasattr(value, "fileno"):
            self._attributes(value, depth)
        else:
            self.opaque = True

    def _attributes(self, value: Any, depth: int) -> None:
        state = vars(value)
        # an object that keeps its content below Python shows no attributes, but has its own way to be pickled
        kind: Any = type(value)
        if not state and (kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__):
            self.opaque = True
        for name in sorted(state):
            self.digester.add(name)
            self.visit(state[name], depth)


def _parts(view: Any, prefix: str = "") -> dict[str, Any]:
    """The attributes of a dataset object, or of every object in a list of such."""
    if isinstance(view, list) and prefix.count("/") < _DEEPEST and len(view) <= 64:
        inner = [_parts(part, f"{prefix}{place}/") for place, part in enumerate(view)]
        return {name: value for part in inner for name, value in part.items()}
    if not hasattr(view, "__dict__") or hasattr(view, "_fingerprint"):
        return {prefix: view}
    kept = {f"{prefix}{name}": value for name, value in vars(view).items() if name not in TRANSFORM_NAMES}
    return {f"{prefix}class": type(view), **kept}


def _walked(view: Any) -> tuple[dict[str, str], dict[str, Any], bool]:
    parts = _parts(view)
    digests, opaque = {}, False
    for name, value in parts.items():
        walk = _Walk()
        walk.visit(value)
        digests[name] = walk.digester.hexdigest()
        opaque = opaque or walk.opaque
    return digests, parts, opaque


def state_key(view: Any, read_spots: Callable[[], str]) -> str:
    """Key of a dataset object's present state, without its transforms.

    Arrays, strings, numbers and containers among its attributes count, files that are named there by size and
    modification time. Attributes that change by reading items (counters) are left out.

    Args:
        view: the dataset without the user's transforms, or a list of such.
        read_spots: reads a few items and gives their digest, against state that does not show.

    Returns:
        The key; it starts with `opaque:` when something (an open file, a database, a folder, content that changes by
        reading) could not be looked into, so that equal keys do not promise equal content.
    """
    read_spots()  # what is opened or filled at the first read is there from now on
    before, _, _ = _walked(view)
    spots = read_spots()
    after, parts, opaque = _walked(view)
    steady = {name: digest for name, digest in after.items() if before.get(name) == digest}
    opaque = opaque or any(not isinstance(parts[name], int | float) for name in after.keys() - steady.keys())
    return f"{'opaque:' if opaque else ''}dataset-state:{digest_of(steady, spots)}"
