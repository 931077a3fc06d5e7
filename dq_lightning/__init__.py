"""Dataset Quantization for PyTorch Lightning: train on a small, well-chosen part of your data.

Every public name is imported on first use, so `import dq_lightning` alone is light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dq_lightning.bins.make import make_bins
    from dq_lightning.compact import load_selection
    from dq_lightning.config import BinConfig, FeatureConfig, QuantizeConfig, SelectionConfig
    from dq_lightning.errors import DQError
    from dq_lightning.lightning import QuantizedDataModule
    from dq_lightning.patch_config import PatchConfig
    from dq_lightning.patches.mae import load_mae
    from dq_lightning.pipeline import quantize
    from dq_lightning.records import Bins, Features, PatchChoice, Selection, StoreInfo
    from dq_lightning.selection.select import select
    from dq_lightning.sources.adapt import as_source
    from dq_lightning.store.reader import PackedDataset

__version__ = "0.1.0"

_HOMES = {
    "BinConfig": "config",
    "Bins": "records",
    "DQError": "errors",
    "FeatureConfig": "config",
    "Features": "records",
    "PackedDataset": "store.reader",
    "PatchChoice": "records",
    "PatchConfig": "patch_config",
    "QuantizeConfig": "config",
    "QuantizedDataModule": "lightning",
    "Selection": "records",
    "SelectionConfig": "config",
    "StoreInfo": "records",
    "as_source": "sources.adapt",
    "load_mae": "patches.mae",
    "load_selection": "compact",
    "make_bins": "bins.make",
    "quantize": "pipeline",
    "select": "selection.select",
}

__all__ = [
    "BinConfig",
    "Bins",
    "DQError",
    "FeatureConfig",
    "Features",
    "PackedDataset",
    "PatchChoice",
    "PatchConfig",
    "QuantizeConfig",
    "QuantizedDataModule",
    "Selection",
    "SelectionConfig",
    "StoreInfo",
    "as_source",
    "load_mae",
    "load_selection",
    "make_bins",
    "quantize",
    "select",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
