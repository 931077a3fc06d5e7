"""A choice that exists already: positions in memory or in a file, checked, in place of bins and a draw."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.core.config import BinConfig, FeatureConfig, QuantizeConfig, SelectionConfig
from dq_lightning.core.errors import ConfigError, StoreError
from dq_lightning.core.records import Selection

# Any takes arrays and tensors, which LightningCLI can't write; it can write the others
Indices = str | Path | Sequence[int] | Any


def check_alone(indices: Any, config: QuantizeConfig | None = None, **given: Any) -> None:
    """Raise ConfigError when positions come with settings that would choose them.

    Args:
        indices: as in `quantize`; None is fine with everything.
        config: whose settings of features, bins and selection must be the defaults; a seed may differ, since loaders use it.
        **given: keywords that the user passed; None is one that was not given.
    """
    if indices is None:
        return
    named = [f"{name}=" for name, value in given.items() if value is not None]
    if config is not None:
        parts: dict[str, Any] = {"features": FeatureConfig(), "bins": BinConfig(), "selection": SelectionConfig()}
        named = [
            f"config.{part}.{name}"
            for part, default in parts.items()
            for name, value in vars(default).items()
            if name not in ("seed", "batch_size", "num_workers") and getattr(getattr(config, part), name) != value
        ]
    if named:
        raise ConfigError(
            f"indices= and {', '.join(named)} were both given: indices= is a finished choice, for which no features, bins or "
            "draw are made. Leave one of the two out"
        )


def read_indices(indices: Any, total: int | None = None) -> Tensor:
    """The positions that a user has chosen, int64 [M], ascending.

    Args:
        indices: integers [M] as array, tensor or list, a `Selection`, or a file as for `read_index`.
        total: samples of the dataset, to compare with; None compares nothing.

    Raises:
        ConfigError: they are no positions, none at all, negative, beyond the dataset, or some are there twice.
        StoreError: likewise, of a file.
    """
    if isinstance(indices, str | Path):
        index = read_index(indices, total)
        if not len(index):
            raise StoreError(f"{indices} holds no position: nothing would be kept")
        return torch.from_numpy(index)
    given = indices.index if isinstance(indices, Selection) else indices
    try:
        values = np.asarray(given.detach().cpu().numpy() if isinstance(given, Tensor) else given)
    except ValueError as error:  # lists of different lengths
        raise ConfigError(f"indices= holds no integers [M]: {error}") from error
    if not values.size:
        raise ConfigError("indices= holds no position: nothing would be kept")
    if values.ndim != 1 or values.dtype.kind not in "iu":
        advice = "; of a mask pass the positions, mask.nonzero()[0]" if values.dtype.kind == "b" else ""
        raise ConfigError(
            f"indices= holds {values.dtype} {list(values.shape)}, expected positions in the dataset, integers [M]{advice}"
        )
    return torch.from_numpy(_checked(values, total, "indices=", ConfigError))


def read_index(path: str | Path, total: int | None = None, *, ordered: bool = True) -> NDArray[np.int64]:
    """Row numbers of a `.npy` (or of `index` in an `.npz`), int64 [M], ascending.

    Args:
        path: of the file.
        total: samples of the dataset, to compare with; None compares nothing.
        ordered: False keeps the order of the file.

    Raises:
        StoreError: it is no list of different row numbers, or does not fit the dataset.
    """
    try:
        read = np.load(Path(path).expanduser(), allow_pickle=False)
        values = np.asarray(read["index"] if isinstance(read, np.lib.npyio.NpzFile) else read)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise StoreError(
            f"{path} cannot be read as row numbers: {error}; write them with numpy.save, int64 [M]"
        ) from error
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise StoreError(f"{path} holds {values.dtype} {list(values.shape)}, expected row numbers, integers [M]")
    index = _checked(values, total, str(path), StoreError)
    return index if ordered else values.astype(np.int64)


def _checked(
    values: NDArray[Any], total: int | None, name: str, kind: type[ConfigError | StoreError]
) -> NDArray[np.int64]:
    """Positions in ascending order, all different and inside the dataset."""
    index: NDArray[np.int64] = np.sort(values.astype(np.int64))
    if len(index) and (index[0] < 0 or (np.diff(index) == 0).any() or (total is not None and index[-1] >= total)):
        raise kind(
            f"{name} has the rows {index[0]} to {index[-1]}, {len(index) - len(np.unique(index))} of them twice"
            + (f", for a dataset of {total:,}: it belongs to another one" if total is not None else "")
        )
    return index
