"""On how many examples a property is tried: a tenth by default, all with DQ_LIGHTNING_FULL_TESTS=1."""

import os

FULL = os.environ.get("DQ_LIGHTNING_FULL_TESTS", "") not in ("", "0")


def examples(count: int) -> int:
    """`count`, or a tenth of it and at least 20."""
    return count if FULL else max(20, count // 10)
