"""The step "store": write the compact set, with row numbers alone, whole samples, or samples with kept patches."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
from torch import Tensor

from dq_lightning.cache.entries import require_space
from dq_lightning.cache.tensors import write_selection
from dq_lightning.core.errors import CacheError, SourceError, StoreError
from dq_lightning.core.handles import FORK, LoaderProcesses, loader_processes
from dq_lightning.core.isolation import isolated_random_state
from dq_lightning.core.records import PatchChoice, Selection
from dq_lightning.core.sharing import Arrays, Job, Sharing
from dq_lightning.core.workers import MAX_WORKERS, WORKER_START_SECONDS, available_cores
from dq_lightning.identity.values import digest_of
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.packed.writer import (
    PIECE_BYTES,
    Item,
    SharedItems,
    encode_pieces,
    estimate_bytes,
    rough_bytes,
    write_packed,
)
from dq_lightning.pipeline.budget import ByteSetting
from dq_lightning.pipeline.compact import write_description
from dq_lightning.pipeline.encoding import (
    NOTHING_KNOWN,
    described_setting,
    encoded_items,
    fixed_setting,
    warn_of_encoding,
)
from dq_lightning.pipeline.patch_bytes import PatchFacts, measure_bytes
from dq_lightning.pipeline.patching import (
    choose,
    in_codec,
    packed_items,
    with_all_patches,
)
from dq_lightning.pipeline.plan import Plan
from dq_lightning.pipeline.step import Task, reading_again
from dq_lightning.sources.items import evenly_spaced, plain_parts
from dq_lightning.sources.skipping import readable_items

# The size of the store is estimated from about so many samples.
MEASURED_SAMPLES = 16
# So many samples are checked before the long work.
TRIED_SAMPLES = 8
# The samples that a loader process is handed at once take about this long at most.
PIECE_SECONDS = 0.5
# A transform whose result differs after packing is repeated so often, to find out whether it is random.
REPEATS = 64


def make_store(task: Task, selection: Selection, scored: tuple[Tensor, Tensor] | None = None) -> None:
    """Write the entry of the compact set: its selection and description, and the samples if the plan packs them.

    Packed samples are plain items, that is, items without the user's transforms. `scored` holds the scores float32 [sum
    of L_i] of every patch, image after image, and the sizes int32 [M, 2] of the images, (height, width) in pixels; None
    where all patches are kept.

    Raises:
        PatchError: the patches do not fit into `max_bytes`, or an image cannot be cut into patches where it must be.
        StoreError: a sample cannot be stored.
        SourceError: a sample cannot be read.
        ChangedError: the data changed while they were read.
        CacheError: the disk has too little space.
    """
    plan, facts = task.plan, None
    write_selection(task.folder, selection)
    if plan.store_kind == "packed":
        with reading_again(plan):
            if scored is None:
                _write_whole(task, selection)
            else:
                facts = _write_patches(task, selection, *scored)
            task.check_unchanged()
    setting = fixed_setting(plan.config.encoding)
    write_description(task.folder, plan, facts, None if setting.codec == "keep" else described_setting(setting))


def _write_whole(task: Task, selection: Selection) -> None:
    """Write the samples as they are, or with their images encoded anew."""
    plan = task.plan
    setting = fixed_setting(plan.config.encoding)
    few = selection.index[:: max(1, len(selection) // MEASURED_SAMPLES)]
    if plan.source.in_order:
        few = torch.tensor(plan.source.spread(MEASURED_SAMPLES))
    size = estimate_bytes(encoded_items(plan, setting, few), len(selection))
    write_samples(task, selection, size, made_from=selection.content_hash(), setting=setting)


def _write_patches(task: Task, selection: Selection, scores: Tensor, sizes: Tensor) -> PatchFacts:
    """Choose the patches to keep, and write the samples with these patches in place of their images."""
    plan = task.plan
    choice = choose(plan, selection, scores, sizes)
    facts = measure_bytes(plan, selection, choice)
    write_samples(
        task,
        selection,
        round(facts.unpatched_bytes * facts.keep_ratio),
        made_from=f"{selection.content_hash()} {choice.content_hash()}",
        choice=choice,
        image_place=list(plan.source.image_leaf()),
        one_size=bool((sizes == sizes[:1]).all()),
    )
    return facts


def write_samples(
    task: Task,
    selection: Selection,
    size: int,
    *,
    made_from: str,
    setting: ByteSetting | None = None,
    choice: PatchChoice | None = None,
    known: Mapping[int, Item] = NOTHING_KNOWN,
    squeeze: bool = False,
    **attributes: Any,
) -> None:
    """Write the M kept samples in the packed format, together with other ranks, which call `help_packing`, or processes.

    `size` says about how many bytes they take, and `made_from` is a digest of what they are made from beside the data,
    for the shards of an interrupted run. Images are stored as the `setting` says, and with the patches of the `choice`
    alone; None for that of the plan, and for whole images. `known` holds samples by position that the setting was
    applied to already. With `squeeze` the small arrays are compressed. The store
    keeps the attributes.
    """
    require_space(task.folder, size)
    shards = task.shards("packing")
    shards.reserve_bytes, shards.made_from = size, made_from
    source = task.plan.source
    facts: dict[str, Any] = {"setting": None if setting is None else asdict(setting)}
    arrays: Arrays = {"index": selection.index.numpy()}
    if choice is not None:
        facts["patch_size"] = choice.patch_size
        arrays |= {"sizes": choice.sizes.numpy(), "packed": choice.packed.numpy()}
    items = _items(task.plan, selection.index, setting, choice, known)
    shared = SharedItems(task.sharing, items, facts, arrays)
    if source.in_order:
        # A rank that packs some samples of a stream would read it from its beginning.
        shared = replace(shared, sharing=Sharing())
    elif task.sharing.num_ranks == 1 and choice is None:
        shared = _in_processes(
            shared, task.plan, len(selection), lambda plan: _items(plan, selection.index, setting, choice, known)
        )
    write_packed(
        task.folder,
        shared,
        ids=[source.sample_id(i) for i in selection.index.tolist()],
        index=selection.index,
        bins=selection.bin,
        attributes={"source": source.describe()} | attributes,
        shards=shards,
        squeeze=squeeze,
    )


def _in_processes(
    shared: SharedItems, plan: Plan, count: int, items_of: Callable[[Plan], Callable[[Iterator[int]], Iterator[Item]]]
) -> SharedItems:
    """Let processes of this machine read and encode the `count` samples, where a dataset can be read in several.

    They do so where it takes one process longer than to start them, by the time that a few samples take. They read through
    a copy of the dataset that holds nothing open (`loader_processes`), which this process does not read before. `items_of`
    makes the function that yields the samples of a plan.
    """
    workers = plan.config.features.num_workers
    if FORK is None or workers == 0 or not count:
        return shared
    started = time.perf_counter()
    tried = list(shared.items(iter(evenly_spaced(count, TRIED_SAMPLES))))
    each = (time.perf_counter() - started) / len(tried)
    if workers == "auto":
        cores = min(available_cores(), MAX_WORKERS)
        workers = cores if cores > 1 and each * count >= WORKER_START_SECONDS else 0
    if workers == 0:
        return shared
    sharing = LoaderProcesses(workers)

    def others() -> Callable[[Iterator[int]], Iterator[Item]]:
        source, sharing.count = loader_processes(plan.source, workers, asked=False, context=FORK)
        return items_of(replace(plan, source=source))

    # Each process gets several pieces, none of which takes much time or memory.
    most_bytes = max(1, *map(rough_bytes, tried))
    size = min(-(-count // (4 * workers)), PIECE_BYTES // most_bytes, int(PIECE_SECONDS / max(each, 1e-9)))
    return replace(shared, sharing=sharing, others=others, piece_samples=max(1, size))


def _items(
    plan: Plan,
    index: Tensor,
    setting: ByteSetting | None,
    choice: PatchChoice | None,
    known: Mapping[int, Item] = NOTHING_KNOWN,
) -> Callable[[Iterator[int]], Iterator[Item]]:
    """Return the function that yields samples as they are stored; the arguments are those of `write_samples`."""
    if choice is not None:
        return partial(packed_items, plan if setting is None else in_codec(plan, setting), index, choice)
    return partial(encoded_items, plan, setting or fixed_setting(plan.config.encoding), index, known=known)


@contextmanager
def help_packing(plan: Plan, job: Job, numbers: Iterator[int]) -> Iterator[Iterator[Arrays]]:
    """Give some encoded samples, in a `with` block, to a rank that packs those of an equal plan."""
    facts, arrays = job.facts["items"], {name: torch.from_numpy(array) for name, array in job.arrays.items()}
    setting = None if facts["setting"] is None else ByteSetting(**facts["setting"])
    choice = PatchChoice(facts["patch_size"], arrays["sizes"], arrays["packed"]) if "sizes" in arrays else None
    with reading_again(plan):
        yield encode_pieces(job, numbers, _items(plan, arrays["index"], setting, choice))


def check_storable(plan: Plan, finisher: Any = None) -> None:
    """Check before the long work that samples can be packed: pack a few of them and read them back.

    Nothing is done if the plan packs no samples. The finisher, for the positions `plan.candidates`, must give the same
    result for a sample read back as for the dataset's own sample; a transform may use something that no packed set
    keeps, such as the file name of an image.

    Raises:
        StoreError: a sample cannot be stored.
        CacheError: the folder for temporary files cannot be written.
        SourceError: the finisher gives another result for a sample that was packed and read back.
    """
    if plan.store_kind != "packed":
        return
    index, positions, items, problems = plan.candidates, [], [], []
    places = {int(index[place]): place for place in evenly_spaced(len(index), TRIED_SAMPLES)}
    for position, sample in readable_items(plan.source, places):
        item: Item = plain_parts(sample), plan.source.encoded(position)
        if plan.patches is not None:
            try:
                item = with_all_patches(plan, item[0], plan.source.image_leaf()), None
            except StoreError as error:
                problems.append(error)
        positions.append(position)
        items.append(item)
    warn_of_encoding(plan, [sample for sample, _ in items])
    # Images of other modes than RGB and L stay whole, but not all of them, and none that is filled on the device.
    fills_late = plan.patches is not None and plan.patches.config.reconstruct == "batch"
    if problems and (fills_late or len(problems) == len(items)):
        raise problems[0]
    try:
        # This is the system's folder for temporary files, because a cache that is full has an error of its own.
        with TemporaryDirectory(prefix="dq_lightning-", ignore_cleanup_errors=True) as folder:
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
            f"{plan.source.describe()} can't be packed; a trial with a few samples failed: {error}"
        ) from error
    except OSError as error:
        raise CacheError(
            f"a few samples could not be packed on trial in {gettempdir()} ({error}): make room there, or set TMPDIR to "
            "another folder"
        ) from error
    for position, sample in zip(positions, stored, strict=True) if finisher is not None else ():
        _check_finished(plan, partial(finisher, places[position]), position, sample)


def _check_finished(plan: Plan, finish: Callable[[Any], Any], position: int, stored: Any) -> None:
    def finished(item: Any) -> str:
        finish_once = finish
        # A copy starts with the same states of random generators that the transform holds.
        with suppress(Exception):
            finish_once = copy.deepcopy(finish)
        with isolated_random_state(position):
            return digest_of(finish_once(item))

    def finished_plain() -> str:
        return finished(plain_parts(plan.source.plain(position)))

    try:
        wanted = finished_plain()
    except Exception:
        return  # The transform fails on the dataset's own sample too, or its result cannot be compared.
    reason = "another result"
    try:
        if finished(stored) == wanted:
            return
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    if any(finished_plain() != wanted for _ in range(REPEATS)):
        return  # The transform draws from a random generator that it does not hold, so its results cannot be compared.
    raise SourceError(
        f"the transform of {plan.source.describe()} does not give the same for sample {position} after packing as before "
        f"({reason}): it uses something that a packed set does not keep, such as the file's name or the class of the image. "
        'Let the dataset do that part itself, or use store="indices" (without drop_ratio=), which reads through the dataset'
    )
