"""Station 4 by itself: the chosen images with their least informative patches dropped and filled again."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

from dq_lightning.config import FeatureConfig, QuantizeConfig
from dq_lightning.errors import ConfigError
from dq_lightning.exports.samples import KeptImages, kept_of_items
from dq_lightning.filling import filled_items
from dq_lightning.patch_config import PatchConfig
from dq_lightning.patching import check_packable, choose, image_place, packed_items, score_selection
from dq_lightning.plan import Plan, make_plan
from dq_lightning.records import PatchChoice, Selection
from dq_lightning.store.cache import Cache, default_cache_dir
from dq_lightning.store.patched import map_patched, mean_filled


def reconstruct_images(
    dataset: Any,
    selection: Selection,
    config: PatchConfig,
    *,
    classifier: Any = None,
    reconstructor: Any = None,
    name: str = "dataset",
    cache_dir: str | None = None,
    device: str = "auto",
    progress: bool = True,
) -> KeptImages:
    """Images as a network sees them that was given the kept patches alone (Zhou et al. 2023, section 3.3).

    Only the selected images are scored and filled. Nothing is computed before the first image is asked for, and the images
    are made one after the other, in memory independent of their number.

    Args:
        dataset: of images; see `as_source`.
        selection: positions in it.
        config: `drop_ratio` and the rest; with `reconstruct="off"` dropped patches have the mean colour.
        classifier: network in place of the config's name.
        reconstructor: likewise.
        name: of the set, for files.
        cache_dir: of the digests of weights; None as in `quantize`.
        device: where the networks run.
        progress: show bars.

    Raises:
        ConfigError: nothing would be dropped.
        PatchError: classifier or reconstructor cannot be found or do not fit.
    """
    if not config.drops:
        raise ConfigError("drop_ratio=0 drops no patch: pass a share between 0 and 1, as published 0.2")
    # no features are made, so no encoder is asked for
    wanted = QuantizeConfig(FeatureConfig("bundled"), patches=config, store="packed")
    plan = make_plan(dataset, wanted, classifier=classifier, reconstructor=reconstructor)
    check_packable(plan)
    assert plan.patches is not None
    plan = replace(plan, patches=plan.patches.resolve(Cache(cache_dir or default_cache_dir()).memory))

    def samples() -> Iterator[Any]:
        scores, sizes = score_selection(plan, selection, device=device, progress=progress)
        packed = _Packed(plan, selection, choose(plan, selection, scores, sizes))
        if config.reconstruct == "off":
            return (map_patched(sample, mean_filled) for sample in packed)
        assert plan.patches is not None
        filled = filled_items(cast(Any, packed), image_place(plan), plan.patches, device=device, progress=progress)
        return (sample for sample, _ in filled)

    return kept_of_items(plan.source, selection, samples, name)


class _Packed:
    """The packed samples of a choice, read when they are asked for."""

    def __init__(self, plan: Plan, selection: Selection, choice: PatchChoice) -> None:
        self._arguments = plan, selection, choice

    def __len__(self) -> int:
        return len(self._arguments[1])

    def __iter__(self) -> Iterator[Any]:
        return (sample for sample, _ in packed_items(*self._arguments))
