"""Which way the bins are made, and what it costs, said before it starts. PURE but for asking how much memory there is."""

import logging
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from dq_lightning.bins.maximizers import LAZY
from dq_lightning.bins.objectives import OBJECTIVES
from dq_lightning.core.config import BinConfig
from dq_lightning.core.devices import named_device
from dq_lightning.core.errors import ConfigError

log = logging.getLogger("dq_lightning")
# groups up to this size share their steps; a GPU needs larger ones to be kept busy
_SMALL_GROUP = {"cpu": 256, "cuda": 2048}


@dataclass(frozen=True)
class Room:
    """How many float64 numbers the matrix-free graph cut may hold.

    Attributes:
        matrix: in matrices of inner products.
        rows: in copies of rows.
    """

    matrix: int = 1 << 25
    rows: int = 1 << 25

    @classmethod
    def beside(cls, stored: int, device: torch.device) -> "Room":
        """In proportion to the bytes of the features, and a share of the memory on a GPU, where speed depends on it."""
        if device.type != "cpu":
            most = max(1 << 25, free_memory(device) // 32)
            return cls(most, most)
        # of very many rows the last bins fit in memory as float64, where a pass over them is several times faster
        rows = min(1 << 28, stored // 8) if stored > 1 << 30 else min(1 << 25, max(1 << 22, stored // 16))
        return cls(min(1 << 25, max(1 << 22, stored // 4)), rows)


@dataclass(frozen=True)
class Plan:
    """How the bins are made.

    Attributes:
        exact: whether the matrix-free graph cut applies: no similarity matrix, float64's own answer.
        room: sizes of the graph cut's working arrays.
        small_group: groups up to this size are done together, each as one matrix.
        bytes: memory beyond the features, about.
    """

    exact: bool
    room: Room
    small_group: int
    bytes: int


def make_plan(config: BinConfig, factors: dict[str, Tensor], sizes: list[int], device: torch.device) -> Plan:
    """Choose the way, tell it, and refuse what can't fit before anything is allocated.

    Args:
        config: settings.
        factors: of `as_factors`.
        sizes: samples of every group.
        device: where the work is done.

    Raises:
        ConfigError: the objective needs more memory than there is.
    """
    total, largest = sum(sizes), max(sizes, default=0)
    width = sum(values.shape[1] + number for number, values in enumerate(factors.values()))
    stored = sum(values.numel() * values.element_size() for values in factors.values())
    exact = config.objective == "graph_cut" and config.maximizer == "naive" and config.similarity != "rbf"
    room = Room.beside(stored, device)
    if exact:
        needed = 8 * (min(largest**2, room.matrix) + min(largest * width, 2 * room.rows) + 6 * largest) + 32 * total
        way = "graph cut without a similarity matrix"
    else:
        need = OBJECTIVES[config.objective].memory
        count = -(-largest // config.num_bins)
        needed = need(largest, count, config.maximizer not in LAZY | {"stochastic"}) + 32 * total
        way = f"{config.objective} with the {config.maximizer} maximizer"
    free = free_memory(device)
    if needed > free:
        raise ConfigError(
            f"{way} needs about {_size(needed)} for a group of {largest:,} samples, and {_size(free)} are free on {device}; "
            + _advice(config)
        )
    log.info(
        "bins: %s; %s, %s similarity, about %s of memory beyond the features, on %s",
        f"{total:,} samples in {len(sizes):,} {'group' if len(sizes) == 1 else 'groups'}",
        way,
        config.similarity,
        _size(needed),
        device,
    )
    return Plan(exact, room, _SMALL_GROUP.get(device.type, 2048), needed)


def refuse_growing_gains(config: BinConfig, negative: bool) -> None:
    """Lazy maximisers take old gains as bounds: refuse them where a gain can grow.

    Raises:
        ConfigError: the maximizer is lazy and, with some similarity negative, picks can raise the gains of others.
    """
    if config.maximizer in LAZY and negative and OBJECTIVES[config.objective].needs_positive:
        raise ConfigError(
            f"maximizer {config.maximizer!r} is right only where gains never grow, but those of objective "
            f"{config.objective!r} do when similarities are negative, and similarity {config.similarity!r} is negative for "
            "some of these features; use maximizer='naive' or 'stochastic', or similarity='cosine' or 'rbf'"
        )


def choose_device(device: str | torch.device, factors: dict[str, Tensor]) -> torch.device:
    """`"auto"`: where the features are, or the GPU when there is one and the features would fill a quarter of it at most."""
    if str(device) != "auto":
        return named_device(device)
    values = next(iter(factors.values()))
    if values.device.type == "cuda":
        return values.device
    if torch.cuda.is_available() and sum(v.numel() * v.element_size() for v in factors.values()) > 1 << 22:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:  # noqa: PTH123
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        # no Linux: all of the physical memory is an upper bound, where even that is known
        pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}) else 1 << 40
        return int(pages) * 4096


def _advice(config: BinConfig) -> str:
    if config.objective == "facility_location" and config.maximizer == "naive":
        return "use maximizer='lazy', which needs no matrix, or clusters=... for smaller groups"
    return "use clusters=... for smaller groups, or more bins"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
