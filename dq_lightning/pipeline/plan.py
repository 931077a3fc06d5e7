"""What will be quantized and how, and the identity of every station's entry that follows from it. Computes nothing."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dq_lightning.core.config import QuantizeConfig
from dq_lightning.core.errors import ConfigError, SourceError
from dq_lightning.core.records import DigestMemory, Labels, Selection
from dq_lightning.features.choose import EncoderSpec, choose_encoder
from dq_lightning.pipeline.patch_plan import PatchPlan, check_modality, make_patch_plan
from dq_lightning.selection.given import read_indices
from dq_lightning.sources.adapt import as_source, grouping_id
from dq_lightning.sources.base import Source
from dq_lightning.sources.items import evenly_spaced
from dq_lightning.sources.text import TextRows

FEATURES, BINS, SELECTION, PATCHES, STORE = "1-features", "2-bins", "3-selection", "4-patches", "5-store"
# images with their dropped patches filled: made from the store alone, so this folder may be removed at any time. Entries of
# this station and of PATCHES are found by the content of the entry that they are made from
FILLED = "6-filled"
# Raised by whoever changes what a station computes: old entries are then never reused.
ALGORITHM_VERSIONS = {FEATURES: 1, BINS: 1, SELECTION: 1, PATCHES: 2, STORE: 2, FILLED: 3}
SIZE_SAMPLES = 16
# before an identity of the data that the user gave
GIVEN = "given:"

Parts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """What will be quantized and how; nothing is computed yet.

    Attributes:
        source: the dataset as the stations see it.
        encoder: the resolved encoder, not loaded; None where the choice needs none.
        config: every setting.
        fingerprint: identity of the dataset given by the user, in place of its content digest.
        labels_id: names the grouping given by the user; None when it is the dataset's own.
        patches: the step on patches, or None while all of them are kept.
        chosen: int64 [M], the positions that are kept, where no features and bins are needed to choose them: the user has,
            or all are kept. Else None.
    """

    source: Source
    encoder: EncoderSpec | None
    config: QuantizeConfig
    fingerprint: str | None = None
    labels_id: str | None = None
    patches: PatchPlan | None = None
    chosen: Tensor | None = None

    @cached_property
    def chosen_id(self) -> str | None:
        """Digest of the chosen positions."""
        return None if self.chosen is None else hashlib.sha256(self.chosen.numpy().tobytes()).hexdigest()

    @property
    def reads_for_features(self) -> bool:
        """Whether every sample is read to make its features."""
        return self.encoder is not None and self.encoder.reads_samples

    @cached_property
    def labels(self) -> Labels | None:
        """The class of every sample; a dataset that lists none is read through for it, once."""
        return self.source.labels()

    @cached_property
    def store_kind(self) -> str:
        """`"auto"` resolved: nothing is copied as long as all patches are kept."""
        if self.config.store == "auto":
            return "indices" if self.patches is None else "packed"
        return self.config.store

    @property
    def candidates(self) -> Tensor:
        """Positions int64 [n] of the samples that may be kept: those that were given, or all."""
        return torch.arange(len(self.source)) if self.chosen is None else self.chosen

    def resolve(self, memory: DigestMemory) -> "Plan":
        """The same plan with the commits of hub names fixed; the only method that may ask a hub."""
        patches = self.patches and self.patches.resolve(memory)
        return replace(self, encoder=self.encoder and self.encoder.resolve(memory), patches=patches)

    def identities(self, memory: DigestMemory) -> dict[str, str] | None:
        """Identity of every network used, by name; None when one is known to a hub alone."""
        others = {} if self.patches is None else self.patches.identities(memory)
        if self.encoder is None or others is None:
            return others
        encoder = self.encoder.identity(memory)
        return None if encoder is None else {"encoder": encoder} | others


def make_plan(
    dataset: Any,
    config: QuantizeConfig,
    *,
    encoder: Any = None,
    classifier: Any = None,
    reconstructor: Any = None,
    labels: Any = None,
    indices: Any = None,
    transform: Any = "keep",
    target_transform: Any = "keep",
    fingerprint: str | None = None,
) -> Plan:
    """Adapt the dataset and choose the encoder. Reads a few images at most; loads no weights."""
    source = as_source(
        dataset,
        image_column=config.image_column,
        label_column=config.label_column,
        labels=labels,
        transform=transform,
        target_transform=target_transform,
        text=config.text,
        on_error=config.on_error,
    )
    chosen = None if indices is None else read_indices(indices, len(source))
    if chosen is None and keeps_all(config):
        chosen = torch.arange(len(source))
    spec = _encoder(source, config, encoder) if chosen is None else None
    patches = None
    if config.patches.drops:
        check_modality(source.modality)
        if config.store == "indices":
            raise ConfigError(
                'store="indices" copies nothing, so no patch can be dropped: leave it out, or drop_ratio='
            )
        size = _typical_size(source)
        patches = make_patch_plan(
            config.patches, (size[1], size[0]), classifier=classifier, reconstructor=reconstructor
        )
    return Plan(source, spec, config, fingerprint, grouping_id(source), patches, chosen)


def keeps_all(config: QuantizeConfig) -> bool:
    """Whether every sample is kept, so that there is nothing to choose."""
    return config.selection.keep_ratio == 1 and config.bins.deduplicate is None


def _encoder(source: Source, config: QuantizeConfig, encoder: Any) -> EncoderSpec:
    encoder = config.features.encoder if encoder is None else encoder
    spec = choose_encoder(
        encoder,
        weights=config.features.weights,
        image_size=_typical_size(source) if _by_size(encoder, source) else (0, 0),
        modality=source.modality,
        text=config.text,
    )
    if isinstance(source, TextRows) and spec.reads_samples:
        source.template()  # columns that can't be read are told before anything long
    check_image = getattr(source, "check_image", None)
    if (
        config.image_column is not None
        and source.modality == "image"
        and spec.reads_samples
        and check_image is not None
    ):
        check_image()
    if config.features.selection_epochs and not (source.modality == "image" and spec.reads_samples):
        raise ConfigError(
            f"selection_epochs trains a network of images, and features come from {spec.description}: leave it out"
        )
    return spec


def _by_size(encoder: Any, source: Source) -> bool:
    """Whether the encoder is chosen by the size of the images."""
    return isinstance(encoder, str) and encoder == "auto" and source.modality == "image"


def _typical_size(source: Source) -> tuple[int, int]:
    """Width and height of the image whose longer side is the median of a few evenly spaced ones."""
    sizes, problem = [], None
    for index in evenly_spaced(len(source), SIZE_SAMPLES):
        try:
            sizes.append(source.image(index).size)
        except SourceError as error:
            problem = error  # whether that ends the run is decided where every sample is read
    if problem is not None and not sizes:
        raise problem
    return sorted(sizes, key=max)[len(sizes) // 2]


def source_identity(plan: Plan, memory: DigestMemory, *, full: bool) -> str | None:
    """Identity of the data.

    Args:
        plan: what is to be made.
        memory: of digests.
        full: read the whole dataset if that is what it takes. False only looks digests up, as ranks that build nothing do;
            the answer is then None when it is not known here.
    """
    if plan.fingerprint is not None:
        column = plan.config.image_column
        return f"{GIVEN}{plan.fingerprint}" + (f" column:{column}" if column is not None else "")
    if not full:
        return plan.source.quick_digest(memory)
    if not plan.source.identity_is_certain:
        return plan.source.digest(memory)
    return plan.source.quick_digest(memory) or plan.source.digest(memory)


def station_parts(plan: Plan, source: str, identities: dict[str, str]) -> Parts:
    """What identifies the entry of each station; every station's parts contain those of its parent.

    Args:
        plan: what is to be made.
        source: identity of the data.
        identities: of the networks, by name.
    """
    version = ALGORITHM_VERSIONS
    data: dict[str, Any] = {"source": source, "num_source_samples": len(plan.source)}
    if plan.config.on_error == "skip":
        data["on_error"] = "skip"
    if plan.chosen is None:
        parts = _parts_of_choice(plan, data, identities)
    else:
        parts = {SELECTION: data | {"indices": plan.chosen_id, "selection_version": version[SELECTION]}}
    store = selection = parts[SELECTION]
    if plan.patches is not None:
        scored = {"patches": plan.patches.saliency_parts(identities), "patches_version": version[PATCHES]}
        parts[PATCHES] = selection | scored
        store = parts[PATCHES] | {"stored_patches": plan.patches.store_parts()}
    parts[STORE] = store | {"store": plan.store_kind, "store_version": version[STORE]}
    if plan.patches is not None and plan.patches.fills_ahead:
        # the rest is the content of the store, see `filled_parts`
        parts[FILLED] = {"reconstructor": identities["reconstructor"]}
    return parts


def _parts_of_choice(plan: Plan, data: dict[str, Any], identities: dict[str, str]) -> Parts:
    """What identifies features, bins and selection of the data."""
    config, version = plan.config, ALGORITHM_VERSIONS
    features = data | {
        "encoder": identities["encoder"],
        "kind": config.features.kind,
        "features_version": version[FEATURES],
    }
    if isinstance(plan.source, TextRows) and plan.reads_for_features:
        features["text"] = plan.source.text_identity()
    training = config.features.selection_training()
    features |= training
    if config.features.kind == "gradient" or training:
        features["labels"] = plan.labels_id
    grouped = {"labels": plan.labels_id, "whiten": config.features.whiten, "bins_version": version[BINS]}
    bins = features | config.bins.to_dict() | grouped
    selection = bins | config.selection.to_dict() | {"selection_version": version[SELECTION]}
    return {FEATURES: features, BINS: bins, SELECTION: selection}


def usable_parts(plan: Plan, source: str, identities: dict[str, str]) -> list[Parts]:
    """The parts of every entry that is what this plan would make, its own first.

    An entry made under `on_error="raise"` had nothing to skip, so it serves `"skip"` too; never the other way round.
    """
    own = [station_parts(plan, source, identities)]
    # ready-made features are made without reading the samples
    if plan.config.on_error == "raise" or (plan.chosen is None and not plan.reads_for_features):
        return own
    strict = replace(plan, config=replace(plan.config, on_error="raise"))
    return [*own, station_parts(strict, source, identities)]


def scored_parts(parts: Parts, selection: Selection) -> dict[str, Any]:
    """What identifies the scores of a selection's patches: which samples it holds, not only how it was asked for.

    The same settings may select other samples on another device, whose features differ in their last bits.
    """
    return parts[PATCHES] | {"selection": selection.content_hash()}


def filled_parts(store_digest: str, reconstructor: str) -> dict[str, Any]:
    """What identifies the filled images of a store: its content, not what it says of its origin.

    Args:
        store_digest: see `PackedDataset.digest`.
        reconstructor: identity of the network.
    """
    return {"store": store_digest, "reconstructor": reconstructor, "filled_version": ALGORITHM_VERSIONS[FILLED]}
