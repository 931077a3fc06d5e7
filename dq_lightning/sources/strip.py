"""Take the user's transforms off a dataset, and put the same or others on, without touching the user's object."""

from typing import Any

from torch.utils.data import Dataset

from dq_lightning.sources.finish import TransformFinisher, identity, pair_identity

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


def without_transforms(dataset: Any) -> Any:
    """The dataset with every transform attribute None, or the identity where the class calls it regardless."""
    present = own_transforms(dataset)
    if not any(value is not None for value in present.values()):
        return dataset
    plain = with_attributes(dataset, dict.fromkeys(present))
    try:
        plain[0]
    except TypeError as error:
        if "NoneType" in str(error):
            neutral = {"transform": identity, "target_transform": identity, "transforms": pair_identity}
            kept = {name: neutral[name] for name, value in present.items() if value is not None}
            return with_attributes(plain, kept)
    except Exception:
        pass  # an unreadable item is reported with its index when it is read
    return plain


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
    neutral = own_transforms(plain)
    return with_attributes(plain, {n: neutral.get(n) if v is None else v for n, v in changes.items()})


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
