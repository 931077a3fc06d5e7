"""The commands of the first table in docs/published.md, word by word."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def published_rows() -> dict[str, str]:
    """The first command of every row, by what it replaces."""
    text = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
    table = text.split("| published | here |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (.+?) \| `(.+?)`.*\|$", table, re.MULTILINE)
    return {name.replace("`", ""): command for name, command in rows}


def words(name: str, home: Path, **files: object) -> list[str]:
    """The command of a row as a shell would pass it, with `~` and the names in capitals filled in."""
    parts = shlex.split(published_rows()[name])
    filled = [str(files.get(part, part)) for part in parts]
    return [str(home / part[2:]) if part.startswith("~/") else part for part in filled]
