"""Exact greedy graph cut of one large group, bin after bin, for similarities that are linear in the inner product."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.bins.exact import Array
from dq_lightning.bins.levels import Level, Levels
from dq_lightning.bins.plan import Room
from dq_lightning.bins.prepare import Prepared, next_twins
from dq_lightning.bins.referee import ROUNDING, Referee


def pick_group(
    prepared: Prepared,
    members: NDArray[np.int64],
    sizes: Sequence[int],
    *,
    lam: float,
    halved: bool,
    room: Room,
    tick: Callable[[int], object],
) -> tuple[NDArray[np.int64], Array]:
    """Pick all samples of a group, bin after bin.

    The gain of x is `lam * sum_j S[j, x] - 2 * sum_{s picked} S[s, x]` (Zhou et al. 2023, eq. 3). Here j runs over the
    samples that remained when the bin was begun, s runs over the picks of the bin so far, and S is a . b, or
    1/2 + (a . b)/2 if `halved`. For such a similarity `sum_j S[j, x]` is the inner product of x with one vector.

    Args:
        prepared: features of all samples.
        members: int64 [n], the samples of the group, ascending.
        sizes: number of samples in each bin.
        lam: weight of representativeness against diversity.
        halved: whether S is 1/2 + (a . b)/2.
        room: limits on the working arrays.
        tick: progress callback, called with the number of picks made, or a negative number of picks undone.

    Returns:
        Indices of the members (0 to n - 1) in the order of picking, int64 [n], and their gains, float64 [n].
    """
    rows = prepared.rows.only(torch.from_numpy(members))
    twins = next_twins(prepared, members)
    referee = Referee(rows, lam=lam, halved=halved, largest=prepared.largest)
    levels = Levels(referee, prepared.longest, twins, tick, room)
    # Equal samples share one row, which represents the lowest of them that is left.
    distinct = np.ones(len(members), dtype=bool)
    if twins is not None:
        distinct[twins[twins >= 0]] = False
    row = np.flatnonzero(distinct)
    samples = row.copy()
    vector, vector_error = _sum_of_rows(referee, prepared.longest)
    base = rows.only(torch.from_numpy(row)).against(vector)[:, 0]
    reach = prepared.longest * float(vector.norm())
    base_error = ROUNDING * (rows.depth + 4) * reach + prepared.longest * vector_error
    order: list[NDArray[np.int64]] = [row[:0]]
    values: list[Array] = [np.empty(0)]
    for size in sizes:
        if size == 0:
            continue
        left = referee.num_left
        start_error = lam * base_error
        stored = rows.only(torch.from_numpy(row))
        table = stored.take(torch.arange(len(row))) if len(row) * sum(rows.widths) <= room.rows else stored
        level = Level(table, samples, lam * base, start_error + ROUNDING * lam * reach)
        levels.forget()
        levels.reach = prepared.longest * (lam * left + 2.0 * size) * prepared.longest
        gains = levels.pick(level, size).gains
        order.append(referee.close_bin())
        values.append(0.5 * (lam * left - 2.0 * np.arange(size)) + 0.5 * gains if halved else gains)
        alive = level.gains > -torch.inf
        # The picks reduced each gain by twice the inner product of the row with the sum of the picks.
        base = (base - 0.5 * (lam * base - level.gains.to(base.device)))[alive.to(base.device)]
        base_error += 0.5 * (level.error - start_error) + 2.0 * ROUNDING * levels.reach
        keep = alive.cpu().numpy()
        row, samples = row[keep], level.samples[keep]
    return np.concatenate(order), np.concatenate(values)


def _sum_of_rows(referee: Referee, longest: float) -> tuple[Tensor, float]:
    """Return the sum of the rows of a group, [1, D] or [1, C, D + 1], and a bound on the length of its error.

    Rows with one factor are added exactly, because near ties need the exact sum. Rows with two factors are not
    multiplied out unless there are near ties, so their sum is computed as a product of matrices.
    """
    rows = referee.rows
    if len(rows.shape) == 1:
        return referee.left().rounded().reshape(1, *rows.shape).to(rows.device), 0.0
    ranges = rows.ranges()
    sums = list(rows.workers.map(lambda ends: rows.span(*ends).sum(), ranges))
    terms = max((last - first for first, last in ranges), default=0) + len(ranges) + 2
    return torch.stack(sums).sum(dim=0), ROUNDING * terms * len(rows) * longest
