"""Adapters for datasets of text rows. They extend the adapters for images, and give a text in place of an image."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from dq_lightning.cache.digests import DigestMemory
from dq_lightning.core.config import TextConfig
from dq_lightning.core.errors import ConfigError, SourceError
from dq_lightning.core.records import EncodedImage, Labels
from dq_lightning.identity.values import digest_of
from dq_lightning.sources.hub import HubRecordSource
from dq_lightning.sources.items import IMAGE_NAMES, TARGET_NAMES, Leaf, image_leaves, quoted
from dq_lightning.sources.mapped import MapSource
from dq_lightning.sources.nested import ConcatSource, SubsetSource
from dq_lightning.sources.prompts import Template, choose_template
from dq_lightning.sources.reading import ItemSource
from dq_lightning.sources.strip import KEEP
from dq_lightning.sources.targets import Targets, as_targets

logger = logging.getLogger("dq_lightning")


class TextRows(ItemSource):
    """Mixin that turns an adapter for images into an adapter for rows of text.

    The settings say which columns are read, and which part of a row is embedded.
    """

    modality = "text"
    settings = TextConfig()

    def columns(self) -> list[str]:
        """Names of the rows' fields."""
        return list(self.first_item())

    def rows(self, positions: Sequence[int]) -> list[Mapping[str, Any]]:
        """The plain rows at the given positions, in the same order."""
        return [self.plain(index) for index in positions]

    def template(self) -> Template:
        """The template that reads the rows of this source.

        Raises:
            SourceError: the columns fit no template.
            ConfigError: the settings ask for the instruction of plain text, which has none, or name columns in a number
                that does not fit the template.
        """
        template = choose_template(self.columns(), self.settings.template, self.settings.columns)
        if template.name == "plain" and self.settings.embed == "instruction":
            raise ConfigError(
                f'config.text.embed="instruction", but plain text ({", ".join(template.columns)}) has no instruction: leave it '
                "out, or name the columns with config.text.template and config.text.columns"
            )
        return template

    def texts(self, positions: Sequence[int]) -> list[str]:
        template, part = self.template(), self.settings.embed
        rows = self.rows(positions)
        return [template.embedded_text(row, part, index) for index, row in zip(positions, rows, strict=True)]

    def text_identity(self) -> dict[str, Any]:
        template = self.template()
        return {"template": template.name, "columns": list(template.all_columns), "embed": self.settings.embed}

    # The following methods override those that read images.

    def image(self, index: int) -> Image.Image:
        raise SourceError(f"{self.describe()} holds rows of text, which have no image: pass an encoder of text")

    def image_leaf(self) -> Leaf:
        return ()

    def decode_problem(self, index: int) -> str | None:
        return None

    def encoded(self, index: int) -> EncodedImage | None:
        return None

    def check(self, index: int) -> None:
        self.texts([index])

    def check_columns(self) -> None:
        self.template()

    def check_repeatable(self) -> None:
        self._check_same_reads()

    # Rows of text have no groups unless a column is named or labels are given.

    def target_leaf(self) -> Leaf | None:
        if self.label_column is None:
            return None
        if self.label_column not in self.columns():
            raise SourceError(
                f"labels={self.label_column!r}: the columns are {quoted(self.columns())}; pass one of them"
            )
        return (self.label_column,)

    def listed_targets(self) -> Targets | None:
        return None if self.label_column is None else super().listed_targets()  # type: ignore[safe-super]

    def labels(self) -> Labels | None:
        if self.label_column is None and self.grouping is None:
            self._tell_of_classes()
            return None
        if self.grouping is None:
            self.target_leaf()
        found = super().labels()
        if found is None and self.grouping is None:
            raise SourceError(
                f"labels={self.label_column!r}: this column holds neither strings nor whole numbers, so its values are no "
                "groups; pass another column, or labels= with one value a row"
            )
        return found

    def _tell_of_classes(self) -> None:
        """Log once that a column looks like classes, which rows of text are not grouped by unless it is named."""
        if self._logged_no_classes:
            return
        self._logged_no_classes = True
        with contextlib.suppress(SourceError, ConfigError):
            read = self.template().all_columns
            found = next((name for name in self.columns() if name.lower() in TARGET_NAMES and name not in read), None)
            if found is not None:
                logger.info(
                    "%s: bins are made over the whole set. If the column %r holds classes, labels=%r makes them inside each "
                    "class",
                    self.describe(),
                    found,
                    found,
                )


class HubTextSource(TextRows, HubRecordSource):
    """Adapter for a Hugging Face `Dataset` of text rows."""

    def columns(self) -> list[str]:
        return list(self.plain_dataset.column_names)

    def rows(self, positions: Sequence[int]) -> list[Mapping[str, Any]]:
        # All rows are read at once, because reading them one by one takes longer than tokenizing them.
        there = set(self.plain_dataset.column_names)
        wanted = self.plain_dataset.select_columns([name for name in self.template().all_columns if name in there])
        together = range(positions[0], positions[-1] + 1) if len(positions) else range(0)
        batch = wanted[together.start : together.stop] if list(together) == list(positions) else wanted[list(positions)]
        return [dict(zip(batch, cells, strict=True)) for cells in zip(*batch.values(), strict=True)]


class RowsSource(TextRows, MapSource):
    """Adapter for rows in memory (a list of dicts), or for any map-style dataset whose items are dicts of text.

    Rows are grouped by the field `label_column`, if any. A transform of a whole row replaces the dataset's own; None
    removes it, `"keep"` keeps it. `name` is that of the dataset in messages.

    Raises:
        SourceError: the dataset is empty, or an element of a list or tuple is no dict.
    """

    def __init__(self, dataset: Any, label_column: str | None, transform: Any = KEEP, name: str | None = None) -> None:
        super().__init__(dataset, None, label_column, transform)
        self._rows: Sequence[Any] | None = dataset if isinstance(dataset, list | tuple) else None
        self._name = name or ("list of rows" if self._rows is not None else self._name)
        # A subclass of list or tuple may return other rows than it holds.
        self.by_items, self.trusts_list = type(dataset) not in (list, tuple), self._rows is not None
        for index, row in enumerate(self._rows or ()):
            if not isinstance(row, Mapping):
                raise SourceError(f"row {index} is no dict of fields but a {type(row).__name__}; leave it out")

    def columns(self) -> list[str]:
        if self._rows is None:
            return super().columns()
        return list(dict.fromkeys(name for row in self._rows for name in row))

    def listed_targets(self) -> Targets | None:
        if self.label_column is None or self._rows is None:
            return None
        return as_targets([row.get(self.label_column) for row in self._rows])

    def digest(self, memory: DigestMemory) -> str:
        if self.by_items or self._rows is None:
            return super().digest(memory)
        return digest_of("rows", *(list(row.items()) for row in self._rows))


class TextSubsetSource(TextRows, SubsetSource):
    """Adapter for a torch `Subset` of another source of text."""

    inner: TextRows

    def columns(self) -> list[str]:
        return self.inner.columns()

    def rows(self, positions: Sequence[int]) -> list[Mapping[str, Any]]:
        return self.inner.rows([self.positions[index] for index in positions])


class TextConcatSource(TextRows, ConcatSource):
    """Adapter for a torch `ConcatDataset` of sources of text."""

    parts: list[TextRows]  # type: ignore[assignment]

    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for part in self.parts for name in part.columns()))


def hub_is_text(dataset: Any) -> bool:
    """Whether a Hugging Face dataset holds rows of text.

    No column may be an image. Beyond that, the columns must fit a template, or one must hold strings and none bytes.
    """
    kinds = {
        name: (type(feature).__name__, str(getattr(feature, "dtype", ""))) for name, feature in dataset.features.items()
    }
    if any(kind in ("Image", "Array2D", "Array3D") or name.lower() in IMAGE_NAMES for name, (kind, _) in kinds.items()):
        return False
    dtypes = [dtype for _, dtype in kinds.values()]
    strings = any(dtype in ("string", "large_string", "string_view") for dtype in dtypes)
    return (strings and "binary" not in dtypes) or _fits(list(kinds))


def is_row(item: Any) -> bool:
    """Whether an item is a row of text: a dict without images that fits a template or has a string value."""
    if not isinstance(item, Mapping) or image_leaves(item):
        return False
    return _fits(list(item)) or any(isinstance(value, str) for value in item.values())


def _fits(columns: list[str]) -> bool:
    try:
        choose_template(columns)
    except SourceError:
        return False
    return True
