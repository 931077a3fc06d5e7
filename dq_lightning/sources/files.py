"""The adapter for datasets with one image file per sample, such as torchvision's `ImageFolder`.

Its identity is a digest of the relative paths, the labels and the contents of the files.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

from PIL import Image

from dq_lightning.cache.digests import DigestMemory, file_stamp
from dq_lightning.core.libraries import is_library
from dq_lightning.core.records import EncodedImage
from dq_lightning.identity.callables import patches_of
from dq_lightning.identity.datasets import State, find_state
from dq_lightning.identity.values import digest_of, digest_text
from dq_lightning.sources.base import relative_paths
from dq_lightning.sources.items import Leaf
from dq_lightning.sources.mapped import MapSource, getter_module, reads_as_installed
from dq_lightning.sources.pixels import header_problem
from dq_lightning.sources.strip import TRANSFORM_NAMES
from dq_lightning.sources.targets import Targets, as_targets

_LISTS = ("samples", "_samples", "imgs", "_image_files")


def file_list(dataset: Any) -> str | None:
    """Name of the dataset's attribute that lists one file per sample; None when it has no such list with classes."""
    folder = "torchvision.datasets.folder", "DatasetFolder"
    is_folder = any((owner.__module__, owner.__name__) == folder for owner in type(dataset).__mro__)
    if not is_folder and not getter_module(dataset).startswith("torchvision.datasets."):
        return None
    for name in _LISTS:
        entries = getattr(dataset, name, None)
        if not isinstance(entries, list) or len(entries) != len(dataset) or not entries:
            continue
        first = entries[0]
        if isinstance(first, tuple) and len(first) == 2 and isinstance(first[0], str | os.PathLike):
            return name
        if isinstance(first, str | os.PathLike) and len(getattr(dataset, "_labels", ())) == len(entries):
            return name
    return None


def _opens_as_installed() -> bool:
    """Whether the functions of torchvision and Pillow that open files are the original ones."""
    from torchvision.datasets.folder import default_loader, pil_loader

    opening: tuple[Any, ...] = (default_loader, pil_loader, Image.open)
    return all(map(is_library, opening)) and not patches_of(Image.Image)


def _reads_pil_rgb(dataset: Any) -> bool:
    """Whether the dataset's own code is torchvision's and opens every file with Pillow, converted to RGB."""
    if not getter_module(dataset).startswith("torchvision.datasets.") or patches_of(type(dataset)):
        return False
    if not _opens_as_installed():
        return False
    if not hasattr(dataset, "loader"):
        # All torchvision classes that list image files with classes, and take no loader, read with Pillow as RGB.
        return True
    from torchvision import get_image_backend
    from torchvision.datasets.folder import default_loader, pil_loader

    loader = dataset.loader
    return loader is pil_loader or (loader is default_loader and str(get_image_backend()) == "PIL")  # type: ignore[no-untyped-call]


class FileSource(MapSource):
    """Adapter for datasets with one image file per sample, for which `file_list` names an attribute."""

    def __init__(self, dataset: Any, *options: Any) -> None:
        # These attributes are set first, because the base class reads them while it replaces the transforms.
        self._list = file_list(dataset) or ""
        self._standard = _reads_pil_rgb(dataset)
        self._state_beside: State | None = None
        self._exact = self._standard and reads_as_installed(dataset)
        super().__init__(dataset, *options)
        self.trusts_list = getter_module(dataset).startswith("torchvision.datasets.") and self.label_column is None

    def _paths(self) -> list[str]:
        entries = getattr(self.plain_dataset, self._list)
        return [os.fspath(entry[0] if isinstance(entry, tuple) else entry) for entry in entries]

    def path(self, index: int) -> str | None:
        entry = getattr(self.plain_dataset, self._list)[index]
        return os.fspath(entry[0] if isinstance(entry, tuple) else entry)

    def _root(self) -> str | None:
        root = getattr(self.plain_dataset, "root", None)
        return os.fspath(root) if isinstance(root, str | os.PathLike) else None

    def sample_id(self, index: int) -> str:
        path = self.path(index)
        assert path is not None
        return relative_paths([path], self._root())[0]

    def image_leaf(self) -> Leaf:
        # torchvision delivers (image, class). Looking into an item to find this would decode an image.
        return (0,) if self._standard and self.image_column is None else super().image_leaf()

    def target_leaf(self) -> Leaf | None:
        return (1,) if self._standard and self.label_column is None else super().target_leaf()

    def _listed(self) -> list[Any]:
        """The values that the dataset's lists hold for every file in addition to its path."""
        entries = getattr(self.plain_dataset, self._list)
        beside = [entry[1:] for entry in entries if isinstance(entry, tuple)]
        return beside or list(getattr(self.plain_dataset, "_labels", ()))

    def listed_targets(self) -> Targets | None:
        entries = getattr(self.plain_dataset, self._list)
        if isinstance(entries[0], tuple):
            names = getattr(self.plain_dataset, "classes", None)
            flat = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
            return as_targets([entry[1] for entry in entries], names if flat else None)
        return super().listed_targets()

    def decode_problem(self, index: int) -> str | None:
        path = self.path(index)
        return header_problem(path) if self._standard and path is not None else None

    def encoded(self, index: int) -> EncodedImage | None:
        path = self.path(index)
        if not self._standard or path is None:
            return None
        with self.explaining(index):
            return EncodedImage(Path(path).read_bytes(), "pil_rgb")

    def _file_digests(self, paths: list[str], memory: DigestMemory) -> list[str]:
        try:
            return memory.files(paths, skips=self.skips)
        except OSError as error:
            index = next((place for place, path in enumerate(paths) if not os.access(path, os.R_OK)), None)
            if index is None:
                raise
            with self.explaining(index):
                raise error

    def _beside(self) -> State:
        """The state of the dataset apart from the files: the user's code that reads them, and its attributes."""
        # The state is determined once, because reading may change the dataset and must not change its identity.
        if self._state_beside is None:
            view, known = self.plain_view(), {*_LISTS, *TRANSFORM_NAMES, "root"}
            root = self._root() or ""
            self._state_beside = find_state(view, self.given, self.sample_digest, without=known, root=root)
        return self._state_beside

    @property
    def by_items(self) -> bool:  # type: ignore[override]
        return not self._exact and (not _opens_as_installed() or bool(self._beside().unknown))

    def marks(self, *, fresh: bool) -> str:
        if not self.by_items:
            with contextlib.suppress(OSError):
                return digest_text(*map(file_stamp, self._paths()))
        return super().marks(fresh=fresh)

    def digest(self, memory: DigestMemory) -> str:
        if self.by_items:
            return super().digest(memory)
        paths = self._paths()
        targets = self.listed_targets()
        content = "\n".join(self._file_digests(paths, memory))
        reading = "" if self._exact else self._beside().digest
        # Values that are not classes are delivered too, so they are part of the identity.
        values = targets.values if targets is not None else digest_of(self._listed())
        return digest_of(
            "files", self.image_place(), "\n".join(relative_paths(paths, self._root())), values, content, reading
        )
