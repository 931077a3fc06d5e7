"""The build of a compact set, step by step: source -> features -> bins -> selection -> patches -> store.

Each station looks in the cache first. If its entry is missing, it asks the station before it for the input and computes
only what is missing. This file does not use Lightning.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dq_lightning.cache.entries import Cache, Read, require_space
from dq_lightning.cache.paid import PAID_FOLDER, PaidFolder
from dq_lightning.cache.shards import KeptShards, remove_shards
from dq_lightning.cache.tensors import (
    read_bins,
    read_features,
    read_scores,
    read_selection,
    write_bins,
    write_features,
    write_scores,
    write_selection,
)
from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import CacheError, ChangedError, ConfigError, StoreError
from dq_lightning.core.records import Bins, Selection
from dq_lightning.features.extract import extract_features
from dq_lightning.features.loading import telling_of_lost_loaders
from dq_lightning.features.readable import find_unreadable, without_labels
from dq_lightning.features.selection_training import with_selection_epochs
from dq_lightning.pipeline.binning import bins_of, tell_lost_classes
from dq_lightning.pipeline.compact import Compact, open_compact, store_digest, write_description
from dq_lightning.pipeline.filling import write_filled
from dq_lightning.pipeline.packing import reading_again, write_patches, write_whole
from dq_lightning.pipeline.patch_bytes import describe_costs
from dq_lightning.pipeline.patching import check_saliency, score_selection
from dq_lightning.pipeline.plan import (
    BINS,
    FEATURES,
    FILLED,
    PATCHES,
    SELECTION,
    STORE,
    Plan,
    filled_parts,
    keeps_all,
    scored_parts,
    source_identity,
    usable_parts,
)
from dq_lightning.selection.select import select


class Build:
    """One build of a compact set, or of bins, through all the stations that it needs.

    Args:
        plan: plan of the run.
        source: identity of the data.
        cache: cache that keeps the entry of every station.
        device: device that the networks and the bins run on.
        force: make again what is already in the cache.
        progress: show progress bars.
        seconds: wall time in seconds that was spent before this build, by the name of the work.

    Attributes:
        marks: text that differs once the data were changed, found without reading all of them, as it was before the
            build.
        usable: parts of all entries that equal what the plan would make; see `usable_parts`.
        parts: parts of the plan's own entries, by station.
        has_made: whether any station had to compute something.

    Raises:
        CacheError: the identity of a network could not be written to the cache.
    """

    def __init__(
        self,
        plan: Plan,
        source: str,
        cache: Cache,
        device: str,
        *,
        force: bool,
        progress: bool,
        seconds: dict[str, float],
    ) -> None:
        self.cache, self.device, self.force, self.progress = cache, device, force, progress
        self.seconds = seconds
        self.plan = plan.resolve(cache.memory)
        identities = self.plan.identities(cache.memory)
        if identities is None:
            raise CacheError(
                f"the identity of a network could not be recorded in {cache.root}; pass a cache_dir= that can be written"
            )
        self.source = source
        self.marks = self.plan.source.marks(fresh=False)
        self.usable = usable_parts(self.plan, source, identities)
        self.parts = self.usable[0]
        self.has_made = False

    def bins(self) -> Bins:
        """Return the bins alone, found in the cache or made."""
        return self._load(BINS, partial(self._telling, BINS, self._write_bins), read_bins)

    def _telling(self, station: str, write: Callable[[Path], None], folder: Path) -> None:
        """Log, once per build, why something is made, and then make it.

        The line is not logged earlier, because another process may make the entry while this one waits for its lock.
        """
        if not self.has_made:
            self.has_made = True
            get_logger().info(self._reason(station))
        write(folder)

    def compact(self) -> Compact:
        """Return the compact set, found in the cache or made, and log what was kept and how long each step took."""
        # Finding the identity of the data came before the build, and its seconds count towards the total.
        started, before = time.perf_counter(), sum(self.seconds.values())
        log = get_logger()
        read = partial(open_compact, parts=self.parts, reused=False)
        write = partial(self._telling, STORE, self._write_store)
        compact = self._load(STORE, write, read)
        if FILLED in self.parts:
            try:
                compact = self._filled(compact)
            except StoreError:
                # The failed read asked the cache to compare all files of this entry, or the entry was removed
                # meanwhile. The next lookup therefore finds out whether it is damaged, and makes it again if so.
                again = self.cache.load(STORE, self.parts[STORE], write, read)
                compact = self._filled(again)
        if not self.has_made:
            log.info(
                f"reusing the compact set of {len(compact.selection):,} of {len(self.plan.source):,} samples, which another "
                f"process made while this one waited {time.perf_counter() - started:.1f} s: {compact.info.path}"
            )
            return replace(compact, info=replace(compact.info, reused=True))
        whole = before + time.perf_counter() - started
        # The seconds of each step are rounded down, so that they never sum to more than the total.
        spent = ", ".join(f"{name} {math.floor(10 * seconds) / 10:.1f} s" for name, seconds in self.seconds.items())
        log.info(
            f"kept {len(compact.selection):,} of {len(self.plan.source):,} samples in {whole:.1f} s "
            f"({spent}): {compact.info.path}"
        )
        if self.plan.patches is not None:
            log.info(describe_costs(compact.info))
        return replace(compact, info=replace(compact.info, seconds=self.seconds))

    def _reason(self, station: str) -> str:
        """Return a sentence that says why something is computed and which earlier results are reused."""
        encoder = "" if self.plan.encoder is None else f"; encoder: {self.plan.encoder.description}"
        if self.force:
            return f"computing everything because force_recompute=True{encoder}"
        why = self.cache.explain_miss(station, self.parts[station])
        reusable = {
            STORE: "the packed patches",
            PATCHES: "features, bins, selection and saliency" if self.plan.chosen is None else "selection and saliency",
            SELECTION: "features, bins and selection" if self.plan.chosen is None else "selection",
            BINS: "features and bins",
            FEATURES: "features",
        }
        for earlier, reused in reusable.items():
            if earlier in self.parts and self._is_made(earlier):
                return f"{why}; reusing {reused}"
        return why + encoder

    def _is_made(self, station: str) -> bool:
        if station != PATCHES:
            return self.cache.find(station, self.parts[station]) is not None
        selected = self.cache.find(SELECTION, self.parts[SELECTION])
        try:
            selection = None if selected is None else read_selection(selected)
        except StoreError:
            return False
        return selection is not None and self.cache.find(PATCHES, scored_parts(self.parts, selection)) is not None

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started, others = time.perf_counter(), sum(self.seconds.values())
        with telling_of_lost_loaders():
            yield
        # Time that nested steps recorded under their own names is subtracted.
        spent = time.perf_counter() - started - (sum(self.seconds.values()) - others)
        self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 3)

    def _load(self, station: str, write: Callable[[Path], None], read: Callable[[Path], Read]) -> Read:
        return self.cache.load(station, self.parts[station], write, read, force=self.force)

    def _shards(self, station: str, noun: str, *, parts: dict[str, Any] | None = None, **options: Any) -> KeptShards:
        """Return the shards of an entry: finished work that an interrupted run kept, and that this run adds to.

        Args:
            station: station of the entry.
            noun: name of the work in messages.
            parts: parts of the entry's key; None uses the plan's own parts of the station.
            **options: further arguments of `KeptShards`.
        """
        place = self.cache.place(station, self.parts[station] if parts is None else parts)
        return KeptShards(place, noun, fresh=self.force, **options)

    def _check_unchanged(self, station: str) -> None:
        """Raise an error if the data changed while they were read.

        Otherwise the entry would hold results of the changed data under the key of the data before the change. Data
        whose identity is the digest of their items are not read a second time, because each item is compared as it is
        read.

        Raises:
            ChangedError: the data changed; the shards of the entry are removed.
        """
        if self.plan.fingerprint is not None:
            return
        source = self.plan.source
        changed = source.marks(fresh=True) != self.marks
        if changed or (not source.by_items and source_identity(self.plan, self.cache.memory, full=True) != self.source):
            remove_shards(self.cache.place(station, self.parts[station]))
            raise ChangedError(
                f"{source.describe()} changed while it was read: start again when nothing writes to it any more. "
                "What was made of it was not kept"
            )

    def _write_store(self, folder: Path) -> None:
        if self.plan.patches is not None and (self.force or not self._is_made(PATCHES)):
            with self._timed("saliency"):
                check_saliency(self.plan, device=self.device)
        plan, selection = self.plan, self._load(SELECTION, self._write_selection, read_selection)
        if plan.patches is not None:
            parts, write = scored_parts(self.parts, selection), partial(self._write_scores, selection)
            scored = self.cache.load(PATCHES, parts, write, read_scores, force=self.force)
            with self._timed("store"), reading_again(plan):
                write_patches(folder, plan, selection, *scored, self._shards(STORE, "packing"))
                self._check_unchanged(STORE)
            return
        with self._timed("store"), reading_again(plan):
            if plan.store_kind == "packed":
                write_whole(folder, plan, selection, self._shards(STORE, "packing"))
                self._check_unchanged(STORE)
            else:
                write_selection(folder, selection)
                write_description(folder, plan)

    def _write_scores(self, selection: Selection, folder: Path) -> None:
        with self._timed("saliency"), reading_again(self.plan):
            shards = self._shards(PATCHES, "saliency", parts=scored_parts(self.parts, selection))
            scored = score_selection(self.plan, selection, device=self.device, progress=self.progress, shards=shards)
        write_scores(folder, *scored)

    def _filled(self, compact: Compact) -> Compact:
        """Return the compact set together with its filled images, which are found in the cache or made.

        Raises:
            StoreError: the store is damaged; this is found before the first image is filled.
        """
        store = Path(compact.info.path)
        digest = store_digest(store)
        parts = filled_parts(digest, self.parts[FILLED]["reconstructor"])

        def write(folder: Path) -> None:
            assert self.plan.patches is not None
            shards = self._shards(FILLED, "filling", parts=parts)
            options: dict[str, Any] = {"device": self.device, "progress": self.progress, "shards": shards}
            with self._timed("filling"):
                write_filled(folder, store, digest, self.plan.patches, **options)

        telling = partial(self._telling, STORE, write)
        return replace(compact, filled=self.cache.build(FILLED, parts, telling, force=self.force))

    def _write_selection(self, folder: Path) -> None:
        if self.plan.chosen is not None:
            with self._timed("selection"):
                write_selection(folder, self._given(self.plan.chosen))
            return
        bins = self._load(BINS, self._write_bins, read_bins)
        settings = self.plan.config.selection
        with self._timed("selection"):
            selection = select(
                bins,
                keep_ratio=settings.keep_ratio,
                seed=settings.seed,
                draw=settings.draw,
                bin_weights=settings.bin_weights,
            )
        tell_lost_classes(self.plan, bins, selection)
        write_selection(folder, selection)

    def _given(self, chosen: Tensor) -> Selection:
        """Return the selection of positions that were chosen without features; their bin is -1.

        With `on_error="skip"` the samples that cannot be read are left out.

        Args:
            chosen: int64 [M], positions.

        Raises:
            ConfigError: all samples were asked for, but some cannot be read.
        """
        source, config = self.plan.source, self.plan.config
        source.check_repeatable()
        total, unreadable = len(chosen), 0
        if config.on_error == "skip":
            left_out = find_unreadable(
                source,
                positions=chosen,
                num_workers=config.features.num_workers,
                progress=self.progress,
                shards=self._shards(SELECTION, "reading", part="reading"),
            )
            chosen, unreadable = chosen[~torch.isin(chosen, left_out)], len(left_out)
        if unreadable and keeps_all(config):
            raise ConfigError(
                f"keep_ratio=1.0 of {total} samples wants all, but {unreadable} can't be read; lower keep_ratio, or pass the "
                "others as indices="
            )
        return Selection(chosen, torch.full((len(chosen),), -1, dtype=torch.int16), unreadable)

    def _write_bins(self, folder: Path) -> None:
        features = self._load(FEATURES, self._write_features, read_features)
        with self._timed("bins"):
            bins = bins_of(self.plan, features, device=self.device, progress=self.progress)
        write_bins(folder, bins)

    def _write_features(self, folder: Path) -> None:
        settings = self.plan.config.features
        # A run with on_error="raise" that stopped at an unreadable sample left shards of the samples before it. They
        # are valid here too.
        stricter = [self.cache.place(FEATURES, parts[FEATURES]) for parts in self.usable[1:]]
        shards = self._shards(FEATURES, "features", also=next(iter(stricter), None))

        def allocate(name: str, shape: tuple[int, int]) -> Tensor:
            # The shape is known after the first batch, so a full disk is reported before the long work.
            require_space(folder, 4 * math.prod(shape))
            shards.reserve_bytes += 4 * math.prod(shape)
            return torch.empty(shape, dtype=torch.float32)

        with self._timed("features"):
            self.plan.source.check_repeatable()
            labels = self.plan.labels if settings.kind == "gradient" or settings.selection_epochs else None
            left_out = None
            if self.plan.config.on_error == "skip":
                left_out = find_unreadable(
                    self.plan.source,
                    num_workers=settings.num_workers,
                    progress=self.progress,
                    shards=self._shards(FEATURES, "reading", part="reading"),
                )
            learned = labels if labels is None or left_out is None else without_labels(labels, left_out)
            assert self.plan.encoder is not None
            encoder = with_selection_epochs(self.plan.encoder, self.plan.source, learned, settings, self.progress)
            features = extract_features(
                self.plan.source,
                encoder,
                kind=settings.kind,
                labels=labels.values if labels is not None else None,
                num_classes=labels.num_classes if labels is not None else None,
                device=self.device,
                precision=settings.precision,
                batch_size=settings.batch_size,
                num_workers=settings.num_workers,
                progress=self.progress,
                out=allocate,
                paid=PaidFolder(self.cache.root / PAID_FOLDER),
                shards=shards,
                left_out=left_out,
            )
            self._check_unchanged(FEATURES)
        write_features(folder, features)
