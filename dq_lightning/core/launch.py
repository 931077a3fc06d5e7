"""Finds out whether this process is one of several ranks that torchrun, srun or another launcher has started."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

# SLURM names no port. Lightning takes one from 15000 to 24999.
FIRST_SLURM_PORT, NUM_SLURM_PORTS = 25_000, 7_000


@dataclass(frozen=True)
class Launch:
    """One of the processes (ranks) of a run.

    Attributes:
        rank: number of this process among all, from 0.
        num_ranks: number of processes.
        local_rank: number of this process among those of its machine.
        ranks_on_node: number of processes on this machine.
        address: name or address of the machine of rank 0; None if a process group knows it already.
        port: port at this address; 0 if a process group knows it already.
        attempt: text that differs after an elastic restart.
        is_hosted: whether the launcher listens at this port, so that no rank has to.
    """

    rank: int
    num_ranks: int
    local_rank: int = 0
    ranks_on_node: int = 1
    address: str | None = None
    port: int = 0
    attempt: str = ""
    is_hosted: bool = False


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Return which of several processes this is, or None if it is alone.

    The default process group of `torch.distributed` comes first, then the variables of torchrun (`RANK`, `WORLD_SIZE`,
    `MASTER_ADDR`, `MASTER_PORT`), then those of a SLURM step (`srun`).

    Example:
        >>> find_launch({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}).num_ranks
        2
        >>> find_launch({}) is None
        True
    """
    found = _of_group(environment) or _of_torchrun(environment) or _of_slurm(environment)
    return found if found is not None and found.num_ranks > 1 else None


def _of_group(environment: Mapping[str, str]) -> Launch | None:
    if not (dist.is_available() and dist.is_initialized()):
        return None
    local = _number(environment, "LOCAL_RANK", "SLURM_LOCALID") or 0
    on_node = _number(environment, "LOCAL_WORLD_SIZE") or local + 1
    return Launch(dist.get_rank(), dist.get_world_size(), local, on_node)


def _of_torchrun(environment: Mapping[str, str]) -> Launch | None:
    rank, num_ranks, port = (_number(environment, name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    address = environment.get("MASTER_ADDR")
    if rank is None or num_ranks is None or port is None or not address:
        return None
    attempt = [environment.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")]
    return Launch(
        rank,
        num_ranks,
        local_rank=_number(environment, "LOCAL_RANK") or 0,
        ranks_on_node=_number(environment, "LOCAL_WORLD_SIZE") or 1,
        address=address,
        port=port,
        attempt="-".join(attempt),
        is_hosted=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _of_slurm(environment: Mapping[str, str]) -> Launch | None:
    # Only a step that srun started has these two; a batch script has the variables of its job alone.
    rank, num_ranks = (_number(environment, name) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
    address = environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", ""))
    if rank is None or num_ranks is None or not address:
        return None
    job, step = (_number(environment, name) or 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    on_node = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return Launch(
        rank,
        num_ranks,
        local_rank=_number(environment, "SLURM_LOCALID") or 0,
        ranks_on_node=int(on_node[0]) if on_node else 1,
        address=address,
        port=_number(environment, "MASTER_PORT") or FIRST_SLURM_PORT + (job + 1000 * step) % NUM_SLURM_PORTS,
        attempt=f"{job}-{step}-{environment.get('SLURM_RESTART_COUNT', '')}",
    )


def first_host(nodes: str) -> str:
    """Return the first of the hosts that SLURM lists.

    Example:
        >>> first_host("gpu[007-010,42],login1"), first_host("a-1,a-2"), first_host("rack[2,4]-n[01-08]")
        ('gpu007', 'a-1', 'rack2-n01')
    """
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else ""


def _number(environment: Mapping[str, str], *names: str) -> int | None:
    return next((int(text) for name in names if (text := environment.get(name, "")).isdecimal()), None)
