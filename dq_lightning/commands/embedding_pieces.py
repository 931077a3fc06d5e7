"""Joining pieces of embeddings (see `features/pieces.py`), also published ones."""

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dq_lightning.cache.entries import Cache, default_cache_dir
from dq_lightning.commands.opening import open_dataset
from dq_lightning.core.config import TextConfig
from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import FeatureError
from dq_lightning.exports.rows import whole
from dq_lightning.features.pieces import merge_pieces
from dq_lightning.sources.adapt import as_source


def merge_rows(data: str, folder: str | Path, *, name: str, text: TextConfig, cache_dir: str | None = None) -> Path:
    """Join the pieces of a folder as `NAME.npy`, float32 [N, D], in that folder, and return its path.

    The number of rows of `data`, from which the pieces were made, is compared; for pieces with descriptions also the
    content. The names of the pieces begin with `name`.

    Raises:
        FeatureError: a piece is missing, damaged, or belongs to other data.
    """
    folder = Path(folder).expanduser()
    source = as_source(open_dataset(None, data), text=text)
    own = any(folder.glob(f"{name}_*.json"))
    if own:
        content = source.digest(Cache(cache_dir or default_cache_dir()).memory)
        merged = merge_pieces(folder, name=name, identity={"source": content})
    else:
        merged = _published(folder, name)
    if len(merged) != len(source):
        raise FeatureError(
            f"the pieces have {len(merged):,} rows, but {data} has {len(source):,}: pass the data that they were made from"
        )
    return whole(folder / f"{name}.npy", lambda place: np.save(place, merged, allow_pickle=False))


def _published(folder: Path, name: str) -> NDArray[np.float32]:
    """Join pieces without descriptions in the order of their numbers; only a gap between the numbers can be noticed."""
    found = {
        int(m[1]): path
        for path in folder.glob(f"{name}_*.npy")
        if (m := re.fullmatch(rf"{name}_(\d+)\.npy", path.name))
    }
    if not found:
        raise FeatureError(
            f"there is no {name}_*.npy in {folder}: run `dq-lightning embed DATA --index 0 --nums 10000` first"
        )
    missing = [number for number in range(max(found)) if number not in found]
    if missing:
        raise FeatureError(
            f"{folder / f'{name}_{missing[0]}.npy'} is missing: make this piece, too, with "
            f"`dq-lightning embed DATA --index {missing[0]}` and the same --nums"
        )
    get_logger().warning(
        f"the pieces in {folder} have no .json files that describe them, so they are used without checking that they were made "
        "from these data"
    )
    try:
        parts = [np.load(found[number], allow_pickle=False) for number in sorted(found)]
        merged = np.concatenate([np.asarray(part, dtype=np.float32) for part in parts])
    except (OSError, ValueError) as error:
        raise FeatureError(f"the pieces in {folder} do not fit together ({error}): make them again") from error
    if merged.ndim != 2 or not np.isfinite(merged).all():
        raise FeatureError(
            f"the pieces in {folder} must together be a matrix of finite numbers [N, D], but they are of shape "
            f"{list(merged.shape)} or hold NaN or infinity: make them again"
        )
    return merged
