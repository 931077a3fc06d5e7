"""Find the compact set of a dataset, or its bins, in the cache, or else make them. This file does not use Lightning."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dq_lightning.cache.entries import Cache, default_cache_dir
from dq_lightning.cache.tensors import read_bins, read_features
from dq_lightning.core.config import AnyConfig, OnError, Preset, QuantizeConfig, VerifyPolicy
from dq_lightning.core.console import get_logger
from dq_lightning.core.devices import DeviceNames
from dq_lightning.core.isolation import isolated_random_state
from dq_lightning.core.records import StoreInfo
from dq_lightning.core.sharing import Distributed, check_distributed
from dq_lightning.pipeline.build import Build
from dq_lightning.pipeline.compact import Compact, find_compact
from dq_lightning.pipeline.first_pass import read_stream
from dq_lightning.pipeline.identifying import shared_digests
from dq_lightning.pipeline.packing import check_storable
from dq_lightning.pipeline.plan import BINS, FEATURES, FILLED, STORE, Plan, make_plan, source_identity, usable_parts
from dq_lightning.pipeline.together import build_together
from dq_lightning.pipeline.wanted import Wanted, want
from dq_lightning.selection.given import Indices


def quantize(
    source: Any,
    config: AnyConfig | None = None,
    *,
    encoder: Any = None,
    classifier: Any = None,
    reconstructor: Any = None,
    labels: Any = None,
    indices: Indices = None,
    scores: Any = None,
    drop_worst: float | Literal["auto"] | None = None,
    preset: Preset | None = None,
    cache_dir: str | Path | None = None,
    device: DeviceNames = "auto",
    fingerprint: str | None = None,
    force_recompute: bool = False,
    verify: VerifyPolicy = "size",
    on_error: OnError | None = None,
    progress: bool = True,
    distributed: Distributed = "auto",
) -> StoreInfo:
    """Make the compact set of a dataset, or find it in the cache.

    Args:
        source: any torchvision or Hugging Face dataset, map-style dataset, stream, or `Source`; N samples.
        config: settings as a `QuantizeConfig`, a dict of its fields, or a YAML or JSON file; the defaults keep 12.5 %
            of the samples from 10 bins.
        encoder: network that makes the features: an `nn.Module`, `(module, preprocessing)`, or a value of
            `config.features.encoder`, for which it is the short form; or ready features [N, D] or a function of one raw
            sample, for which the samples may be of any kind.
        classifier: network, or `(network, preprocessing)`, whose saliency maps score the patches; None uses
            `config.patches.classifier`.
        reconstructor: `ViTMAEForPreTraining` that fills dropped patches; None uses `config.patches.reconstructor`.
        labels: class of every sample [N], the name of a column, or False for no classes; None uses the dataset's own
            labels. 0 and 1 for several labels a sample [N, C], `"quantiles"` or `"dominant"`: see `as_source`.
        indices: positions of the samples to keep, in place of features, bins and a draw: an integer array, tensor or
            list [M], or an `.npy` file of these (such as the published `select_indices_*.npy`).
        scores: what each sample is worth, higher is better: numbers [N], or a value of `config.quality.score`, for
            which it is the short form.
        drop_worst: share of each class that is left out for its low scores, in [0, 1), or `"auto"`, which leaves out
            the samples whose labels seem wrong; short form of `config.quality.drop_worst`. None uses the value of the
            config.
        preset: `"published"` for the paper's way of choosing; short form of `config.preset`.
        cache_dir: folder of the cache; None uses `DQ_LIGHTNING_CACHE` or the platform's cache folder.
        device: device that the networks and the bins run on: `"auto"`, `"cpu"`, `"cuda"`, `"cuda:1"`, ... Several, such
            as `["cuda:0", "cuda:1"]`, share the batches of features, saliency and filling, in one thread each; all else
            runs on the first. The result is that of one device.
        fingerprint: identity of the dataset given by the user, in place of the digest of its content.
        force_recompute: build again what is already in the cache.
        verify: how cache entries are checked before use: `"size"` compares names and sizes of their files, `"hash"`
            also compares the digests of all files, and `"off"` checks the manifest only.
        on_error: short form of `config.on_error`; None uses the value of the config.
        progress: show progress bars.
        distributed: whether the ranks of a run (processes of one `torch.distributed` group, or started by torchrun or
            srun) that call this function with the same arguments share the long loops. `"auto"` does so
            wherever there are several, waits for none that does not come, and works alone if they cannot reach each
            other, which is an error with `"all"`. `"off"` works alone; ranks with a common cache then wait for the
            first. The result is that of one process, on devices of one kind with one number of threads.

    Returns:
        The folder of the compact set, its size, and further facts about it.

    Raises:
        DQError: anything that keeps the compact set from being made; the message says what was seen and what to do.

    Example:
        >>> import tempfile, torch
        >>> dataset = [(torch.full((3, 8, 8), i / 40), i % 2) for i in range(40)]
        >>> features = torch.rand(40, 5).numpy()  # in place of an encoder
        >>> with tempfile.TemporaryDirectory() as cache:
        ...     settings = {"selection": {"keep_ratio": 0.25}, "bins": {"num_bins": 5}}
        ...     info = quantize(dataset, settings, encoder=features, cache_dir=cache, progress=False)
        >>> info.kind, info.num_samples, info.data_keep_ratio
        ('indices', 10, 0.25)
    """
    check_distributed(distributed)
    wanted = want(
        config,
        encoder=encoder,
        classifier=classifier,
        reconstructor=reconstructor,
        labels=labels,
        indices=indices,
        scores=scores,
        drop_worst=drop_worst,
        preset=preset,
        fingerprint=fingerprint,
        on_error=on_error,
    )
    cache = Cache(cache_dir or default_cache_dir(), verify=verify)
    with isolated_random_state():
        plan = make_plan(source, wanted)
        return find_or_build(
            plan, cache, device=device, force=force_recompute, progress=progress, distributed=distributed
        ).info


def find_or_build(
    plan: Plan,
    cache: Cache,
    *,
    device: DeviceNames = "auto",
    force: bool = False,
    progress: bool = True,
    check: Callable[[], object] | None = None,
    distributed: Distributed = "off",
) -> Compact:
    """Return the compact set of a plan: from the cache if it is there, else made now.

    One line of the log says whether it was reused or is made, and why. The caller restores the global random state,
    once for the whole of its work (`isolated_random_state`). `check` is called before the work, only if something has
    to be made; an error that it raises ends the run before any long work. None packs a few samples on trial
    (`check_storable`). `distributed` is as in `quantize`.

    Raises:
        DQError: the compact set cannot be made.
    """
    check = check or partial(check_storable, plan.head)
    seconds = read_stream(
        plan, cache, device=device, force=force, progress=progress, check=check, distributed=distributed
    )
    started = time.perf_counter()
    with shared_digests(cache.memory, distributed):
        source = source_identity(plan, cache.memory)
    if not force and (found := find_compact(plan, cache, source)) is not None:
        kept, whole = len(found.selection), len(plan.source)
        get_logger().info(f"reusing the compact set of {kept:,} of {whole:,} samples: {found.info.path}")
        return found
    seconds = seconds or {"identity": round(time.perf_counter() - started, 3)}
    check()
    build = Build(plan, source, cache, device, force=force, progress=progress, seconds=seconds)
    targets = tuple(station for station in (STORE, FILLED) if station in build.parts)
    return build_together(build, distributed, targets, build.compact, partial(find_compact, plan, cache, source))


def station_of_dataset(
    dataset: Any,
    config: QuantizeConfig,
    station: str,
    *,
    labels: Any = None,
    cache_dir: str | Path | None = None,
    device: DeviceNames = "auto",
    progress: bool = True,
) -> Any:
    """Return only the features or the bins of a dataset: from the cache if they are there, else made now.

    The station is `plan.FEATURES` or `plan.BINS`, and the result a record `Features` or `Bins`. The other arguments are
    those of `quantize`; settings of later stations have no effect.

    Raises:
        DQError: the result cannot be made.
    """
    cache, read = Cache(cache_dir or default_cache_dir()), {FEATURES: read_features, BINS: read_bins}[station]
    with isolated_random_state():
        plan = make_plan(dataset, Wanted(config, labels=labels))
        read_stream(plan, cache, device=device, force=False, progress=progress, check=list)
        source = source_identity(plan, cache.memory)
        identities = plan.identities(cache.memory)
        for parts in [] if identities is None else usable_parts(plan, source, identities):
            if (found := cache.read(station, parts[station], read)) is not None:
                get_logger().info(f"reusing the {station.partition('-')[2]} of {len(plan.source):,} samples")
                return found
        return Build(plan, source, cache, device, force=False, progress=progress, seconds={}).run(station)[station]
