"""How a dataset calls its transforms, seen by standing in their place while it delivers a few items.

`trace` puts a recorder in the place of each transform and reads an item: what every call was given, what it gave, and what
was delivered. `explain` finds where each of these comes from: a part of the plain item, or of an earlier call's result. That
is a `CallingFinisher`, which makes of any plain item what the dataset would deliver. No random number enters, so transforms
that seldom fire and those with a generator of their own are seen like any other. It is believed only if it explains every
trace: the same calls in the same order, each given what it would give, and the whole item, type by type.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dq_lightning.core.errors import SourceError
from dq_lightning.core.isolation import isolated_random_state
from dq_lightning.identity.values import digest_of
from dq_lightning.sources.items import Leaf, at, children, is_dataclass, outline, tv_tensor
from dq_lightning.sources.streams import generators_in, random_states
from dq_lightning.sources.strip import replaced, with_attributes

# items that are looked at, each under a seed of its own
TRACED_SAMPLES = 8
_SCALARS = (type(None), bool, int, float, str)
_LONGEST = 64


@dataclass(frozen=True)
class Taken:
    """A part of the plain item or of a call's result.

    Attributes:
        call: number of the call, from 1; 0 is the plain item.
        leaf: where in it.
        kind: what the part is made into first: "array" (of numpy), or the name of a class of torchvision's tv_tensors.
    """

    call: int
    leaf: Leaf
    kind: str = ""


@dataclass(frozen=True)
class Built:
    """A container that the dataset puts together.

    Attributes:
        kind: its class.
        keys: of its parts.
        parts: where they come from.
        default: of a `defaultdict`.
    """

    kind: type
    keys: tuple[Any, ...]
    parts: tuple[Any, ...]
    default: Any = None


@dataclass(frozen=True)
class Fixed:
    """A setting that a call is given in every item."""

    value: Any


@dataclass(frozen=True)
class Call:
    """One call of a transform.

    Attributes:
        place: attribute of the dataset, and keys in it, that hold the transform.
        transform: what is called.
        given: where its positional arguments come from, and its named ones: a `Built` tuple of a tuple and a dict.
    """

    place: tuple[Any, ...]
    transform: Callable[..., Any]
    given: Any


@dataclass(frozen=True)
class CallingFinisher:
    """Calls transforms as the dataset does.

    Attributes:
        calls: in their order.
        item: where the parts of the delivered item come from.
    """

    calls: tuple[Call, ...]
    item: Any

    def __call__(self, position: int, plain_item: Any) -> Any:
        known = [plain_item]
        for call in self.calls:
            values, named = _build(call.given, known)
            known.append(call.transform(*values, **named))
        return _build(self.item, known)


@dataclass
class SeenCall:
    """What a recorder saw of one call.

    Attributes:
        place: as in `Call`.
        transform: likewise.
        given: its arguments, positional and named, copied before it worked on them.
        result: what it gave, copied likewise.
        live_given: the arguments themselves, by which they are found again.
        live_result: what the dataset was given: a copy, so that it is another object than the argument even where the
            transform gives its argument back.
    """

    place: tuple[Any, ...]
    transform: Callable[..., Any]
    given: tuple[tuple[Any, ...], dict[str, Any]]
    live_given: Any
    result: Any = None
    live_result: Any = None


@dataclass
class Trace:
    """What was seen while one item was read.

    Attributes:
        plain: the same item without transforms, as a packed store gives it.
        delivered: the item.
        calls: of transforms.
        streams: gives the states of all generators of random numbers.
        doubt: why what was seen does not show all that the dataset does with its transforms; empty when there is no reason.
    """

    plain: Any
    streams: Callable[[], str] = str
    delivered: Any = None
    calls: list[SeenCall] = field(default_factory=list)
    doubt: str = ""
    _mark: str = ""

    def leave(self) -> None:
        """A transform was left, or reading begins."""
        self._mark = self.streams()

    def enter(self) -> None:
        """A transform is entered, or reading ends."""
        if self._mark != self.streams():
            self.doubt = self.doubt or (
                "it draws random numbers or sets a seed beside its transforms (to change image and mask alike, call one joint "
                "transform with both: torchvision's v2, albumentations)"
            )

    def copied(self, value: Any) -> Any:
        """A copy, since a transform may work in place, and so may the dataset afterwards."""
        try:
            return copy.deepcopy(value)
        except Exception as error:
            self.doubt = (
                self.doubt or f"what its transform is given or gives can't be copied ({type(error).__name__}: {error})"
            )
            return value


class _Recorder:
    """Stands in the place of a transform: calls it, and keeps what it was given and what it gave."""

    def __init__(self, transform: Any, place: tuple[Any, ...], trace: Trace) -> None:
        self._recorded = transform, place, trace

    def __call__(self, *values: Any, **named: Any) -> Any:
        transform, place, trace = self._recorded
        trace.enter()
        seen = SeenCall(place, transform, trace.copied((values, named)), (values, named))
        result = transform(*values, **named)
        seen.result, seen.live_result = trace.copied(result), trace.copied(result)
        trace.calls.append(seen)
        trace.leave()
        return seen.live_result

    def __getattr__(self, name: str) -> Any:
        transform, _, trace = self._recorded
        value = getattr(transform, name)
        if callable(value) and not name.startswith("__"):
            trace.doubt = trace.doubt or f"it does more with its transform than to call it: .{name}"
        return value

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # classes that look at the type of their transform must do what they do without the recorder
        return type(self._recorded[0])


def trace(dataset: Any, used: dict[str, Any], index: int, plain: Any, seed: int) -> Trace:
    """Read one item with recorders in the place of its transforms.

    Args:
        dataset: with its transforms.
        used: those, by attribute.
        index: of the item.
        plain: the same item without transforms.
        seed: of the global random state while it is read.
    """
    found = generators_in(vars(dataset))
    seen = Trace(plain, lambda: random_states(found))
    recorders = {
        name: replaced(value, lambda one, place: _Recorder(one, place, seen), (name,)) for name, value in used.items()
    }
    with isolated_random_state(seed):
        seen.leave()
        seen.delivered = with_attributes(dataset, recorders)[index]
        seen.enter()
    return seen


@dataclass(frozen=True)
class InTurn:
    """Two finishers, one after the other."""

    first: Any
    second: Any

    def __call__(self, position: int, plain_item: Any) -> Any:
        return self.second(position, self.first(position, plain_item))


def explain(traces: Sequence[Trace], usual: Sequence[Leaf]) -> CallingFinisher:
    """The finisher that all traces agree with.

    Args:
        traces: of items.
        usual: leaves that are preferred where parts of the items are equal: those of image and target.

    Raises:
        SourceError: there is none; the message says what was seen.
    """
    for seen in traces:
        if seen.doubt:
            raise SourceError(seen.doubt)
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
    """Whether a finisher does what was seen, each transform giving what it gave then."""
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
        return False  # this item has no such part


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal in type and content, and so are all their parts."""
    if type(one) is not type(other):
        return False
    if isinstance(one, _SCALARS):
        return bool(one == other) or (one != one and other != other)  # NaN
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
    """Where the values of one trace come from."""

    def __init__(self, seen: Trace, usual: Sequence[Leaf], plain_first: bool) -> None:
        self._seen = seen
        self._plain_first = plain_first
        # the usual parts first, else in order
        self._plain = sorted(
            _parts(seen.plain), key=lambda part: usual.index(part[0]) if part[0] in usual else len(usual)
        )
        self._touched: list[Leaf] = []

    def finisher(self) -> CallingFinisher:
        calls = []
        for number, call in enumerate(self._seen.calls):
            values, named = call.given
            given = tuple(self._argument(value, number) for value in values)
            by_name = tuple(self._argument(value, number) for value in named.values())
            arguments = Built(tuple, (0, 1), (_tuple_of(given), Built(dict, tuple(named), by_name)))
            calls.append(Call(call.place, call.transform, arguments))
        return CallingFinisher(tuple(calls), self._delivered(self._seen.delivered, ()))

    def _argument(self, value: Any, number: int) -> Any:
        """Where an argument of a call comes from."""
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
        """Where a part of the delivered item comes from."""
        number = len(self._seen.calls)
        found: Any = self._live_result(value, number)
        if found is None:
            touched = any(leaf[: len(place)] == place or place[: len(leaf)] == leaf for leaf in self._touched)
            kept = None if touched and _is_container(value) else self._plain_at(value, place)
            given = self._result_like(value, number)
            original = any(part is value for call in self._seen.calls for _, part in _parts(call.live_given))
            # a copy may be one of what a transform was given or of what it gave, until the two differ
            first = touched and not (original and not isinstance(value, _SCALARS)) and not self._prefers_plain(value)
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

    def _prefers_plain(self, value: Any) -> bool:
        # numbers and texts are not told apart by what object they are: what a transform gave counts
        return self._plain_first and not isinstance(value, _SCALARS)

    def _live_result(self, value: Any, before: int) -> Taken | None:
        """The part of a result that is this very object, and was not changed since; of the latest call."""
        if isinstance(value, _SCALARS):
            return None
        for number in range(before, 0, -1):
            call = self._seen.calls[number - 1]
            for leaf, part in _parts(call.live_result):
                if part is value and same(at(call.result, leaf), value):
                    return Taken(number, leaf)
        return None

    def _result_like(self, value: Any, before: int) -> Taken | None:
        """A part of a result of the calls so far that is equal."""
        for number in range(before, 0, -1):
            for leaf, part in _parts(self._seen.calls[number - 1].result):
                if same(part, value):
                    return Taken(number, leaf)
        return None

    def _plain_at(self, value: Any, place: Leaf) -> Taken | None:
        return next((Taken(0, leaf) for leaf, part in self._plain if leaf == place and same(part, value)), None)

    def _plain_like(self, value: Any, place: Leaf | None = None) -> Taken | None:
        """A part of the plain item that is equal, or becomes so in a usual way; the one at the same place first."""
        parts = sorted(self._plain, key=lambda part: part[0] != place)
        for leaf, part in parts:
            if same(part, value):
                return Taken(0, leaf)
        kind = _kind_of(value)
        for leaf, part in parts:
            if kind and isinstance(part, Image.Image | Tensor | np.ndarray) and same(_made(part, kind), value):
                return Taken(0, leaf, kind)
        return None


def _parts(value: Any, place: Leaf = ()) -> Iterator[tuple[Leaf, Any]]:
    yield place, value
    for key, part in children(value):
        yield from _parts(part, (*place, key))


def _is_container(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple) or is_dataclass(value)


def _tuple_of(parts: tuple[Any, ...]) -> Built:
    return Built(tuple, tuple(range(len(parts))), parts)


def _container(value: Any, place: Callable[[Any, Any], Any]) -> Built | None:
    """How a container is put together, `place` saying where each part comes from."""
    if not _is_container(value) or (isinstance(value, list | tuple) and len(value) > _LONGEST):
        return None
    found = list(children(value))
    keys, parts = tuple(key for key, _ in found), tuple(place(part, key) for key, part in found)
    return Built(type(value), keys, parts, value.default_factory if isinstance(value, defaultdict) else None)


def _build(template: Any, known: Sequence[Any]) -> Any:
    if isinstance(template, Taken):
        return _made(at(known[template.call], template.leaf), template.kind)
    if isinstance(template, Fixed):
        return template.value
    parts = [_build(part, known) for part in template.parts]
    kind: Any = template.kind
    named = dict(zip(template.keys, parts, strict=True))
    if issubclass(kind, defaultdict):
        return kind(template.default, named)
    if issubclass(kind, Mapping):
        return named if kind is dict else kind(named)
    if hasattr(kind, "__dataclass_fields__"):
        return kind(**named)
    return kind(*parts) if hasattr(kind, "_fields") else kind(parts)


def _kind_of(value: Any) -> str:
    """Into what images are usually made for a transform, if the value is such."""
    return "array" if type(value) is np.ndarray else tv_tensor(value)


def _made(value: Any, kind: str) -> Any:
    if kind == "array":
        return np.array(value)
    if kind:
        from torchvision import tv_tensors

        return getattr(tv_tensors, kind)(value)
    return value
