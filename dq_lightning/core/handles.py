"""Finds open files in a dataset that forked processes would share, and reads a dataset in as many as are safe.

A forked process inherits the open files of its parent, and both share one file position. A dataset that seeks in such a
file would read the rows of another process, or nothing at all. An object whose position is in memory (a memory map, a
`BytesIO`) is copied by the fork and is safe, and so is a file that each process opens for itself.
"""

import functools
import gc
import itertools
import logging
import multiprocessing
import pickle
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dq_lightning.core.libraries import is_library
from dq_lightning.core.sharing import Arrays, Job, Result, Sharing

logger = logging.getLogger("dq_lightning")

_LEAVES = (type(None), bool, int, float, complex, str, bytes, bytearray, range, slice, type(Ellipsis), np.dtype)
# Libraries whose objects are open files although they have no Python file descriptor.
_FILE_LIBRARIES = ("h5py", "tables", "netCDF4", "decord", "torchcodec", "lmdb", "apsw", "_sqlite3", "sqlite3")
# Modules whose objects are not searched: loggers and message streams are only written to, and the other libraries make
# their objects so that several processes can hold them.
_NOT_LOOKED_INTO = ("logging", "multiprocessing", "torch", "numpy", "pyarrow")
_STANDARD_STREAMS = 2
_warned: set[str] = set()

PREFETCHED = 4
"""A loader process is asked for so many items ahead."""

FORK = "fork" if sys.platform.startswith("linux") else None
"""Start method of the processes of this library's own passes over a dataset.

Forked processes accept datasets with local classes and lambdas, which could not be pickled.
"""


def loader_processes(
    dataset: Any, num_workers: int, *, asked: bool, context: Any = None, also: Any = None
) -> tuple[Any, int]:
    """Decide how many processes may read a dataset, and in which form it is given to them.

    If the dataset holds something open, fresh copies of it are tried: the dataset as it was before anything was read
    (`unread()`), then a pickled and restored copy. A copy that holds nothing open is safe, since each process opens
    what it needs by itself. A daemon process, such as one of a `multiprocessing.Pool`, may not start others.

    Args:
        dataset: dataset or source to read.
        num_workers: number of processes that is wanted.
        asked: whether the user named this number: then the number is kept, and a danger is only reported by a warning.
        context: start method of the processes, as a multiprocessing context or its name; None is torch's default.
        also: object that is sent to the processes beside the dataset, such as a collate function.

    Returns:
        The dataset or a copy of it, and the number of processes: 0 if only the calling process may read it safely.
    """
    if num_workers == 0 or (not asked and multiprocessing.current_process().daemon):
        return dataset, 0
    name = context if isinstance(context, str) else getattr(context, "_name", None)
    # `allow_none` only looks: the plain call would fix the start method of the whole process.
    name = name or multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if name != "fork":
        if not asked and (problem := _pickling_problem((dataset, also))) is not None:
            _warn_once(f"the dataset can't be sent to loader processes ({problem}), so it is read in one process")
            return dataset, 0
        return dataset, num_workers
    held = find_open_handle((dataset, also))
    if held is None:
        return dataset, num_workers
    for fresh in _fresh_copies(dataset):
        if find_open_handle((fresh, also)) is None:
            return fresh, num_workers
    advice = "open it at the first read of each process, and leave it out in __getstate__"
    if asked:
        _warn_once(
            f"num_workers={num_workers} was asked for, but the dataset holds {held}, which forked processes share: samples may "
            f"come out wrong or not at all. Pass num_workers=0, or {advice}"
        )
        return dataset, num_workers
    _warn_once(
        f"the dataset holds {held}, which forked processes would share, so it is read in one process. To use several, {advice}"
    )
    return dataset, 0


def find_open_handle(value: Any) -> str | None:
    """Describe the first open object inside a value that forked processes would share; None if there is none.

    The search follows attributes, containers, closures, default arguments, classes, and the global names that the
    user's code uses.
    """
    seen: dict[int, Any] = {}
    level: list[Any] = [value]
    while level:
        following: list[Iterable[Any]] = []
        for one in level:
            kind = type(one)
            if kind in _LEAVES:
                continue
            if kind is tuple:
                # A dataset may hold millions of (path, class). They need not be remembered, since no cycle consists of
                # tuples alone.
                following.append(one)
                continue
            if id(one) in seen:
                continue
            # The object is kept, so that no other object can get the same id.
            seen[id(one)] = one
            if (found := _describe_open(one)) is not None:
                return found
            following.append(_referents(one))
        level = [child for children in following for child in children if type(child) not in _LEAVES]
    return None


def _referents(value: Any) -> Iterable[Any]:
    """The objects that a value refers to and may use."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, np.ndarray):
        base: list[Any] = [] if value.base is None else [value.base]
        return [*base, *value.ravel().tolist()] if value.dtype.hasobject else base
    if isinstance(value, Tensor | types.ModuleType | types.CodeType | types.FrameType):
        return []
    if isinstance(value, types.FunctionType):
        cells = [*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__, value.__dict__]
        return [*cells, *_used_globals(value)]
    if isinstance(value, type):
        return [] if is_library(value) else [*vars(value).values(), *value.__bases__]
    if _root(type(value)) in _FILE_LIBRARIES and not _is_open(value):
        # what a closed file still refers to cannot be read either
        return []
    if _root(type(value)) in _NOT_LOOKED_INTO and not hasattr(type(value), "__getitem__"):
        return []
    return [*gc.get_referents(value), type(value)]


def _used_globals(function: types.FunctionType) -> Iterator[Any]:
    """Global objects that the user's code names, and the attributes that it uses of the user's own modules."""
    if is_library(function):
        return
    names = set(_code_names(function.__code__))
    for name in names:
        if name in function.__globals__:
            found = function.__globals__[name]
            yield found
            if isinstance(found, types.ModuleType) and not is_library(found):
                yield from (vars(found)[one] for one in names if one in vars(found))


def _code_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code_names(constant)


def _root(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _describe_open(value: Any) -> str | None:
    """Describe a value in words if it is itself an open object that forked processes would share; otherwise None."""
    kind: Any = type(value)
    why = _open_check(kind)
    if why is None:
        return None
    what = f"an open {kind.__module__}.{kind.__qualname__}"
    if why == "thread":
        lives = value.is_alive() and value is not threading.main_thread()
        return f"a running thread ({value.name})" if lives else None
    if why == "library":
        return what if _is_open(value) else None
    if why == "closes":
        return what if _pickling_problem(value) is not None else None
    try:
        descriptor = value.fileno()
        read_from = not hasattr(value, "readable") or value.readable()
    except Exception:
        # The file is closed, or it is in memory and has no descriptor.
        return None
    if not isinstance(descriptor, int) or descriptor <= _STANDARD_STREAMS or not read_from:
        return None
    name = getattr(value, "name", "")
    return f"an open file ({name})" if isinstance(name, str) and name else what


@functools.lru_cache(4096)
def _open_check(kind: type[Any]) -> str | None:
    """The kind of check that tells whether an object of a class is open: "thread", "library", "descriptor" or "closes".

    None means that objects of this class are never open files.
    """
    root = _root(kind)
    if issubclass(kind, type | types.FunctionType | types.ModuleType):
        return None
    if issubclass(kind, threading.Thread):
        return "thread"
    if root in _FILE_LIBRARIES:
        return "library"
    if callable(getattr(kind, "fileno", None)):
        return None if root == "multiprocessing" else "descriptor"
    # An object of a library that can be closed and cannot be pickled is most likely a file opened by compiled code.
    closes = any(callable(getattr(kind, name, None)) for name in ("close", "release"))
    own = root in sys.stdlib_module_names or root in _NOT_LOOKED_INTO
    return "closes" if closes and not own and is_library(kind) else None


def _is_open(value: Any) -> bool:
    # Objects of h5py are falsy once they are closed.
    try:
        return bool(value) if type(value).__module__.startswith("h5py") else True
    except Exception:
        return True


def _fresh_copies(dataset: Any) -> Iterator[Any]:
    if callable(getattr(dataset, "unread", None)):
        yield dataset.unread()
    try:
        yield pickle.loads(pickle.dumps(dataset))
    except Exception:
        # The dataset cannot be copied, so it will be read in one process.
        return


def _pickling_problem(value: Any) -> str | None:
    try:
        pickle.dumps(value)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _warn_once(text: str) -> None:
    """Log a warning once in the life of the process, since several passes read the same dataset."""
    if text not in _warned:
        _warned.add(text)
        logger.warning("%s", text)


def read_in_order(
    dataset: Any,
    num_workers: int,
    *,
    pin_memory: bool = False,
    numbers: Iterator[int] | None = None,
    prefetch: int = PREFETCHED,
) -> Iterator[Any]:
    """Yield items of a map-style dataset in order; an exception that the dataset raises is raised with its causes.

    `num_workers` processes, which may read the dataset (see `loader_processes`), read the items; 0 reads them in this
    process. `pin_memory` puts tensors into pinned memory, from which they are copied to a GPU faster. The items are
    those with the given numbers, or all; each process is asked for `prefetch` items ahead.
    """
    options: dict[str, Any] = {}
    if num_workers:
        # Python 3.14 no longer forks by default, but datasets with local classes and lambdas need it.
        options = {"multiprocessing_context": multiprocessing.get_context(FORK), "prefetch_factor": prefetch}
    # Without a generator of its own, the loader would draw its seed from the global random state.
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(
        Items(len(dataset), functools.partial(_caught, dataset)),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=generator,
        sampler=numbers,
        # The default walks through every item and makes tensors of its arrays.
        collate_fn=_unchanged,
        **options,
    )
    for item, errors in loader:
        if errors:
            for error, cause in itertools.pairwise(errors):
                error.__cause__ = cause
            raise errors[0]
        yield item


def _unchanged(item: Any) -> Any:
    return item


def _caught(dataset: Any, index: int) -> tuple[Any, list[BaseException]]:
    """Return an item, or the exception that the dataset raised and its causes; a DataLoader would wrap it in another one."""
    try:
        return dataset[index], []
    except Exception as error:
        if get_worker_info() is None:
            return None, [error]
        # The traceback stays behind, and pickle leaves out causes.
        error.add_note("In a loader process:\n" + "".join(traceback.format_exception(error)))
        errors: list[BaseException] = [error]
        while (cause := errors[-1].__cause__) is not None and cause not in errors and _travels(cause):
            errors.append(cause)
        return None, errors


def _travels(error: BaseException) -> bool:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


class LoaderProcesses(Sharing):
    """Shares the pieces of a loop among processes of this machine, which are forked when the loop begins.

    Args:
        count: number of processes, which may read the data (see `loader_processes`); 0 makes the pieces in this process.
    """

    num_ranks = 2

    def __init__(self, count: int) -> None:
        self.count = count

    def share(
        self,
        job: Job,
        work: Callable[[Iterator[int]], Iterator[Result]],
        unpack: Callable[[Arrays], Result],
        size: Callable[[Result], int],
    ) -> Iterator[Result]:
        """See `Sharing`. The results come in the order of the pieces."""
        assert job.pieces is not None
        pieces = Items(job.pieces, lambda number: list(work(iter([number]))))
        for results in read_in_order(pieces, self.count, prefetch=2):
            yield from results


class Items(Dataset[Any]):
    """A map-style dataset of `count` items, each of which a function makes from its position."""

    def __init__(self, count: int, make: Callable[[int], Any]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return self._make(index)
