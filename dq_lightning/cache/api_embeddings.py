"""Storage for the embeddings that an API has returned: one file for each finished request, found by digests of texts.

    ROOT/0-paid/MODEL/KEYS-COUNT.rows    see `cache/tensor_files.py`; KEYS is the beginning of a digest of the texts

The files stay when the cache is pruned, because the embeddings were paid for.
"""

import hashlib
import logging
from collections.abc import Sequence
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


class StoredEmbeddings(dict[bytes, Rows]):
    """The embeddings that an API has returned for one model, float32 [D] by key, for several threads and processes.

    Embeddings in a damaged file are ignored, and requested again. The folder of the model is created when the first
    ones are stored; None stores nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        super().__init__()
        self._folder = folder
        if folder is not None:
            for path in sorted(folder.glob("*.rows")):
                self._read(path, folder.name)

    def record(self, keys: Sequence[bytes], rows: Rows) -> None:
        """Store the embeddings of a finished request, float32 [B, D], by the SHA-256 digests of its B texts.

        Raises:
            CacheError: they cannot be written, for example on a full disk; later ones could not be stored either.
        """
        if self._folder is None:
            return
        path = self._folder / f"{hashlib.sha256(b''.join(keys)).hexdigest()[:16]}-{len(keys)}.rows"
        digests = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), -1)
        with files.explained(path):
            files.make_folder(self._folder)
            replace_tensor_file(path, {"key": digests, "row": torch.from_numpy(rows)}, _identity(self._folder.name))
            files.fsync_folder(self._folder)

    def _read(self, path: Path, model: str) -> None:
        try:
            stored, _ = read_tensor_file(path, attributes=_identity(model))
            keys, rows = stored["key"].numpy(), stored["row"].numpy()
            if keys.ndim != 2 or rows.ndim != 2 or len(keys) != len(rows) or not np.isfinite(rows).all():
                raise StoreError("it does not hold rows of finite numbers with their keys")
        except (OSError, StoreError, KeyError, TypeError) as error:
            logger.warning("features: %s cannot be used (%s), so its embeddings are requested again", path, error)
            return
        self.update((key.tobytes(), row) for key, row in zip(keys, rows, strict=True))


def _identity(model: str) -> dict[str, str]:
    return {"format": FORMAT, "model": model}
