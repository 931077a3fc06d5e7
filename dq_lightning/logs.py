"""The one logger of the package, set up so that its lines are seen in a plain script and obey a configured one."""

import logging
import sys

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
