"""Finds out how a dataset calls its transforms, by recording the calls while the dataset delivers a few items.

`trace` replaces each transform by a recorder and reads one item. It keeps the arguments and the result of every call,
and the delivered item. `explain` then finds where each argument and each part of the delivered item comes from: the
plain item, or the result of an earlier call. This gives a `CallingFinisher`, which turns any plain item into the
item that the dataset would deliver. Recorded values are compared with recorded values, so random numbers play no part:
transforms that rarely change anything, and transforms with a random generator of their own, are recorded like all
others. A finisher is accepted only if it reproduces every trace: the same calls in the same order, with equal
arguments, and an equal delivered item, of the same types.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dq_lightning.core.errors import SourceError
from dq_lightning.core.isolation import isolated_random_state
from dq_lightning.identity.values import digest_of
from dq_lightning.sources.items import Leaf, at, children, is_dataclass, outline, parts, tv_tensor
from dq_lightning.sources.streams import generator_states, generators_in, random_states
from dq_lightning.sources.strip import replaced, with_attributes

# Number of items that are traced, each under a random seed of its own.
TRACED_SAMPLES = 8
# Number of times that an item is read whose record shows a problem.
MAX_READS = 3
_SCALARS = (type(None), bool, int, float, str)
_MAX_LENGTH = 64


@dataclass(frozen=True)
class Taken:
    """A value that is taken from the plain item or from the result of a call.

    Attributes:
        call: number of the call whose result holds the value, counted from 1; 0 stands for the plain item.
        leaf: path of keys and positions that leads to the value.
        kind: type that the value is converted to: `"array"` for a NumPy array, the name of a class of torchvision's
            tv_tensors, or empty for no conversion.
    """

    call: int
    leaf: Leaf
    kind: str = ""


@dataclass(frozen=True)
class Built:
    """A container that the dataset builds.

    Attributes:
        kind: class of the container.
        keys: keys, field names or positions of its parts.
        parts: where each part comes from: a `Taken`, `Built` or `Fixed` for each key.
        default: default factory of a `defaultdict`; None for other containers.
    """

    kind: type
    keys: tuple[Any, ...]
    parts: tuple[Any, ...]
    default: Any = None


@dataclass(frozen=True)
class Fixed:
    """A constant argument, which a call receives for every item."""

    value: Any


@dataclass(frozen=True)
class Call:
    """One call of a transform.

    Attributes:
        place: name of the dataset's attribute that holds the transform, followed by the keys inside that attribute.
        transform: the transform that is called.
        given: where its arguments come from: a `Built` tuple of a tuple (positional) and a dict (named).
    """

    place: tuple[Any, ...]
    transform: Callable[..., Any]
    given: Any


@dataclass(frozen=True)
class CallingFinisher:
    """A finisher that calls the transforms as the dataset does.

    Attributes:
        calls: the calls, in the order in which the dataset makes them.
        item: where the delivered item comes from: a `Taken`, or a `Built` container.
        added: finisher that is applied to this item afterwards, or None.
    """

    calls: tuple[Call, ...]
    item: Any
    added: Callable[[int, Any], Any] | None = None

    def __call__(self, position: int, plain_item: Any) -> Any:
        known = [plain_item]
        for call in self.calls:
            values, named = _build(call.given, known)
            known.append(call.transform(*values, **named))
        item = _build(self.item, known)
        return item if self.added is None else self.added(position, item)


@dataclass
class RecordedCall:
    """One recorded call of a transform.

    Attributes:
        place: name of the dataset's attribute that holds the transform, followed by the keys inside that attribute.
        transform: the transform that was called.
        given: copies of its positional and named arguments, made before the call.
        live_given: the argument objects themselves, which are recognised by identity later.
        result: a copy of the result of the call.
        live_result: the object that was returned to the dataset. It is another copy of the result, so that it is
            not the argument object even where the transform returns its argument.
    """

    place: tuple[Any, ...]
    transform: Callable[..., Any]
    given: tuple[tuple[Any, ...], dict[str, Any]]
    live_given: Any
    result: Any = None
    live_result: Any = None


@dataclass
class Trace:
    """The record of reading one item.

    Attributes:
        plain: the item without transforms, as a packed store returns it.
        streams: function that returns a digest of the states of all random number generators.
        delivered: the item as the dataset delivered it.
        calls: the recorded calls of transforms, in order.
        problem: reason why the record may not show everything that the dataset does with its transforms; empty when there
            is none.
    """

    plain: Any
    streams: Callable[[], str] = str
    delivered: Any = None
    calls: list[RecordedCall] = field(default_factory=list)
    problem: str = ""
    _mark: str = ""

    def note_random_state(self) -> None:
        """Note the random state when the reading of the item begins or a transform has returned."""
        self._mark = self.streams()

    def check_random_state(self) -> None:
        """Compare the random state with the noted one when a transform is called or the reading ends.

        If it changed in between, the dataset itself drew numbers or set a seed, which is recorded as `problem`.
        """
        if self._mark != self.streams():
            self.problem = self.problem or (
                "it draws random numbers or sets a seed beside its transforms (to change image and mask alike, call one joint "
                "transform with both: torchvision's v2, albumentations)"
            )

    def copied(self, value: Any) -> Any:
        """A deep copy of a value, since the transform or the dataset may change the value in place afterwards.

        A value that cannot be copied is returned itself, and `problem` is set.
        """
        try:
            return copy.deepcopy(value)
        except Exception as error:
            self.problem = (
                self.problem
                or f"what its transform is given or gives can't be copied ({type(error).__name__}: {error})"
            )
            return value


class _Recorder:
    """Replaces a transform: calls the transform, and records its arguments and its result."""

    def __init__(self, transform: Any, place: tuple[Any, ...], trace: Trace) -> None:
        self._recorded = transform, place, trace

    def __call__(self, *values: Any, **named: Any) -> Any:
        transform, place, trace = self._recorded
        trace.check_random_state()
        seen = RecordedCall(place, transform, trace.copied((values, named)), (values, named))
        result = transform(*values, **named)
        seen.result, seen.live_result = trace.copied(result), trace.copied(result)
        trace.calls.append(seen)
        trace.note_random_state()
        return seen.live_result

    def __getattr__(self, name: str) -> Any:
        transform, _, trace = self._recorded
        value = getattr(transform, name)
        if callable(value) and not name.startswith("__"):
            trace.problem = trace.problem or f"it does more with its transform than to call it: .{name}"
        return value

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # A dataset that checks the type of its transform must behave as it does without the recorder.
        return type(self._recorded[0])


def trace(dataset: Any, used: dict[str, Any], index: int, plain: Any, seed: int) -> Trace:
    """Read the item at `index` of a dataset whose transforms `used`, by attribute, are replaced by recorders.

    `plain` is the item without transforms, as a packed store returns it, and `seed` that of the global random state. This
    state may also change because another thread draws a number, such as one that waits before it asks a server again. So
    an item with a problem is read up to 3 times, under the same seed: the dataset shows the same problem each time. It is
    not read again if a generator of the dataset's own has changed, which no other thread does.
    """
    found = generators_in(vars(dataset))
    for _ in range(MAX_READS):
        before = generator_states(found)
        seen = _trace_once(dataset, used, index, plain, seed, found)
        if not seen.problem or generator_states(found) != before:
            break
    return seen


def _trace_once(dataset: Any, used: dict[str, Any], index: int, plain: Any, seed: int, found: list[Any]) -> Trace:
    seen = Trace(plain, lambda: random_states(found))
    recorders = {
        name: replaced(value, lambda one, place: _Recorder(one, place, seen), (name,)) for name, value in used.items()
    }
    recorded = with_attributes(dataset, recorders)
    with isolated_random_state(seed):
        seen.note_random_state()
        if hasattr(recorded, "go_to"):
            recorded.go_to(index)  # A stream calls its transforms for the items before this one, too.
            seen.calls.clear()
        seen.delivered = recorded[index]
        seen.check_random_state()
    return seen


def explain(traces: Sequence[Trace], usual: Sequence[Leaf]) -> CallingFinisher:
    """Find the finisher that reproduces all traces, the records of several items of one dataset.

    Where parts of an item are equal, the paths `usual` are preferred: those of image and target.

    Raises:
        SourceError: no finisher reproduces all traces, two different ones do, or a trace is incomplete
            (`Trace.problem`). The message says what was seen.
    """
    for seen in traces:
        if seen.problem:
            raise SourceError(seen.problem)
    problem: SourceError | None = None
    for seen in traces:
        try:
            finisher, other = (_Explanation(seen, usual, plain_first).finisher() for plain_first in (False, True))
        except SourceError as error:
            problem = error
            continue
        if not all(_agrees(finisher, one) for one in traces):
            continue
        if other != finisher and all(_agrees(other, one) for one in traces):
            raise SourceError(
                f"in {len(traces)} items, each under another seed, its transform changed nothing, and what it delivers is a "
                "copy, which may be of what the transform is given or of what it gives"
            )
        return finisher
    raise problem or SourceError("its items do not all go the same way through its transforms")


def _agrees(finisher: CallingFinisher, seen: Trace) -> bool:
    """Whether a finisher reproduces a trace, when each transform returns its recorded result."""
    if [call.place for call in finisher.calls] != [call.place for call in seen.calls]:
        return False
    known = [seen.plain]
    try:
        for call, was in zip(finisher.calls, seen.calls, strict=True):
            if not same(_build(call.given, known), was.given):
                return False
            known.append(was.result)
        return same(_build(finisher.item, known), seen.delivered)
    except (LookupError, TypeError, AttributeError, ValueError):
        return False  # This item has no part at a path that the finisher reads.


def same(one: Any, other: Any) -> bool:
    """Whether two values, and all their parts, are equal in type and content.

    Example:
        >>> same([1, "a"], [1, "a"]), same([1], [True])
        (True, False)
    """
    if type(one) is not type(other):
        return False
    if isinstance(one, _SCALARS):
        return bool(one == other) or (one != one and other != other)  # Two NaN count as equal.
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if is_dataclass(one):
        pairs = dict(children(one)), dict(children(other))
        return same(*pairs)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor | np.ndarray) and (one.shape != other.shape or one.dtype != other.dtype):
        return False
    if isinstance(one, Tensor) and type(one) is not Tensor and not same(vars(one), vars(other)):
        return False
    if isinstance(one, Image.Image):
        alike = (one.size, one.mode) == (other.size, other.mode) and one.tobytes() == other.tobytes()
        return alike and (one.mode not in ("P", "PA") or one.getpalette("RGBA") == other.getpalette("RGBA"))
    return digest_of(one) == digest_of(other)


class _Explanation:
    """Finds where the values of one trace come from; paths in `usual` are preferred where several parts are equal.

    With `plain_first`, a delivered copy that equals both the argument and the result of a transform is attributed to
    the plain item rather than to the result.
    """

    def __init__(self, seen: Trace, usual: Sequence[Leaf], plain_first: bool) -> None:
        self._seen = seen
        self._plain_first = plain_first
        # The parts at the usual paths come first, the others in their order in the item.
        self._plain = sorted(
            parts(seen.plain), key=lambda part: usual.index(part[0]) if part[0] in usual else len(usual)
        )
        self._touched: list[Leaf] = []

    def finisher(self) -> CallingFinisher:
        calls = []
        for number, call in enumerate(self._seen.calls):
            values, named = call.given
            given = tuple(self._argument(value, number) for value in values)
            by_name = tuple(self._argument(value, number) for value in named.values())
            in_order, named_ones = Built(tuple, tuple(range(len(given))), given), Built(dict, tuple(named), by_name)
            arguments = Built(tuple, (0, 1), (in_order, named_ones))
            calls.append(Call(call.place, call.transform, arguments))
        return CallingFinisher(tuple(calls), self._delivered(self._seen.delivered, ()))

    def _argument(self, value: Any, number: int) -> Any:
        """Find where an argument of a call that follows `number` others comes from; SourceError if that is not known."""
        found = self._live_result(value, number)
        if found is None and isinstance(value, _SCALARS):
            found = self._result_like(value, number)
        found = found or self._plain_like(value) or self._result_like(value, number)
        if found is not None:
            if found.call == 0:
                self._touched.append(found.leaf)
            return found
        built = _container(value, lambda part, _: self._argument(part, number))
        if built is not None:
            return built
        if isinstance(value, _SCALARS):
            return Fixed(value)
        raise SourceError(f"its transform is given a {outline(value)} that is no part of the item without transforms")

    def _delivered(self, value: Any, place: Leaf) -> Any:
        """Find where the part of the delivered item at the path `place` comes from; SourceError if that is not known."""
        number = len(self._seen.calls)
        found: Any = self._live_result(value, number)
        if found is None:
            touched = any(leaf[: len(place)] == place or place[: len(leaf)] == leaf for leaf in self._touched)
            kept: Any = None
            if not (touched and _is_container(value)):
                same_place = (Taken(0, leaf) for leaf, part in self._plain if leaf == place and same(part, value))
                kept = next(same_place, None)
            given = self._result_like(value, number)
            original = any(part is value for call in self._seen.calls for _, part in parts(call.live_given))
            # While a transform changes nothing, a delivered copy may be a copy of its argument or of its result. Numbers
            # and strings cannot be distinguished by object identity, so the result of a transform is preferred.
            first = touched and (isinstance(value, _SCALARS) or not (original or self._plain_first))
            found = (given or kept) if first else (kept or given)
        if found is None:
            found = _container(value, lambda part, key: self._delivered(part, (*place, key)))
        found = found or self._plain_like(value, place)
        if found is None:
            where = "".join(f"[{key!r}]" for key in place) or "all of it"
            raise SourceError(
                f"what it delivers ({where}: {outline(value)}) is neither a part of the item without transforms nor of what a "
                "transform gives"
            )
        return found

    def _live_result(self, value: Any, before: int) -> Taken | None:
        """The part of a result of the first `before` calls that is this object, unchanged; latest call first."""
        if isinstance(value, _SCALARS):
            return None
        for number in range(before, 0, -1):
            call = self._seen.calls[number - 1]
            for leaf, part in parts(call.live_result):
                if part is value and same(at(call.result, leaf), value):
                    return Taken(number, leaf)
        return None

    def _result_like(self, value: Any, before: int) -> Taken | None:
        """The part of a result of the first `before` calls that is equal to the value; latest call first."""
        for number in range(before, 0, -1):
            for leaf, part in parts(self._seen.calls[number - 1].result):
                if same(part, value):
                    return Taken(number, leaf)
        return None

    def _plain_like(self, value: Any, place: Leaf | None = None) -> Taken | None:
        """The part of the plain item that equals the value, if need be after conversion; that at `place` is preferred."""
        candidates = sorted(self._plain, key=lambda part: part[0] != place)
        for leaf, part in candidates:
            if same(part, value):
                return Taken(0, leaf)
        # Datasets often convert images to these types for a transform; see `Taken.kind`.
        kind = "array" if type(value) is np.ndarray else tv_tensor(value)
        for leaf, part in candidates:
            if kind and isinstance(part, Image.Image | Tensor | np.ndarray) and same(_made(part, kind), value):
                return Taken(0, leaf, kind)
        return None


def _is_container(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple) or is_dataclass(value)


def _container(value: Any, place: Callable[[Any, Any], Any]) -> Built | None:
    """Describe how a container is built, or return None for other values and for sequences of more than 64 values.

    `place` is a function of a part and its key that returns where the part comes from.
    """
    if not _is_container(value) or (isinstance(value, list | tuple) and len(value) > _MAX_LENGTH):
        return None
    found = list(children(value))
    keys, built = tuple(key for key, _ in found), tuple(place(part, key) for key, part in found)
    return Built(type(value), keys, built, value.default_factory if isinstance(value, defaultdict) else None)


def _build(template: Any, known: Sequence[Any]) -> Any:
    if isinstance(template, Taken):
        return _made(at(known[template.call], template.leaf), template.kind)
    if isinstance(template, Fixed):
        return template.value
    built = [_build(part, known) for part in template.parts]
    kind: Any = template.kind
    named = dict(zip(template.keys, built, strict=True))
    if issubclass(kind, defaultdict):
        return kind(template.default, named)
    if issubclass(kind, Mapping):
        return named if kind is dict else kind(named)
    if hasattr(kind, "__dataclass_fields__"):
        return kind(**named)
    return kind(*built) if hasattr(kind, "_fields") else kind(built)


def _made(value: Any, kind: str) -> Any:
    if kind == "array":
        return np.array(value)
    if kind:
        from torchvision import tv_tensors

        return getattr(tv_tensors, kind)(value)
    return value
