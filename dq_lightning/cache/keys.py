"""The text that a key is made from: plain JSON in one canonical spelling. These functions are pure."""

import json
from typing import Any

from dq_lightning.cache import files
from dq_lightning.core.errors import CacheError


def canonical_parts(station: str, parts: dict[str, Any]) -> str:
    """Return the canonical JSON of a key's parts.

    Raises:
        CacheError: a part is not plain JSON, or a dict has keys other than text.
    """
    try:
        text = files.canonical_json(parts)
        same = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise CacheError(f"the key of {station} needs plain JSON values, got {parts!r:.200}: {error}") from error
    # json converts other dict keys to text, so two different parts could have the same key.
    if files.canonical_json(same) != text or _has_other_keys(parts):
        raise CacheError(f"the key of {station} needs text as dict keys: {parts!r:.200}")
    return text


def _has_other_keys(value: Any) -> bool:
    if isinstance(value, dict):
        return any(not isinstance(key, str) or _has_other_keys(inner) for key, inner in value.items())
    return isinstance(value, list | tuple) and any(map(_has_other_keys, value))
