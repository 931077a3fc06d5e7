"""Find near-duplicates among embeddings: rows that are close to an earlier row, which is kept in their place."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.bins.prepare import check_finite
from dq_lightning.bins.sizes import group_members, group_of_each
from dq_lightning.core.arrays import as_tensor
from dq_lightning.core.errors import ConfigError, FeatureError
from dq_lightning.core.fields import check_ratio
from dq_lightning.core.records import Bins

# This many rows are compared at a time, which makes 4 MiB of similarities.
_BLOCK = 1024
# The similarity of this many pairs is recomputed at a time, which takes 50 MiB in float64 for rows of 768 numbers.
_PAIRS = 4096
# The cosine of a row with its copy may differ from 1 by the rounding of their lengths.
_ROUNDING = 1e-12
# Bounds on cosines are tried with this many numbers a row, on this many rows.
_WIDTHS, _TRIED = (16, 32, 64, 128), 512
# To compute the cosine of one pair costs as much as those of this many pairs in a product of matrices.
_GATHERING = 128

Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]


def find_duplicates(
    features: NDArray[np.floating] | Tensor,
    threshold: float,
    *,
    labels: NDArray[np.generic] | Tensor | Sequence[int | str] | None = None,
    against: NDArray[np.floating] | Tensor | None = None,
) -> Tensor:
    """Find for each row the earliest kept row that it is a near-duplicate of.

    Rows are visited in order. A row is a near-duplicate if its cosine with an earlier kept row is at least the
    threshold (to within 1e-12), and it is kept otherwise. So every row that is left out is close to a kept row, and no
    two kept rows are close to each other. The cosine with a zero row is 0. Embeddings of images and of texts are
    treated alike; which threshold leaves out what one would call a copy depends on the encoder, so look at
    `near_pairs` first.

    Time is O(N M D) if M rows are kept; memory is O(N D), never N x N. Each block of rows is first compared by an upper
    bound on the cosine, from the 16 to 128 directions in which the rows are longest and the length of the rest, and
    the full cosine is computed only where that bound reaches the threshold. Cosines are computed in float32, and again
    in float64 where the float32 rounding error bound does not decide on which side of the threshold they lie, so the
    result is that of float64.

    Millions of rows take hours this way. Pass the numbers of k-means clusters as `labels` then: the time falls with the
    number of clusters, and near-duplicates on both sides of a border between clusters are not found.

    Args:
        features: floating matrix [N, D].
        threshold: smallest cosine of a near-duplicate, in (0, 1].
        labels: class of every sample as N integers or strings, within which rows are compared; None compares all rows.
        against: floating matrix [M, D] of another set, such as the validation set, to compare the rows with instead.

    Returns:
        int64 [N]: number of the lowest kept row that is close enough, or the row's own number if it is kept. The kept
        rows are those with `find_duplicates(x, t) == torch.arange(N)`. With `against`, the number of its lowest row that
        is close enough, or -1 if there is none.

    Raises:
        ConfigError: the threshold is out of range, or both `labels` and `against` are given.
        FeatureError: the features are not a floating matrix or hold values that are not finite, or the two sets differ
            in width.

    >>> find_duplicates(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]), 0.9).tolist()
    [0, 1, 0]
    >>> find_duplicates(torch.eye(2), 0.9, against=torch.tensor([[0.0, 5.0]])).tolist()
    [-1, 0]
    """
    check_ratio("find_duplicates", "threshold", threshold)
    values = _matrix(features, "features")
    if against is not None:
        if labels is not None:
            raise ConfigError("labels= and against= cannot be used together; compare the classes one by one")
        others = _matrix(against, "against")
        if others.shape[1] != values.shape[1]:
            raise FeatureError(f"features have {values.shape[1]} columns, and the rows of against= {others.shape[1]}")
        return _Search(torch.cat([others.cpu(), values.cpu()]), threshold).against_first(len(others))
    if labels is None:
        return _Search(values, threshold).run()
    of = torch.arange(len(values))
    for members in map(torch.from_numpy, group_members(group_of_each(labels, len(values)))):
        of[members] = members[_Search(values[members.to(values.device)], threshold).run()]
    return of


def near_pairs(
    features: NDArray[np.floating] | Tensor, of: Tensor, *, against: NDArray[np.floating] | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """List the pairs that `find_duplicates` has found, the closest first.

    Args:
        features: floating matrix [N, D].
        of: int64 [N], result of `find_duplicates` for these features.
        against: the other set, if `of` was made with one.

    Returns:
        Pairs int64 [P, 2] of a row and the row that it is a near-duplicate of, and their cosines float64 [P].

    Raises:
        FeatureError: `of` is of another number of rows, or the features are not a floating matrix.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    >>> near_pairs(x, find_duplicates(x, 0.9))
    (tensor([[2, 0]]), tensor([1.], dtype=torch.float64))
    """
    values = _matrix(features, "features", check=False)
    others = values if against is None else _matrix(against, "against", check=False)
    if len(of) != len(values):
        raise FeatureError(
            f"of= holds {len(of)} positions for {len(values)} rows of features: pass those that it was made of"
        )
    found = of >= 0 if against is not None else of != torch.arange(len(of))
    pairs = torch.stack([found.nonzero().flatten(), of[found]], dim=1)
    parts = [
        (_unit(values[some[:, 0].to(values.device)]) * _unit(others[some[:, 1].to(others.device)])).sum(dim=1)
        for some in torch.split(pairs, _PAIRS)
    ]
    cosine = torch.cat(parts)
    order = cosine.argsort(descending=True, stable=True)
    return pairs[order], cosine[order]


def spread_bins(bins: Bins, kept: Tensor, total: int) -> Bins:
    """Turn bins of M kept samples into bins of all N samples.

    Args:
        bins: bins of the M kept samples.
        kept: int64 [M], positions of the kept samples among all N, ascending.
        total: number N of all samples.

    Returns:
        Bins of N samples. The samples that are not kept have assignment -1, rank -1 and gain 0, and are never selected.
    """
    assignment, rank = torch.full((total,), -1, dtype=torch.int16), torch.full((total,), -1, dtype=torch.int32)
    gain, group = torch.zeros(total), torch.zeros(total, dtype=torch.int32)
    assignment[kept], rank[kept], gain[kept], group[kept] = bins.assignment, bins.rank, bins.gain, bins.group
    return Bins(assignment, rank, gain, group, bins.num_bins)


class _Search:
    """Compares rows block by block with the rows kept before.

    Args:
        values: floating [N, D], the features.
        threshold: smallest cosine of a near-duplicate.
    """

    def __init__(self, values: Tensor, threshold: float) -> None:
        self.values, self.limit = values, threshold - _ROUNDING
        self.single: NDArray[np.float32] = np.empty(values.shape, dtype=np.float32)
        for start in range(0, len(values), _BLOCK):
            self.single[start : start + _BLOCK] = _unit(values[start : start + _BLOCK]).float().numpy()
        # This bounds the error of a float32 inner product of two rounded unit vectors, summed in any order.
        self.error = (values.shape[1] + 4) * 2.0**-23
        self.bounds = self._bounds()

    def run(self) -> Tensor:
        """Return the result of `find_duplicates` without another set."""
        total = len(self.values)
        of = np.arange(total)
        kept = np.empty(total, dtype=np.int64)
        count = 0
        for start in range(0, total, _BLOCK):
            block = np.arange(start, min(start + _BLOCK, total))
            self._first_close(block, kept[:count], of)
            left = block[of[block] == block]
            stays = np.ones(len(left), dtype=bool)
            mine, theirs = self._close(left, left)
            earlier = theirs < mine
            mine, theirs = mine[earlier], theirs[earlier]
            places, begin = np.unique(mine, return_index=True)
            for place, nearby in zip(places, np.split(theirs, begin[1:]), strict=False):
                nearby = nearby[stays[nearby]]
                if len(nearby):
                    stays[place] = False
                    of[left[place]] = left[nearby[0]]
            kept[count : count + int(stays.sum())] = left[stays]
            count += int(stays.sum())
        return torch.from_numpy(of)

    def against_first(self, count: int) -> Tensor:
        """Return for each row but the first `count` the lowest of these that it is close to, or -1."""
        of = np.arange(len(self.values))
        for start in range(count, len(of), _BLOCK):
            self._first_close(np.arange(start, min(start + _BLOCK, len(of))), np.arange(count), of)
        return torch.from_numpy(np.where(of[count:] < count, of[count:], -1))

    def _first_close(self, block: NDArray[np.int64], kept: NDArray[np.int64], of: NDArray[np.int64]) -> None:
        """Set `of` for the rows of a block that are close to some of the rows `kept`."""
        for first in range(0, len(kept), _BLOCK):
            some, left = kept[first : first + _BLOCK], block[of[block] == block]
            mine, theirs = self._close(left, some)
            places, begin = np.unique(mine, return_index=True)
            of[left[places]] = some[theirs[begin]]

    def _close(self, rows: NDArray[np.int64], others: NDArray[np.int64]) -> Pairs:
        """Return which of the rows are close to which of the others, as places in both, in ascending order."""
        # NumPy computes the product, because the user may have reduced the precision of torch's
        # (set_float32_matmul_precision), which also applies to the CPU.
        wanted = self.limit - self.error
        if self.bounds is not None:
            mine, theirs = _at_least(self.bounds[rows] @ self.bounds[others].T, wanted)
            if len(mine) * _GATHERING < len(rows) * len(others):
                parts = [slice(start, start + _PAIRS) for start in range(0, len(mine), _PAIRS)]
                cosine = [
                    np.einsum("ij,ij->i", self.single[rows[mine[part]]], self.single[others[theirs[part]]])
                    for part in parts
                ]
                return self._decided(rows, others, mine, theirs, np.concatenate([np.empty(0, np.float32), *cosine]))
        product = self.single[rows] @ self.single[others].T
        mine, theirs = _at_least(product, wanted)
        return self._decided(rows, others, mine, theirs, product[mine, theirs])

    def _decided(
        self,
        rows: NDArray[np.int64],
        others: NDArray[np.int64],
        mine: NDArray[np.int64],
        theirs: NDArray[np.int64],
        cosine: NDArray[np.float32],
    ) -> Pairs:
        close = cosine >= self.limit + self.error
        doubtful = np.flatnonzero((cosine >= self.limit - self.error) & ~close)
        device = self.values.device
        for start in range(0, len(doubtful), _PAIRS):
            part = doubtful[start : start + _PAIRS]
            left, right = (torch.from_numpy(side).to(device) for side in (rows[mine[part]], others[theirs[part]]))
            exact = (_unit(self.values[left]) * _unit(self.values[right])).sum(dim=1)
            close[part] = (exact >= self.limit).numpy()
        return mine[close], theirs[close]

    def _bounds(self) -> NDArray[np.float32] | None:
        """Return rows whose inner products are at least the cosines, float32 [N, k + 1], or None if they save nothing.

        With orthonormal directions, a . b is the inner product of the parts along k of them plus that of the rest, which
        is at most the product of the lengths of the rest.
        """
        total, width = self.single.shape
        if total <= 2 * _BLOCK or width <= 2 * _WIDTHS[0]:
            return None
        sample = self.single[:: -(-total // _TRIED)].astype(np.float64)
        directions = np.linalg.svd(sample, full_matrices=False)[2].T
        best, least = 0, float(width)
        for count in _WIDTHS:
            if 2 * count <= min(width, directions.shape[1]):
                some = _parts(sample, directions[:, :count])
                reached = float(np.mean((some @ some.T)[~np.eye(len(some), dtype=bool)] >= self.limit))
                if (cost := count + 1 + _GATHERING * reached * width) < least:
                    best, least = count, cost
        if not best:
            return None
        bounds = np.empty((total, best + 1), dtype=np.float32)
        for start in range(0, total, _BLOCK):
            part = slice(start, start + _BLOCK)
            bounds[part] = _parts(self.single[part].astype(np.float64), directions[:, :best])
        return bounds


def _parts(rows: NDArray[np.float64], directions: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the parts of the rows along orthonormal directions, and the lengths of the rest, float32 [n, k + 1]."""
    along = rows @ directions
    rest = np.sqrt(np.maximum(0.0, (rows * rows).sum(axis=1) - (along * along).sum(axis=1)))
    # The rest is rounded up by more than its error, which is below 2**-23: float64's, after the square root, and that of
    # the rounding to float32. The error of a product of two such rows is below the one that `_close` allows for, because
    # k is at most half of the width.
    return np.concatenate([along, (rest + 2.0**-22)[:, None]], axis=1).astype(np.float32)


def _at_least(product: NDArray[np.float32], limit: float) -> Pairs:
    """Return the places of all entries that are at least the limit, row by row."""
    # Most rows reach it nowhere, and finding their maximum is much faster than finding places.
    rows = np.flatnonzero(product.max(axis=1, initial=-1.0) >= limit)
    mine, theirs = np.nonzero(product[rows] >= limit)
    return rows[mine], theirs


def _matrix(features: NDArray[np.floating] | Tensor, name: str, *, check: bool = True) -> Tensor:
    values = features if isinstance(features, Tensor) else as_tensor(np.asarray(features))
    if values.ndim != 2 or not values.is_floating_point():
        raise FeatureError(f"{name} must be a floating matrix [N, D], got {values.dtype} {tuple(values.shape)}")
    if check:
        parts = [part.isfinite().all(dim=1).cpu() for part in torch.split(values, _BLOCK)]
        check_finite(name, torch.cat(parts))
    return values


def _unit(rows: Tensor) -> Tensor:
    """Return the rows scaled to length one, in float64 on the CPU; zero rows stay zero."""
    wide = rows.double().cpu()
    # Dividing by the largest entry first keeps squares of tiny or huge numbers from vanishing or overflowing.
    wide = wide / wide.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    return wide / torch.where(length > 0, length, torch.ones_like(length))
