"""What loader processes see of the user's dataset: the dataset itself, and in its present state."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch.utils.data import DataLoader, get_worker_info

# A list, tuple or dict that is longer holds samples rather than transforms, and is compared as one object.
_MOST_VALUES = 64
_MOST_COMPARED = 10_000
_COMPARED_BY_VALUE = (bool, int, float, complex, str, bytes)
_NOT_LOOKED_INTO = (*_COMPARED_BY_VALUE, type, ModuleType)


class OnOwnDataset:
    """A `worker_init_fn` that lets the user's own see the user's dataset as `get_worker_info().dataset`.

    The dataset of a loader of the compact set is a `KeptSamples` of the user's. What the user's function sets there, such as
    a random generator for each process, might have no effect.

    Args:
        own: the user's `worker_init_fn`.
    """

    def __init__(self, own: Callable[[int], Any]) -> None:
        self.own = own

    def __call__(self, worker: int) -> Any:
        info: Any = get_worker_info()
        # The record forbids assignments once a process has started.
        object.__setattr__(info, "dataset", info.dataset.whole)
        return self.own(worker)


class CurrentLoader(DataLoader[Any]):
    """A DataLoader that keeps its processes between epochs, and starts new ones when the dataset was changed.

    A process holds the dataset as it was when the process started. What a callback sets later on the dataset or on its
    transforms (`dataset.epoch = 3`), or on the collate function, would never reach processes that are kept. Attributes are
    compared at the beginning of each epoch; what an array, a table or a long list holds is not.
    """

    def __iter__(self) -> Any:
        before = self.__dict__.get("_known")
        self._known = attributes_below(self.dataset, self.collate_fn)
        if before is not None and not _all_same(before, self._known):
            self._iterator = None
        return super().__iter__()


def attributes_below(*values: Any) -> list[Any]:
    """Return objects, the values of all their attributes, and what is in these, in a fixed order.

    An object is looked into if it has a `__dict__`, and a list, tuple or dict if it is short. What is nearest comes first,
    and at most 10,000 values are returned.
    """
    found, seen = list(values), set()
    for one in found:
        if isinstance(one, _NOT_LOOKED_INTO) or id(one) in seen:
            continue
        seen.add(id(one))  # `found` holds the object, so no other one gets its id.
        if isinstance(one, list | tuple | dict):
            held: Any = one if len(one) <= _MOST_VALUES else ()
        else:
            held = getattr(one, "__dict__", ())
        found.extend([*held, *held.values()] if isinstance(held, dict) else held)
        if len(found) >= _MOST_COMPARED:
            return found[:_MOST_COMPARED]
    return found


def _all_same(before: list[Any], after: list[Any]) -> bool:
    return len(before) == len(after) and all(map(_same, before, after))


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    return type(one) is type(other) and isinstance(one, _COMPARED_BY_VALUE) and bool(one == other)
