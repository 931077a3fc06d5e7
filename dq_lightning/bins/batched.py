"""Exact greedy graph cut of many small groups at the same time, with one matrix of inner products for each group."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.bins.exact import Array
from dq_lightning.bins.plan import Room
from dq_lightning.bins.prepare import Prepared
from dq_lightning.bins.referee import ROUNDING, Referee
from dq_lightning.bins.sizes import bin_sizes

Picked = tuple[NDArray[np.int64], NDArray[np.int64], Array]


def pick_groups(
    prepared: Prepared,
    groups: Sequence[NDArray[np.int64]],
    num_bins: int,
    *,
    lam: float,
    halved: bool,
    room: Room,
    tick: Callable[[int], object],
) -> Iterator[Picked]:
    """Pick all samples of every group, as `graph_cut.pick_group` does for one.

    Args:
        prepared: features of all samples.
        groups: members of each group, int64, ascending.
        num_bins: number K of bins.
        lam: weight of representativeness against diversity.
        halved: whether S is 1/2 + (a . b)/2.
        room: limits on the matrices of one batch of groups.
        tick: progress callback, called with the number of picks made.

    Yields:
        For each group its members, their indices within the group in the order of picking, and their gains.
    """
    waiting = sorted(groups, key=len)
    while waiting:
        # Groups of similar size share a batch, so that there is little padding.
        count = 1
        while count < len(waiting) and (count + 1) * len(waiting[-1]) ** 2 <= room.matrix:
            count += 1
        batch, waiting = waiting[-count:], waiting[:-count]
        yield from _Batch(prepared, batch, num_bins, lam=lam, halved=halved).run(tick)


class _Batch:
    """A batch of B groups of at most n samples, with matrices [B, n, n] and gains [B, n].

    Groups of fewer than n samples are padded with zero rows.
    """

    def __init__(
        self, prepared: Prepared, groups: Sequence[NDArray[np.int64]], num_bins: int, *, lam: float, halved: bool
    ) -> None:
        self._prepared, self._groups, self._lam, self._halved = prepared, groups, lam, halved
        lengths = torch.tensor([len(members) for members in groups])
        self._sizes = torch.tensor([bin_sizes(len(members), num_bins) for members in groups])
        rows = prepared.rows.load(torch.from_numpy(np.concatenate(groups)))
        device, longest = rows.factors[0].device, int(lengths.max())
        self._valid = (torch.arange(longest) < lengths[:, None]).to(device)
        self._doubled = torch.full((len(groups), longest, longest), 2.0, dtype=torch.float64, device=device)
        for factor in rows.factors:
            padded = torch.zeros(len(groups), longest, factor.shape[1], dtype=torch.float64, device=device)
            padded[self._valid] = factor
            self._doubled *= padded @ padded.mT
        self._square = prepared.longest**2
        self._product_error = ROUNDING * (prepared.rows.depth + 4) * self._square
        self._base = 0.5 * self._doubled.sum(dim=1)
        self._base_error = longest * (self._product_error + ROUNDING * longest * self._square)
        self._order: list[list[NDArray[np.int64]]] = [[] for _ in groups]
        self._values: list[list[Array]] = [[] for _ in groups]
        self._referees: dict[int, Referee] = {}

    def run(self, tick: Callable[[int], object]) -> Iterator[Picked]:
        """Make all bins of all groups and yield the result of each group."""
        alive = self._valid.clone()
        for number in range(self._sizes.shape[1]):
            wanted = self._sizes[:, number]
            gains = torch.where(alive, self._lam * self._base, -torch.inf)
            gains, error = self._one_bin(gains, wanted)
            left = gains > -torch.inf
            self._base = torch.where(left, self._base - 0.5 * (self._lam * self._base - gains), self._base)
            self._base_error += 0.5 * (error - self._lam * self._base_error) + ROUNDING * self._reach(int(wanted.max()))
            alive = left
            tick(int(wanted.sum()))
        for members, order, values in zip(self._groups, self._order, self._values, strict=True):
            yield members, np.concatenate(order), np.concatenate(values)

    def _reach(self, picks: int) -> float:
        """Return a bound on the absolute value of a gain after `picks` picks of a bin."""
        return self._square * (self._lam * self._valid.shape[1] + 2.0 * picks)

    def _one_bin(self, gains: Tensor, wanted: Tensor) -> tuple[Tensor, float]:
        """Pick one bin in every group; return the gains afterwards, [B, n], and a bound on their rounding error."""
        steps, device = int(wanted.max()), gains.device
        group = torch.arange(len(gains), device=device)
        picks = torch.zeros(steps, len(gains), dtype=torch.int64, device=device)
        values = torch.zeros(steps, len(gains), dtype=torch.float64, device=device)
        step_error = 2.0 * self._product_error + 2.0 * ROUNDING * self._reach(steps)
        error = self._lam * self._base_error + ROUNDING * self._reach(0)
        for step in range(steps):
            active = (wanted > step).to(device)
            top, best = gains.max(dim=1)
            close = ((gains >= (top - 2.0 * error)[:, None]).sum(dim=1) > 1) & active
            if bool(close.any()):
                for number in torch.nonzero(close).flatten().tolist():
                    near = torch.nonzero(gains[number] >= top[number] - 2.0 * error).flatten().cpu().numpy()
                    best[number] = self._settle(number, near, picks[:step, number])
                top = gains[group, best]
            picks[step], values[step] = best, top
            gains -= torch.where(active[:, None], self._doubled[group, best], 0.0)
            gains[group[active], best[active]] = -torch.inf
            error += step_error
        self._note(picks.cpu().numpy(), values.cpu().numpy(), wanted.tolist())
        return gains, error

    def _note(self, picks: NDArray[np.int64], values: Array, wanted: list[int]) -> None:
        for number, (order, kept) in enumerate(zip(self._order, self._values, strict=True)):
            size = wanted[number]
            gains = values[:size, number]
            if self._halved:
                left = len(self._groups[number]) - sum(map(len, order))
                gains = 0.5 * (self._lam * left - 2.0 * np.arange(size)) + 0.5 * gains
            order.append(picks[:size, number])
            kept.append(gains)

    def _settle(self, number: int, near: NDArray[np.int64], picks: Tensor) -> int:
        """Decide between near ties of a group by exact arithmetic, given the bins and picks made so far."""
        rows = self._prepared.rows.only(torch.from_numpy(self._groups[number]))
        if number not in self._referees:
            self._referees[number] = Referee(rows, lam=self._lam, halved=self._halved, largest=self._prepared.largest)
        referee = self._referees[number]
        while referee.bins_closed < len(self._order[number]):
            referee.extend(self._order[number][referee.bins_closed])
            referee.close_bin()
        referee.extend(picks.cpu().numpy())
        return referee.settle(near)
