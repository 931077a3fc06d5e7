"""Compact sets at an address such as `s3://bucket/set`: they are copied into the cache, and used from there."""

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dq_lightning.cache.entries import Cache, default_cache_dir, require_space
from dq_lightning.cache.manifest import MANIFEST, check_file, read_manifest
from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import DQError, StoreError
from dq_lightning.core.fields import address_scheme
from dq_lightning.pipeline.compact import SET_FOLDER, set_folder
from dq_lightning.pipeline.plan import STORE


def local_set(path: str | Path, cache_dir: str | Path | None = None) -> Path:
    """Return the folder of a compact set on this machine; a set at an address is copied into the cache first.

    A copy of the same content is used again; only the manifest is read then.

    Args:
        path: folder as `set_folder` takes it, or the address of such a folder in any file system of fsspec.
        cache_dir: folder of the cache that keeps the copy; None uses `DQ_LIGHTNING_CACHE` or the platform's folder.

    Raises:
        StoreError: no compact set can be read at the address.
        CacheError: the copy cannot be written.
    """
    if address_scheme(path) is None:
        return set_folder(path)
    if isinstance(path, Path):
        raise StoreError(f"{str(path)!r} was an address before it became a Path, which drops a slash: pass it as text")
    address, cache = path, Cache(cache_dir or default_cache_dir())
    try:
        from fsspec.core import url_to_fs

        system, root = url_to_fs(address)  # type: ignore[no-untyped-call]
        inside = f"{root}/{SET_FOLDER}"
        place = inside if system.exists(f"{inside}/{MANIFEST}") else root
        with TemporaryDirectory(prefix="dq_lightning-") as scratch:
            system.get_file(f"{place}/{MANIFEST}", f"{scratch}/{MANIFEST}")
            manifest = read_manifest(Path(scratch))
    except Exception as error:
        # Every file system has errors of its own, for missing packages, files, networks and credentials.
        raise _unreadable(address, error) from error
    if manifest["station"] != STORE:
        raise _unreadable(address, StoreError(f"it is an entry of {manifest['station']}"))
    listed: dict[str, Any] = manifest["files"]

    def write(folder: Path) -> None:
        size = sum(facts["size"] for facts in listed.values())
        require_space(folder, size)
        get_logger().info(f"copying {address} ({size:,} bytes) into the cache")
        for name, facts in listed.items():
            try:
                system.get_file(f"{place}/{name}", str(folder / name))
                check_file(folder, name, facts, hashed=True)
            except Exception as error:
                raise _unreadable(address, error) from error

    # The address and the content are parts of the key: a set that somebody else made never takes the place of one's own.
    content = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    return cache.build(STORE, manifest["parts"] | {"copied_from": address, "content": content}, write)


def _unreadable(address: str, error: Exception) -> DQError:
    named = str(error) if isinstance(error, DQError) else f"{type(error).__name__}: {error}"
    return StoreError(
        f"{address} can't be read as a compact set ({named}): pass the address of the folder that StoreInfo.path names, as "
        "text, install the package of its file system and give it the credentials that it asks for; or copy the folder to "
        "this machine and pass that"
    )
