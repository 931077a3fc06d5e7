"""The manifest that makes a folder an entry: names, sizes and digests of its files, written last.

Large files are not compared completely each time an entry is found; instead, their readers compare what they read. A
reader that meets other bytes than were written requests a full check by putting the file `.check` into the entry. The
next process that finds the entry then compares all files, under any verification policy.
"""

import contextlib
import os
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dq_lightning.cache import files
from dq_lightning.core.config import VerifyPolicy
from dq_lightning.core.errors import CacheError, DQError, StoreError
from dq_lightning.core.fields import check_no_address
from dq_lightning.core.libraries import library_version

MANIFEST = "manifest.json"
# This empty file beside the manifest requests a full check; by its leading dot it is not taken for a file of the entry.
FULL_CHECK = ".check"
FORMAT = "dq_lightning entry"
FORMAT_VERSION = 1
# Files up to this size are always hashed, because that costs almost nothing.
SMALL_BYTES = 1 << 20


class Damage(DQError):  # noqa: N818 (a finding, caught inside the station)
    """An entry does not match its manifest; the message gives the reason."""


def is_plain_name(name: object) -> bool:
    """Return whether a name can only mean a file directly inside its folder.

    Example:
        >>> is_plain_name("index.bin"), is_plain_name("../index.bin")
        (True, False)
    """
    return (
        isinstance(name, str)
        and 0 < len(name.encode(errors="surrogatepass")) < 256
        and name not in (".", "..")
        and not any(c in name for c in "/\\:\0")
        and name.isprintable()
    )


def write_manifest(folder: Path, *, station: str, key: str, parts: dict[str, Any]) -> None:
    """Make every file of an entry's folder durable, then write and sync the manifest that lists them all.

    Raises:
        CacheError: the folder holds something that is not a plain file.
        OSError: a file cannot be read, synced or written.
    """
    listed = {}
    for path in sorted(folder.iterdir()):
        if not is_plain_name(path.name) or not stat.S_ISREG(path.lstat().st_mode) or path.name == MANIFEST:
            raise CacheError(
                f"an entry holds plain files only, but {path} is something else: write files directly into it"
            )
        files.fsync_file(path)
        listed[path.name] = {"size": path.stat().st_size, "sha256": files.file_digest(path)}
    values = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "station": station,
        "key": key,
        "parts": parts,
        "files": listed,
        # A checkout need not be installed.
        "package": library_version("dq-lightning") or "unknown",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    files.write_bytes(folder / MANIFEST, files.seal(values))
    files.fsync_file(folder / MANIFEST)
    files.fsync_folder(folder)


def request_full_check(folder: Path) -> None:
    """Let the next process that finds an entry compare all its files; a failure to write the request is ignored."""
    if (folder / MANIFEST).exists():
        with contextlib.suppress(OSError):
            files.write_bytes(folder / FULL_CHECK, b"")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the content of an entry's manifest.

    Raises:
        Damage: the manifest is missing, changed, of another format, or lists something outside its folder.
        OSError: the manifest cannot be read.
    """
    try:
        values = files.read_sealed(folder / MANIFEST)
    except FileNotFoundError as error:
        raise Damage("it has no manifest") from error
    except DQError as error:
        raise Damage(str(error)) from error
    if values.get("format") != FORMAT or values.get("version") != FORMAT_VERSION:
        seen = f"{values.get('format')!r} version {values.get('version')!r}"
        raise Damage(f"its manifest is {seen}, but this package reads {FORMAT!r} version {FORMAT_VERSION}")
    listed = values.get("files")
    if not isinstance(listed, dict) or not isinstance(values.get("parts"), dict):
        raise Damage("its manifest has no files or no parts")
    for name, facts in listed.items():
        whole = isinstance(facts, dict) and type(facts.get("size")) is int and isinstance(facts.get("sha256"), str)
        if not is_plain_name(name) or not whole:
            raise Damage(f"its manifest names {name!r}, which is not a plain file with size and sha256")
    return values


def check_entry(folder: Path, verify: VerifyPolicy, *, station: str, key: str) -> dict[str, Any]:
    """Verify an entry and return its manifest.

    The manifest is always checked. Names, sizes and the content of small files are compared unless `verify` is "off";
    the content of all files is compared if it is "hash", or if a reader requested a full check.

    Raises:
        Damage: the entry does not match its manifest, or belongs to another station or key.
        OSError: a file cannot be read.
    """
    values = read_manifest(folder)
    if (values.get("station"), values.get("key")) != (station, key):
        raise Damage(f"its manifest belongs to another entry, {values.get('station')}/{values.get('key')}")
    requested = os.path.lexists(folder / FULL_CHECK)
    if verify == "off" and not requested:
        return values
    listed = values["files"]
    # Network file systems and desktops leave files whose names begin with a dot; no reader opens them.
    foreign = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - set(listed) - {MANIFEST}
    if foreign:
        raise Damage(f"it holds files that its manifest does not name: {', '.join(sorted(foreign)[:3])}")
    for name, facts in listed.items():
        check_file(folder, name, facts, hashed=requested or verify == "hash" or facts["size"] <= SMALL_BYTES)
    if requested:
        with contextlib.suppress(OSError):
            (folder / FULL_CHECK).unlink()
    return values


def check_copied_entry(folder: Path, verify: VerifyPolicy, *, station: str) -> None:
    """Verify an entry outside the cache, such as a copy, whatever the name of its folder is.

    Raises:
        StoreError: the folder is missing or an address, is no entry of this station, or is incomplete or damaged.
    """
    check_no_address(folder)
    if not folder.exists():
        raise StoreError(f"{folder} does not exist: pass the folder that StoreInfo.path names, or a whole copy of it")
    try:
        values = read_manifest(folder)
        check_entry(folder, verify, station=station, key=str(values.get("key")))
    except (Damage, OSError) as error:
        raise StoreError(
            f"{folder} holds no compact set that can be used: {error}. Pass the folder that StoreInfo.path names, or a whole "
            "copy of it; make a damaged copy again"
        ) from error


def check_file(folder: Path, name: str, facts: dict[str, Any], *, hashed: bool) -> None:
    """Compare a file with its `size` in bytes and (with `hashed`) its `sha256`, which the manifest records in `facts`.

    Raises:
        Damage: the file is missing, not a plain file, of another size or (with `hashed`) of another content.
        OSError: the file cannot be read.
    """
    try:
        seen = (folder / name).lstat()
    except FileNotFoundError as error:
        raise Damage(f"{name} is missing") from error
    if not stat.S_ISREG(seen.st_mode):
        raise Damage(f"{name} is not a plain file")
    if seen.st_size != facts["size"]:
        raise Damage(f"{name} has {seen.st_size} bytes instead of {facts['size']}")
    if hashed and files.file_digest(folder / name) != facts["sha256"]:
        raise Damage(f"{name} has another content than was written")
