"""Take the user's transforms off a dataset, and put the same or others on, without touching the user's object."""

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import Dataset

from dq_lightning.core.errors import SourceError
from dq_lightning.core.isolation import isolated_random_state
from dq_lightning.sources.finish import TransformFinisher

TRANSFORM_NAMES = ("transform", "target_transform", "transforms")
KEEP = "keep"


def own_transforms(dataset: Any) -> dict[str, Any]:
    """The transform attributes that the object itself holds."""
    state = getattr(dataset, "__dict__", {})
    return {name: state[name] for name in TRANSFORM_NAMES if name in state}


def with_attributes(dataset: Any, changes: dict[str, Any]) -> Any:
    """A shallow copy with other attributes: the data stay shared, the given object stays as it was."""
    new = object.__new__(type(dataset))
    # not copy.copy: classes may define pickling that rebuilds the dataset, or drops attributes
    new.__dict__.update(dataset.__dict__)
    new.__dict__.update(changes)
    return new


def neutral(*values: Any, **named: Any) -> Any:
    """What stands where a class calls its transform even when there is none: gives back what it is called with.

    The ways to call it are `f(image)`, joint `f(image, mask)` and, as albumentations wants it, `f(image=image, mask=mask)`.
    """
    if values and named:
        raise TypeError("positional and named arguments together")
    if named:
        return named
    return values if len(values) != 1 else values[0]


def replaced(transform: Any, by: Callable[[Any, tuple[Any, ...]], Any], place: tuple[Any, ...] = ()) -> Any:
    """A transform, or a dict, list or tuple of transforms, with another callable in place of each.

    Args:
        transform: as the dataset holds it.
        by: called with a transform and its keys in the container.
        place: keys on the way to the transform.
    """
    if isinstance(transform, Mapping) and not callable(transform):
        return {key: replaced(value, by, (*place, key)) for key, value in transform.items()}
    if isinstance(transform, list | tuple) and not callable(transform):
        return type(transform)(replaced(value, by, (*place, at)) for at, value in enumerate(transform))
    return None if transform is None else by(transform, place)


def copy_of_attributes(dataset: Any) -> Any | None:
    """A shallow copy that keeps what the dataset holds now; None for a class whose objects are more than their attributes."""
    if not hasattr(dataset, "__dict__") or any(vars(owner).get("__slots__") for owner in type(dataset).__mro__):
        return None
    try:
        return with_attributes(dataset, {})
    except TypeError:
        return None


def without_transforms(dataset: Any) -> Any:
    """The dataset with every transform attribute None, or with neutral ones where the class calls them regardless.

    Raises:
        SourceError: the class uses its transforms in a way that neutral ones cannot stand in for.
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
        pass  # an unreadable item is reported with its index when it is read
    return plain


def _check_readable(plain: Any, dataset: Any, names: str) -> None:
    """Tell a transform that is called in an unknown way from an item that cannot be read."""
    try:
        plain[0]
        return
    except Exception as error:
        problem = error
    try:
        with isolated_random_state():
            dataset[0]
    except Exception:
        return  # reported with its index when it is read
    raise SourceError(
        f"{type(dataset).__name__} can't be read without its {names}, which features are made without: its __getitem__ calls "
        f"it even when it is None, and in a way that is not known ({type(problem).__name__}: {problem}). Known are f(image), "
        'f(image, mask) and f(image=image, mask=mask)["image"]. Either call it in one of these ways, or only '
        f"`if self.transform is not None`, so that plain items can be read"
    ) from problem


def with_transforms(dataset: Any, plain: Any, transform: Any, target_transform: Any, finisher: Any) -> Any:
    """What is delivered from: the dataset itself, or one with the transforms that were passed in place of its own.

    Args:
        dataset: the user's.
        plain: the same without transforms.
        transform: of the image; `"keep"` for the dataset's own, None for none.
        target_transform: likewise of the target.
        finisher: makes `TransformFinisher` arguments where the dataset has no place for transforms.
    """
    if transform == KEEP and target_transform == KEEP:
        return dataset
    present = own_transforms(dataset)
    if not present:
        return Transformed(plain, finisher(_given(transform), _given(target_transform)))
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


def _given(value: Any) -> Any:
    return None if value == KEEP else value


class Transformed(Dataset[Any]):
    """A dataset without transforms of its own, with transforms on its image and target."""

    def __init__(self, dataset: Any, finisher: TransformFinisher) -> None:
        self.dataset = dataset
        self.finisher = finisher

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.finisher(index, self.dataset[index])
