"""Choose how the bins are made, estimate the memory this takes, and log both before the work starts."""

import logging
import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from dq_lightning.bins.graph_cut.costs import Costs
from dq_lightning.bins.graph_cut.scores import WIDE
from dq_lightning.bins.maximizers import LAZY
from dq_lightning.bins.objectives import OBJECTIVES
from dq_lightning.bins.sizes import bin_sizes
from dq_lightning.core.config import BinConfig
from dq_lightning.core.control_groups import free_of_groups
from dq_lightning.core.devices import named_device
from dq_lightning.core.errors import ConfigError
from dq_lightning.core.sizes import budget_bytes

log = logging.getLogger("dq_lightning")


@dataclass(frozen=True)
class Room:
    """Limits on the working memory of the graph cut.

    Attributes:
        dense: largest number of rows whose matrix of inner products is made.
        candidates: largest number of candidates that a matrix is made of.
        rows: largest number of entries of a float64 copy of rows.
    """

    dense: int = 1 << 14
    candidates: int = 1 << 12
    rows: int = 1 << 25

    @classmethod
    def beside(cls, stored: int, device: torch.device, matrix: int | str = "50%", ranks: int = 1) -> "Room":
        """Choose the limits for features of `stored` bytes on a device; so many processes share the machine's memory.

        The matrix may take `matrix`, as `BinConfig.matrix_memory` says it. The limits of candidates and of copies of
        rows are proportional to the size of the features; on a GPU, whose speed depends on it, the float64 copy of the
        rows may take a third of its free memory.
        """
        memory = free_memory(device) // (ranks if device.type == "cpu" else 1)
        allowed = budget_bytes(matrix, memory, "matrix_memory")
        # Entries have 4 bytes on a GPU and in small matrices, and 2 otherwise.
        entry = 4 if device.type != "cpu" or allowed <= 4 * WIDE**2 else 2
        dense = int((allowed / entry) ** 0.5)
        if device.type != "cpu":
            # Exact matrices of whole numbers are the processor's.
            most = int((free_memory(torch.device("cpu")) / 4) ** 0.5)
            return cls(min(dense, most), 1 << 13, memory // 3 // 8)
        candidates = int(min(1 << 26, max(1 << 23, stored // 4)) ** 0.5)
        # For very large features, this lets the rows of the last bins be held as float64, which makes a pass over them
        # several times faster.
        rows = min(1 << 28, stored // 8) if stored > 1 << 30 else min(1 << 25, max(1 << 23, stored // 16))
        return cls(dense, candidates, rows)


@dataclass(frozen=True)
class Plan:
    """How the bins are made.

    Attributes:
        exact: whether the graph cut that needs no similarity matrix is used; its picks are exactly those of float64.
        room: limits on the working arrays of the graph cut.
        bytes: estimated memory in bytes beyond the features.
    """

    exact: bool
    room: Room
    bytes: int


def make_plan(
    config: BinConfig, factors: dict[str, Tensor], sizes: list[int], device: torch.device, ranks: int = 1
) -> Plan:
    """Choose how the bins are made, log it, and raise an error before anything is allocated that would not fit.

    Args:
        config: settings of the bins.
        factors: matrices that `as_factors` returns.
        sizes: number of samples in each group.
        device: device that the bins are made on.
        ranks: number of processes on this machine that make bins at the same time.

    Raises:
        ConfigError: the objective, or the matrix that `engine="dense"` asks for, needs more memory than is free.
    """
    total, largest = sum(sizes), max(sizes, default=0)
    width = sum(values.shape[1] + number for number, values in enumerate(factors.values()))
    stored = sum(values.numel() * values.element_size() for values in factors.values())
    exact = uses_exact_engine(config)
    room = Room.beside(stored, device, config.matrix_memory, ranks)
    free = free_memory(device)
    if exact:
        entry = 4 if device.type != "cpu" or largest <= WIDE else 2
        matrix = entry * min(largest, room.dense) ** 2 if config.engine in ("auto", "dense") else 4 * largest * width
        needed = matrix + 8 * (min(largest * width, 2 * room.rows) + 6 * largest) + 32 * total
        wide = math.prod(values.shape[1] + number for number, values in enumerate(factors.values()))
        costs = Costs(width, wide, room.candidates, device.type, torch.get_num_threads())
        way = f"graph cut ({_expected(config, sizes, room, costs)})"
        if config.engine == "dense" and largest > room.dense:
            raise ConfigError(
                f"engine='dense' needs {_size(entry * largest**2)} for a group of {largest:,} samples, more than "
                f"matrix_memory={config.matrix_memory!r} allows; use engine='auto', or clusters=... for smaller groups"
            )
    else:
        need = OBJECTIVES[config.objective].memory
        count = -(-largest // config.num_bins)
        needed = need(largest, count, width, config.maximizer not in LAZY | {"stochastic"}) + 32 * total
        # The heap of a lazy maximizer holds a pair of Python numbers for each sample.
        needed += 160 * largest if config.maximizer in LAZY else 0
        # Blocks of the sums of the radial basis function are there four times while they are computed.
        needed += 32 * min(512 * largest, 1 << 20) if config.similarity == "rbf" else 0
        way = f"{config.objective} with the {config.maximizer} maximizer"
        if needed > free:
            raise ConfigError(
                f"{way} needs about {_size(needed)} for a group of {largest:,} samples, and {_size(free)} are free on "
                f"{device}; {_advice(config)}"
            )
    log.info(
        "bins: %s; %s, %s similarity, about %s of memory beyond the features, on %s",
        f"{total:,} samples in {len(sizes):,} {'group' if len(sizes) == 1 else 'groups'}",
        way,
        config.similarity,
        _size(needed),
        device,
    )
    return Plan(exact, room, needed)


def tell_without_effect(config: BinConfig) -> None:
    """Log a warning that names the settings that were changed, but belong to another way than the one that is used."""
    exact = uses_exact_engine(config)
    seeded = config.maximizer == "stochastic" or config.clusters is not None
    belongs = {
        "lam": (config.objective == "graph_cut", "objective='graph_cut'"),
        "gamma": (config.similarity == "rbf", "similarity='rbf'"),
        "epsilon": (config.maximizer == "stochastic", "maximizer='stochastic'"),
        "beta": (config.maximizer == "approximate_lazy", "maximizer='approximate_lazy'"),
        "search_seed": (seeded, "maximizer='stochastic' and clusters="),
        "engine": (exact, "the graph cut with the naive maximizer and the similarity 'cosine' or 'dot'"),
        "matrix_memory": (exact and config.engine in ("auto", "dense"), "the regime 'dense' of the graph cut"),
    }
    default = BinConfig()
    for name, (used, owner) in belongs.items():
        value = getattr(config, name)
        if not used and value != getattr(default, name):
            log.warning("bins: %s=%r has no effect here: it belongs to %s", name, value, owner)


def uses_exact_engine(config: BinConfig) -> bool:
    """Return whether the bins are those of the graph cut that needs no similarity matrix."""
    return config.objective == "graph_cut" and config.maximizer == "naive" and config.similarity != "rbf"


def refuse_growing_gains(config: BinConfig, negative: bool) -> None:
    """Check that a lazy maximizer, which uses old gains as upper bounds, is not used where gains can grow.

    Args:
        config: settings of the bins.
        negative: whether some similarity may be negative.

    Raises:
        ConfigError: the maximizer is lazy, and negative similarities let a pick increase the gains of other samples.
    """
    if config.maximizer in LAZY and negative and OBJECTIVES[config.objective].needs_positive:
        raise ConfigError(
            f"maximizer {config.maximizer!r} is right only where gains never grow, but those of objective "
            f"{config.objective!r} do when similarities are negative, and similarity {config.similarity!r} is negative for "
            "some of these features; use maximizer='naive' or 'stochastic', or similarity='cosine' or 'rbf'"
        )


def choose_device(device: str | torch.device, factors: dict[str, Tensor]) -> torch.device:
    """Return the named device.

    `"auto"` is the GPU that holds the features, else the current GPU if the features are larger than 4 MiB, else the
    CPU.
    """
    if str(device) != "auto":
        return named_device(device)
    values = next(iter(factors.values()))
    if values.device.type == "cuda":
        return values.device
    if torch.cuda.is_available() and sum(v.numel() * v.element_size() for v in factors.values()) > 1 << 22:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def free_memory(device: torch.device) -> int:
    """Return the number of bytes that can still be allocated on a device.

    On Linux the memory that a container or a job of a cluster may use (a control group) counts, too.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_free_of_machine(), free_of_groups())


def _free_of_machine() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:  # noqa: PTH123
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        # Systems other than Linux report only the physical memory, which is an upper bound, or nothing at all.
        pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}) else 1 << 40
        return int(pages) * 4096


def _expected(config: BinConfig, sizes: list[int], room: Room, costs: Costs) -> str:
    """Return the regimes that are expected, and about how many seconds they take on an idle machine."""
    low = high = 0.0
    expected: set[str] = set()
    for size in sizes:
        matrix = costs.matrix(size) + size * costs.from_matrix(size)
        steady = size * costs.steady(size)
        passes = costs.passes(size, bin_sizes(size, config.num_bins))
        dense = matrix if size <= room.dense else float("inf")
        cheaper = min(dense, passes)
        otherwise = "dense" if dense <= passes else "stream"
        expected.add(otherwise if cheaper <= 2.0 * steady else f"candidates, {otherwise} where few of them are proved")
        low += {"dense": matrix, "candidates": steady, "stream": passes, "auto": min(cheaper, steady)}[config.engine]
        high += {"dense": matrix, "candidates": steady, "stream": passes, "auto": 2.0 * cheaper}[config.engine]
    regimes: str = config.engine
    if regimes == "auto" and costs.device != "cpu":
        regimes = "dense or stream"
    elif regimes == "auto":
        regimes = " or ".join(sorted(expected))
    return f"{regimes}; about {low:.1f} to {high:.1f} s" if high >= 0.1 else regimes


def _advice(config: BinConfig) -> str:
    if config.objective == "facility_location" and config.maximizer == "naive":
        return "use clusters=... for smaller groups, or maximizer='lazy', which needs no matrix but much more time"
    return "use clusters=... for smaller groups" + (", or more bins" if config.objective == "log_determinant" else "")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
