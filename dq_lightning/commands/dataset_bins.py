"""The first two stations alone: this module makes the bins of a dataset, or finds them in the cache."""

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
        dataset: the dataset, as in `quantize`.
        config: settings; only `features`, `bins`, `text` and `on_error` are used.
        labels: class of every sample [N], a column name, or False for no groups; None takes the dataset's own classes.
        cache_dir: folder of the cache; None uses `DQ_LIGHTNING_CACHE` or the platform's cache folder.
        device: device that the encoder runs on: `"auto"`, `"cpu"`, `"cuda"`, ...
        progress: show progress bars.

    Returns:
        Bins of the N samples.

    Raises:
        DQError: the dataset, the encoder or the cache cannot be used, or a setting is wrong, as in `quantize`.
    """
    with isolated_random_state():
        plan = make_plan(dataset, config, labels=labels)
        return find_or_build_bins(plan, Cache(cache_dir or default_cache_dir()), device=device, progress=progress)
