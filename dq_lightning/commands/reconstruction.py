"""Station 4 without a draw: images with their least informative patches dropped and filled again."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dq_lightning.cache.entries import Cache, default_cache_dir
from dq_lightning.core.config import PatchConfig, QuantizeConfig, SelectionConfig
from dq_lightning.core.errors import ConfigError
from dq_lightning.core.isolation import isolated_random_state
from dq_lightning.exports.samples import KeptImages, kept_of_source
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.pipeline.compact import open_packed
from dq_lightning.pipeline.plan import make_plan
from dq_lightning.pipeline.quantize import find_or_build
from dq_lightning.pipeline.wanted import want


def reconstruct_images(
    dataset: Any,
    config: PatchConfig,
    *,
    indices: Any = None,
    name: str = "dataset",
    cache_dir: str | Path | None = None,
    device: str = "auto",
    progress: bool = True,
) -> KeptImages:
    """Return images as a reconstructor rebuilds them from their kept patches (Zhou et al. 2023, section 3.3).

    The packed set and its filled images are made in the cache as `quantize` makes them, or found there, so a run that
    was killed goes on where it stopped. The arguments are those of `quantize` and of the command `reconstruct`; `name`
    is the name of the set, for files. With `reconstruct="off"` dropped patches have the mean colour, otherwise they are
    filled.

    Returns:
        The reconstructed images, ascending by their position in the dataset.

    Raises:
        ConfigError: no patch would be dropped.
        PatchError: the classifier or the reconstructor cannot be found or does not fit.
    """
    if not config.drops:
        raise ConfigError(
            "drop_ratio=0 drops no patches, so there is nothing to fill: pass a share between 0 and 1 (0.2 in the paper)"
        )
    if config.reconstruct == "batch":
        config = replace(config, reconstruct="prepare")
    selection = SelectionConfig(keep_ratio=1.0) if indices is None else SelectionConfig()
    settings = QuantizeConfig(selection=selection, patches=config, store="packed")
    with isolated_random_state():
        plan = make_plan(dataset, want(settings, indices=indices))
        cache = Cache(cache_dir or default_cache_dir())
        compact = find_or_build(plan, cache, device=device, progress=progress)

    def samples() -> Iterator[Any]:
        return iter(open_packed(compact.info.path) if compact.filled is None else PackedDataset(compact.filled))

    return kept_of_source(plan.source, compact.selection, name, samples)
