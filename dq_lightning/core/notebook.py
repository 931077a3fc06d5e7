"""Small tables that notebooks show in place of a `repr`."""

from collections.abc import Mapping
from html import escape
from typing import Any


def facts_as_html(title: str, facts: Mapping[str, Any]) -> str:
    """Return a titled HTML table with one row for each fact; facts that are None are left out.

    All text is escaped, because names of classes and paths come from the user's data.

    Example:
        >>> facts_as_html("Bins", {"samples": 5, "classes": None})
        '<table><caption><b>Bins</b></caption><tr><th>samples</th><td>5</td></tr></table>'
    """
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(f'{value:,}' if isinstance(value, int) else str(value))}</td></tr>"
        for name, value in facts.items()
        if value is not None
    )
    return f"<table><caption><b>{escape(title)}</b></caption>{rows}</table>"
