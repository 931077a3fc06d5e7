"""Examine every row of the features once before bins are made: check that it is finite, measure it, and hash it."""

import math
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.bins.graph_cut.exact import two_product
from dq_lightning.bins.graph_cut.workers import Workers
from dq_lightning.bins.rows import StoredRows, row_lengths, wide_factor
from dq_lightning.core.arrays import as_tensor
from dq_lightning.core.errors import FeatureError
from dq_lightning.core.records import Features

_ROWS = 1024
# The squares of numbers beyond this power of two may leave the range of float64.
_SAFE_EXPONENT = 450
# Entries may be whole multiples of this number, or of the smallest of them, if its size is not extreme.
_FRACTION, _SENSIBLE = 2.0**-10, (1e-100, 1e100)


@dataclass(frozen=True, eq=False)
class Prepared:
    """Features together with what one pass over them has found.

    Attributes:
        rows: rows of all samples.
        longest: bound on the Euclidean length of a row.
        largest: bound on the absolute value of an entry of a row, after factors are multiplied out.
        marks: int64 [N], hash of each row; equal rows have equal hashes, and other rows almost never do.
        step: number that all entries of all rows are whole multiples of, exactly, such as 1 for one-hot rows and
            0.7071... for the cosine of rows that have two ones; 0.0 if none was found, or if there are two factors.
    """

    rows: StoredRows
    longest: float
    largest: float
    marks: NDArray[np.int64]
    step: float


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
        named = {"features": as_tensor(array)}
    factors = {name: values.detach() for name, values in named.items() if values is not None}
    for name, values in factors.items():
        if values.ndim != 2 or not values.is_floating_point():
            raise FeatureError(f"{name} must be a floating matrix [N, width], got {values.dtype} {tuple(values.shape)}")
    return factors


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
    step = 0.0

    def look(start: int) -> tuple[list[float], int]:
        nonlocal step
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
        if start == 0 and len(raw) == 1:
            step = _possible_step(values)
        divisor = _divisor(values, step) if step else 0
        if not divisor:
            # The first block decides for almost all features.
            step = 0.0
        marks[samples] = mark.masked_fill(zero, 0).cpu()
        return reach, divisor

    common = 0
    for reach, divisor in chain([look(0)], workers.map(look, range(_ROWS, total, _ROWS))):
        largest = [max(pair) for pair in zip(largest, reach, strict=True)]
        common = math.gcd(common, divisor)
    for (name, values), length in zip(factors.items(), lengths, strict=True):
        _check_finite(name, values, length)
    longest = float(np.prod([float(length.max()) if total else 0.0 for length in lengths]))
    scales = tuple(torch.where(length > 0, length, torch.ones_like(length)) for length in lengths) if unit else None
    rows = StoredRows(raw, scales, torch.arange(total), device, workers)
    if unit:
        longest, largest = 1.0 + 2.0**-40, [1.0]
    return Prepared(rows, longest, float(np.prod(largest)), marks.numpy(), step * common)


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


def _possible_step(values: Tensor) -> float:
    """Return the one number that all entries may be whole multiples of, or 0.0 if there is none."""
    if _divisor(values, _FRACTION):
        return _FRACTION
    least = float(values.abs().masked_fill(values == 0, torch.inf).min())
    return least if _SENSIBLE[0] < least < _SENSIBLE[1] else 0.0


def _divisor(values: Tensor, step: float) -> int:
    """Return a common divisor of the whole numbers that `step` has to be multiplied by to give all values exactly.

    It is the greatest one, or 1 if all values are zero. The result is 0 if some value is no such multiple.
    """
    if len(values) > 16 and not _divisor(values[:16], step):
        return 0
    multiples = values / step
    if not bool(((multiples == multiples.round()) & (multiples.abs() < 2.0**26)).all()):
        return 0
    whole = multiples.cpu().numpy()
    product, error = two_product(whole, step)
    if error.any() or (product != values.cpu().numpy()).any():
        return 0
    return int(np.gcd.reduce(whole.astype(np.int64), axis=None)) or 1


def _check_finite(name: str, values: Tensor, length: Tensor) -> None:
    suspects = torch.nonzero(~torch.isfinite(length)).flatten()
    if not len(suspects):
        return
    finite = torch.ones(len(values), dtype=torch.bool)
    finite[suspects] = torch.isfinite(values[suspects.to(values.device)]).all(dim=1).cpu()
    if finite.all():
        raise FeatureError(
            f"{name}: row {int(suspects[0])} is too long to be squared in float64; scale the features down"
        )
    check_finite(name, finite)


def check_finite(name: str, finite: Tensor) -> None:
    """Raise a FeatureError that counts and names the rows of a matrix that are not finite, of bool [N]."""
    bad = torch.nonzero(~finite).flatten().tolist()
    if bad:
        first = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
        raise FeatureError(
            f"{name}: {len(bad)} of {len(finite)} rows are not finite (rows {first}), but hold NaN or infinity; look at those "
            "samples, or run the encoder in float32 if it overflows in half precision"
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
