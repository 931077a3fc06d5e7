"""The one logger of the package, set up so that its lines are seen in a plain script and obey a configured one."""

import logging
import os
import sys
from typing import Any

from tqdm import auto

LOGGER_NAME = "dq_lightning"


def get_logger() -> logging.Logger:
    """The package's logger. In a program that configured no logging it writes INFO lines to stderr, as Lightning does."""
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
    """A tqdm bar to be used as a context manager.

    Args:
        show: False draws nothing.
        total: steps.
        unit: of a step, for the rate.
        description: what goes on.
    """
    bar: Any = auto.tqdm
    show = show and os.environ.get("TQDM_DISABLE", "") in ("", "0")
    # None lets tqdm look whether it writes to a terminal; its notebook widget must not look
    in_notebook = bar.__name__ == "tqdm_notebook"
    disable = False if in_notebook else None
    return bar(total=total, unit=unit, desc=description, disable=disable if show else True, mininterval=0.5)
