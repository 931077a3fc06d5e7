"""Communication between the processes of one run.

All functions also work in a single process in which torch.distributed is not initialized.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from dq_lightning.core.errors import DistributedError

Result = TypeVar("Result")


def world_size() -> int:
    """Return the number of processes in the default process group, or 1 if there is no group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def global_rank() -> int:
    """Return this process's rank in the default process group, or 0 if there is no group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_from_all(value: Any) -> list[Any]:
    """Return the values of all ranks, plain and picklable, in the order of the ranks. Every rank must call it."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def raise_on_all(error: BaseException | None, doing: str) -> None:
    """Raise on every rank if any rank failed, each time with the cause. Every rank must call it.

    `error` is that of this process, or None, and `doing` says what was done, for the message.

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


def call_on_all(action: Callable[[], Result], doing: str) -> Result:
    """Call a function on every rank, return its result, and raise as `raise_on_all` if it fails on any of them.

    Every rank must call it. The function must not contain a call that waits for other ranks.
    """
    try:
        result = action()
    except (Exception, SystemExit) as error:
        raise_on_all(error, doing)
        raise
    raise_on_all(None, doing)
    return result


def check_equal_on_all(value: str, what: str, advice: str) -> None:
    """Check that all ranks hold the same value; `what` names the values in the plural. Every rank must call it.

    Raises:
        DistributedError: the values differ; the message lists every distinct value and the ranks that hold it, and
            ends with the advice.
    """
    values = gather_from_all(value)
    if len(set(values)) > 1:
        raise DistributedError(f"the ranks have different {what}: {describe_groups(values)}. {advice}")


def describe_groups(values: Sequence[str]) -> str:
    """Return a text that says which ranks hold which value.

    Example:
        >>> describe_groups(["abc", "abc", "def"])
        'abc on ranks 0, 1; def on rank 2'
    """
    groups: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(str(rank))
    return "; ".join(f"{value} on rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}" for value, ranks in groups.items())
