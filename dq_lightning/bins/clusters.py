"""k-means clusters of the features, which split a group that would be too large into smaller groups."""

import numpy as np
import torch
from numpy.typing import NDArray

from dq_lightning.bins.prepare import Prepared
from dq_lightning.bins.rows import StoredRows
from dq_lightning.core.errors import ConfigError

_ROUNDS = 20
# The centres are computed from this many rows for each cluster; more rows change them little.
_SAMPLE = 256


def cluster_members(prepared: Prepared, members: NDArray[np.int64], count: int, seed: int) -> list[NDArray[np.int64]]:
    """Split the members of a group into at most `count` clusters by Lloyd's k-means algorithm.

    The centres are computed from 256 rows for each cluster, and the assignment of all rows takes O(n count W) time.
    Memory is O(count W).

    Args:
        prepared: features of all samples; for the cosine their rows have length one.
        members: int64 [n], samples of the group, ascending.
        count: number of clusters wanted; it is reduced to the number of members if it is larger.
        seed: seed of the draw of the first centres.

    Returns:
        The members of every cluster that is not empty, ascending.

    Raises:
        ConfigError: the features have a head gradient, whose rows are not multiplied out.
    """
    rows = prepared.rows.only(torch.from_numpy(members))
    if len(rows.raw) > 1:
        raise ConfigError("clusters= needs plain embeddings; with head gradients pass your own labels= instead")
    count = min(count, len(members))
    if count <= 1:
        return [members]
    keys = np.random.PCG64(np.random.SeedSequence([seed, len(members)])).random_raw(len(members))
    sample = np.sort(np.argsort(keys, kind="stable")[: _SAMPLE * count])
    some = rows.only(torch.from_numpy(sample))
    centres = rows.take(torch.from_numpy(np.sort(np.argsort(keys, kind="stable")[:count]))).factors[0]
    for _ in range(_ROUNDS):
        sums, sizes = torch.zeros_like(centres), torch.zeros(len(centres), dtype=torch.float64, device=centres.device)
        start = 0
        nearest = _nearest(some, centres)
        for block in some.blocks():
            part = nearest[start : start + len(block)]
            sums.index_add_(0, part, block.factors[0])
            sizes.index_add_(0, part, torch.ones(len(block), dtype=torch.float64, device=centres.device))
            start += len(block)
        # A centre without rows does not move.
        moved = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1.0)[:, None], centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    label = _nearest(rows, centres).cpu().numpy()
    order = np.argsort(label, kind="stable")
    return [members[part] for part in np.split(order, np.flatnonzero(np.diff(label[order])) + 1)]


def _nearest(rows: StoredRows, centres: torch.Tensor) -> torch.Tensor:
    """Return the number of the nearest centre of each row, int64 [n]; the lowest number if several are nearest."""
    half = 0.5 * (centres * centres).sum(dim=1)
    return torch.cat([(block.against(centres) - half).argmax(dim=1) for block in rows.blocks()])
