"""The flow on one page: dataset -> source -> features -> bins -> selection -> store. No Lightning here."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dq_lightning.bins.make import make_bins
from dq_lightning.config import QuantizeConfig, VerifyPolicy
from dq_lightning.errors import CacheError
from dq_lightning.features.choose import EncoderSpec, choose_encoder
from dq_lightning.features.extract import extract_features
from dq_lightning.logs import get_logger
from dq_lightning.randomness import isolated_random_state
from dq_lightning.records import Bins, Features, Selection, StoreInfo
from dq_lightning.selection.select import select
from dq_lightning.sources.adapt import as_source
from dq_lightning.sources.base import Source
from dq_lightning.store.cache import Cache, default_cache_dir
from dq_lightning.store.packed import write_packed
from dq_lightning.store.reader import PackedDataset
from dq_lightning.store.tensors import (
    read_bins,
    read_features,
    read_selection,
    write_bins,
    write_features,
    write_selection,
)

FEATURES, BINS, SELECTION, STORE = "1-features", "2-bins", "3-selection", "5-store"
# Raised by whoever changes what a station computes: old entries are then never reused.
ALGORITHM_VERSIONS = {FEATURES: 1, BINS: 1, SELECTION: 1, STORE: 1}
COMPACT_FILE = "compact.json"


@dataclass(frozen=True)
class Plan:
    """What will be quantized and how; nothing is computed yet.

    Attributes:
        source: the dataset as the stations see it.
        encoder: the resolved encoder, not loaded.
        config: every setting.
        fingerprint: identity of the dataset given by the user, in place of its content digest.
        labels_id: digest of labels given by the user; None when they are the dataset's own.
    """

    source: Source
    encoder: EncoderSpec
    config: QuantizeConfig
    fingerprint: str | None = None
    labels_id: str | None = None


@dataclass
class Compact:
    """A compact set in the cache: where it is, which samples it holds, and the identity of every station."""

    info: StoreInfo
    selection: Selection
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)


def quantize(
    source: Any,
    config: QuantizeConfig | None = None,
    *,
    encoder: Any = None,
    labels: Any = None,
    cache_dir: str | Path | None = None,
    device: str = "auto",
    fingerprint: str | None = None,
    force_recompute: bool = False,
    verify: VerifyPolicy = "size",
    progress: bool = True,
) -> StoreInfo:
    """Make the compact set of a dataset, or find it in the cache.

    Args:
        source: any torchvision or Hugging Face dataset, map-style dataset, or `Source`.
        config: settings; the defaults keep 12.5 % of the samples from 10 bins.
        encoder: an `nn.Module`, or `(module, preprocessing)`; None uses `config.features.encoder`.
        labels: class of every sample [N], a column name, or False for none; None takes the dataset's own.
        cache_dir: folder of the cache; None uses `DQ_LIGHTNING_CACHE` or the platform's cache folder.
        device: `"auto"`, `"cpu"`, `"cuda"`, `"cuda:1"`, ...
        fingerprint: identity of the dataset, in place of the digest of its content.
        force_recompute: build again what is in the cache already.
        verify: how an entry is checked before use.
        progress: show progress bars.

    Returns:
        Where the compact set is and what it costs.

    Raises:
        DQError: with what was seen and what to do.
    """
    plan = make_plan(source, config or QuantizeConfig(), encoder=encoder, labels=labels, fingerprint=fingerprint)
    cache = Cache(cache_dir or default_cache_dir(), verify=verify)
    return find_or_build(plan, cache, device=device, force=force_recompute, progress=progress).info


def make_plan(
    dataset: Any,
    config: QuantizeConfig,
    *,
    encoder: Any = None,
    labels: Any = None,
    transform: Any = "keep",
    target_transform: Any = "keep",
    fingerprint: str | None = None,
) -> Plan:
    """Adapt the dataset and choose the encoder. Reads one image at most; loads no weights."""
    source = as_source(
        dataset,
        image_column=config.image_column,
        label_column=config.label_column,
        labels=labels,
        transform=transform,
        target_transform=target_transform,
    )
    spec = choose_encoder(
        config.features.encoder if encoder is None else encoder,
        weights=config.features.weights,
        image_size=source.image(0).size,
        modality=source.modality,
    )
    labels_id = None
    if labels is not None:
        groups = source.labels()
        labels_id = "none" if groups is None else hashlib.sha256(groups.values.numpy().tobytes()).hexdigest()
    return Plan(source, spec, config, fingerprint, labels_id)


def station_parts(plan: Plan, cache: Cache, *, full: bool) -> dict[str, dict[str, Any]] | None:
    """What identifies the entry of each station; every station's parts contain those of its parent.

    Args:
        plan: what is to be made.
        cache: remembers digests.
        full: read the whole dataset if that is what its identity takes. False only looks digests up, as ranks that build
            nothing do; the answer is then None when they are not known here.
    """
    if plan.fingerprint is not None:
        identity: str | None = f"given:{plan.fingerprint}"
    elif full and not plan.source.identity_is_certain:
        identity = plan.source.digest(cache.memory)
    elif full:
        identity = plan.source.quick_digest(cache.memory) or plan.source.digest(cache.memory)
    else:
        identity = plan.source.quick_digest(cache.memory)
    encoder_identity = plan.encoder.identity(cache.memory)
    if identity is None or encoder_identity is None:
        return None
    config = plan.config
    features = {
        "source": identity,
        "num_source_samples": len(plan.source),
        "encoder": encoder_identity,
        "kind": config.features.kind,
        "features_version": ALGORITHM_VERSIONS[FEATURES],
    }
    if config.features.kind == "gradient":
        features["labels"] = plan.labels_id
    bins = features | config.bins.to_dict() | {"labels": plan.labels_id, "bins_version": ALGORITHM_VERSIONS[BINS]}
    selection = bins | config.selection.to_dict() | {"selection_version": ALGORITHM_VERSIONS[SELECTION]}
    store = selection | {"store": store_kind(config), "store_version": ALGORITHM_VERSIONS[STORE]}
    return {FEATURES: features, BINS: bins, SELECTION: selection, STORE: store}


def store_kind(config: QuantizeConfig) -> str:
    """`"auto"` resolved: nothing is copied as long as all patches are kept."""
    return "indices" if config.store == "auto" else config.store


def find_compact(plan: Plan, cache: Cache, *, full: bool = False) -> Compact | None:
    """The compact set in the cache, or None. Loads no model and touches no GPU."""
    parts = station_parts(plan, cache, full=full)
    path = cache.find(STORE, parts[STORE]) if parts is not None else None
    if parts is None or path is None:
        return None
    return open_compact(path, parts)


def open_compact(path: Path, parts: dict[str, dict[str, Any]] | None = None, *, reused: bool = True) -> Compact:
    """Read the selection and the description of an entry of the store station."""
    try:
        described = json.loads((path / COMPACT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} holds no compact set ({error}); pass the folder that StoreInfo.path names") from error
    selection = read_selection(path)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    info = StoreInfo(
        path=str(path),
        kind=described["kind"],
        num_samples=len(selection),
        num_source_samples=described["num_source_samples"],
        bytes=size,
        content_hash=selection.content_hash(),
        num_classes=described["num_classes"],
        reused=reused,
    )
    return Compact(info, selection, parts or {})


def find_or_build(
    plan: Plan, cache: Cache, *, device: str = "auto", force: bool = False, progress: bool = True
) -> Compact:
    """The compact set, from the cache when it is there. Says in one line which of the two, and why.

    The global random state is the same before and after, whatever had to be done.
    """
    log = get_logger()
    with isolated_random_state():
        found = None if force else find_compact(plan, cache, full=True)
        if found is not None:
            log.info(
                "reusing %s of %s samples from %s",
                f"{len(found.selection):,}",
                f"{len(plan.source):,}",
                found.info.path,
            )
            return found
        return _Build(plan, cache, device, force, progress).run()


class _Build:
    """One run of the stations: each asks the cache first and computes, through its parent, only what is missing."""

    def __init__(self, plan: Plan, cache: Cache, device: str, force: bool, progress: bool) -> None:
        self.plan, self.cache, self.device, self.force, self.progress = plan, cache, device, force, progress
        self.seconds: dict[str, float] = {}
        self.parts = self._parts()

    def run(self) -> Compact:
        started = time.perf_counter()
        log = get_logger()
        why = "force_recompute=True" if self.force else self.cache.explain_miss(STORE, self.parts[STORE])
        log.info("%s; encoder: %s", why, self.plan.encoder.description)
        path = self._entry(STORE, self._write_store)
        compact = open_compact(path, self.parts, reused=False)
        compact.info = replace(compact.info, seconds=self.seconds)
        log.info(
            "kept %s of %s samples (%s) in %.1f s: %s",
            f"{len(compact.selection):,}",
            f"{len(self.plan.source):,}",
            ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items()),
            time.perf_counter() - started,
            path,
        )
        return compact

    def _parts(self) -> dict[str, dict[str, Any]]:
        with self._timed("identity"):
            self.plan = replace(self.plan, encoder=self.plan.encoder.resolve(self.cache.memory))
            parts = station_parts(self.plan, self.cache, full=True)
        if parts is None:
            raise CacheError(
                f"the identity of {self.plan.encoder.description} could not be recorded in "
                f"{self.cache.root}; pass a cache_dir= that can be written"
            )
        return parts

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - started, 3)

    def _entry(self, station: str, write: Callable[[Path], None]) -> Path:
        return self.cache.build(station, self.parts[station], write, force=self.force)

    def _write_store(self, folder: Path) -> None:
        selection = read_selection(self._entry(SELECTION, self._write_selection))
        source, kind = self.plan.source, store_kind(self.plan.config)
        with self._timed("store"):
            labels = source.labels()
            write_selection(folder, selection)
            if kind == "packed":
                positions = selection.index.tolist()
                write_packed(
                    folder,
                    ((source.plain(i), source.encoded(i)) for i in positions),
                    ids=[source.sample_id(i) for i in positions],
                    index=selection.index,
                    bins=selection.bin,
                    attributes={"source": source.describe()},
                )
        described = {
            "kind": kind,
            "source": source.describe(),
            "encoder": self.plan.encoder.description,
            "num_source_samples": len(source),
            "num_classes": labels.num_classes if labels is not None else None,
            "class_names": list(labels.names) if labels is not None and labels.names is not None else None,
            "config": self.plan.config.to_dict(),
        }
        (folder / COMPACT_FILE).write_text(json.dumps(described, indent=2), encoding="utf-8")

    def _write_selection(self, folder: Path) -> None:
        bins = read_bins(self._entry(BINS, self._write_bins))
        settings = self.plan.config.selection
        with self._timed("selection"):
            selection = select(
                bins,
                keep_ratio=settings.keep_ratio,
                seed=settings.seed,
                draw=settings.draw,
                bin_weights=settings.bin_weights,
            )
        write_selection(folder, selection)

    def _write_bins(self, folder: Path) -> None:
        features = read_features(self._entry(FEATURES, self._write_features))
        settings = self.plan.config.bins
        with self._timed("bins"):
            bins = make_bins(
                features,
                num_bins=settings.num_bins,
                labels=self._groups(),
                objective=settings.objective,
                maximizer=settings.maximizer,
                similarity=settings.similarity,
                lam=settings.lam,
            )
        write_bins(folder, bins)

    def _write_features(self, folder: Path) -> None:
        settings = self.plan.config.features
        with self._timed("features"):
            self.plan.source.check_repeatable()
            labels = self.plan.source.labels() if settings.kind == "gradient" else None
            features: Features = extract_features(
                self.plan.source,
                self.plan.encoder,
                kind=settings.kind,
                labels=labels.values if labels is not None else None,
                device=self.device,
                precision=settings.precision,
                batch_size=settings.batch_size,
                num_workers=settings.num_workers,
                progress=self.progress,
            )
        write_features(folder, features)

    def _groups(self) -> Tensor | None:
        labels = self.plan.source.labels() if self.plan.config.bins.by_label else None
        return labels.values if labels is not None else None


def read_bins_of(compact: Compact, cache: Cache) -> Bins:
    """The bins behind a compact set.

    Raises:
        CacheError: they were pruned; a run with `force_recompute=True` makes them again.
    """
    path = cache.find(BINS, compact.parts[BINS]) if BINS in compact.parts else None
    if path is None:
        raise CacheError(
            "the bins of this compact set are not in the cache; run with force_recompute=True to make them"
        )
    return read_bins(path)


def open_packed(path: str | Path, *, finisher: Any = None, verify: VerifyPolicy = "size") -> PackedDataset:
    """The packed samples of a compact set.

    Raises:
        CacheError: the entry holds indices only.
    """
    compact = open_compact(Path(path))
    if compact.info.kind != "packed":
        raise CacheError(
            f"{path} holds indices, not samples: it needs the original dataset. Quantize with store='packed' to get a set "
            "that stands alone"
        )
    return PackedDataset(path, finisher=finisher, verify=verify)
