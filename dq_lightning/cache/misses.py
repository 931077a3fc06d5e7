"""The one-line explanation of why an entry has to be made."""

from typing import Any

MAX_CHANGES = 4
MAX_VALUE = 40
MIN_DIGEST, SHOWN_DIGEST = 32, 8
# Messages call these parts by the names that users know; in a key their names are shorter.
NOUNS = {"5-store": "the compact set", "6-filled": "the filled images"}
DATA, DROP_RATIO = "source", "stored_patches.drop_ratio"
NAMES = {
    "encoder": "the encoder",
    "num_source_samples": "number of samples",
    DROP_RATIO: "drop_ratio",
}
# These parts appear and disappear together with a budget of bytes.
KEEP_RATIO, BUDGET, OF_BUDGET = "keep_ratio", "max_bytes", ("encoding.", "encoding_version")
# One of these parts is there: the samples were given by their positions, or are drawn from bins.
BY_POSITION, BY_BINS = "indices", "num_bins"
# These parts appear and disappear together with the drop ratio, so they are not reported separately.
OF_PATCHES = ("patches", "stored_patches", "reconstructor")
FOLLOWING = ("_version", "draw_scores")


def flatten(parts: Any, path: str = "") -> dict[str, Any]:
    """Flatten nested dicts into one dict with dotted paths; other values, and empty dicts, stay as they are.

    Example:
        >>> flatten({"a": {"b": 1}, "c": 2})
        {'a.b': 1, 'c': 2}
    """
    if not isinstance(parts, dict) or not parts:
        return {path: parts}
    flat: dict[str, Any] = {}
    for name, value in parts.items():
        flat.update(flatten(value, f"{path}.{name}" if path else str(name)))
    return flat


def describe_change(
    station: str, wanted: dict[str, Any], existing: list[dict[str, Any]], *, maybe_split: bool = False
) -> str:
    """Return one line that compares the parts of an entry that has to be made with the nearest existing ones.

    All are of one station. The nearest parts are those of the same data, if there are any, with the fewest different
    values. `maybe_split` says that the data may come from a random split.
    """
    noun = NOUNS.get(station) or station.partition("-")[2] or station
    if not existing:
        return f"computing {noun}: nothing cached yet"
    missing = object()
    new = flatten(wanted)

    def changes(parts: dict[str, Any]) -> list[tuple[str, Any, Any]]:
        old = flatten(parts)
        paths = [*new, *(path for path in old if path not in new)]
        pairs = [(path, old.get(path, missing), new.get(path, missing)) for path in paths]
        return [(path, a, b) for path, a, b in pairs if type(a) is not type(b) or a != b]

    def is_listed(change: tuple[str, Any, Any]) -> bool:
        path, a, b = change
        follows = OF_PATCHES + (OF_BUDGET if any(one[0] == BUDGET for one in nearest) else ())
        return not (missing in (a, b) and path != DROP_RATIO and path.startswith(follows))

    # A comparison with an entry of the same data is more useful than one with other data.
    nearest = min(
        (changes(parts) for parts in existing), key=lambda found: (any(c[0] == DATA for c in found), len(found))
    )
    if not nearest:
        return f"computing {noun} again: force_recompute is set, or the cached entry cannot be used"
    for path, a, b in nearest:
        if path == DATA:
            seen = f"{_short(path, a, missing)} -> {_short(path, b, missing)}"
            how = "are new or were changed"
            if maybe_split:
                how = "are new, were changed, or were split at random without a seed"
            return f"computing {noun}: the cache has none for these data, which {how} ({seen})"
    for name, how in (
        (BY_POSITION, "the samples were given, or all are kept"),
        (BY_BINS, "samples are chosen from bins"),
    ):
        # All settings of features, bins and draw appear or disappear with this one.
        if any(path == name and a is missing for path, a, _ in nearest):
            return f"computing {noun} because now {how}"
    listed = list(filter(is_listed, nearest))
    # What appears or disappears with a setting is reported only where the setting is not.
    listed = [one for one in listed if not (missing in one[1:] and one[0].endswith(FOLLOWING))] or listed
    texts = [
        f"{NAMES.get(path, path)} changed ({_short(path, a, missing)} -> {_short(path, b, missing)})"
        for path, a, b in listed[:MAX_CHANGES]
    ]
    if len(listed) > MAX_CHANGES:
        texts.append(f"and {len(listed) - MAX_CHANGES} more")
    return f"computing {noun} because {', '.join(texts)}"


def _short(path: str, value: Any, missing: object) -> str:
    if value is missing:
        return "0" if path == DROP_RATIO else "not set"
    if path == KEEP_RATIO and value is None:
        return "as many as fit"
    text = value if isinstance(value, str) else repr(value)
    if len(text) >= MIN_DIGEST and all(letter in "0123456789abcdef" for letter in text):
        return text[:SHOWN_DIGEST]
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 3]}..."
