"""The selected samples of a plan into a packed store, whole or by their kept patches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dq_lightning.compact import write_description
from dq_lightning.errors import SourceError
from dq_lightning.patch_bytes import measure_bytes
from dq_lightning.patching import choose, image_place, packed_items
from dq_lightning.plan import Plan
from dq_lightning.records import Selection
from dq_lightning.sources.items import plain_parts
from dq_lightning.store.cache import require_space
from dq_lightning.store.packed import Item, estimate_bytes, write_packed
from dq_lightning.store.shards import KeptShards
from dq_lightning.store.tensors import write_selection

# of so many samples the size of all is estimated
MEASURED_SAMPLES = 16


def write_whole(folder: Path, plan: Plan, selection: Selection, shards: KeptShards) -> None:
    """Write the selection, and its samples as the dataset delivers them."""
    few = selection.index[:: max(1, len(selection) // MEASURED_SAMPLES)]
    shards.reserve_bytes = estimate_bytes(_whole_items(plan, few), len(selection))
    require_space(folder, shards.reserve_bytes)
    shards.made_from = selection.content_hash()
    write_selection(folder, selection)
    _write_samples(folder, plan, selection, partial(_whole_items, plan, selection.index), shards)
    write_description(folder, plan)


def write_patches(
    folder: Path, plan: Plan, selection: Selection, scores: Tensor, sizes: Tensor, shards: KeptShards
) -> None:
    """Choose among the patches, write the selection and its samples with the chosen ones.

    Args:
        folder: of the store.
        plan: what is made.
        selection: M samples.
        scores: float32 [sum of L_i] of every patch.
        sizes: int32 [M, 2] of the images.
        shards: finished samples.
    """
    choice = choose(plan, selection, scores, sizes)
    facts = measure_bytes(plan, selection, choice)
    shards.reserve_bytes = round(facts.unpatched_bytes * facts.keep_ratio)
    require_space(folder, shards.reserve_bytes)
    shards.made_from = f"{selection.content_hash()} {choice.content_hash()}"
    write_selection(folder, selection)
    attributes = {"image_place": list(image_place(plan)), "one_size": bool((sizes == sizes[:1]).all())}
    _write_samples(folder, plan, selection, partial(packed_items, plan, selection, choice), shards, **attributes)
    write_description(folder, plan, facts)


@contextmanager
def reading_again(plan: Plan) -> Iterator[None]:
    """Tell that a sample which can't be read now was read before, where its features were made from it."""
    try:
        yield
    except SourceError as error:
        if not plan.reads_for_features:
            raise
        raise SourceError(
            f"A sample that was read for its features can't be read any more: the dataset changed between two reads. {error}"
        ) from error


def _whole_items(plan: Plan, index: Tensor, start: int = 0) -> Iterator[Item]:
    for position in index[start:].tolist():
        yield plain_parts(plan.source.plain(position)), plan.source.encoded(position)


def _write_samples(
    folder: Path,
    plan: Plan,
    selection: Selection,
    items: Callable[[int], Iterator[Item]],
    shards: KeptShards,
    **attributes: Any,
) -> None:
    write_packed(
        folder,
        items,
        ids=[plan.source.sample_id(i) for i in selection.index.tolist()],
        index=selection.index,
        bins=selection.bin,
        attributes={"source": plan.source.describe()} | attributes,
        shards=shards,
    )
