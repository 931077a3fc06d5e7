"""Dataset Quantization for PyTorch Lightning: train on a small, well-chosen part of your data.

Every public name is imported at its first use, so `import dq_lightning` itself loads no heavy library, not even torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dq_lightning.bins.make import make_bins
    from dq_lightning.core.config import (
        BinConfig,
        EncodingConfig,
        FeatureConfig,
        PatchConfig,
        QualityConfig,
        QuantizeConfig,
        SelectionConfig,
    )
    from dq_lightning.core.errors import DQError
    from dq_lightning.core.records import Bins, Features, PatchChoice, Selection, StoreInfo
    from dq_lightning.lightning import QuantizedDataModule
    from dq_lightning.packed.reader import PackedDataset
    from dq_lightning.patches.mae import load_mae
    from dq_lightning.pipeline.compact import load_selection
    from dq_lightning.pipeline.quantize import quantize
    from dq_lightning.quality.margin import margin_scores
    from dq_lightning.selection.select import select
    from dq_lightning.sources.adapt import as_source

__version__ = "0.1.0"

_HOMES = {
    "BinConfig": "core.config",
    "Bins": "core.records",
    "DQError": "core.errors",
    "FeatureConfig": "core.config",
    "Features": "core.records",
    "PackedDataset": "packed.reader",
    "PatchChoice": "core.records",
    "EncodingConfig": "core.config",
    "PatchConfig": "core.config",
    "QualityConfig": "core.config",
    "QuantizeConfig": "core.config",
    "QuantizedDataModule": "lightning",
    "Selection": "core.records",
    "SelectionConfig": "core.config",
    "StoreInfo": "core.records",
    "as_source": "sources.adapt",
    "load_mae": "patches.mae",
    "load_selection": "pipeline.compact",
    "make_bins": "bins.make",
    "margin_scores": "quality.margin",
    "quantize": "pipeline.quantize",
    "select": "selection.select",
}

__all__ = [
    "BinConfig",
    "Bins",
    "DQError",
    "EncodingConfig",
    "FeatureConfig",
    "Features",
    "PackedDataset",
    "PatchChoice",
    "PatchConfig",
    "QualityConfig",
    "QuantizeConfig",
    "QuantizedDataModule",
    "Selection",
    "SelectionConfig",
    "StoreInfo",
    "as_source",
    "load_mae",
    "load_selection",
    "make_bins",
    "margin_scores",
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
