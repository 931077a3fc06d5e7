"""The adapter for Hugging Face datasets. The `datasets` package is imported only when such a dataset is used."""

import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dq_lightning.cache.digests import DigestMemory
from dq_lightning.core.errors import SourceError
from dq_lightning.core.isolation import isolated_random_state
from dq_lightning.core.records import EncodedImage
from dq_lightning.identity.callables import is_untouched
from dq_lightning.identity.values import digest_of
from dq_lightning.sources.base import Finisher, dataset_length
from dq_lightning.sources.finish import HubFinisher, TransformFinisher
from dq_lightning.sources.items import IMAGE_NAMES, TARGET_NAMES, Leaf, quoted
from dq_lightning.sources.pixels import header_problem
from dq_lightning.sources.reading import ItemSource
from dq_lightning.sources.strip import KEEP
from dq_lightning.sources.targets import Targets, as_targets
from dq_lightning.sources.traced import TRACED_SAMPLES

_ROWS_AT_ONCE = 256
_HOMES = {
    "Dataset": "datasets.arrow_dataset",
    "DatasetDict": "datasets.dataset_dict",
    "IterableDataset": "datasets.iterable_dataset",
    "IterableDatasetDict": "datasets.dataset_dict",
}


def hub_kind(dataset: Any) -> str | None:
    """Name of the class of the `datasets` package that an object belongs to; None for other objects.

    The package is not imported for this.
    """
    for owner in type(dataset).__mro__:
        if _HOMES.get(owner.__name__) == owner.__module__:
            return owner.__name__
    return None


def rows_example(image: str) -> str:
    """Return code of a transform for rows of a Hugging Face dataset, whose image is in the given column."""
    return f"transform=lambda rows: rows | {{{image!r}: [to_tensor(one) for one in rows[{image!r}]]}}"


def check_hub_options(target_transform: Any) -> None:
    """Check the options of a Hugging Face dataset.

    Raises:
        SourceError: a transform of the target was given.
    """
    if target_transform != KEEP:
        raise SourceError(
            "target_transform= does not fit a Hugging Face dataset, whose transform sees the whole row: "
            "pass transform= with a function as for set_transform, or use dataset.map on the target column."
        )


class HubColumns:
    """Finds the columns of images and classes of a Hugging Face dataset by the types of its columns."""

    image_column: str | None
    label_column: str | None

    @property
    @abstractmethod
    def features(self) -> Any:
        """The `Features` of the dataset: a type for each column."""

    def _image_column(self) -> str:
        features = self.features
        if self.image_column is not None:
            return self._existing_column("image_column", self.image_column)
        for kinds in (("Image",), ("Array2D", "Array3D")):
            found = [name for name, feature in features.items() if type(feature).__name__ in kinds]
            usual = [name for name in found if name.lower() in IMAGE_NAMES]
            if len(found) == 1 or len(usual) == 1:
                return str(found[0] if len(found) == 1 else usual[0])
            if found:
                raise SourceError(f"Several columns hold images ({quoted(found)}): pass image_column= with one of them")
        raise SourceError(
            f"No column is of the Image type; the columns are {quoted(features)}. Pass image_column=, or cast the column "
            "first: dataset.cast_column(name, datasets.Image())"
        )

    def _existing_column(self, option: str, name: str) -> str:
        if name not in self.features:
            raise SourceError(f"{option}={name!r}: the columns are {quoted(self.features)}; pass one of them")
        return name

    def _target_column(self) -> str | None:
        features = self.features
        if self.label_column is not None:
            return self._existing_column("label_column", self.label_column)
        found = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
        usual = [name for name in features if name.lower() in TARGET_NAMES]
        if len(found) > 1 and len(set(found) & set(usual)) != 1:
            raise SourceError(
                f"Several columns hold classes ({quoted(found)}): pass label_column= with one of them, or labels=False"
            )
        if found:
            usual = [name for name in found if name in usual] if len(found) > 1 else found
        return str(usual[0]) if len(usual) == 1 else None


class HubSource(HubColumns, ItemSource):
    """Adapter for a Hugging Face `Dataset` of images.

    Its items are dicts. A function given to `set_transform` and a format given to `set_format` count as the user's
    transforms. The columns and the transform, which replaces both, are as in `as_source`; `target_transform` must be
    `"keep"`.

    Raises:
        SourceError: `target_transform` is given, the dataset is empty, or no single image column is found.
    """

    trusts_list = True

    def __init__(
        self, dataset: Any, image_column: str | None, label_column: str | None, transform: Any, target_transform: Any
    ) -> None:
        dataset_length(dataset)
        # A subclass, or a class that was changed from outside, may return other rows than its table holds.
        self.by_items = not is_untouched(type(dataset))
        check_hub_options(target_transform)
        self.plain_dataset = dataset.with_format(None)
        if transform != KEEP:
            dataset = self.plain_dataset if transform is None else self.plain_dataset.with_transform(transform)
        super().__init__(dataset, image_column, label_column)
        self._open_pictures()
        if callable(transform):
            self._check_transform()

    def _check_transform(self) -> None:
        """Raise a SourceError if the transform that was passed fails for each of a few rows that can be read."""
        failed = None
        for index in self.spread(3):
            try:
                self.plain_dataset[index]
            except Exception:  # An unreadable row is reported by the step that reads all of them.
                return
            try:
                with isolated_random_state():
                    self.dataset[index]
                return
            except Exception as error:
                failed = error
        raise SourceError(
            f"transform= fails for rows of {self.describe()} ({type(failed).__name__}: {failed}): it gets what a function of "
            f"set_transform gets, a dict with a list for each column. Pass {rows_example(self._column)}"
        ) from failed

    def _open_pictures(self) -> None:
        """Find the image column, and prepare views of it that give decoded images and stored bytes."""
        self._column = self._image_column()
        feature = self.dataset.features[self._column]
        self._mode = getattr(feature, "mode", None)
        self._decodes = bool(getattr(feature, "decode", False))
        pictures = self.plain_dataset.select_columns([self._column])
        if hasattr(feature, "decode") and not self._decodes:
            from datasets import Image

            pictures = pictures.cast_column(self._column, Image(mode=self._mode))
        self._pictures = pictures
        self._stored = pictures.with_format("arrow") if hasattr(feature, "decode") else None

    @property
    def features(self) -> Any:
        return self.dataset.features

    def describe(self) -> str:
        name = getattr(self.dataset.info, "dataset_name", None)
        split = f" ({self.dataset.split})" if self.dataset.split else ""
        return f"Hugging Face dataset{f' {name}' if name else ''}{split} with {len(self):,} samples"

    # The following methods read items.

    def read_plain(self, index: int) -> Any:
        return self.plain_dataset[index]

    def read_image(self, index: int) -> Any:
        value = self._pictures[index][self._column]
        if value is None:
            raise ValueError(f"the column {self._column!r} is empty here")
        return np.asarray(value) if isinstance(value, list) else value

    def image_leaf(self) -> Leaf:
        return (self._column,)

    def target_leaf(self) -> Leaf | None:
        column = self._target_column()
        return (column,) if column is not None else None

    def _stored_image(self, index: int) -> dict[str, Any] | None:
        if self._stored is None:
            return None
        value: dict[str, Any] | None = self._stored[index].column(0)[0].as_py()
        return value

    def path(self, index: int) -> str | None:
        stored = self._stored_image(index)
        return stored["path"] if stored and stored["bytes"] is None else None

    def encoded(self, index: int) -> EncodedImage | None:
        stored = self._stored_image(index) if self._decodes else None
        if not stored:
            return None
        data = stored["bytes"]
        if data is None:
            if not stored["path"] or not os.path.isfile(stored["path"]):  # noqa: PTH113
                return None
            data = Path(stored["path"]).read_bytes()
        return EncodedImage(data, f"hf:{self._mode}" if self._mode else "hf")

    def decode_problem(self, index: int) -> str | None:
        # Without a mode nothing is converted, and the modes I and F keep the pixel values of the file.
        if self._mode is None or self._mode.startswith(("I", "F")):
            return None
        stored = self._stored_image(index)
        data = (stored["bytes"] or stored["path"]) if stored else None
        return header_problem(data, turned=False) if data else None

    # The following method applies the user's transforms.

    def finisher(self, index: Tensor) -> Finisher:
        how, columns = self.dataset.format, self.dataset._format_columns
        if how["type"] is None and columns is None:
            return TransformFinisher()
        chosen = None if columns is None else tuple(columns)
        finisher = HubFinisher(how["type"], dict(how["format_kwargs"]), chosen, bool(how["output_all_columns"]))

        def seeded(call: Callable[[], Any], seed: int) -> str:
            with isolated_random_state(seed):
                return digest_of(call())

        for seed, place in enumerate(self.readable(index, TRACED_SAMPLES)):
            wanted = {seeded(partial(self.delivered, place), seed) for _ in range(2)}
            # A transform with a random generator of its own differs under equal seeds, so it is not compared.
            if len(wanted) == 1 and seeded(lambda place=place: finisher(0, self.plain(place)), seed) not in wanted:  # type: ignore[misc]
                raise SourceError(
                    f"What {self.describe()} delivers can't be made from its plain items by its format or transform, so a "
                    "self-contained copy would give other items. Use store='indices', which reads through the dataset "
                    "itself."
                )
        return finisher

    # The following methods give the targets and the identity.

    def listed_targets(self) -> Targets | None:
        column = self._target_column()
        if column is None:
            return None
        table = self.plain_dataset.select_columns([column]).with_format("arrow")[:]
        values = table.column(0)
        feature = self.dataset.features[column]
        names = feature.names if type(feature).__name__ == "ClassLabel" else None
        if getattr(feature, "dtype", None) is None or feature.dtype.startswith(("float", "double")):
            return None
        numeric = values.null_count == 0 and feature.dtype.startswith(("int", "uint", "bool"))
        return as_targets(values.to_numpy() if numeric else values.to_pylist(), names)

    def read_target(self, index: int) -> Any:
        if self.by_items:
            return super().read_target(index)
        column = str(self._named_target()[0])
        return self.plain_dataset.select_columns([column])[index][column]

    def target_names(self) -> tuple[str, ...] | None:
        return names_inside(self.dataset.features[str(self._named_target()[0])])

    def target_values(self, read: Callable[[Any], Any]) -> list[Any]:
        if self.by_items or self.skips:
            return super().target_values(read)
        column = str(self._named_target()[0])
        rows = self.plain_dataset.select_columns([column]).iter(batch_size=_ROWS_AT_ONCE)
        return [None if value is None else read(value) for batch in rows for value in batch[column]]

    def plain_view(self) -> Any:
        return self.plain_dataset

    def plain_items(self) -> Any:
        return self.plain_dataset

    def digest(self, memory: DigestMemory) -> str:
        if self.by_items:
            return super().digest(memory)
        key = self._table_key()
        recalled = memory.recall(key) if key is not None else None
        if recalled is not None:
            return recalled
        from dq_lightning.sources.arrow import digest_tables  # This imports pyarrow, which `datasets` requires.

        names = list(self.plain_dataset.column_names)
        rows = self.plain_dataset.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE)
        content, saw_files = digest_tables(rows, names, memory, skips=self.skips)
        schema = json.dumps(self.plain_dataset.features.to_dict(), sort_keys=True, default=str)
        digest = digest_of("hub", self.image_place(), schema, content)
        if key is not None and not saw_files:  # Files outside the table can change while the table does not.
            memory.remember(key, digest)
        return digest

    def _table_key(self) -> str | None:
        """A key for the present state of a table on disk, found without reading it; None for tables in memory."""
        files = sorted({entry["filename"] for entry in self.plain_dataset.cache_files})
        if not files:
            return None
        seen = [(name, Path(name).stat()) for name in files]
        # Programs that copy or unpack files restore the modification time, but not the time of change (ctime).
        state = [(name, status.st_size, status.st_mtime_ns, status.st_ctime_ns) for name, status in seen]
        mapping = self.plain_dataset._indices
        indices = b"" if mapping is None else mapping.column(0).to_numpy().tobytes()
        history = _history(self.plain_dataset.data) or self.plain_dataset._fingerprint
        return f"hub-table:{digest_of(state, history, hashlib.sha256(indices).hexdigest(), self._column)}"


class HubRecordSource(HubSource):
    """Adapter for a Hugging Face `Dataset` without images: rows of text, or samples whose features are given."""

    def _open_pictures(self) -> None:
        self._column, self._mode, self._decodes, self._stored = "", None, False, None

    def image_leaf(self) -> Leaf:
        raise SourceError(f"No column of {self.describe()} is of the Image type: {quoted(self.dataset.features)}")


def holds_images(dataset: Any) -> bool:
    """Whether a column of a Hugging Face `Dataset` is of a type that images have."""
    return any(type(feature).__name__ in ("Image", "Array2D", "Array3D") for feature in dataset.features.values())


def names_inside(feature: Any) -> tuple[str, ...] | None:
    """The names of the only type of class in a column, however deep it lies; None if there is none, or several."""
    if type(feature).__name__ == "ClassLabel":
        return tuple(feature.names)
    inner = feature.values() if isinstance(feature, dict) else feature if isinstance(feature, list) else ()
    inner = inner or ([feature.feature] if hasattr(feature, "feature") else [])
    found = {names for one in inner if (names := names_inside(one)) is not None}
    return found.pop() if len(found) == 1 else None


def _history(table: Any) -> list[Any] | None:
    """The paths and recorded operations of a table that is entirely memory-mapped; None for other tables.

    Unlike the fingerprint of the dataset, this does not change with the dataset's format, and it does not change at
    random when a transform cannot be hashed.
    """
    if hasattr(table, "blocks"):
        rows = [[_history(block) for block in row] for row in table.blocks]
        return None if any(block is None for row in rows for block in row) else rows
    if hasattr(table, "path") and hasattr(table, "replays"):
        return [str(table.path), repr(table.replays)]
    return None
