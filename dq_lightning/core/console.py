"""The logger of the package, visible in a plain script and obedient to configured logging, and its progress bars."""

import logging
import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

from tqdm import auto

LOGGER_NAME = "dq_lightning"


def get_logger() -> logging.Logger:
    """Return the package's logger.

    If the program has configured no logging, the logger writes INFO lines to stderr, as Lightning does.
    """
    logger = logging.getLogger(LOGGER_NAME)
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
    return logger


def progress_bar(show: bool, *, total: int | None, unit: str, description: str) -> Any:
    """Return a tqdm progress bar of `total` steps, each called `unit`, to be used as a context manager.

    `total` is None where the number of steps is not known.

    A bar that is not wanted (`show`, or the environment variable `TQDM_DISABLE`) is none of tqdm's: making one waits
    for a lock that forked processes share, and a process that is killed meanwhile never gives it back.
    """
    if not show or os.environ.get("TQDM_DISABLE", "") not in ("", "0"):
        return nullcontext(SimpleNamespace(update=lambda count=1: None))
    bar: Any = auto.tqdm
    # None makes tqdm draw only on a terminal. Its notebook widget must not make this check, since a notebook is no
    # terminal.
    in_notebook = bar.__name__ == "tqdm_notebook"
    return bar(total=total, unit=unit, desc=description, disable=False if in_notebook else None, mininterval=0.5)
