"""Through this class a long loop shares its work with other processes that run the same program."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from dq_lightning.core.errors import ConfigError
from dq_lightning.core.resuming import Array

Result = TypeVar("Result")
Arrays = dict[str, Array]
Distributed = Literal["auto", "all", "off"]
"""Whether the ranks of a run make one compact set together, see `quantize`."""


def check_distributed(value: str) -> None:
    """Raise ConfigError for a value that is none of `Distributed`."""
    if value not in get_args(Distributed):
        raise ConfigError(f'distributed={value!r} is not "auto", "all" or "off"')


@dataclass(frozen=True)
class Job:
    """The work of one loop, cut into numbered pieces that any rank may do.

    Attributes:
        name: name of the loop, by which the other ranks know what to do.
        facts: plain JSON that the other ranks need.
        arrays: arrays that the other ranks need.
        pieces: number of pieces; None if it is not known, and then the results are wanted in order. Each piece gives the same
            results whichever rank does it, and in whichever order.
        total: size of the results of all pieces together, such as their number of samples; or a function that gives it, which
            is called when the work of the calling rank has ended. Helpers are not told it.
        ahead: 0 if the results are wanted in any order. Else each piece gives one result, a pair that begins with the
            number of the piece, of which the arrays have the number as `"piece"`; no rank begins a piece that is more
            than `ahead` times the number of ranks behind the first whose result is missing. So `in_order` holds few.
    """

    name: str
    facts: Mapping[str, Any]
    arrays: Mapping[str, Array]
    pieces: int | None
    total: int | Callable[[], int] = 0
    ahead: int = 0


def in_order(results: Iterable[tuple[int, Result]]) -> Iterator[Result]:
    """Yield results in the order of their numbers 0, 1, ..., each of which comes once.

    Example:
        >>> list(in_order([(1, "b"), (0, "a"), (2, "c")]))
        ['a', 'b', 'c']
    """
    waiting: dict[int, Result] = {}
    following = 0
    for number, result in results:
        waiting[number] = result
        while following in waiting:
            yield waiting.pop(following)
            following += 1


class Sharing:
    """How the work of loops is shared.

    This base class shares it with nobody; `Leader` in `pipeline/meeting.py` shares it with helpers.

    Attributes:
        num_ranks: number of processes that may share the work.
        ranks_on_node: number of these that run on this machine, and share its cores.
    """

    num_ranks = 1
    ranks_on_node = 1

    def check(self) -> None:
        """Raise an error if another rank has failed. This call is cheap."""

    def share(
        self,
        job: Job,
        work: Callable[[Iterator[int]], Iterator[Result]],
        unpack: Callable[[Arrays], Result],
        size: Callable[[Result], int],
    ) -> Iterator[Result]:
        """Yield the results of all pieces of a job, in any order.

        Args:
            job: the work.
            work: function that does the pieces whose numbers it is given, and yields their results. It asks for the
                next number only when it is ready for it, because other ranks may take it otherwise. It ends at a number
                behind the last piece where the number of pieces is not known.
            unpack: function that makes a result of the arrays that another rank sent.
            size: function that returns the size of a result, in the unit of `Job.total`.
        """
        return work(itertools.count() if job.pieces is None else iter(range(job.pieces)))
