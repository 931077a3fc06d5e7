"""A cheap key for the present state of any dataset object, under which its content digest is remembered."""

import contextlib
import weakref
from collections.abc import Callable, Collection
from typing import Any

from dq_lightning.sources.items import digest_of
from dq_lightning.sources.strip import TRANSFORM_NAMES
from dq_lightning.sources.walk import DEEPEST, Walk


def _parts(view: Any, prefix: str = "") -> dict[str, Any]:
    """The attributes of a dataset object, or of every object in a list of such."""
    if isinstance(view, list) and prefix.count("/") < DEEPEST and len(view) <= 64:
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
        walk = Walk(root)
        walk.visit(value)
        found = [(value, walk.digester.hexdigest()), *walk.used]
        for number, (one, digest) in enumerate(found):
            place = f"{name} uses {number}" if number else name
            digests[place], values[place] = digest, one
        opaque = opaque or walk.opaque
    return digests, values, opaque


# what was once seen to change by reading, by dataset: a memory that is full does not grow any more
_unsteady: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def _steady(
    view: Any,
    owner: Any,
    read: Callable[[bool], str],
    root: str | None = None,
    without: Collection[str] = (),
) -> tuple[str, bool]:
    """Digest of what does not change by reading and of the spots, and whether something could not be looked into."""
    read(False)  # what is opened or filled at the first read is there from now on
    before, _, _ = _walked(view, root, without)
    read(True)
    spots = read(False)
    after, values, opaque = _walked(view, root, without)
    changed = {name for name, digest in after.items() if before.get(name) != digest}
    with contextlib.suppress(TypeError):  # of a class that weak references cannot point to
        changed |= _unsteady.setdefault(owner, set())
        _unsteady[owner] = changed
    steady = {name: digest for name, digest in after.items() if name not in changed}
    opaque = opaque or any(not isinstance(values[name], int | float) for name in changed & values.keys())
    return digest_of(steady, spots), opaque


def state_key(view: Any, owner: Any, read: Callable[[bool], str]) -> str:
    """Key of a dataset object's present state, without its transforms.

    Arrays, strings, numbers and containers among its attributes count, its class and others of the user's by their code and
    the values of their modules that it uses, files that are named there by size and times. Attributes that change by reading
    items (counters, memories) are left out.

    Args:
        view: the dataset without the user's transforms, or a list of such.
        owner: the user's own object; what was seen to change by reading it is remembered as long as it lives.
        read: reads a few items and gives their digest, against state that does not show; given True, a few others, so that a
            memory of what was read is seen to grow.

    Returns:
        The key; it starts with `opaque:` when something (an open file, a database, a folder, an address, a module of the
        user's, a file that was changed just now, content that changes by reading) could not be looked into, so that equal
        keys do not promise equal content.
    """
    digest, opaque = _steady(view, owner, read)
    return f"{'opaque:' if opaque else ''}dataset-state:{digest}"


def state_beside(view: Any, owner: Any, read: Callable[[bool], str], root: str | None, known: Collection[str]) -> str:
    """Digest of a dataset's code and attributes, as far as they can be seen; moving its folder changes nothing.

    Args:
        view: as in `state_key`.
        owner: likewise.
        read: likewise.
        root: its folder; the files in it are known otherwise.
        known: names of attributes that are known otherwise.
    """
    return _steady(view, owner, read, root or "", known)[0]
