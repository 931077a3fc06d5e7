"""The first pass over a stream, which finds its identity and length, and makes the features on the way."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from dq_lightning.cache.entries import Cache, require_space
from dq_lightning.cache.shards import KeptShards, partial_folder, remove_shards
from dq_lightning.cache.tensors import write_features
from dq_lightning.core.console import get_logger
from dq_lightning.core.devices import DeviceNames, device_names
from dq_lightning.core.records import Features
from dq_lightning.core.sharing import Distributed, Sharing
from dq_lightning.features.streams import extract_stream, extract_stream_pieces
from dq_lightning.pipeline.compact import find_compact
from dq_lightning.pipeline.meeting import Handler
from dq_lightning.pipeline.plan import FEATURES, Plan, length_key, source_identity, station_parts
from dq_lightning.pipeline.together import Entry, read_together
from dq_lightning.sources.in_order import StreamSource


def read_stream(
    plan: Plan,
    cache: Cache,
    *,
    device: DeviceNames,
    force: bool,
    progress: bool,
    check: Callable[[], object],
    distributed: Distributed = "off",
) -> dict[str, float]:
    """Read a stream once for its identity and its features together, where its features are needed and not in the cache.

    Otherwise, and with `force`, nothing is read: a later step reads the stream for its identity alone, or recalls it.
    `check` is called before the work; an error that it raises ends the run.

    Features belong to the identity of the data, which is known at the end of the pass. Finished work of a run that was
    killed is kept under a key of what can be seen of the stream beforehand, and taken up only if the stream begins with
    the same samples.

    The ranks of a run (`distributed` as in `quantize`) each read the whole stream, and share the decoding and encoding.

    Returns:
        Wall time in seconds by the name of the work; empty if nothing was read.

    Raises:
        DQError: the stream cannot be read, or the features cannot be made.
    """
    source, settings = plan.source, plan.config.features
    one_pass = settings.kind == "embedding" and not settings.selection_epochs and plan.config.on_error == "raise"
    if not isinstance(source, StreamSource) or not one_pass or not plan.reads_for_features or source.is_read or force:
        return {}
    started, memory = time.perf_counter(), cache.memory
    # The key is that of the state before the stream is read, because reading may change it.
    key = source.state_key() if plan.fingerprint is None else length_key(plan.fingerprint)
    source.recall(memory, key)
    if source.is_read and (plan.fingerprint is not None or source.identity_is_certain):
        return {}
    is_known = source.is_read and _has_results(plan, cache)
    source.forget()
    if is_known:
        return {}
    check()
    plan = plan.resolve(memory)
    assert plan.encoder is not None
    spec = plan.encoder
    identities = plan.identities(memory)
    if identities is None:
        return {}
    source.expect(key, 0)  # In place of digest and length, which are not known yet.
    entry = cache.place(FEATURES, station_parts(plan, key, identities)[FEATURES])
    source.forget()
    get_logger().info(f"reading {source.describe()} for its identity and features; encoder: {spec.description}")
    source.check_repeatable()
    options: dict[str, Any] = {"precision": settings.precision, "batch_size": settings.batch_size}
    reads_itself = False

    def read(sharing: Sharing, devices: tuple[str, ...]) -> list[Entry]:
        nonlocal reads_itself
        folder = partial_folder(entry)
        embedding = extract_stream(
            source,
            spec,
            folder,
            device=list(devices),
            **options,
            progress=progress,
            shards=KeptShards(entry, "features"),
            check_space=lambda size: require_space(folder, size),
            sharing=sharing,
        )
        made: list[Entry] = []
        reads_itself = embedding is None
        if embedding is not None:
            parts = station_parts(plan, source_identity(plan, memory), identities)[FEATURES]
            cache.build(FEATURES, parts, lambda place: write_features(place, Features(embedding)))
            made.append((FEATURES, parts))
        remove_shards(entry)
        return made

    def handler(devices: tuple[str, ...]) -> Handler:
        return partial(extract_stream_pieces, source, spec, device=list(devices), **options)

    digest = f"{entry.name}-{settings.batch_size}-{settings.precision}"
    # Nothing would be gained for texts, whose batches are not shared.
    shared: Distributed = distributed if source.modality == "image" else "off"
    read_together(cache, digest, device_names(device), shared, read, handler)
    if reads_itself:
        return {}
    return {"identity and features": round(time.perf_counter() - started, 3)}


def _has_results(plan: Plan, cache: Cache) -> bool:
    """Whether the cache has the features of what a stream was in an earlier run, or what was made of them."""
    source, identities = plan.source, plan.identities(cache.memory)
    digest = source.quick_digest(cache.memory)
    if identities is None or digest is None:
        return False
    parts = station_parts(plan, digest, identities)[FEATURES]
    return cache.find(FEATURES, parts) is not None or find_compact(plan, cache, digest) is not None
