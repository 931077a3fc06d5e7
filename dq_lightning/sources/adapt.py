"""The one place that decides which adapter fits a dataset."""

import copy
import hashlib
from typing import Any, cast

from torch.utils.data import ConcatDataset, Subset

from dq_lightning.errors import ConfigError, SourceError
from dq_lightning.sources.base import Source, dataset_length
from dq_lightning.sources.files import FileSource, file_list
from dq_lightning.sources.hub import HubSource, hub_kind
from dq_lightning.sources.mapped import ArraySource, MapSource, arrays_of, getter_module
from dq_lightning.sources.nested import ConcatSource, SubsetSource, filled_parts
from dq_lightning.sources.reading import ItemSource
from dq_lightning.sources.strip import KEEP
from dq_lightning.sources.targets import given_labels


def as_source(
    dataset: Any,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    labels: Any = None,
    transform: Any = KEEP,
    target_transform: Any = KEEP,
) -> Source:
    """See any dataset through the source protocol. The given object is never changed.

    Args:
        dataset: a torchvision dataset, `Subset`, `ConcatDataset`, any object with `__getitem__` and `__len__`, a Hugging Face
            `Dataset`, or a `DatasetDict` with a split named `train`. A source is returned as it is, or with another grouping.
        image_column: column, key or position of the image; found when None.
        label_column: the same for the class.
        labels: grouping in place of the dataset's own classes: N whole numbers or strings, a column's name, or False for
            none. The delivered targets stay as they are.
        transform: in place of the dataset's own: None removes it, `"keep"` keeps it. For Hugging Face a function of a
            batch, as for `set_transform`.
        target_transform: likewise.

    Raises:
        SourceError: the dataset is empty, a stream, or without a split, image or column that can be told apart.
        ConfigError: an option is given for a source, which was made with its own.
    """
    if isinstance(labels, str):
        label_column, labels = labels, None
    if isinstance(dataset, ItemSource | Source):
        columns = {"image_column": image_column, "label_column": label_column}
        _check_ready(dataset, columns, {"transform": transform, "target_transform": target_transform})
    if not isinstance(dataset, ItemSource) and isinstance(dataset, Source):
        if labels is not None:
            raise ConfigError(
                f"labels= was given for a {type(dataset).__name__}, which is a source with a grouping of its own: let its "
                "labels() give these classes"
            )
        return dataset
    options = (image_column, label_column, transform, target_transform)
    source = dataset if isinstance(dataset, ItemSource) else _adapt(dataset, *options)
    if labels is not None and labels is not False:
        given_labels(labels, len(source))  # a wrong length is told now, not after the features
    if labels is not None:
        source = copy.copy(source)  # a source that was passed in keeps its own grouping
        source.grouping = labels
    return cast(Source, source)


def grouping_id(source: Source) -> str | None:
    """Names the grouping that a source was given in place of its dataset's own; None when it has its own.

    Costs a pass over the given classes at most: nothing of the dataset is read.
    """
    grouping, column = getattr(source, "grouping", None), getattr(source, "label_column", None)
    if grouping is False:
        return "none"
    if grouping is not None:
        given = given_labels(grouping, len(source))
        digest = hashlib.sha256(given.values.numpy().tobytes())
        digest.update(repr(given.names).encode() if given.names is not None else b"")
        return digest.hexdigest()
    # the column's values belong to the source's own identity: its name is enough
    return None if column is None else f"column:{column}"


def _check_ready(source: Any, columns: dict[str, str | None], transforms: dict[str, Any]) -> None:
    late = [name for name, value in columns.items() if value not in (None, getattr(source, name, None))]
    late += [name for name, value in transforms.items() if not isinstance(value, str) or value != KEEP]
    if late:
        named = ", ".join(f"{name}=" for name in late)
        raise ConfigError(
            f"{named} was given for a source that is made already ({source.describe()}): pass it to as_source together "
            "with the dataset, or pass the dataset itself"
        )


def _adapt(dataset: Any, *options: Any) -> ItemSource:
    kind = hub_kind(dataset)
    if kind == "DatasetDict":
        if "train" not in dataset:
            splits = ", ".join(map(repr, dataset))
            raise SourceError(
                f"The DatasetDict has no 'train' split but {splits or 'none'}: pass one split, dataset[name]"
            )
        return _adapt(dataset["train"], *options)
    if kind in ("IterableDataset", "IterableDatasetDict"):
        raise SourceError(
            f"A Hugging Face {kind} is a stream, but every sample must be compared with every other: load it with "
            "streaming=False, or collect it with datasets.Dataset.from_generator."
        )
    if kind == "Dataset":
        return HubSource(dataset, *options)
    dataset_length(dataset)
    # subclasses that read items in their own way are datasets like any other
    by_torch = getter_module(dataset) == "torch.utils.data.dataset"
    if isinstance(dataset, Subset) and by_torch:
        return SubsetSource(dataset, _adapt(dataset.dataset, *options))
    if isinstance(dataset, ConcatDataset) and by_torch:
        return ConcatSource(dataset, [_adapt(part, *options) for part in filled_parts(dataset)])
    if arrays_of(dataset) is not None:
        return ArraySource(dataset, *options)
    return FileSource(dataset, *options) if file_list(dataset) is not None else MapSource(dataset, *options)
