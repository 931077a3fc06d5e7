"""The manifest that makes a folder an entry: names, sizes and digests of its files, written last. Touches the disk.

Large files are not compared whole each time an entry is found, but whoever reads them compares what he reads. A reader that
meets other bytes than were written leaves a doubt in the entry; whoever finds it next compares all files, under any policy.
"""

import contextlib
import importlib.metadata
import os
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dq_lightning.cache import files
from dq_lightning.core.config import VerifyPolicy
from dq_lightning.core.errors import CacheError, DQError, StoreError

MANIFEST = "manifest.json"
# an empty file beside the manifest; the leading dot keeps it out of what an entry is compared with
DOUBT = ".doubt"
FORMAT = "dq_lightning entry"
FORMAT_VERSION = 1
# files that cost nothing to hash are always hashed
SMALL_BYTES = 1 << 20


class Damage(DQError):  # noqa: N818 (a finding, caught inside the station)
    """An entry is not what its manifest says: the message is the reason."""


def package_version() -> str:
    """Version of dq_lightning as installed, or "unknown" when run from a bare checkout."""
    try:
        return importlib.metadata.version("dq-lightning")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def is_plain_name(name: object) -> bool:
    """Whether a name can only mean a file directly inside its folder."""
    return (
        isinstance(name, str)
        and 0 < len(name.encode(errors="surrogatepass")) < 256
        and name not in (".", "..")
        and not any(c in name for c in "/\\:\0")
        and name.isprintable()
    )


def write_manifest(folder: Path, *, station: str, key: str, parts: dict[str, Any]) -> None:
    """Make every file of `folder` durable, then write and sync the manifest that names them all.

    Raises:
        CacheError: the folder holds something that is not a plain file.
        OSError: the disk refuses.
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
        "package": package_version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    files.write_bytes(folder / MANIFEST, files.seal(values))
    files.fsync_file(folder / MANIFEST)
    files.fsync_folder(folder)


def cast_doubt(folder: Path) -> None:
    """Ask whoever finds this entry next to compare all its files; where that cannot be written down, nobody is asked."""
    if (folder / MANIFEST).exists():
        with contextlib.suppress(OSError):
            files.write_bytes(folder / DOUBT, b"")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an entry.

    Raises:
        Damage: it is missing, changed, of another format, or names something outside its folder.
        OSError: it cannot be read.
    """
    try:
        values = files.read_sealed(folder / MANIFEST)
    except FileNotFoundError as error:
        raise Damage("it has no manifest") from error
    except DQError as error:
        raise Damage(str(error)) from error
    if values.get("format") != FORMAT or values.get("version") != FORMAT_VERSION:
        seen = f"{values.get('format')!r} version {values.get('version')!r}"
        raise Damage(f"its manifest is {seen}, this package reads {FORMAT!r} version {FORMAT_VERSION}")
    listed = values.get("files")
    if not isinstance(listed, dict) or not isinstance(values.get("parts"), dict):
        raise Damage("its manifest has no files or no parts")
    for name, facts in listed.items():
        whole = isinstance(facts, dict) and type(facts.get("size")) is int and isinstance(facts.get("sha256"), str)
        if not is_plain_name(name) or not whole:
            raise Damage(f"its manifest names {name!r}, which is not a plain file with size and sha256")
    return values


def check_entry(folder: Path, verify: VerifyPolicy, *, station: str, key: str) -> dict[str, Any]:
    """Verify an entry: the manifest always, names, sizes and small files unless "off", all under "hash" or after a doubt.

    Raises:
        Damage: with the reason.
        OSError: a file cannot be read.
    """
    values = read_manifest(folder)
    if (values.get("station"), values.get("key")) != (station, key):
        raise Damage(f"its manifest belongs to {values.get('station')}/{values.get('key')}")
    doubted = os.path.lexists(folder / DOUBT)
    if verify == "off" and not doubted:
        return values
    listed = values["files"]
    # names with a leading dot are left by network file systems and desktops; no reader opens them
    foreign = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - set(listed) - {MANIFEST}
    if foreign:
        raise Damage(f"it holds files that its manifest does not name: {', '.join(sorted(foreign)[:3])}")
    for name, facts in listed.items():
        check_file(folder, name, facts, hashed=doubted or verify == "hash" or facts["size"] <= SMALL_BYTES)
    if doubted:
        with contextlib.suppress(OSError):
            (folder / DOUBT).unlink()
    return values


def check_copied_entry(folder: Path, verify: VerifyPolicy, *, station: str) -> None:
    """Verify an entry outside the cache, such as a copied one, under whatever name its folder has.

    Raises:
        StoreError: it is none of this station, incomplete or damaged.
    """
    if not folder.exists():
        raise StoreError(f"{folder} does not exist: pass the folder that StoreInfo.path names, or a whole copy of it")
    try:
        values = read_manifest(folder)
        check_entry(folder, verify, station=station, key=str(values.get("key")))
    except (Damage, OSError) as error:
        raise StoreError(
            f"{folder} is no compact set that can be used: {error}. Pass the folder that StoreInfo.path names, or a whole "
            "copy of it; copy a damaged one again"
        ) from error


def check_file(folder: Path, name: str, facts: dict[str, Any], *, hashed: bool) -> None:
    """Compare one file with what was written down about it.

    Raises:
        Damage: missing, no plain file, of another size or (with `hashed`) another content.
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
