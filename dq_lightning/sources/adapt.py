"""Chooses the adapter that presents a given dataset as a `Source`. No other module makes this choice."""

import copy
from pathlib import Path
from typing import Any, cast

from torch.utils.data import ConcatDataset, Subset

from dq_lightning.core.config import OnError, TextConfig
from dq_lightning.core.errors import ConfigError, SourceError
from dq_lightning.identity.values import digest_of
from dq_lightning.sources.base import CompletedSource, Source, dataset_length, is_source
from dq_lightning.sources.files import FileSource, file_list
from dq_lightning.sources.groups import given_labels, is_rule
from dq_lightning.sources.hub import HubRecordSource, HubSource, holds_images, hub_kind
from dq_lightning.sources.hub_streams import hub_stream, open_shards, shard_files
from dq_lightning.sources.in_order import Rows, StreamSource, TextStreamSource
from dq_lightning.sources.items import quoted
from dq_lightning.sources.jsonl import NAMES, is_rows_file, read_rows
from dq_lightning.sources.mapped import ArraySource, MapSource, arrays_of, getter_module, reads_as_installed
from dq_lightning.sources.nested import ConcatSource, SubsetSource, filled_parts
from dq_lightning.sources.reading import ItemSource
from dq_lightning.sources.shuffles import check_shuffles, check_whole, is_stream
from dq_lightning.sources.strip import KEEP
from dq_lightning.sources.text import (
    HubTextSource,
    RowsSource,
    TextConcatSource,
    TextRows,
    TextSubsetSource,
    hub_is_text,
    is_row,
)


def as_source(
    dataset: Any,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    labels: Any = None,
    transform: Any = KEEP,
    target_transform: Any = KEEP,
    text: TextConfig | None = None,
    on_error: OnError = "raise",
    needs_images: bool = True,
) -> Source:
    """Present any dataset through the `Source` protocol. The given object is never changed.

    Args:
        dataset: a torchvision dataset, `Subset`, `ConcatDataset`, any object with `__getitem__` and `__len__`, a
            Hugging Face `Dataset`, or a `DatasetDict` with a split named `train`; for text also a list of dicts, or the
            path of a JSON or JSON Lines file. Or a stream: an `IterableDataset` of torch or Hugging Face, a WebDataset
            pipeline, or tar or Parquet files as a folder, a path, an address, or a list of these. A source is returned
            as it is, or as a copy with another grouping, text setting or handling of unreadable items.
        image_column: column, key or position of the image in an item; it is looked for when None.
        label_column: column, key or position of the class in an item; it is looked for when None.
        labels: grouping that replaces the dataset's own classes: N whole numbers or strings, the name of a column, or
            False for no groups; for samples with several labels 0 and 1 [N, C], or the name of the column that lists
            them. `"quantiles"` (or `"quantiles:5"`) makes ten (five) groups of equal size of a number, and `"dominant"`
            takes the class that covers most of an image, of masks or boxes; both read the target, or `label_column`.
            The delivered targets stay as they are.
        transform: transform of the image that replaces the dataset's own: None removes it, `"keep"` keeps it. For a
            Hugging Face dataset this is a function of a batch, as for `set_transform`.
        target_transform: transform of the target that replaces the dataset's own: None removes it, `"keep"` keeps it.
            Hugging Face datasets and rows of text take none.
        text: how rows of text are read. Rows of a Hugging Face dataset or of a list count as text when they hold
            strings and no image; rows of other datasets do when a template or columns are named here.
        on_error: with `"skip"`, computing the identity and the classes passes over items that cannot be read. Reading
            such an item itself is an error either way.
        needs_images: False for samples of any kind (sound, tables, volumes) whose features are given: then an item
            without an image is no error.

    Returns:
        The adapter around the dataset.

    Raises:
        SourceError: the dataset is empty, is a shuffled stream, or has no split, image or column that can be identified; an
            option does not fit this kind of dataset; or `labels` does not hold one class for each sample.
        ConfigError: a column, transform or grouping is given for a source that was made without it.

    Example:
        >>> from PIL import Image
        >>> source = as_source([(Image.new("RGB", (8, 8)), i % 3) for i in range(6)])
        >>> source.modality, source.image(0).size, source.labels().values.tolist()
        ('image', (8, 8), [0, 1, 2, 0, 1, 2])
    """
    if isinstance(labels, str) and not is_rule(labels):
        label_column, labels = labels, None
    if is_source(dataset):
        ready = cast(Source, dataset if isinstance(dataset, Source | CompletedSource) else CompletedSource(dataset))
        columns = {"image_column": image_column, "label_column": label_column}
        _check_ready(ready, columns, {"transform": transform, "target_transform": target_transform})
        if not isinstance(ready, ItemSource):
            if labels is not None:
                raise ConfigError(
                    f"labels= was given for {ready.describe()}, which is a source with a grouping of its own: let its "
                    "labels() give these classes"
                )
            return ready
    options = (image_column, label_column, transform, target_transform)
    source = (
        dataset
        if isinstance(dataset, ItemSource)
        else _adapt(dataset, text or TextConfig(), *options, needs_images=needs_images)
    )
    source = _with_settings(source, skips=on_error == "skip", needs_images=needs_images)
    if isinstance(source, TextRows) and text is not None:
        source = copy.copy(source)
        source.settings = text
    if labels is not None and labels is not False and not isinstance(labels, str) and not source.in_order:
        given_labels(labels, len(source))  # A wrong number of labels is reported before features are computed.
    if labels is not None:
        source = copy.copy(source)  # A source that was passed in keeps its own grouping.
        source.grouping = labels
    return source


def _with_settings(source: ItemSource, **settings: bool) -> ItemSource:
    """Return the source with attributes set on it and on the sources inside it. The given source is not changed."""
    if all(getattr(source, name) == value for name, value in settings.items()):
        return source
    changed = copy.copy(source)
    vars(changed).update(settings)
    if isinstance(changed, SubsetSource):
        changed.inner = _with_settings(changed.inner, **settings)
    if isinstance(changed, ConcatSource):
        changed.parts = [_with_settings(part, **settings) for part in changed.parts]
    return changed


def grouping_id(source: Source) -> str | None:
    """Identify the grouping that a source was given in place of its dataset's own classes; None if it uses these.

    This reads the given classes at most, and no item of the dataset. It is `"none"` for a source without groups, a
    hexadecimal SHA-256 digest of given classes, `"column:NAME"` for a named column, and `"RULE"` or `"RULE of NAME"`
    for a rule such as `"dominant"`.
    """
    grouping, column = source.grouping, source.label_column
    if grouping is False:
        return "none"
    if isinstance(grouping, str):
        return grouping if column is None else f"{grouping} of {column}"
    if grouping is not None:
        given = given_labels(grouping, len(grouping) if source.in_order else len(source))
        sets = () if given.members is None else (given.members,)
        return digest_of(given.values, given.names, given.unlabeled, *sets)
    # The values of the column are already part of the source's own identity, so the name of the column is enough.
    return None if column is None else f"column:{column}"


def _check_ready(source: Source, columns: dict[str, str | None], transforms: dict[str, Any]) -> None:
    late = [name for name, value in columns.items() if value not in (None, getattr(source, name, None))]
    late += [name for name, value in transforms.items() if not isinstance(value, str) or value != KEEP]
    if late:
        named = ", ".join(f"{name}=" for name in late)
        raise ConfigError(
            f"{named} was given for a source that is made already ({source.describe()}): pass it to as_source together "
            "with the dataset, or pass the dataset itself"
        )


def _adapt(dataset: Any, text: TextConfig, *options: Any, needs_images: bool = True) -> ItemSource:
    kind = hub_kind(dataset)
    if kind in ("DatasetDict", "IterableDatasetDict"):
        if "train" not in dataset:
            raise SourceError(f"The {kind} has no 'train' split but {quoted(dataset)}: pass one split, dataset[name]")
        return _adapt(dataset["train"], text, *options, needs_images=needs_images)
    if kind == "IterableDataset":
        return hub_stream(dataset, text, *options)
    if kind == "Dataset":
        is_text = options[0] is None and (_named_as_text(text) or hub_is_text(dataset))
        if is_text:
            return HubTextSource(dataset, *options)
        imageless = not needs_images and options[0] is None and not holds_images(dataset)
        return HubRecordSource(dataset, *options) if imageless else HubSource(dataset, *options)
    if (shards := shard_files(dataset)) is not None:
        return hub_stream(open_shards(shards), text, *options, files=shards)
    if isinstance(dataset, str | Path):
        return _rows_of_file(dataset, *options)
    if is_stream(dataset):
        return _stream(dataset, text, *options)
    dataset_length(dataset)
    # A subclass with a `__getitem__` of its own is adapted like any other dataset.
    by_torch = getter_module(dataset) == "torch.utils.data.dataset"
    if isinstance(dataset, Subset) and by_torch:
        inner = _adapt(dataset.dataset, text, *options, needs_images=needs_images)
        return TextSubsetSource(dataset, inner) if isinstance(inner, TextRows) else SubsetSource(dataset, inner)
    if isinstance(dataset, ConcatDataset) and by_torch:
        parts = [_adapt(part, text, *options, needs_images=needs_images) for part in filled_parts(dataset)]
        kinds = {part.modality for part in parts}
        if len(kinds) > 1:
            raise SourceError(
                "The ConcatDataset joins images and text, which can't be compared: quantize each on its own"
            )
        return TextConcatSource(dataset, parts) if kinds == {"text"} else ConcatSource(dataset, parts)
    in_memory = isinstance(dataset, list | tuple) and is_row(dataset[0])
    if options[0] is None and (in_memory or _named_as_text(text)):
        return _rows(dataset, None, *options)
    if arrays_of(dataset) is not None and reads_as_installed(dataset):
        return ArraySource(dataset, *options)
    return FileSource(dataset, *options) if file_list(dataset) is not None else MapSource(dataset, *options)


def _stream(dataset: Any, text: TextConfig, *options: Any) -> ItemSource:
    check_shuffles(dataset)
    check_whole(dataset)
    rows = Rows(dataset)
    if options[0] is None and _named_as_text(text):
        _check_row_options(options[0], options[3])
        return TextStreamSource(rows, *options)
    return StreamSource(rows, *options)


def _named_as_text(text: TextConfig) -> bool:
    """Whether the settings name a template or columns, which means that the rows hold text."""
    return text.template != "auto" or text.columns is not None


def _rows_of_file(path: str | Path, *options: Any) -> ItemSource:
    if "://" in str(path) and not Path(path).suffix:
        raise SourceError(
            f"{path} is an address, where a folder can't be listed on every system: name its files, as in "
            f'"{str(path).rstrip("/")}/*.tar" or "/*.parquet"'
        )
    if not is_rows_file(path):
        raise SourceError(
            f"{str(path)!r} is not named like a file of text rows ({NAMES}): pass such a file, or the dataset itself"
        )
    rows = read_rows(path)
    if not rows:
        raise SourceError(f"{path} is empty: there is nothing to choose from")
    return _rows(rows, Path(path).name, *options)


def _check_row_options(image_column: str | None, target_transform: Any) -> None:
    """Raise a SourceError if rows of text were given options for images."""
    if image_column is not None or target_transform != KEEP:
        raise SourceError("image_column= and target_transform= do not fit rows of text; transform= sees the whole row")


def _rows(
    rows: Any, name: str | None, image_column: str | None, label_column: str | None, transform: Any, target: Any
) -> ItemSource:
    _check_row_options(image_column, target)
    return RowsSource(rows, label_column, transform, name)
