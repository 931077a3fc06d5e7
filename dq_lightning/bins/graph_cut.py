"""Exact greedy graph cut over a linear kernel, bin after bin, in one group. PURE."""

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

    The gain of x is `lam * sum_j S[j, x] - 2 * sum_{s picked} S[s, x]` (Zhou et al. 2023, eq. 3): j runs over what remained
    when the bin was begun, s over the bin's picks so far, and S is a . b, or 1/2 + (a . b)/2 when `halved`. For such a kernel
    `sum_j S[j, x]` is x times one vector.

    Args:
        prepared: features of all samples.
        members: int64 [n], the samples of the group, ascending.
        sizes: of the bins.
        lam: weight of representativeness against diversity.
        halved: whether S is 1/2 + (a . b)/2.
        room: for working arrays.
        tick: told how many picks were made, or taken back (negative).

    Returns:
        The n members' numbers in the order of picking, and their gains.
    """
    rows = prepared.rows.only(torch.from_numpy(members))
    twins = next_twins(prepared, members)
    referee = Referee(rows, lam=lam, halved=halved, largest=prepared.largest)
    levels = Levels(referee, prepared.longest, twins, tick, room)
    # equal samples are one row, which stands for the lowest of them that is left
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
        # what the picks took from each gain is twice its inner product with their sum
        base = (base - 0.5 * (lam * base - level.gains.to(base.device)))[alive.to(base.device)]
        base_error += 0.5 * (level.error - start_error) + 2.0 * ROUNDING * levels.reach
        keep = alive.cpu().numpy()
        row, samples = row[keep], level.samples[keep]
    return np.concatenate(order), np.concatenate(values)


def _sum_of_rows(referee: Referee, longest: float) -> tuple[Tensor, float]:
    """The sum of a group's rows, [1, D] or [1, C, D + 1], and a bound on the length of its error.

    Vectors of one factor are added exactly, as near ties need them. The others are never written out as long as there are no
    near ties, so their sum is a product of matrices.
    """
    rows = referee.rows
    if len(rows.shape) == 1:
        return referee.left().rounded().reshape(1, *rows.shape).to(rows.device), 0.0
    ranges = rows.ranges()
    sums = list(rows.workers.map(lambda ends: rows.span(*ends).sum(), ranges))
    terms = max((last - first for first, last in ranges), default=0) + len(ranges) + 2
    return torch.stack(sums).sum(dim=0), ROUNDING * terms * len(rows) * longest
