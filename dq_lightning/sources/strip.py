"""Makes copies of a dataset without the user's transforms or with others. The user's object is not changed."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import Dataset

from dq_lightning.core.errors import SourceError
from dq_lightning.core.isolation import isolated_random_state
from dq_lightning.sources.finish import TransformFinisher

TRANSFORM_NAMES = ("transform", "target_transform", "transforms")
KEEP = "keep"


def own_transforms(dataset: Any) -> dict[str, Any]:
    """The transform attributes of the dataset, by name: its own, and objects that are attributes of its class.

    Methods and properties of the class are part of how it reads an item.
    """
    state = getattr(dataset, "__dict__", {})
    found = {name: state[name] for name in TRANSFORM_NAMES if name in state}
    for name in TRANSFORM_NAMES:
        shared = inspect.getattr_static(type(dataset), name, None)
        if name not in state and isinstance(state, dict) and callable(shared) and not hasattr(type(shared), "__get__"):
            found[name] = shared
    return found


def with_attributes(dataset: Any, changes: dict[str, Any]) -> Any:
    """A shallow copy with the attributes in `changes` replaced. The data are shared; `dataset` is not changed."""
    new = object.__new__(type(dataset))
    # `copy.copy` is not used, because a class may define pickling that rebuilds the dataset or drops attributes.
    new.__dict__.update(dataset.__dict__)
    new.__dict__.update(changes)
    return new


def neutral(*values: Any, **named: Any) -> Any:
    """A transform that returns its arguments, for classes that call their transform without checking for None.

    It can be called as `f(image)`, as a joint transform `f(image, mask)`, and in the way of albumentations as
    `f(image=image, mask=mask)`, which returns a dict.

    Raises:
        TypeError: it is called with positional and named arguments together.
    """
    if values and named:
        raise TypeError("positional and named arguments together")
    if named:
        return named
    return values if len(values) != 1 else values[0]


def replaced(transform: Any, by: Callable[[Any, tuple[Any, ...]], Any], place: tuple[Any, ...] = ()) -> Any:
    """Replace a transform, or each transform in a dict, list or tuple, by another callable.

    `by` is a function of a transform and the keys that lead to it that returns the callable to put in its place.
    """
    if isinstance(transform, Mapping) and not callable(transform):
        return {key: replaced(value, by, (*place, key)) for key, value in transform.items()}
    if isinstance(transform, list | tuple) and not callable(transform):
        return type(transform)(replaced(value, by, (*place, at)) for at, value in enumerate(transform))
    return None if transform is None else by(transform, place)


def copy_of_attributes(dataset: Any) -> Any | None:
    """A shallow copy that keeps the dataset's present attributes; None for classes with `__slots__` or no dict."""
    if not hasattr(dataset, "__dict__") or any(vars(owner).get("__slots__") for owner in type(dataset).__mro__):
        return None
    try:
        return with_attributes(dataset, {})
    except TypeError:
        return None


def without_transforms(dataset: Any) -> Any:
    """A copy of the dataset whose transform attributes are None, or `neutral` where the class calls them regardless.

    A dataset without transforms is returned itself.

    Raises:
        SourceError: the class calls its transforms in a way that `neutral` does not support.
    """
    present = own_transforms(dataset)
    if not any(value is not None for value in present.values()):
        return dataset
    plain = with_attributes(dataset, dict.fromkeys(present))
    try:
        plain[0]
    except (TypeError, AttributeError) as error:
        if "NoneType" in str(error):
            kept = {name: replaced(value, lambda *_: neutral) for name, value in present.items() if value is not None}
            plain = with_attributes(plain, kept)
            _check_readable(plain, dataset, ", ".join(f"`{name}`" for name in kept))
    except Exception:
        pass  # An unreadable item is reported with its index when it is read.
    return plain


def _check_readable(plain: Any, dataset: Any, names: str) -> None:
    """Raise a SourceError if the first item of the dataset can be read with its transforms only."""
    try:
        plain[0]
        return
    except Exception as error:
        problem = error
    try:
        with isolated_random_state():
            dataset[0]
    except Exception:
        return  # An unreadable item is reported with its index when it is read.
    raise SourceError(
        f"{type(dataset).__name__} can't be read without its {names}, which features are made without: its __getitem__ calls "
        f"it even when it is None, and in a way that is not known ({type(problem).__name__}: {problem}). Known are f(image), "
        'f(image, mask) and f(image=image, mask=mask)["image"]. Either call it in one of these ways, or only '
        f"`if self.transform is not None`, so that plain items can be read"
    ) from problem


def with_transforms(dataset: Any, plain: Any, transform: Any, target_transform: Any, finisher: Any) -> Any:
    """The dataset that items are delivered from: the given one, or a copy with the transforms that were passed.

    `plain` is the same dataset without transforms. A transform `"keep"` keeps the dataset's own, None removes it.
    `finisher` makes a `TransformFinisher` of both, for datasets without attributes for transforms.
    """
    if transform == KEEP and target_transform == KEEP:
        return dataset
    present = own_transforms(dataset)
    chosen = {
        "transform": present.get("transform") if transform == KEEP else transform,
        "target_transform": present.get("target_transform") if target_transform == KEEP else target_transform,
    }
    if not set(chosen) <= set(present) and "transforms" not in present:
        return Transformed(plain, finisher(chosen["transform"], chosen["target_transform"]))
    changes = {name: value for name, value in chosen.items() if name in present}
    if "transforms" in present:
        from torchvision.datasets.vision import StandardTransform

        some = any(value is not None for value in chosen.values())
        changes["transforms"] = StandardTransform(**chosen) if some else None
    without = own_transforms(plain)
    return with_attributes(plain, {n: without.get(n) if v is None else v for n, v in changes.items()})


class Transformed(Dataset[Any]):
    """A dataset that applies transforms to the image and target of another dataset, which has no place for them."""

    def __init__(self, dataset: Any, finisher: TransformFinisher) -> None:
        self.dataset = dataset
        self.finisher = finisher

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.finisher(index, self.dataset[index])
