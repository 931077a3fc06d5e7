"""The first two stations alone: a dataset to its bins, through the cache."""

from pathlib import Path
from typing import Any

from dq_lightning.cache.entries import Cache, default_cache_dir
from dq_lightning.core.config import QuantizeConfig
from dq_lightning.core.isolation import isolated_random_state
from dq_lightning.core.records import Bins
from dq_lightning.pipeline.plan import make_plan
from dq_lightning.pipeline.quantize import find_or_build_bins


def bins_of_dataset(
    dataset: Any,
    config: QuantizeConfig,
    *,
    labels: Any = None,
    cache_dir: str | Path | None = None,
    device: str = "auto",
    progress: bool = True,
) -> Bins:
    """Make the bins of a dataset, or find them in the cache.

    Args:
        dataset: as in `quantize`, and so are the others.
        config: `features`, `bins`, `text` and `on_error` count.
        labels: as in `quantize`.
        cache_dir: likewise.
        device: likewise.
        progress: likewise.

    Returns:
        Bins of the N samples.

    Raises:
        DQError: as `quantize`.
    """
    with isolated_random_state():
        plan = make_plan(dataset, config, labels=labels)
    return find_or_build_bins(plan, Cache(cache_dir or default_cache_dir()), device=device, progress=progress)
