"""Storing tensors in a folder without pickle; they are memory-mapped when read.

`NAME.bin` holds each tensor's bytes in C order. `tensors.json`, which contains a digest of itself, holds dtype, shape,
attributes, and a crc32 of every 16 MiB. These checksums are verified when the tensors are loaded, because bit rot in
features would silently change the bins.
"""

import json
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dq_lightning.cache import files
from dq_lightning.cache.manifest import cast_doubt, is_plain_name
from dq_lightning.core.arrays import TENSOR_DTYPES, plain_shape
from dq_lightning.core.config import VerifyPolicy
from dq_lightning.core.errors import DQError, StoreError
from dq_lightning.core.records import Bins, Features, Selection, Suspects

TENSORS_FILE = "tensors.json"
FORMAT = "dq_lightning tensors"
FORMAT_VERSION = 1
CHUNK_BYTES = 16 << 20
_SUSPECT_DTYPES = {"index": torch.int64, "score": torch.float64, "label": torch.int64, "suggested": torch.int64}


def save_tensors(folder: str | Path, **tensors: Tensor) -> None:
    """Write tensors on the CPU or a GPU into a folder, under their names.

    Args:
        folder: folder that holds no tensors yet; created when it is missing.
        **tensors: tensors of any shape, of a dtype in `TENSOR_DTYPES`, by name.

    Raises:
        StoreError: a dtype or a name cannot be stored.
        OSError: a file exists or cannot be written.
    """
    write_tensor_folder(Path(folder), tensors, {})


def load_tensors(folder: str | Path, *, verify: VerifyPolicy = "size") -> dict[str, Tensor]:
    """Load the tensors of a folder by name. They are memory-mapped, and writing to them does not change the disk.

    Args:
        folder: folder that `save_tensors` wrote.
        verify: "off" skips the checksums; "size" and "hash" verify them.

    Raises:
        StoreError: the folder holds no tensors, or damaged ones.
    """
    return read_tensor_folder(Path(folder), verify)[0]


def write_tensor_folder(folder: Path, tensors: dict[str, Tensor], attributes: dict[str, Any]) -> None:
    """Write tensors and plain JSON attributes into a folder that holds no tensors yet.

    Raises:
        StoreError: a dtype or a name cannot be stored.
        OSError: a file exists or cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed = {}
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if not name.isidentifier() or dtype not in TENSOR_DTYPES:
            raise StoreError(f"a tensor {name!r} of {tensor.dtype} cannot be stored")
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1)
        data = memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
        pieces = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
        with files.Writer(folder / f"{name}.bin") as file:
            for piece in pieces:
                file.write(piece)
        listed[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "checksums": [zlib.crc32(piece) for piece in pieces],
        }
    values = {"format": FORMAT, "version": FORMAT_VERSION, "tensors": listed, "attributes": attributes}
    json.dumps(values, allow_nan=False)
    files.write_bytes(folder / TENSORS_FILE, files.seal(values))


def read_tensor_folder(folder: Path, verify: VerifyPolicy = "size") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the attributes of a folder.

    Raises:
        StoreError: the folder holds no tensors, or damaged ones.
    """
    try:
        values = files.read_sealed(folder / TENSORS_FILE)
        if values.get("format") != FORMAT or values.get("version") != FORMAT_VERSION:
            raise StoreError(
                f"its format is {values.get('format')!r:.40} version {values.get('version')!r:.40}, which is not known"
            )
        if not isinstance(values.get("tensors"), dict) or not isinstance(values.get("attributes"), dict):
            raise StoreError("tensors.json lacks tensors or attributes")
        tensors = {name: _load(folder, name, facts, verify) for name, facts in values["tensors"].items()}
    except (OSError, DQError) as error:
        cast_doubt(folder)
        raise StoreError(
            f"the tensors in {folder} cannot be used: {error}. The next run over the data makes them again"
        ) from error
    return tensors, values["attributes"]


def _load(folder: Path, name: str, facts: Any, verify: VerifyPolicy) -> Tensor:
    whole = isinstance(facts, dict) and facts.get("dtype") in TENSOR_DTYPES and isinstance(facts.get("checksums"), list)
    if not is_plain_name(name) or not whole:
        raise StoreError(f"tensors.json describes {name!r:.80} as {facts!r:.80}")
    dtype, shape = TENSOR_DTYPES[facts["dtype"]], plain_shape(facts.get("shape"))
    size, path = math.prod(shape) * dtype.itemsize, folder / f"{name}.bin"
    if path.stat().st_size != size:
        raise StoreError(f"{path.name} has {path.stat().st_size} bytes instead of {size}")
    if not size:
        return torch.empty(shape, dtype=dtype)
    data = np.memmap(path, np.uint8, "c")
    if verify != "off":
        starts = range(0, size, CHUNK_BYTES)
        with ThreadPoolExecutor(4) as pool:
            seen = list(pool.map(lambda start: zlib.crc32(data[start : start + CHUNK_BYTES].data), starts))
        if seen != facts["checksums"]:
            raise StoreError(f"{path.name} has another content than was written")
    return torch.from_numpy(data).view(dtype).reshape(shape)


def _expect(folder: Path, verify: VerifyPolicy, *names: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, attributes = read_tensor_folder(folder, verify)
    if missing := [name for name in names if name not in tensors]:
        raise StoreError(f"{folder} holds {', '.join(tensors) or 'nothing'}, but no {', '.join(missing)}")
    return tensors, attributes


def _check_columns(folder: Path, tensors: dict[str, Tensor], dtypes: dict[str, torch.dtype]) -> None:
    """Raise StoreError unless the tensors are columns [N] of these dtypes, all of the same length."""
    first = next(iter(dtypes))
    for name, dtype in dtypes.items():
        seen = tensors[name]
        if seen.ndim != 1 or seen.dtype != dtype or len(seen) != tensors[first].numel():
            raise _unfit(folder, f"a {name} of {seen.dtype} {tuple(seen.shape)}")


def _count(folder: Path, attributes: dict[str, Any], name: str) -> int:
    count = attributes.get(name, 0)
    if type(count) is not int or count < 0:
        raise _unfit(folder, f"a {name} of {count!r:.40}")
    return count


def _unfit(folder: Path, seen: str) -> StoreError:
    cast_doubt(folder)
    return StoreError(
        f"the tensors in {folder} cannot be used: it holds {seen}. The next run over the data makes them again"
    )


def write_features(folder: Path, features: Features) -> None:
    """Write features as the tensors `embedding` and, where they exist, `head_gradient` and `unreadable`."""
    tensors = {"embedding": features.embedding}
    if features.head_gradient is not None:
        tensors["head_gradient"] = features.head_gradient
    if len(features.unreadable):
        tensors["unreadable"] = features.unreadable
    write_tensor_folder(folder, tensors, {})


def read_features(folder: Path, *, verify: VerifyPolicy = "size") -> Features:
    """Read what `write_features` wrote; StoreError when it is damaged."""
    tensors, _ = _expect(folder, verify, "embedding")
    unreadable = tensors.get("unreadable", torch.empty(0, dtype=torch.int64))
    return Features(tensors["embedding"], tensors.get("head_gradient"), unreadable)


def write_bins(folder: Path, bins: Bins) -> None:
    """Write bins as four tensors and the number of bins, and suspects where there are any."""
    tensors = {"assignment": bins.assignment, "rank": bins.rank, "gain": bins.gain, "group": bins.group}
    doubtful, facts = _suspects(bins.suspects)
    write_tensor_folder(folder, tensors | doubtful, {"num_bins": bins.num_bins} | _skipped(bins.num_unreadable) | facts)


def read_bins(folder: Path, *, verify: VerifyPolicy = "size") -> Bins:
    """Read what `write_bins` wrote; StoreError when it is damaged."""
    tensors, attributes = _expect(folder, verify, "assignment", "rank", "gain", "group")
    facts = {"assignment": torch.int16, "rank": torch.int32, "gain": torch.float32, "group": torch.int32}
    _check_columns(folder, tensors, facts)
    counts = _count(folder, attributes, "num_bins"), _count(folder, attributes, "num_unreadable")
    four = (tensors["assignment"], tensors["rank"], tensors["gain"], tensors["group"])
    return Bins(*four, *counts, _read_suspects(folder, tensors, attributes))


def write_selection(folder: Path, selection: Selection) -> None:
    """Write a selection as the tensors `index` and `bin`, and suspects where there are any."""
    tensors = {"index": selection.index, "bin": selection.bin}
    doubtful, facts = _suspects(selection.suspects)
    write_tensor_folder(folder, tensors | doubtful, _skipped(selection.num_unreadable) | facts)


def read_selection(folder: Path, *, verify: VerifyPolicy = "size") -> Selection:
    """Read what `write_selection` wrote; StoreError when it is damaged."""
    tensors, attributes = _expect(folder, verify, "index", "bin")
    _check_columns(folder, tensors, {"index": torch.int64, "bin": torch.int16})
    count, suspects = _count(folder, attributes, "num_unreadable"), _read_suspects(folder, tensors, attributes)
    return Selection(tensors["index"], tensors["bin"], count, suspects)


def _suspects(suspects: Suspects | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and attributes that hold suspects; none of them for None."""
    if suspects is None:
        return {}, {}
    tensors = {f"suspect_{name}": getattr(suspects, name) for name in _SUSPECT_DTYPES}
    return tensors, {
        "suspects": {"names": None if suspects.names is None else list(suspects.names), "noise": suspects.noise}
    }


def _read_suspects(folder: Path, tensors: dict[str, Tensor], attributes: dict[str, Any]) -> Suspects | None:
    facts = attributes.get("suspects")
    if facts is None:
        return None
    dtypes = {f"suspect_{name}": dtype for name, dtype in _SUSPECT_DTYPES.items()}
    whole = isinstance(facts, dict) and {"names", "noise"} <= set(facts) and set(dtypes) <= set(tensors)
    if not whole or not isinstance(facts["names"], list | None) or not isinstance(facts["noise"], float | None):
        raise _unfit(folder, f"suspects of {facts!r:.40}")
    _check_columns(folder, tensors, dtypes)
    names = None if facts["names"] is None else tuple(map(str, facts["names"]))
    index, score, label, suggested = (tensors[name] for name in dtypes)
    return Suspects(index, score, label, suggested, names, facts["noise"])


def _skipped(count: int) -> dict[str, Any]:
    # The attribute is left out when it is zero, so that such entries keep the bytes that earlier versions wrote.
    return {"num_unreadable": count} if count else {}


def write_scores(folder: Path, scores: Tensor, sizes: Tensor) -> None:
    """Write the scores of patches as the tensors `scores` and `sizes`."""
    write_tensor_folder(folder, {"scores": scores, "sizes": sizes}, {})


def read_scores(folder: Path, *, verify: VerifyPolicy = "size") -> tuple[Tensor, Tensor]:
    """Read what `write_scores` wrote: scores of one dimension, and sizes [M, 2]; StoreError when it is damaged."""
    tensors, _ = _expect(folder, verify, "scores", "sizes")
    if tensors["scores"].ndim != 1 or tensors["sizes"].shape[1:] != (2,):
        raise _unfit(folder, "scores or sizes of another shape")
    return tensors["scores"], tensors["sizes"]
