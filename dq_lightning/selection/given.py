"""Reads and checks positions that the user has chosen, in memory or in a file, in place of bins and a random draw."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.core.arrays import as_numpy
from dq_lightning.core.config import BinConfig, FeatureConfig, QualityConfig, QuantizeConfig, SelectionConfig
from dq_lightning.core.errors import ConfigError, StoreError
from dq_lightning.core.records import Selection

# `Any` stands for arrays and tensors, which LightningCLI cannot write to a file; it can write the other types.
Indices = str | Path | Sequence[int] | Any


# Keywords that choose samples in another way than `indices=`.
CHOOSING = ("keep_ratio", "num_bins", "encoder", "scores", "drop_worst", "balance")


def check_alone(indices: Any, config: QuantizeConfig | None = None, **given: Any) -> None:
    """Check that positions, unless they are None, are not combined with settings that would choose them.

    The fields of the config for features, bins and selection must have their defaults; seeds, batch size and number of
    workers may differ, since loaders use them. Of the keywords `given`, those in `CHOOSING` must not have been passed.

    Raises:
        ConfigError: a keyword was passed or a field differs from its default.
    """
    if indices is None:
        return
    named = [f"{name}=" for name in CHOOSING if given.get(name) is not None]
    if config is not None:
        parts: dict[str, Any] = {"features": FeatureConfig(), "bins": BinConfig(), "selection": SelectionConfig()}
        parts["quality"] = QualityConfig()
        named = [
            f"config.{part}.{name}"
            for part, default in parts.items()
            for name, value in vars(default).items()
            if name not in ("seed", "batch_size", "num_workers") and getattr(getattr(config, part), name) != value
        ]
    if named:
        raise ConfigError(
            f"indices= and {', '.join(named)} were both given: indices= names the samples to keep, so no features or bins are "
            "made and nothing is drawn. Leave one of the two out"
        )


def read_indices(indices: Any, total: int | None = None) -> Tensor:
    """Read the positions that a user has chosen, in ascending order, int64 [M].

    They are integers [M] as an array, tensor or list, a `Selection`, or the path of a file that `read_index` reads.
    `total` is the number of samples of the dataset, which bounds the positions.

    Raises:
        ConfigError: `indices` is not a list of integers, is empty, or holds a position that is negative, beyond the
            dataset or repeated.
        StoreError: a file cannot be read, or what it holds fails the same checks.
    """
    name = "indices="
    kind: type[ConfigError | StoreError] = ConfigError
    if isinstance(indices, str | Path):
        name, kind = str(indices), StoreError
        values = _loaded(indices)
    else:
        given = indices.index if isinstance(indices, Selection) else indices
        try:
            values = as_numpy(given)
        except ValueError as error:  # lists of different lengths
            raise ConfigError(f"indices= must be integers [M], in one flat list or array: {error}") from error
    if not values.size:
        raise kind(f"{name} holds no positions, so nothing would be kept: pass at least one")
    return torch.from_numpy(_checked(values, total, name, kind))


def read_index(path: str | Path, total: int | None = None, *, ordered: bool = True) -> NDArray[np.int64]:
    """Read row numbers int64 [M] from an `.npy` file, or from the array `index` of an `.npz` file; M may be 0.

    They are sorted, unless `ordered` is False. `total` is the number of samples of the dataset, which bounds them.

    Raises:
        StoreError: the file cannot be read, or it holds anything but integers [M], or row numbers that are negative,
            beyond the dataset or repeated.
    """
    values = _loaded(path)
    index = _checked(values, total, str(path), StoreError)
    return index if ordered else values.astype(np.int64)


def _loaded(path: str | Path) -> NDArray[Any]:
    try:
        read = np.load(Path(path).expanduser(), allow_pickle=False)
        return np.asarray(read["index"] if isinstance(read, np.lib.npyio.NpzFile) else read)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise StoreError(
            f"{path} cannot be read as row numbers: {error}; write them with numpy.save, int64 [M]"
        ) from error


def _checked(
    values: NDArray[Any], total: int | None, name: str, kind: type[ConfigError | StoreError]
) -> NDArray[np.int64]:
    """Return the positions in ascending order, checked to be integers [M], all different and inside the dataset."""
    if values.ndim != 1 or values.dtype.kind not in "iu":
        advice = "; turn a mask into positions with mask.nonzero()[0]" if values.dtype.kind == "b" else ""
        raise kind(f"{name} holds {values.dtype} {list(values.shape)}, expected row numbers, integers [M]{advice}")
    index: NDArray[np.int64] = np.sort(values.astype(np.int64))
    if len(index) and (index[0] < 0 or (np.diff(index) == 0).any() or (total is not None and index[-1] >= total)):
        raise kind(
            f"{name} must hold different row numbers from 0"
            + (f" to {total - 1}, since the dataset has {total:,} samples" if total is not None else "")
            + f", but its row numbers are {index[0]} to {index[-1]}, with {len(index) - len(np.unique(index))} of them repeated"
            + (": it was made from another dataset" if total is not None else ": make it again")
        )
    return index
