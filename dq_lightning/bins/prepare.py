"""Examine every row of the features once before bins are made: check that it is finite, measure it, and hash it."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.bins.graph_cut.workers import Workers
from dq_lightning.bins.rows import StoredRows, row_lengths, wide_factor
from dq_lightning.core.errors import FeatureError
from dq_lightning.core.records import Features

_ROWS = 4096
# The squares of numbers beyond this power of two may leave the range of float64.
_SAFE_EXPONENT = 450


@dataclass(frozen=True, eq=False)
class Prepared:
    """Features together with what one pass over them has found.

    Attributes:
        rows: rows of all samples.
        longest: bound on the Euclidean length of a row.
        largest: bound on the absolute value of an entry of a row, after factors are multiplied out.
        marks: int64 [N], hash of each row; equal rows have equal hashes, and other rows almost never do.
        on_grid: whether there is one factor and all entries of its rows are multiples of 2**-10.
    """

    rows: StoredRows
    longest: float
    largest: float
    marks: NDArray[np.int64]
    on_grid: bool


def as_factors(features: Features | Tensor | NDArray[np.floating]) -> dict[str, Tensor]:
    """Return the matrices that samples are compared by, under their names.

    These are the embedding alone, or the head gradient followed by the embedding.

    Raises:
        FeatureError: the features are not a floating matrix.
    """
    if isinstance(features, Features):
        named = {"head_gradient": features.head_gradient, "embedding": features.embedding}
    elif isinstance(features, Tensor):
        named = {"features": features}
    else:
        array = np.asarray(features)
        if not np.issubdtype(array.dtype, np.floating):
            raise FeatureError(f"features must be a floating matrix [N, D], got {array.dtype} {array.shape}")
        # torch warns that it cannot protect read-only arrays; nothing here writes to them.
        named = {"features": torch.as_tensor(array) if array.flags.writeable else _read_only(array)}
    factors = {name: values.detach() for name, values in named.items() if values is not None}
    for name, values in factors.items():
        if values.ndim != 2 or not values.is_floating_point():
            raise FeatureError(f"{name} must be a floating matrix [N, width], got {values.dtype} {tuple(values.shape)}")
    return factors


def _read_only(array: NDArray[np.floating]) -> Tensor:
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.as_tensor(array)


def prepare(factors: dict[str, Tensor], *, unit: bool, device: torch.device, workers: Workers) -> Prepared:
    """Examine every row once.

    This takes O(N W) time for factors of W columns altogether, and 24 bytes of memory for each row.

    Args:
        factors: matrices that `as_factors` returns.
        unit: whether samples are compared by the cosine, so that rows are divided by their lengths.
        device: device that blocks are computed on.
        workers: threads that compute the blocks.

    Raises:
        FeatureError: some rows are not finite (the message counts them and names the first ones), or too long to be
            squared.
    """
    raw = tuple(_within_range(values) if unit else values for values in factors.values())
    total = len(raw[0])
    lengths = [torch.empty(total, dtype=torch.float64) for _ in raw]
    marks = torch.zeros(total, dtype=torch.int64)
    largest = [0.0] * len(raw)
    on_grid = [len(raw) == 1]

    def look(start: int) -> list[float]:
        samples = torch.arange(start, min(start + _ROWS, total))
        reach = [0.0] * len(raw)
        zero = torch.zeros(len(samples), dtype=torch.bool, device=device)
        mark = torch.zeros(len(samples), dtype=torch.int64, device=device)
        for number in range(len(raw)):
            values = wide_factor(raw, number, samples, device)
            length = row_lengths(values)
            lengths[number][samples] = length.cpu()
            if not unit and values.numel():
                reach[number] = float(values.abs().amax())
            zero |= length == 0
            if unit:
                values /= torch.where(length > 0, length, torch.ones_like(length))[:, None]
            mark = mark * 31 + _mark(values)
            # The first block decides for almost all features.
            if on_grid[0] and not bool((values * 1024.0 == (values * 1024.0).round()).all()):
                on_grid[0] = False
        marks[samples] = mark.masked_fill(zero, 0).cpu()
        return reach

    for reach in workers.map(look, range(0, total, _ROWS)):
        largest = [max(pair) for pair in zip(largest, reach, strict=True)]
    for (name, values), length in zip(factors.items(), lengths, strict=True):
        _check_finite(name, values, length)
    longest = float(np.prod([float(length.max()) if total else 0.0 for length in lengths]))
    scales = tuple(torch.where(length > 0, length, torch.ones_like(length)) for length in lengths) if unit else None
    rows = StoredRows(raw, scales, torch.arange(total), device, workers)
    if unit:
        longest, largest = 1.0 + 2.0**-40, [1.0]
    return Prepared(rows, longest, float(np.prod(largest)), marks.numpy(), on_grid[0])


def _within_range(values: Tensor) -> Tensor:
    """Scale float64 rows by powers of two where squares would overflow or vanish; the cosine stays the same."""
    if values.dtype != torch.float64 or not values.numel():
        return values
    exponent = torch.frexp(values.abs().amax(dim=1))[1]
    if int(exponent.abs().max()) < _SAFE_EXPONENT:
        return values
    half = torch.div(-exponent, 2, rounding_mode="floor")[:, None]
    return torch.ldexp(torch.ldexp(values, half), -exponent[:, None] - half)


def _mark(values: Tensor) -> Tensor:
    """Return a 64-bit hash [n] of float64 rows; 0.0 and -0.0 are the same."""
    bits = np.random.PCG64(0).random_raw(values.shape[1]).view(np.int64) | 1
    words = (values + 0.0).view(torch.int64)
    # The low bits of numbers with short fractions are zero, so the high bits are mixed in.
    return ((words ^ (words >> 29)) * torch.from_numpy(bits).to(values.device)).sum(dim=1)


def _check_finite(name: str, values: Tensor, length: Tensor) -> None:
    suspects = torch.nonzero(~torch.isfinite(length)).flatten()
    if not len(suspects):
        return
    bad = suspects[~torch.isfinite(values[suspects.to(values.device)]).all(dim=1).cpu()].tolist()
    if not bad:
        raise FeatureError(
            f"{name}: row {int(suspects[0])} is too long to be squared in float64; scale the features down"
        )
    first = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
    raise FeatureError(
        f"{name}: {len(bad)} of {len(values)} rows are not finite (rows {first}); look at those samples, or run the encoder "
        "in float32 if it overflows in half precision"
    )


def next_twins(prepared: Prepared, members: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Find equal rows among the members of a group.

    Args:
        prepared: features of all samples.
        members: int64 [n], samples of the group, ascending.

    Returns:
        int64 [n], for each member the index (0 to n - 1) of the next member with an equal row, or -1 if there is none;
        None if no two rows are equal.
    """
    marks = prepared.marks[members]
    order = np.argsort(marks, kind="stable")
    same = np.flatnonzero(marks[order[1:]] == marks[order[:-1]])
    if not len(same):
        return None
    twins = np.full(len(members), -1, dtype=np.int64)
    zero = marks[order[same]] == 0
    for start in range(0, len(same), _ROWS):
        part = slice(start, start + _ROWS)
        first, second = order[same[part]], order[same[part] + 1]
        pair = [prepared.rows.load(torch.from_numpy(members[side])).factors for side in (first, second)]
        equal = torch.stack([(a == b).all(dim=1) for a, b in zip(*pair, strict=True)]).all(dim=0)
        vanish = [torch.stack([(f == 0).all(dim=1) for f in side]).any(dim=0) for side in pair]
        equal = equal.cpu().numpy() | (zero[part] & (vanish[0] & vanish[1]).cpu().numpy())
        twins[first[equal]] = second[equal]
    return twins
