"""The logger of the package, visible in a plain script and obedient to configured logging, and its progress bars."""

import logging
import os
import sys
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


def progress_bar(show: bool, *, total: int, unit: str, description: str) -> Any:
    """Return a tqdm progress bar, to be used as a context manager.

    Args:
        show: whether to draw the bar; it is not drawn either if the environment variable `TQDM_DISABLE` is set.
        total: number of steps.
        unit: name of one step, shown in the rate.
        description: text in front of the bar.
    """
    bar: Any = auto.tqdm
    show = show and os.environ.get("TQDM_DISABLE", "") in ("", "0")
    # None makes tqdm draw only on a terminal. Its notebook widget must not make this check, since a notebook is no
    # terminal.
    in_notebook = bar.__name__ == "tqdm_notebook"
    disable = False if in_notebook else None
    return bar(total=total, unit=unit, desc=description, disable=disable if show else True, mininterval=0.5)
