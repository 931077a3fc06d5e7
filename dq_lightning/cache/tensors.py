"""Features, bins, selections and scores as tensors in a folder: one file, `tensors.safetensors`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dq_lightning.cache.manifest import request_full_check
from dq_lightning.cache.tensor_files import read_tensor_file, write_tensor_file
from dq_lightning.core.errors import StoreError
from dq_lightning.core.records import Bins, Features, Selection, Suspects

TENSORS_FILE = "tensors.safetensors"
# The columns [N] of a record, each with its dtype.
_BINS = {"assignment": torch.int16, "rank": torch.int32, "gain": torch.float32, "group": torch.int32}
_SELECTION = {"index": torch.int64, "bin": torch.int16}
# Suspects may also be in these types, which `narrow` chooses.
_NARROW = {torch.int64: (torch.int8, torch.int16, torch.int32), torch.float64: (torch.float32,)}
_SUSPECTS = {"index": torch.int64, "score": torch.float64, "label": torch.int64, "suggested": torch.int64}


def write_tensor_folder(folder: Path, tensors: dict[str, Tensor], attributes: dict[str, Any]) -> None:
    """Write tensors and plain JSON attributes into a folder that holds no tensors yet; it is created when missing.

    Raises:
        StoreError: a dtype or a name cannot be stored.
        OSError: the file exists or cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tensor_file(folder / TENSORS_FILE, tensors, attributes)


def read_tensor_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the attributes of a folder; the tensors are as those of `read_tensor_file`.

    Raises:
        StoreError: the folder holds no tensors, or damaged ones.
    """
    try:
        return read_tensor_file(folder / TENSORS_FILE)
    except (OSError, StoreError) as error:
        raise _unusable(folder, str(error)) from error


def _unusable(folder: Path, reason: str) -> StoreError:
    request_full_check(folder)
    return StoreError(f"the tensors in {folder} cannot be used: {reason}. The next run over the data makes them again")


def _tensor(folder: Path, tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise StoreError(f"{folder} holds {', '.join(tensors) or 'nothing'}, but no {name}")
    return tensors[name]


def _columns(folder: Path, tensors: dict[str, Tensor], dtypes: dict[str, torch.dtype]) -> list[Tensor]:
    """Return the columns [N] with these names; StoreError if one is missing, or has another dtype or length."""
    found: list[Tensor] = []
    for name, dtype in dtypes.items():
        column = _tensor(folder, tensors, name)
        if column.ndim != 1 or column.dtype != dtype or (found and len(column) != len(found[0])):
            raise _unusable(folder, f"it holds a {name} of {column.dtype} {tuple(column.shape)}")
        found.append(column)
    return found


def _count(folder: Path, attributes: dict[str, Any], name: str) -> int:
    count = attributes.get(name, 0)
    if type(count) is not int or count < 0:
        raise _unusable(folder, f"it holds a {name} of {count!r:.40}")
    return count


def write_features(folder: Path, features: Features) -> None:
    """Write features as the tensors `embedding` and, where they exist, `head_gradient` and `unreadable`."""
    tensors = {"embedding": features.embedding}
    if features.head_gradient is not None:
        tensors["head_gradient"] = features.head_gradient
    if len(features.unreadable):
        tensors["unreadable"] = features.unreadable
    write_tensor_folder(folder, tensors, {})


def read_features(folder: Path) -> Features:
    """Read what `write_features` wrote; StoreError when it is damaged."""
    tensors, _ = read_tensor_folder(folder)
    unreadable = tensors.get("unreadable", torch.empty(0, dtype=torch.int64))
    return Features(_tensor(folder, tensors, "embedding"), tensors.get("head_gradient"), unreadable)


def write_bins(folder: Path, bins: Bins) -> None:
    """Write bins as four tensors and the number of bins, what was left out of them, and the scores if there are any."""
    tensors, attributes = _left_out(bins)
    if bins.score is not None:
        tensors["score"] = bins.score
    columns = {name: getattr(bins, name) for name in _BINS}
    write_tensor_folder(folder, columns | tensors, {"num_bins": bins.num_bins} | attributes)


def read_bins(folder: Path) -> Bins:
    """Read what `write_bins` wrote; StoreError when it is damaged."""
    tensors, attributes = read_tensor_folder(folder)
    assignment, rank, gain, group = _columns(folder, tensors, _BINS)
    num_bins = _count(folder, attributes, "num_bins")
    score = _columns(folder, tensors, {"score": torch.float64})[0] if "score" in tensors else None
    return Bins(assignment, rank, gain, group, num_bins, *_read_left_out(folder, tensors, attributes), score)


def write_selection(folder: Path, selection: Selection) -> None:
    """Write a selection as the tensors `index` and `bin`, and what was left out of it."""
    tensors, attributes = _left_out(selection)
    write_tensor_folder(folder, {"index": selection.index, "bin": selection.bin} | tensors, attributes)


def read_selection(folder: Path) -> Selection:
    """Read what `write_selection` wrote; StoreError when it is damaged."""
    tensors, attributes = read_tensor_folder(folder)
    index, bin_of_each = _columns(folder, tensors, _SELECTION)
    return Selection(index, bin_of_each, *_read_left_out(folder, tensors, attributes))


def _left_out(record: Bins | Selection) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and attributes for the unreadable samples and the suspects of a record; none if there are none."""
    attributes: dict[str, Any] = {"num_unreadable": record.num_unreadable} if record.num_unreadable else {}
    suspects = record.suspects
    if suspects is None:
        return {}, attributes
    names = None if suspects.names is None else list(suspects.names)
    tensors = {f"suspect_{name}": getattr(suspects, name) for name in _SUSPECTS}
    return tensors, attributes | {"suspects": {"names": names, "noise": suspects.noise}}


def _read_left_out(folder: Path, tensors: dict[str, Tensor], attributes: dict[str, Any]) -> tuple[int, Suspects | None]:
    """Return the number of unreadable samples and the suspects that `_left_out` described."""
    count, facts = _count(folder, attributes, "num_unreadable"), attributes.get("suspects")
    if facts is None:
        return count, None
    whole = isinstance(facts, dict) and {"names", "noise"} <= set(facts)
    if not whole or not isinstance(facts["names"], list | None) or not isinstance(facts["noise"], float | None):
        raise _unusable(folder, f"it holds suspects of {facts!r:.40}")
    dtypes = {f"suspect_{name}": dtype for name, dtype in _SUSPECTS.items()}
    for name, dtype in dtypes.items():
        if name in tensors and tensors[name].dtype in _NARROW[dtype]:
            tensors[name] = tensors[name].to(dtype)
    index, score, label, suggested = _columns(folder, tensors, dtypes)
    names = None if facts["names"] is None else tuple(map(str, facts["names"]))
    return count, Suspects(index, score, label, suggested, names, facts["noise"])


def narrow(suspects: Suspects) -> Suspects:
    """Return suspects that take a third of the bytes: whole numbers in the smallest type, scores rounded to 32 bits.

    `read_selection` returns them in their usual types.
    """

    def smallest(numbers: Tensor) -> Tensor:
        fits = (kind for kind in _NARROW[torch.int64] if torch.equal(numbers.to(kind).long(), numbers))
        return numbers.to(next(fits, torch.int64))

    score = suspects.score.float()
    return replace(
        suspects,
        index=smallest(suspects.index),
        score=score if bool(score.isfinite().all()) else suspects.score,
        label=smallest(suspects.label),
        suggested=smallest(suspects.suggested),
    )


def write_scores(folder: Path, scores: Tensor, sizes: Tensor) -> None:
    """Write the scores of patches as the tensors `scores` and `sizes`."""
    write_tensor_folder(folder, {"scores": scores, "sizes": sizes}, {})


def read_scores(folder: Path) -> tuple[Tensor, Tensor]:
    """Read what `write_scores` wrote: scores of one dimension, and sizes [M, 2]; StoreError when it is damaged."""
    tensors, _ = read_tensor_folder(folder)
    scores, sizes = (_tensor(folder, tensors, name) for name in ("scores", "sizes"))
    if scores.ndim != 1 or sizes.shape[1:] != (2,):
        raise _unusable(folder, "it holds scores or sizes of another shape")
    return scores, sizes
