"""The selected samples of a plan into a packed store, whole or by their kept patches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
from torch import Tensor

from dq_lightning.cache.entries import require_space
from dq_lightning.cache.shards import KeptShards
from dq_lightning.cache.tensors import write_selection
from dq_lightning.core.errors import CacheError, SourceError, StoreError
from dq_lightning.core.isolation import isolated_random_state
from dq_lightning.core.records import Selection
from dq_lightning.identity.values import digest_of
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.packed.writer import Item, estimate_bytes, write_packed
from dq_lightning.pipeline.compact import write_description
from dq_lightning.pipeline.patch_bytes import measure_bytes
from dq_lightning.pipeline.patching import (
    TRIED_SAMPLES,
    check_packable,
    choose,
    image_place,
    packed_items,
    with_all_patches,
)
from dq_lightning.pipeline.plan import Plan
from dq_lightning.sources.items import evenly_spaced, plain_parts
from dq_lightning.sources.skipping import readable_items

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


def check_storable(plan: Plan, finisher: Any = None) -> None:
    """Pack a few samples and read them back, before the hours of work, if that is what the plan will do.

    Args:
        plan: what is to be made.
        finisher: made for `plan.candidates`: what it makes of a sample as it comes back must be what it makes of the dataset's
            own. Its transform may ask for what no packed set keeps, such as the name of an image's file.

    Raises:
        StoreError: a sample cannot be stored.
        SourceError: the finisher makes something else of it afterwards.
    """
    if plan.store_kind != "packed":
        return
    if plan.patches is not None:
        check_packable(plan)
    index, positions, items = plan.candidates, [], []
    places = {int(index[place]): place for place in evenly_spaced(len(index), TRIED_SAMPLES)}
    for position, sample in readable_items(plan.source, places):
        positions.append(position)
        items.append(_tried_item(plan, position, plain_parts(sample)))
    # in the system's folder for temporary files: the cache may be full, or not be writable, and that is told in its own words
    with _trial_folder() as folder:
        try:
            write_packed(
                Path(folder),
                items,
                ids=[str(position) for position in positions],
                index=torch.tensor(positions, dtype=torch.int64),
                bins=torch.zeros(len(positions), dtype=torch.int16),
                attributes={},
            )
            stored = list(PackedDataset(folder))
        except StoreError as error:
            raise StoreError(
                f"{plan.source.describe()} can't be packed, a trial with a few samples failed: {error}"
            ) from error
    for position, sample in zip(positions, stored, strict=True) if finisher is not None else ():
        _check_finished(plan, partial(finisher, places[position]), position, sample)


@contextmanager
def _trial_folder() -> Iterator[str]:
    """A temporary folder for a few samples.

    Raises:
        CacheError: it cannot be made or written.
    """
    try:
        with TemporaryDirectory(prefix="dq_lightning-", ignore_cleanup_errors=True) as folder:
            yield folder
    except OSError as error:
        raise CacheError(
            f"a few samples could not be packed on trial in {gettempdir()} ({error}): make room there, or set TMPDIR to "
            "another folder"
        ) from error


def _tried_item(plan: Plan, position: int, sample: Any) -> Item:
    if plan.patches is not None:
        try:
            return with_all_patches(plan, sample, image_place(plan)), None
        except StoreError:
            pass  # stays whole
    return sample, plan.source.encoded(position)


def _check_finished(plan: Plan, finish: Callable[[Any], Any], position: int, stored: Any) -> None:
    def finished(item: Any) -> str:
        with isolated_random_state(position):
            return digest_of(finish(item))

    try:
        wanted = {finished(plain_parts(plan.source.plain(position))) for _ in range(2)}
    except Exception:
        return  # it fails on the dataset's own sample too, or gives what cannot be compared
    if len(wanted) > 1:
        return  # it draws from a generator of its own
    reason = "another result"
    try:
        if finished(stored) in wanted:
            return
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    raise SourceError(
        f"The transform of {plan.source.describe()} gives something else for sample {position} as it is packed than for the "
        f"dataset's own ({reason}): it asks for what a packed set does not keep, such as the file's name or the image's class. "
        'Let the dataset do that part itself, or use store="indices" (without drop_ratio=), which reads through the dataset'
    )


@contextmanager
def reading_again(plan: Plan) -> Iterator[None]:
    """Tell that a sample which can't be read now was read before, where its features were made from it."""
    try:
        yield
    except SourceError as error:
        if not plan.reads_for_features:
            raise
        raise SourceError(
            "A sample whose image was read for its features can't be read any more: the dataset changed between two reads, or "
            f"another part of the sample is damaged. {error}"
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
