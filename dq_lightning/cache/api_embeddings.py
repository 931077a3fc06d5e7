"""Storage for the embeddings that an API has returned: one file for each finished request, found by digests of texts.

    ROOT/0-paid/MODEL/KEYS-COUNT.rows    see `cache/tensor_files.py`; KEYS is the beginning of a digest of the texts

The files stay when the cache is pruned, because the embeddings were paid for.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dq_lightning.cache import files
from dq_lightning.cache.tensor_files import read_tensor_file, replace_tensor_file
from dq_lightning.core.errors import StoreError

logger = logging.getLogger("dq_lightning")

API_FOLDER = "0-paid"
FORMAT = "dq_lightning paid rows 2"
Rows = NDArray[np.float32]


def api_embeddings_in(root: Path) -> Callable[[str], "StoredEmbeddings"]:
    """Return a function that opens the stored embeddings of a model, whose name must be usable in a path.

    Args:
        root: folder of the embeddings of all models, created when the first ones are stored.
    """
    return lambda model: StoredEmbeddings(root / model)


class StoredEmbeddings:
    """The embeddings that an API has returned for one model; implements `resuming.ApiEmbeddings`.

    Embeddings in a damaged file are ignored, and requested again.

    Args:
        folder: folder of the model.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: dict[bytes, Rows] = {}
        for path in sorted(folder.glob("*.rows")):
            self._read(path)

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def __getitem__(self, key: bytes) -> Rows:
        return self._rows[key]

    def record(self, keys: Sequence[bytes], rows: Rows) -> None:
        """Store the embeddings of a finished request, as in `resuming.ApiEmbeddings`.

        Raises:
            CacheError: they cannot be written, for example on a full disk; later ones could not be stored either.
        """
        path = self._folder / f"{hashlib.sha256(b''.join(keys)).hexdigest()[:16]}-{len(keys)}.rows"
        digests = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), -1)
        with files.explained(path):
            files.make_folder(self._folder)
            replace_tensor_file(path, {"key": digests, "row": torch.from_numpy(rows)}, self._identity)
            files.fsync_folder(self._folder)

    @property
    def _identity(self) -> dict[str, str]:
        return {"format": FORMAT, "model": self._folder.name}

    def _read(self, path: Path) -> None:
        try:
            stored, _ = read_tensor_file(path, attributes=self._identity)
            keys, rows = stored["key"].numpy(), stored["row"].numpy()
            if keys.ndim != 2 or rows.ndim != 2 or len(keys) != len(rows) or not np.isfinite(rows).all():
                raise StoreError("it does not hold rows of finite numbers with their keys")
        except (OSError, StoreError, KeyError, TypeError) as error:
            logger.warning("features: %s cannot be used (%s), so its embeddings are requested again", path, error)
            return
        self._rows.update((key.tobytes(), row) for key, row in zip(keys, rows, strict=True))
