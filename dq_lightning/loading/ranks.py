"""What the processes of one run tell each other. Works in one process without torch.distributed being set up."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from dq_lightning.core.errors import DistributedError


def world_size() -> int:
    """Number of processes in the default group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def global_rank() -> int:
    """Rank in the default group, 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_from_all(value: Any) -> list[Any]:
    """The values of all ranks, in rank order. Every rank must call it; picklable plain values only."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def raise_on_all(error: BaseException | None, doing: str) -> None:
    """If any rank failed, raise on every rank, each with the cause.

    Args:
        error: what went wrong in this process, or None.
        doing: what was being done, for the message.

    Raises:
        BaseException: this rank's own error, unchanged.
        DistributedError: another rank's error, by rank and message.
    """
    messages = gather_from_all(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = [(rank, message) for rank, message in enumerate(messages) if message is not None]
    if failed:
        rank, message = failed[0]
        more = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
        raise DistributedError(f"rank {rank} failed while {doing}{more}: {message}")


def call_on_all(action: Callable[[], None], doing: str) -> None:
    """Act on every rank; if that fails on any, raise on every rank, each with the cause. Every rank must call it.

    Args:
        action: may itself call nothing that waits for other ranks.
        doing: what it does, for the message.

    Raises:
        BaseException: this rank's own error, unchanged.
        DistributedError: another rank's error, by rank and message.
    """
    error: BaseException | None = None
    try:
        action()
    except (Exception, SystemExit) as caught:
        error = caught
    raise_on_all(error, doing)


def check_equal_on_all(value: str, what: str, advice: str) -> None:
    """Stop every rank unless all hold the same value.

    Raises:
        DistributedError: with every distinct value and the ranks that hold it.
    """
    values = gather_from_all(value)
    if len(set(values)) > 1:
        raise DistributedError(f"the ranks have different {what}: {describe_groups(values)}. {advice}")


def describe_groups(values: Sequence[str]) -> str:
    """Which ranks hold which value: "abc on ranks 0, 1; def on rank 2"."""
    groups: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(str(rank))
    return "; ".join(f"{value} on rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}" for value, ranks in groups.items())
