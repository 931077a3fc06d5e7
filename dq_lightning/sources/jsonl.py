"""Reads lists of rows from JSON or JSON Lines files, compressed or not."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dq_lightning.core.errors import SourceError
from dq_lightning.sources.items import short_repr

_OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
_KINDS = (".json", ".jsonl")
# These are also raised for numbers of thousands of digits, and for nesting that exhausts the stack.
_NO_JSON = (ValueError, RecursionError)
NAMES = ", ".join(_KINDS) + f" (also with {', '.join(_OPENERS)} behind)"


def is_rows_file(path: Any) -> bool:
    """Whether a path ends in `.json` or `.jsonl`, perhaps compressed. The file itself is not looked at.

    Example:
        >>> is_rows_file("alpaca.jsonl.gz"), is_rows_file("alpaca.csv")
        (True, False)
    """
    return isinstance(path, str | Path) and bool(_kind(Path(path)))


def _kind(path: Path) -> str:
    inner = path.with_suffix("") if path.suffix.lower() in _OPENERS else path
    return inner.suffix.lower() if inner.suffix.lower() in _KINDS else ""


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a file: a JSON list of objects, or one JSON object per line (empty lines are skipped).

    The path ends in `.json` or `.jsonl`, optionally followed by `.xz`, `.gz` or `.bz2`. The encoding may be UTF-8,
    UTF-16 or UTF-32. The content, not the name, decides whether the file is read as a list or line by line.

    Raises:
        SourceError: the file has another ending, is missing or damaged, or holds something else. The message names the
            row or line where there is one.
    """
    path = Path(path).expanduser()
    if not _kind(path):
        raise SourceError(f"{path} is not named like a file of rows: expected {NAMES}")
    opener = _OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            data = file.read()
        # The encoding is detected, because programs on Windows also write UTF-16, with or without a byte order mark.
        text = data.decode(json.detect_encoding(data))
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} can't be read: {type(error).__name__}: {error}") from error
    # The content decides how the file is read, not its name.
    try:
        rows: list[Any] = json.loads(text) if text.lstrip().startswith("[") else _lines(text, path)
    except _NO_JSON as error:
        raise SourceError(f"{path} is not valid JSON: {error}; repair the file") from error
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise SourceError(
                f"{path}, row {number}: expected an object {{field: value}}, got {short_repr(row)}; repair it"
            )
    return rows


def _lines(text: str, path: Path) -> list[Any]:
    rows = []
    # `splitlines` is not used, because it also splits at separators that may occur inside of JSON strings.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except _NO_JSON as error:
            _check_not_one_object(text, path)
            raise SourceError(
                f"{path}, line {number} is not valid JSON: {error}; repair the line or remove it"
            ) from error
    return rows


def _check_not_one_object(text: str, path: Path) -> None:
    """Raise a `SourceError` if the file is one JSON value over several lines, such as an object that holds the rows."""
    try:
        whole = json.loads(text)
    except _NO_JSON:
        return
    lists = [repr(name) for name, value in whole.items() if isinstance(value, list)] if isinstance(whole, dict) else []
    raise SourceError(
        f"{path} holds one JSON {type(whole).__name__}, not a list of rows: "
        + (f"save its list {' or '.join(lists)} as a file of its own" if lists else "save the rows as a JSON list")
    )
