"""Computes a cheap digest of the present state of a dataset object, and whether equal digests guarantee equal items."""

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

# A file that was changed this recently may change again without a new time, because of the clock's resolution.
_RACY_NANOSECONDS = 2_000_000_000
# Suffixes of databases (SQLite, LMDB and similar). Their latest changes may be in another file, or may leave the times
# of the file as they were.
_DATABASES = (".db", ".db3", ".sqlite", ".sqlite3", ".mdb", ".lmdb", ".gpkg")
_MAX_PATH_BYTES = 4096
_FOLDERS = "torchvision.datasets."


@dataclass(frozen=True)
class State:
    """What is known of a dataset object without reading all its items.

    Attributes:
        digest: hexadecimal digest of the parts of the object that were described; it differs if one of them differs.
        unknown: reasons why equal digests do not guarantee equal items; empty if they do.
    """

    digest: str
    unknown: tuple[str, ...]


class _StateDescriber(CodeDescriber):
    """Describer of a dataset object, which describes files named in the object by their size, times and inode number.

    The contents of files in the folder `root` are identified elsewhere: then names inside it are described relative to
    it, and the sizes and times of files are not read.
    """

    trusts_libraries = False

    def __init__(self, known_names: set[str], root: str | None) -> None:
        super().__init__(known_names)
        self._root = root
        self.order_of_keys = root is None
        self._extra_file = ""  # the first file that is named besides those whose contents are identified elsewhere
        self.values: list[tuple[Any, str]] = []

    def text(self, value: Any) -> str:
        if self._root is not None:
            self._extra_file = self._extra_file or (os.path.isfile(value) and str(value)) or ""  # noqa: PTH113
            return super().text(value if isinstance(value, bytes) else str(value).removeprefix(self._root))
        return super().text(value) + self._file(value)

    def _file(self, value: str | bytes | PurePath) -> str:
        if not value or (isinstance(value, bytes) and len(value) > _MAX_PATH_BYTES):
            return ""
        try:
            seen = os.stat(value)  # noqa: PTH116 (there may be a million of them)
        except (OSError, ValueError):
            return ""
        if stat.S_ISDIR(seen.st_mode):
            return ""
        if str(value).endswith(_DATABASES):
            self.unresolved(f"{value!r} is a database, which may change without a new file time")
        if max(seen.st_mtime_ns, seen.st_ctime_ns) > time.time_ns() - _RACY_NANOSECONDS:
            self.unresolved(f"{value!r} was changed less than two seconds ago")
        # Tools that copy or unpack files restore the modification time but not the status change time (ctime). The
        # inode number is included because a link may come to name another file with equal times.
        return f" {seen.st_size} {seen.st_mtime_ns} {seen.st_ctime_ns} {seen.st_ino}"

    def random_generator(self, value: Any) -> str:
        self.unresolved(f"the random generator {type(value).__name__} is used")
        return super().random_generator(value)

    def referred(self, value: Any) -> str:
        # The value is not a part of the object. It is described separately, since reading may change it while the
        # object stays the same.
        self.values.append((value, self.describe(value)))
        return "used"

    def special(self, value: Any) -> str | None:
        if isinstance(value, np.ndarray) and value.dtype.kind in "US" and self._root is None:
            return self.describe(value.tolist())
        if isinstance(getattr(value, "_fingerprint", None), str) and hasattr(value, "_indices"):
            # The fingerprint of a Hugging Face dataset covers the history of its table, but not files that the table
            # names.
            self._known_attributes.update(dir(type(value)))
            self._computed.add("[]")
            if "decode=" in repr(getattr(value, "features", "")):
                self.unresolved("the table may name files, whose content is not covered")
            if not is_untouched(type(value)):
                self.unresolved(f"a {type(value).__name__} may give other rows than its table")
            return digest_text("hub", value._fingerprint)
        return super().special(value)

    @property
    def unknown(self) -> list[str]:
        found = super().unknown
        if self._extra_file and self._readers:
            found.append(f"{self._extra_file} is a file that the list of samples does not name")
        return found

    def attributes(self, value: Any, held: dict[str, Any]) -> dict[str, Any]:
        self.check_folders(value, held)
        return super().attributes(value, held)

    def check_folders(self, value: Any, held: dict[str, Any]) -> None:
        """Add a reason if a torchvision dataset holds the name of a folder, since its code may read any file there."""
        if self._root is not None or not any(kind.__module__.startswith(_FOLDERS) for kind in type(value).__mro__):
            return
        for one in held.values():
            if isinstance(one, str | PurePath) and os.path.isdir(one):  # noqa: PTH112
                self.unresolved(f"a {type(value).__name__} may read any file in {one}")


def _objects(view: Any) -> list[Any]:
    return [one for part in view for one in _objects(part)] if isinstance(view, Parts) else [view]


def _parts(objects: list[Any], without: Collection[str]) -> dict[str, Any]:
    """Return the attributes of dataset objects by name, without the names in `without`; some objects are one part."""
    parts: dict[str, Any] = {}
    for place, one in enumerate(objects):
        if not hasattr(one, "__dict__") or hasattr(one, "_fingerprint") or isinstance(one, list | tuple | dict):
            parts[f"{place}/"] = one
            continue
        held = vars(one) | {name: getattr(one, name) for name in slots_of(type(one)) if hasattr(one, name)}
        parts[f"{place}/class"] = type(one)
        parts |= {f"{place}/{name}": value for name, value in held.items() if name not in without}
    return parts


class Parts(list[Any]):
    """Several dataset objects that form one dataset together."""


def _describe_parts(view: Any, root: str | None, names: set[str]) -> tuple[dict[str, tuple[str, Any]], list[str]]:
    """Describe the parts of a dataset and the values that its code uses; `names` are attributes that are left out.

    Digest and value by the name of the part or use, and the reasons for uncertainty (see `State`) are returned.
    """
    objects = _objects(view)
    parts = _parts(objects, names)
    describer = _StateDescriber(names | {name.rpartition("/")[2] for name in parts}, root)
    for one in objects:
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


# Names of the parts that were once seen to change by reading, by dataset. A cache that is full stops growing, so a
# later look alone would not find it.
_changing_parts: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def find_state(
    view: Any, owner: Any, read: Callable[[bool], str], *, without: Collection[str], root: str | None = None
) -> State:
    """Compute the present state of a dataset object, without its transforms.

    The digest covers all attributes; the dataset's class and other classes of the user, by their code and what that
    refers to; and files named in the attributes, by size and times. Attributes that change by reading items (counters,
    caches) are left out. To find them, the object is described before and after some items are read; their names are
    remembered for as long as the user's own object, `owner`, lives.

    Args:
        view: dataset without the user's transforms, or `Parts`.
        owner: the user's own object.
        read: reads a few items and returns their digest, which covers state that the attributes do not show; with the
            argument True it reads a few other items, so that a cache of read items is seen to grow.
        without: names of attributes that are identified elsewhere or have no influence on the items.
        root: folder of the dataset if its files are identified elsewhere; the digest then stays the same if the folder
            is moved.
    """
    names = set(without)
    read(False)  # whatever is opened or filled by the first read is there from now on
    before, _ = _describe_parts(view, root, names)
    read(True)
    sampled = read(False)
    after, unknown = _describe_parts(view, root, names)
    changed = {name for name, (digest, _) in after.items() if before.get(name, ("",))[0] != digest}
    with contextlib.suppress(TypeError):  # raised if weak references cannot point to objects of this class
        changed |= _changing_parts.setdefault(owner, set())
        _changing_parts[owner] = changed
    steady = sorted((name, digest) for name, (digest, _) in after.items() if name not in changed)
    # A number that changes by reading counts what was read, which is no reason for uncertainty.
    kept = [name for name in sorted(changed & after.keys()) if not isinstance(after[name][1], int | float)]
    unknown += [f"{name.rpartition('/')[2] or 'the dataset'} changes when items are read" for name in kept]
    return State(digest_text(*(text for pair in steady for text in pair), sampled), tuple(dict.fromkeys(unknown)))
