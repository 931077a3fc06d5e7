"""A cheap key for the present state of any dataset object, under which its content digest is remembered."""

import types
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dq_lightning.sources.items import Digester
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
            status = Path(value).stat()
        except (OSError, ValueError):
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
        # an object that keeps its content below Python shows no attributes, or only some, but tells that it has none to pickle
        kind: Any = type(value)
        if not state and (kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__):
            self.opaque = True
        for name in sorted(state):
            if depth > 1 or name not in TRANSFORM_NAMES:
                self.digester.add(name)
                self.visit(state[name], depth)


def state_key(dataset: Any, spot_digest: str) -> str:
    """Key of a dataset object's present state, without its transforms.

    Arrays, strings, numbers and containers among its attributes count, files that are named there by size and
    modification time.

    Args:
        dataset: without the user's transforms; or a nest of such.
        spot_digest: digest of its length and a few of its items, against state that does not show.

    Returns:
        The key; it starts with `opaque:` when something (an open file, a database) could not be looked into, so that
        equal keys do not promise equal content.
    """
    walk = _Walk()
    walk.visit(dataset)
    walk.digester.add(spot_digest)
    return f"{'opaque:' if walk.opaque else ''}dataset-state:{walk.digester.hexdigest()}"
