"""Features, bins, selections and scores as tensors in a folder: one file, `tensors.safetensors`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dq_lightning.cache.manifest import request_full_check
from dq_lightning.cache.tensor_files import read_tensor_file, write_tensor_file
from dq_lightning.core.config import VerifyPolicy
from dq_lightning.core.errors import StoreError
from dq_lightning.core.records import Bins, Features, Selection, Suspects

TENSORS_FILE = "tensors.safetensors"
_SUSPECT_DTYPES = {"index": torch.int64, "score": torch.float64, "label": torch.int64, "suggested": torch.int64}


def write_tensor_folder(folder: Path, tensors: dict[str, Tensor], attributes: dict[str, Any]) -> None:
    """Write tensors and plain JSON attributes into a folder that holds no tensors yet; it is created when missing.

    Raises:
        StoreError: a dtype or a name cannot be stored.
        OSError: the file exists or cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tensor_file(folder / TENSORS_FILE, tensors, attributes)


def read_tensor_folder(folder: Path, verify: VerifyPolicy = "size") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the attributes of a folder; the tensors are as those of `read_tensor_file`.

    Raises:
        StoreError: the folder holds no tensors, or damaged ones.
    """
    try:
        return read_tensor_file(folder / TENSORS_FILE, verify=verify)
    except (OSError, StoreError) as error:
        request_full_check(folder)
        raise StoreError(
            f"the tensors in {folder} cannot be used: {error}. The next run over the data makes them again"
        ) from error


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
    request_full_check(folder)
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
