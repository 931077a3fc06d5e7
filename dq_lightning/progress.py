"""The one progress bar: drawn on a terminal or in a notebook, silent in logs and with TQDM_DISABLE."""

import os
from typing import Any

from tqdm import auto


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
