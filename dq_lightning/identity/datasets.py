"""A cheap key for the present state of a dataset object, and whether equal keys promise equal items."""

import contextlib
import os
import stat
import time
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from dq_lightning.identity.callables import CodeDescriber, is_untouched
from dq_lightning.identity.values import digest_text, slots_of

# a file that was changed just now may change once more within the clock's step
_RACY_NANOSECONDS = 2_000_000_000
# of SQLite, LMDB and their kin: what was written last may stand in another file, or show in no time at all
_DATABASES = (".db", ".db3", ".sqlite", ".sqlite3", ".mdb", ".lmdb", ".gpkg")
_LONGEST_PATH = 4096
_FOLDERS = "torchvision.datasets."


@dataclass(frozen=True)
class State:
    """What was seen of a dataset object without reading all its items.

    Attributes:
        digest: differs where something seen differs.
        unknown: why equal digests do not promise equal items; empty where they do.
    """

    digest: str
    unknown: tuple[str, ...]


class StateDescriber(CodeDescriber):
    """Describes a dataset object; files that it names are described by size and times.

    Args:
        known_names: attributes that were left out.
        root: folder of files whose content is known otherwise; names below it count from there, and no file is looked at.
    """

    trusts_libraries = False

    def __init__(self, known_names: set[str], root: str | None) -> None:
        super().__init__(known_names)
        self._root = root
        self.order_of_keys = root is None
        self._beside = ""  # a file that is named beside those that are known otherwise
        self.values: list[tuple[Any, str]] = []

    def text(self, value: Any) -> str:
        if self._root is not None:
            self._beside = self._beside or (os.path.isfile(value) and str(value)) or ""  # noqa: PTH113
            return super().text(value if isinstance(value, bytes) else str(value).removeprefix(self._root))
        return super().text(value) + self._file(value)

    def _file(self, value: str | bytes | PurePath) -> str:
        if not value or (isinstance(value, bytes) and len(value) > _LONGEST_PATH):
            return ""
        try:
            seen = os.stat(value)  # noqa: PTH116 (there may be a million of them)
        except (OSError, ValueError):
            return ""
        if stat.S_ISDIR(seen.st_mode):
            return ""
        if str(value).endswith(_DATABASES):
            self.unresolved(f"{value!r} is a database")
        if max(seen.st_mtime_ns, seen.st_ctime_ns) > time.time_ns() - _RACY_NANOSECONDS:
            self.unresolved(f"{value!r} was changed just now")
        # the time of change is not put back by what copies or unpacks files; a link may name another file of equal times
        return f" {seen.st_size} {seen.st_mtime_ns} {seen.st_ctime_ns} {seen.st_ino}"

    def stream(self, value: Any) -> str:
        self.unresolved(f"a {type(value).__name__} is drawn from")
        return super().stream(value)

    def used(self, value: Any) -> str:
        # no part of the object: it may change by reading, while the object does not
        self.values.append((value, self.describe(value)))
        return "used"

    def special(self, value: Any) -> str | None:
        if isinstance(value, np.ndarray) and value.dtype.kind in "US" and self._root is None:
            return self.describe(value.tolist())
        if isinstance(getattr(value, "_fingerprint", None), str) and hasattr(value, "_indices"):
            # a Hugging Face dataset keeps the history of its table in this, but not of files that the table names
            self._offered.update(dir(type(value)))
            self._computed.add("[]")
            if "decode=" in repr(getattr(value, "features", "")):
                self.unresolved("a table may name files")
            if not is_untouched(type(value)):
                self.unresolved(f"a {type(value).__name__} may give other rows than its table")
            return digest_text("hub", value._fingerprint)
        return super().special(value)

    @property
    def unknown(self) -> list[str]:
        beside = [f"{self._beside} is a file beside those of the list"] if self._beside and self._readers else []
        return super().unknown + beside

    def attributes(self, value: Any, held: dict[str, Any]) -> dict[str, Any]:
        self.check_folders(value, held)
        return super().attributes(value, held)

    def check_folders(self, value: Any, held: dict[str, Any]) -> None:
        """Note where code of torchvision's may read files that are not named one by one."""
        if self._root is not None or not any(kind.__module__.startswith(_FOLDERS) for kind in type(value).__mro__):
            return
        for one in held.values():
            if isinstance(one, str | PurePath) and os.path.isdir(one):  # noqa: PTH112
                self.unresolved(f"a {type(value).__name__} may read any file in {one}")


def _parts(view: Any, without: Collection[str], prefix: str = "") -> dict[str, Any]:
    """The attributes of a dataset object, or of every object in a list of such."""
    if isinstance(view, Parts):
        inner = [_parts(part, without, f"{prefix}{place}/") for place, part in enumerate(view)]
        return {name: value for part in inner for name, value in part.items()}
    if not hasattr(view, "__dict__") or hasattr(view, "_fingerprint") or isinstance(view, list | tuple | dict):
        return {prefix: view}
    held = vars(view) | {name: getattr(view, name) for name in slots_of(type(view)) if hasattr(view, name)}
    kept = {f"{prefix}{name}": value for name, value in held.items() if name not in without}
    return {f"{prefix}class": type(view), **kept}


def _objects(view: Any) -> list[Any]:
    return [one for part in view for one in _objects(part)] if isinstance(view, Parts) else [view]


class Parts(list[Any]):
    """Several dataset objects that are one together."""


def _seen(view: Any, root: str | None, names: set[str]) -> tuple[dict[str, tuple[str, Any]], list[str]]:
    """Digests of a dataset's parts and of what its code uses, by place, each with its value; and what is unknown."""
    parts = _parts(view, names)
    describer = StateDescriber(names | {name.rpartition("/")[2] for name in parts}, root)
    for one in _objects(view):
        held = getattr(one, "__dict__", {})
        describer.check_folders(one, held)
        for name in held.keys() - names:
            describer.note_name(name, held[name])
    found: dict[str, tuple[str, Any]] = {}
    for name, value in parts.items():
        describer.values = []
        text = describer.describe(value)
        for number, (one, digest) in enumerate([(value, text), *describer.values]):
            found[f"{name} uses {number}" if number else name] = (digest, one)
    return found, describer.unknown


# what was once seen to change by reading, by dataset: a memory that is full does not grow any more
_unsteady: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def find_state(
    view: Any, owner: Any, read: Callable[[bool], str], *, without: Collection[str], root: str | None = None
) -> State:
    """The present state of a dataset object, without its transforms.

    Everything among its attributes counts, its class and others of the user's by their code and what it refers to, files that
    are named there by size and times. Attributes that change by reading items (counters, memories) are left out.

    Args:
        view: the dataset without the user's transforms, or `Parts`.
        owner: the user's own object; what was seen to change by reading it is remembered as long as it lives.
        read: reads a few items and gives their digest, against state that does not show; given True, a few others, so that a
            memory of what was read is seen to grow.
        without: names of attributes that are known otherwise, or do not count.
        root: its folder, where its files are known otherwise; moving it changes nothing then.
    """
    names = set(without)
    read(False)  # what is opened or filled at the first read is there from now on
    before, _ = _seen(view, root, names)
    read(True)
    spots = read(False)
    after, unknown = _seen(view, root, names)
    changed = {name for name, (digest, _) in after.items() if before.get(name, ("",))[0] != digest}
    with contextlib.suppress(TypeError):  # of a class that weak references cannot point to
        changed |= _unsteady.setdefault(owner, set())
        _unsteady[owner] = changed
    steady = sorted((name, digest) for name, (digest, _) in after.items() if name not in changed)
    # a number that changes counts what was read
    kept = [name for name in sorted(changed & after.keys()) if not isinstance(after[name][1], int | float)]
    unknown += [f"{name.rpartition('/')[2]} changes by reading" for name in kept]
    return State(digest_text(*(text for pair in steady for text in pair), spots), tuple(dict.fromkeys(unknown)))
