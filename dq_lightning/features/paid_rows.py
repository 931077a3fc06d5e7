"""Embeddings that were paid for, one file a finished request, found again by the digest of their text. Touches the disk."""

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger("dq_lightning")
Array = NDArray[np.float32]


class PaidRows:
    """Rows by key, in memory and, if there is a folder, on disk. Safe to use from several threads and processes.

    A file is written under another name and renamed, so a cut write leaves nothing that is read. One that is damaged all
    the same is passed over: its rows are then paid for again.

    Args:
        folder: of one model; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._rows: dict[bytes, Array] = {}
        for path in sorted(folder.glob("*.npz")) if folder is not None and folder.is_dir() else ():
            self._read(path)

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def __getitem__(self, key: bytes) -> Array:
        return self._rows[key]

    def record(self, keys: Sequence[bytes], rows: Array) -> None:
        """Keep finished rows.

        Args:
            keys: sha256 of each text.
            rows: float32 [B, D].
        """
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(suffix=".partial", dir=self._folder)
        with os.fdopen(handle, "wb") as file:
            np.savez(file, key=np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1), row=rows)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(self._folder / f"{keys[0].hex()[:16]}-{len(keys)}.npz")

    def _read(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as stored:
                keys, rows = stored["key"], stored["row"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            logger.warning("features: passing over %s, which cannot be read (%s)", path, error)
            return
        self._rows.update((key.tobytes(), row) for key, row in zip(keys, rows, strict=True))
