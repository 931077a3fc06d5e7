"""Named tensors in one file, which any program that knows the format safetensors can read.

The metadata of the file hold one text of ours: JSON that contains a digest of itself (`files.seal`), and in it the dtype
and shape of every tensor, a crc32 of every 16 MiB of its bytes, and attributes. These checksums are compared when the
file is read, because bit rot in features would silently change the bins.
"""

import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dq_lightning.cache import files
from dq_lightning.cache.lock import host_name
from dq_lightning.core.errors import DQError, StoreError

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
METADATA, SEALED = "__metadata__", "dq_lightning"
CHUNK_BYTES, ALIGNMENT, MAX_HEADER_BYTES = 16 << 20, 8, 1 << 20


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> None:
    """Write a new file of tensors of any shape and device and of the dtypes in `DTYPES`, and of plain JSON attributes.

    Raises:
        StoreError: a dtype or a name cannot be stored.
        OSError: the file exists or cannot be written.
    """
    header: dict[str, Any] = {}
    facts, data, end = {}, [], 0
    # The largest elements come first, so that every tensor begins at a multiple of its element's size.
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        if tensor.dtype not in DTYPES or name == METADATA:
            raise StoreError(
                f"a tensor {name!r} of {tensor.dtype} cannot be stored: convert it to another dtype or name"
            )
        content = _bytes_of(tensor.detach().cpu().resolve_neg().contiguous())
        start, end = end, end + len(content)
        dtype, shape = DTYPES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        facts[name] = [dtype, shape, [zlib.crc32(chunk) for chunk in _chunks(content)]]
        data.append(content)
    header[METADATA] = {SEALED: files.seal({"tensors": facts, "attributes": dict(attributes)}).decode()}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with files.Writer(path) as file:
        file.write(len(text).to_bytes(ALIGNMENT, "little") + text)
        for content in data:
            for chunk in _chunks(content):
                file.write(chunk)


def replace_tensor_file(path: Path, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> None:
    """Write a file beside its place, make it durable and rename it, so that a file at `path` was written to its end.

    The arguments and errors are those of `write_tensor_file`, but the file may exist. A failure leaves nothing behind.
    """
    beside = path.with_name(f".tmp-{host_name()}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        write_tensor_file(beside, tensors, attributes)
        files.fsync_file(beside)
        files.replace(beside, path)
    except BaseException:
        files.remove(beside)
        raise


def read_tensor_file(
    path: Path, *, attributes: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the attributes of a file. The tensors are mapped; writing to them leaves the disk alone.

    Raises:
        StoreError: the file is damaged, made by others, or has other attributes than those that are given.
        OSError: the file cannot be opened.
    """
    with files.open_plain(path) as start:
        if not 0 < int.from_bytes(start.read(ALIGNMENT), "little") <= MAX_HEADER_BYTES:
            raise StoreError(f"{path.name} does not begin with the header of a safetensors file")
    try:
        with safe_open(path, "pt") as file:
            values = files.unseal((file.metadata() or {}).get(SEALED, "").encode(), path.name)
            if attributes is not None and values["attributes"] != attributes:
                raise StoreError(f"{path.name} belongs to other work, or was made from other data")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        facts = {name: [DTYPES.get(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
        if facts != {name: [dtype, shape] for name, (dtype, shape, _) in values["tensors"].items()}:
            raise StoreError(f"{path.name} does not hold the tensors that were written")
        for name, tensor in tensors.items():
            _compare(path, name, tensor, values["tensors"][name][2])
        return tensors, dict(values["attributes"])
    except (SafetensorError, DQError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise error if isinstance(error, StoreError) else StoreError(f"{path.name} cannot be read: {error}") from error


def _compare(path: Path, name: str, tensor: Tensor, checksums: Any) -> None:
    chunks = _chunks(_bytes_of(tensor))
    with ThreadPoolExecutor(4) if len(chunks) > 1 else nullcontext() as pool:
        if list((pool.map if pool else map)(zlib.crc32, chunks)) != checksums:
            raise StoreError(f"{name} in {path.name} has another content than was written")


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else memoryview(b"")


def _chunks(content: memoryview) -> list[memoryview]:
    return [content[start : start + CHUNK_BYTES] for start in range(0, len(content), CHUNK_BYTES)]
