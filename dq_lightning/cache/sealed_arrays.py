"""Named arrays in one file, which is sealed by a digest and tied to an identity.

    uint64 length of the header | header (JSON) | arrays, each padded to 8 bytes | sha256 of all that

The header holds the identity of the file, which a reader has to know, and the names, dtypes and shapes of the arrays.
All numbers are little-endian. A file is written beside its place, synced and renamed, so a file that exists was written
to its end.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_lightning.cache import files
from dq_lightning.cache.lock import host_name
from dq_lightning.core.arrays import plain_shape
from dq_lightning.core.errors import StoreError
from dq_lightning.core.resuming import Array

DTYPES = ("|u1", "<i4", "<i8", "<f4")
DIGEST_BYTES, ALIGNMENT, CHUNK_BYTES, MAX_HEADER_BYTES = 32, 8, 16 << 20, 1 << 20


def write_arrays(path: Path, identity: Any, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a file, replacing an existing one; its folder has to exist.

    Args:
        path: path of the file.
        identity: JSON value that a reader has to know.
        arrays: arrays of any shape, by name, whose dtypes are in `DTYPES`.

    Raises:
        StoreError: an array has another dtype, which is a programming error.
        OSError: the file cannot be written; nothing is left behind.
    """
    header = _header(identity, arrays)
    beside = path.with_name(f".tmp-{host_name()}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with files.Writer(beside) as file:
            file.write(header)
            for array in arrays.values():
                data = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                for at in range(0, len(data), CHUNK_BYTES):
                    file.write(data[at : at + CHUNK_BYTES])
                file.write(bytes(-len(data) % ALIGNMENT))
            file.write(bytes.fromhex(file.sha256()))
        files.fsync_file(beside)
        files.replace(beside, path)
    except BaseException:
        files.remove(beside)
        raise


def read_arrays(path: Path, identity: Any) -> dict[str, Array]:
    """Return the arrays of a file. All of it is read and compared with its digest first.

    Args:
        path: path of the file.
        identity: JSON value that the file has to carry.

    Raises:
        StoreError: the file is damaged, or has another identity.
        OSError: the file cannot be read.
    """
    try:
        with files.open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(ALIGNMENT)
            length = int.from_bytes(first, "little")
            if not 0 < length <= MAX_HEADER_BYTES:
                raise StoreError("it has no header")
            header = file.read(length)
            values = json.loads(header)
            if values["identity"] != identity:
                raise StoreError("it belongs to other work, or was made from other data")
            # The arrays are read only after the file size was checked, because a damaged header may claim any size.
            content = _content_bytes(values["arrays"])
            if size != ALIGNMENT + length + content + DIGEST_BYTES:
                raise StoreError("it is shorter or longer than what was written")
            data = np.fromfile(file, np.uint8, content)
            digest = hashlib.sha256(first + header)
            digest.update(data.data)
            if digest.digest() != file.read(DIGEST_BYTES):
                raise StoreError("its content is not what was written")
        return _arrays(data, values["arrays"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError, MemoryError) as error:
        raise StoreError(f"its header cannot be read ({type(error).__name__})") from error


def _content_bytes(listed: list[Any]) -> int:
    sizes = [math.prod(plain_shape(shape)) * np.dtype(_known(dtype)).itemsize for _, dtype, shape in listed]
    return sum(size + -size % ALIGNMENT for size in sizes)


def _known(dtype: Any) -> str:
    if dtype not in DTYPES:
        raise StoreError(f"it holds an array of {dtype!r:.40}")
    return str(dtype)


def _header(identity: list[Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    listed = []
    for name, array in arrays.items():
        if array.dtype.str not in DTYPES:
            raise StoreError(f"a file holds arrays of {', '.join(DTYPES)}, and {name} is {array.dtype.str}")
        listed.append([name, array.dtype.str, list(array.shape)])
    values = {"identity": identity, "arrays": listed}
    text = files.canonical_json(values).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(ALIGNMENT, "little") + text


def _arrays(data: NDArray[np.uint8], listed: list[Any]) -> dict[str, Array]:
    found: dict[str, Array] = {}
    at = 0
    for name, dtype, shape in listed:
        size = math.prod(plain_shape(shape)) * np.dtype(_known(dtype)).itemsize
        if size > len(data) - at:
            raise StoreError("its arrays are incomplete")
        found[str(name)] = data[at : at + size].view(dtype).reshape(plain_shape(shape))
        at += size + -size % ALIGNMENT
    return found
