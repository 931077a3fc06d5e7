"""The adapter for Hugging Face datasets that are streamed, and for tar and Parquet files, which `datasets` streams."""

import contextlib
import glob
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from dq_lightning.cache.digests import RACY_NANOSECONDS, file_stamp
from dq_lightning.core.config import TextConfig
from dq_lightning.core.errors import SourceError
from dq_lightning.core.records import EncodedImage
from dq_lightning.identity.values import digest_of
from dq_lightning.sources.base import Finisher
from dq_lightning.sources.finish import HubFinisher, TransformFinisher
from dq_lightning.sources.hub import HubColumns, check_hub_options, names_inside
from dq_lightning.sources.in_order import Rows, StreamSource, TextStreamSource
from dq_lightning.sources.items import Leaf
from dq_lightning.sources.pixels import header_problem
from dq_lightning.sources.shuffles import check_shuffles, check_whole
from dq_lightning.sources.strip import KEEP, Transformed
from dq_lightning.sources.text import hub_is_text, is_row
from dq_lightning.sources.traced import TRACED_SAMPLES

# Columns that say where a sample of a tar file lies, not what it is.
PLACES = ("__url__",)
COMPARED_ROWS = 4
_SIMPLE = (int, str, bool, float, type(None))
# Endings of files that may lie beside shards.
_BESIDE = (".json", ".md", ".txt", ".yaml", ".idx", ".gitattributes", "")
_KINDS = {".tar": "webdataset", ".parquet": "parquet"}


class HubRows(Rows):
    """Rows of a streamed Hugging Face dataset, whose images are decoded when an item is made of a row.

    The columns in `without` are left out.

    Attributes:
        column: column of the image, or None.
        images: types of the columns of images that are decoded by `item`.
    """

    def __init__(self, stream: Any, column: str | None, without: tuple[str, ...] = ()) -> None:
        super().__init__(stream)
        self.column, self._without = column, without
        self._plain = plain = stream.with_format(None)
        self.images: dict[str, Any] = {}
        images = {
            name: feature
            for name, feature in (stream.features or {}).items()
            if type(feature).__name__ == "Image" and feature.decode
        }
        for name, feature in images.items():
            plain = plain.cast_column(name, type(feature)(mode=feature.mode, decode=False))
        with contextlib.suppress(Exception):  # An image that can't be decoded is reported when its turn comes.
            delivered = [digest_of(row) for row in itertools.islice(self.open({}), COMPARED_ROWS)]
            undecoded = HubRows.__new__(HubRows)
            vars(undecoded).update(vars(self) | {"_plain": plain, "images": images})
            rows = itertools.islice(undecoded.open({}), COMPARED_ROWS)
            # After a map or a choice of columns `datasets` encodes decoded images anew.
            if images and [digest_of(undecoded.item(row)) for row in rows] == delivered:
                self._plain, self.images = plain, images

    def open(self, transforms: dict[str, Any]) -> Iterator[Any]:
        for row in self._plain:
            for name in self._without:
                row.pop(name, None)
            for name in self.images:
                value = row[name]
                # Images of a folder come as the names of their files.
                if value and value["bytes"] is None and os.path.isfile(value["path"]):  # noqa: PTH113
                    row[name] = value | {"bytes": Path(value["path"]).read_bytes()}
            yield row

    def item(self, row: Any) -> Any:
        decoded = {
            name: None if row[name] is None else feature.decode_example(row[name])
            for name, feature in self.images.items()
        }
        return {**row, **decoded}

    def content(self, row: Any) -> Any:
        if any(row[name] and row[name]["bytes"] is None for name in self.images):
            return super().content(self.item(row))
        # The name of an image's file is no part of the content, because it depends on where the data lie.
        return {**row, **{name: row[name] and row[name]["bytes"] for name in self.images}}

    def digest(self, content: Any) -> bytes:
        # `digest_of` for each cell would take a fifth of the time that small images take to read.
        parts = []
        for name, value in content.items():
            kind = type(value)
            data = value if kind is bytes else repr(value).encode() if kind in _SIMPLE else digest_of(value).encode()
            parts += [f"{name!r} {kind.__name__} {len(data)} ".encode(), data]
        return hashlib.sha256(b"".join(parts)).digest()

    def encoded(self, row: Any) -> EncodedImage | None:
        feature = self.images.get(self.column or "")
        value = None if feature is None else row[self.column]
        if feature is None or not value or value["bytes"] is None:
            return None
        mode = feature.mode
        return EncodedImage(value["bytes"], f"hf:{mode}" if mode else "hf")


class HubStreamSource(HubColumns, StreamSource):
    """Adapter for a Hugging Face `IterableDataset`; the options are as for a `Dataset`.

    Args:
        dataset: the stream, whose features are known.
        image_column: as in `as_source`.
        label_column: as in `as_source`.
        transform: as in `as_source`.
        target_transform: must be `"keep"`.
        files: paths or addresses of the files that the stream reads; None where they are not known.
    """

    def __init__(
        self,
        dataset: Any,
        image_column: str | None,
        label_column: str | None,
        transform: Any,
        target_transform: Any,
        files: list[str] | None = None,
    ) -> None:
        check_hub_options(target_transform)
        self._features: Any = dataset.features or {}
        self.image_column, self.label_column = image_column, label_column
        rows = HubRows(dataset, self._found_column(), PLACES if files else ())
        StreamSource.__init__(self, rows, image_column, label_column, name=_name(dataset, files))
        self.files = files or []
        self._stamps = self._seen_files()
        formatting = dataset._formatting
        self._finisher: HubFinisher | None = None
        if transform != KEEP:
            self._finisher = None if transform is None else HubFinisher("custom", {"transform": transform})
        elif formatting is not None and formatting.format_type is not None:
            self._finisher = HubFinisher(formatting.format_type, {})
            for index, wanted in enumerate(itertools.islice(dataset, TRACED_SAMPLES)):
                if digest_of(self._finisher(index, self.plain(index))) != digest_of(wanted):
                    raise SourceError(
                        f"item {index} of {self._name} has another form in the format {formatting.format_type!r} than a stored "
                        "copy would give: pass the stream without a format, and transform= with a function of a dict of lists"
                    )
        if self._finisher is not None:
            self.dataset = Transformed(self.plain_dataset, self._finisher)  # type: ignore[arg-type]

    def _found_column(self) -> str | None:
        """Name of the image column, or None where it is looked for in the items."""
        if not self._features:
            return self.image_column
        try:
            return self._image_column()
        except SourceError:
            if self.image_column is not None:
                raise
            return None

    @property
    def features(self) -> Any:
        return self._features

    def image_leaf(self) -> Leaf:
        if self._leaf is None:
            self._leaf = (self._image_column(),) if self._features else super().image_leaf()
        return self._leaf

    def target_leaf(self) -> Leaf | None:
        if not self._features:
            return super().target_leaf()
        column = self._target_column()
        return None if column is None else (column,)

    def class_names(self) -> Any:
        leaf = self.target_leaf()
        feature = self._features.get(leaf[0]) if leaf else None
        return getattr(feature, "names", None) if type(feature).__name__ == "ClassLabel" else None

    def target_names(self) -> tuple[str, ...] | None:
        return names_inside(self._features.get(str(self._named_target()[0])))

    def decode_problem(self, index: int) -> str | None:
        rows = self.plain_dataset.rows
        feature = rows.images.get(rows.column)  # type: ignore[attr-defined]
        mode = getattr(feature, "mode", None)
        encoded = self.encoded(index) if mode is not None and not mode.startswith(("I", "F")) else None
        return None if encoded is None else header_problem(encoded.data, turned=False)

    def finisher(self, index: Tensor) -> Finisher:
        return self._finisher or TransformFinisher()

    # The state of files on this machine tells that they are the same, and they need not be read again.

    def _seen_files(self) -> str | None:
        """Digest of size, times and inode of all files; None where that is not enough to notice a change."""
        try:
            stamps = [file_stamp(path) for path in self.files]
        except (OSError, ValueError):
            return None
        young = time.time_ns() - RACY_NANOSECONDS
        return digest_of(stamps) if stamps and all(max(one[1:3]) < young for one in stamps) else None

    @property
    def identity_is_certain(self) -> bool:
        return self._stamps is not None if self.files else super().identity_is_certain

    def state_key(self) -> str:
        if not self.files:
            return super().state_key()
        features = json.dumps(getattr(self._features, "to_dict", dict)(), sort_keys=True, default=str)
        kept = self._stamps or digest_of(self.files)
        return f"{'' if self._stamps else 'opaque:'}shards:{digest_of(kept, features, self.image_place(), self.target_leaf())}"

    def is_unchanged(self) -> bool:
        return self._seen_files() == self._stamps if self.files else super().is_unchanged()


class HubTextStreamSource(TextStreamSource, HubStreamSource):
    """Adapter for a Hugging Face `IterableDataset` of text rows."""


def hub_stream(dataset: Any, text: TextConfig, *options: Any, files: list[str] | None = None) -> StreamSource:
    """Make the source of a Hugging Face `IterableDataset`; the options are those of `HubStreamSource`, in their order.

    Raises:
        SourceError: the stream is shuffled or empty, or an option does not fit.
    """
    check_shuffles(dataset)
    check_whole(dataset)
    if dataset.features is None:
        with contextlib.suppress(Exception):  # `datasets` finds no types for images that a `map` has passed on.
            dataset = dataset._resolve_features()
    named = text.template != "auto" or text.columns is not None
    by_features = dataset.features is not None
    is_text = named or (hub_is_text(dataset) if by_features else is_row(next(iter(dataset), None)))
    kind: Callable[..., StreamSource] = HubTextStreamSource if options[0] is None and is_text else HubStreamSource
    return kind(dataset, *options, files)


def _name(dataset: Any, files: list[str] | None) -> str:
    if files:
        return f"{Path(files[0]).name}{f' and {len(files) - 1:,} more files' if len(files) > 1 else ''}"
    name = getattr(dataset.info, "dataset_name", None)
    return f"Hugging Face stream{f' {name}' if name else ''}{f' ({dataset.split})' if dataset.split else ''}"


def shard_files(dataset: Any) -> list[str] | None:
    """The sorted paths and addresses of tar or Parquet files that a path, a folder or a list names; None for others.

    A path may have `*` in its name. At an address, the package `datasets` finds the files that such a name means.

    Raises:
        SourceError: the files are of both kinds, or one is named twice.

    Example:
        >>> shard_files(["b.tar", "a.tar"]), shard_files("s3://bucket/part.parquet"), shard_files(["a.png"])
        (['a.tar', 'b.tar'], ['s3://bucket/part.parquet'], None)
    """
    given = [dataset] if isinstance(dataset, str | Path) else dataset
    if not isinstance(given, list | tuple) or not given or not all(isinstance(one, str | Path) for one in given):
        return None
    names = [str(one) if "://" in str(one) else os.path.expanduser(one) for one in given]  # noqa: PTH111
    names = [one for name in names for one in (_found(name) or [name])]
    if len(names) == 1 and os.path.isdir(names[0]):  # noqa: PTH112
        names = []
        for path in Path(given[0]).expanduser().rglob("*"):
            if path.suffix.lower() in _KINDS:
                names.append(str(path))
            elif path.suffix.lower() not in _BESIDE and path.is_file():
                return None  # It is a folder of something else, and may be large.
    kinds = {Path(name).suffix.lower() for name in names}
    if not names or not kinds & _KINDS.keys():
        return None
    if len(kinds) > 1:
        raise SourceError(
            f"files of several kinds can't be one stream ({', '.join(sorted(kinds))}): pass those of one kind"
        )
    if len(set(names)) < len(names):
        raise SourceError("a file is named twice: its samples would count twice. Pass every file once")
    return sorted(names)


def _found(name: str) -> list[str]:
    """The files on this machine that a name with `*` stands for."""
    return [] if "*" not in name or "://" in name else glob.glob(name, recursive=True)  # noqa: PTH207


def open_shards(files: list[str]) -> Any:
    """Open tar files of WebDataset, or Parquet files, as a Hugging Face `IterableDataset`; their order is kept.

    Raises:
        SourceError: the package `datasets` is missing, or a file cannot be opened.
    """
    kind = _KINDS[Path(files[0]).suffix.lower()]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise SourceError(f"{kind} files are read by the package datasets: pip install datasets") from error
    try:
        return load_dataset(kind, data_files={"train": files}, split="train", streaming=True)
    except Exception as error:
        raise SourceError(f"{files[0]} can't be opened as {kind}: {type(error).__name__}: {error}") from error
