"""Sizes in bytes as people write them."""

import math
import re
from fractions import Fraction

from dq_lightning.core.errors import ConfigError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(text: str) -> int:
    """Convert a size such as `"20GB"`, `"1.5 TB"` or `"1000000"` to bytes; units are powers of 1,000.

    Example:
        >>> parse_bytes("20GB")
        20000000000

    Raises:
        ConfigError: the text is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", text.upper())
    if match is None or match[2] not in UNITS:
        raise ConfigError(
            f"{text!r} is not a size: write a number of bytes, or a number with KB, MB, GB or TB, such as 20GB"
        )
    return round(float(match[1]) * UNITS[match[2]])


def budget_bytes(budget: int | str, source_bytes: int, setting: str = "max_bytes") -> int:
    """Convert a budget to bytes.

    Args:
        budget: a number of bytes, a size as `parse_bytes` reads it, or a share of a whole (`"10%"`).
        source_bytes: bytes of the whole that a share is of.
        setting: name of the setting, for errors.

    Example:
        >>> budget_bytes("15MB", 0), budget_bytes("2.5%", 153_600_000), budget_bytes(700, 0)
        (15000000, 3840000, 700)

    Raises:
        ConfigError: the budget is none of these, or not positive.
    """
    size: int | Fraction
    if isinstance(budget, bool) or not isinstance(budget, int | str):
        raise ConfigError(
            f'{setting}={budget!r} is not a budget: write a whole number of bytes, a size ("15MB"), or a share ("10%")'
        )
    try:
        if isinstance(budget, str) and budget.strip().endswith("%"):
            size = source_bytes * Fraction(budget.strip()[:-1].strip()) / 100
        else:
            size = budget if isinstance(budget, int) else parse_bytes(budget)
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f'{setting}={budget!r} is not a budget: write a number of bytes, a size ("15MB"), or a share ("10%")'
        ) from error
    if size <= 0 and source_bytes > 0:
        raise ConfigError(f"{setting}={budget!r} must be positive")
    return math.floor(size)
