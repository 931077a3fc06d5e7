"""k-means: clusters that split a group of samples, and many of them quickly, to compare a selection with."""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from dq_lightning.bins.prepare import Prepared
from dq_lightning.core.errors import ConfigError

NEEDS_EMBEDDINGS = "clusters= needs plain embeddings; with head gradients pass your own labels= instead"

Rows = NDArray[np.float32]

_ROUNDS = 10
# If more clusters than this are wanted, coarse clusters are found first, and then each one is split.
_FLAT = 256
_BLOCK_ENTRIES = 1 << 22
# The centres that split a group are computed from this many rows for each cluster; more rows change them little.
_SAMPLE = 256


def cluster_members(prepared: Prepared, members: NDArray[np.int64], count: int, seed: int) -> list[NDArray[np.int64]]:
    """Split the members of a group into at most `count` clusters by k-means.

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
        raise ConfigError(NEEDS_EMBEDDINGS)
    count = min(count, len(members))
    if count <= 1:
        return [members]
    # Squares of rows that are at most 1 long cannot overflow.
    longest = prepared.longest or 1.0
    keys = np.random.PCG64(np.random.SeedSequence([seed, len(members)])).random_raw(len(members))
    sample = rows.take(torch.from_numpy(np.sort(np.argsort(keys, kind="stable")[: _SAMPLE * count])))
    centres, _ = kmeans((sample.factors[0] / longest).float().cpu().numpy(), count, seed)
    parts = [nearest((block.factors[0] / longest).float().cpu().numpy(), centres) for block in rows.blocks()]
    label = np.concatenate(parts)
    order = np.argsort(label, kind="stable")
    return [members[part] for part in np.split(order, np.flatnonzero(np.diff(label[order])) + 1)]


def kmeans(rows: Rows, count: int, seed: int = 0) -> tuple[Rows, NDArray[np.int64]]:
    """Split rows into clusters by ten rounds of Lloyd's algorithm with squared Euclidean distance.

    Up to 256 clusters are found directly. More are found in two steps: about sqrt(count) coarse clusters, then inside
    each of them a number of clusters in proportion to its rows. This reduces a round from O(N count D) to O(N
    sqrt(count) D).

    Args:
        rows: float32 [N, D].
        count: number of clusters, 1 to N.
        seed: seed of the choice of rows that are the first centres.

    Returns:
        Centres float32 [count, D], and the cluster of every row, int64 [N]. A cluster may be empty if rows are equal.
    """
    if count <= _FLAT:
        return _lloyd(rows, count, np.random.SeedSequence([seed, 0]))
    _, coarse = _lloyd(rows, round(math.sqrt(count)), np.random.SeedSequence([seed, 0]))
    # Rounded running sums, so that no cluster is given more centres than it has rows.
    shares = np.diff(np.cumsum(np.bincount(coarse)) * count // len(rows), prepend=0).tolist()
    centres, label, given = [], np.zeros(len(rows), np.int64), 0
    for number, wanted in enumerate(shares):
        members = np.flatnonzero(coarse == number)
        # A coarse cluster that is too small for a cluster of its own joins the nearest centre below.
        if wanted == 0:
            label[members] = -1
            continue
        found, inside = _lloyd(rows[members], wanted, np.random.SeedSequence([seed, 1, number]))
        centres.append(found)
        label[members] = inside + given
        given += wanted
    together = np.concatenate(centres)
    left = np.flatnonzero(label < 0)
    label[left] = nearest(rows[left], together)
    return together, label


def nearest(rows: Rows, centres: Rows) -> NDArray[np.int64]:
    """Return the nearest centre of every row, int64 [N]; among equally near centres the one with the lowest number.

    Args:
        rows: float32 [N, D].
        centres: float32 [C, D], at least one.
    """
    half = 0.5 * np.einsum("ij,ij->i", centres, centres)
    step = max(1, _BLOCK_ENTRIES // len(centres))
    found = [np.argmax(rows[start : start + step] @ centres.T - half, axis=1) for start in range(0, len(rows), step)]
    return np.concatenate([np.empty(0, np.int64), *found])


def _lloyd(rows: Rows, count: int, entropy: np.random.SeedSequence) -> tuple[Rows, NDArray[np.int64]]:
    keys = np.random.PCG64(entropy).random_raw(len(rows))
    centres = rows[np.sort(np.argsort(keys, kind="stable")[:count])]
    label = nearest(rows, centres)
    for _ in range(_ROUNDS):
        order = np.argsort(label, kind="stable")
        sizes = np.bincount(label, minlength=count)
        filled = np.flatnonzero(sizes)
        sums = np.add.reduceat(rows[order], np.cumsum(sizes)[filled] - sizes[filled], axis=0)
        # A centre without rows stays where it is.
        centres = centres.copy()
        centres[filled] = sums / sizes[filled, None].astype(np.float32)
        again = nearest(rows, centres)
        if np.array_equal(again, label):
            break
        label = again
    return centres, label
