"""Checks store.json, the description of a packed store, before any file that it names is opened."""

from pathlib import Path
from typing import Any

from dq_lightning.cache.manifest import Damage, check_file, is_plain_name
from dq_lightning.packed import small_arrays
from dq_lightning.packed.writer import FORMAT, NARROW_KINDS, SMALL_FILE, VERSION_SQUEEZED, VERSIONS

# This is a hundred times ImageNet. Each sample takes about 30 bytes of memory while the store is open, and its name.
MAX_SAMPLES = 1 << 27
MAX_NAME_BYTES = 4096
MAX_COLUMNS = 1 << 16
# The content of these files is verified whenever the store is opened, unless verify is "off".
SMALL_FILES = ("index.npy", "bin.npy", "id_offsets.npy", "ids.bin", "value_offsets.npy", "checksums.npy")


def check_description(path: Path, description: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Check the content of store.json in the folder of a store.

    Returns:
        The number of samples, and the attributes that the writer was given.

    Raises:
        Damage: if the format is another one, a fact is missing or impossible, or a file is missing or has another size.
    """
    version = description.get("version")
    if description.get("format") != FORMAT or version not in VERSIONS:
        seen = f"{description.get('format')!r:.40} version {version!r:.40}"
        raise Damage(f"it is {seen}, this package reads {FORMAT!r} version {min(VERSIONS)} to {max(VERSIONS)}")
    count, listed, attributes = (description.get(name) for name in ("num_samples", "files", "attributes"))
    if (
        type(count) is not int
        or not 0 <= count < MAX_SAMPLES
        or not isinstance(listed, dict)
        or not isinstance(attributes, dict)
    ):
        raise Damage("store.json lacks num_samples, files or attributes")
    for name, facts in listed.items():
        whole = isinstance(facts, dict) and type(facts.get("size")) is int and isinstance(facts.get("sha256"), str)
        if not is_plain_name(name) or not whole:
            raise Damage(f"store.json names {name!r:.80}, which is not a plain file with size and sha256")
        check_file(path, name, facts, hashed=False)
    squeezed = version == VERSION_SQUEEZED
    missing = {*((SMALL_FILE,) if squeezed else SMALL_FILES), "values.bin"} - set(listed)
    if missing:
        raise Damage(f"store.json does not name {', '.join(sorted(missing))}")
    if squeezed:
        _check_squeezed(description, count)
    elif listed["ids.bin"]["size"] > MAX_NAME_BYTES * count:
        raise Damage(f"ids.bin has more than {MAX_NAME_BYTES} bytes for the name of a sample")
    return count, attributes


def _check_squeezed(description: dict[str, Any], count: int) -> None:
    """Check what store.json says of its compressed small arrays."""
    facts = description.get("squeezed")
    size = facts.get("ids_bytes") if isinstance(facts, dict) else -1
    numbers = facts.get("columns") if isinstance(facts, dict) else None
    named = size is None or (type(size) is int and 0 <= size <= MAX_NAME_BYTES * count)
    columns = description.get("columns")
    if (
        not named
        or not isinstance(numbers, list)
        or not isinstance(columns, list)
        or len(set(map(str, numbers))) != len(numbers)
        or len(numbers) > small_arrays.MAX_COLUMNS
        or not all(
            type(number) is int
            and 0 <= number < len(columns)
            and isinstance(columns[number], dict)
            and columns[number].get("kind") in NARROW_KINDS
            for number in numbers
        )
    ):
        raise Damage(f"store.json has impossible facts about its small arrays: {facts!r:.80}")
