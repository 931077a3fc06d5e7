"""The plan of a run: what will be quantized and how, and the identity of each station's cache entry.

Nothing in this file computes features, bins, scores or stores.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dq_lightning.cache.digests import DigestMemory
from dq_lightning.core.config import EncodingConfig, FeatureConfig, QuantizeConfig, SelectionConfig
from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import ConfigError, SourceError
from dq_lightning.core.records import Labels, Selection
from dq_lightning.features.choose import choose_encoder, takes_any_sample
from dq_lightning.features.origins import EncoderSpec
from dq_lightning.patches.reconstructors import ReconstructorSpec
from dq_lightning.pipeline.patch_plan import PatchPlan, make_patch_plan
from dq_lightning.pipeline.suspects import GivenScores, draws_by_scores, given_scores
from dq_lightning.pipeline.wanted import Wanted
from dq_lightning.selection.given import read_indices
from dq_lightning.selection.select import check_weights
from dq_lightning.sources.adapt import as_source, grouping_id
from dq_lightning.sources.base import Source
from dq_lightning.sources.reading import ItemSource

FEATURES, BINS, SELECTION, PATCHES, STORE = "1-features", "2-bins", "3-selection", "4-patches", "5-store"
# This station holds images with their dropped patches filled. They are made from the store alone, so its folder may be
# removed at any time. Entries of this station and of PATCHES are found by the content of the entry that they are made
# from.
FILLED = "6-filled"
# No station, but how images are encoded, and the rule that a budget of bytes is spent by.
ENCODED = "encoded"
# Increase the number of a station whenever what it computes changes, so that its old entries are never reused.
ALGORITHM_VERSIONS = {FEATURES: 2, BINS: 2, SELECTION: 2, PATCHES: 2, STORE: 2, FILLED: 3, ENCODED: 4}
# Version of what the scores of samples leave out of the bins, and of the scores that are kept with the bins for the draw, with
# the order in which samples are drawn by them.
QUALITY_VERSION = 3
SCORES_VERSION = 2
# Near-duplicates are looked for inside each class since version 2.
DUPLICATES_VERSION = 2
# Picks with a `lam` above this are those of float64 since version 2.
LARGE_LAM, LARGE_LAM_VERSION = 1e4, 2
# Distances that are small beside the lengths of the features count for similarity "rbf" since version 2.
DISTANCES_VERSION = 2
# Whitening keeps what varies little beside a large mean since version 2.
WHITEN_VERSION = 2
# Classes that are split into clusters have their shares since version 2.
CLUSTERS_VERSION = 2
SIZE_SAMPLES = 16
# This prefix distinguishes an identity of the data that the user gave from a digest of their content.
GIVEN = "given:"

Parts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """What will be quantized and how; nothing is computed yet.

    Attributes:
        source: the dataset as the stations see it.
        encoder: the resolved encoder, not loaded; None where the samples are chosen without features.
        config: every setting.
        fingerprint: identity of the dataset given by the user, in place of its content digest.
        labels_id: identity of the labels given by the user; None when the labels are the dataset's own.
        patches: the plan of the step on patches, or None while all patches are kept.
        chosen: int64 [M], the positions that are kept, where no features and bins are needed to choose them, because
            the user gave the positions or all samples are kept; else None.
        scores: scores that the user gave; None where margins are used, or none are needed.
    """

    source: Source
    encoder: EncoderSpec | None
    config: QuantizeConfig
    fingerprint: str | None = None
    labels_id: str | None = None
    patches: PatchPlan | None = None
    chosen: Tensor | None = None
    scores: GivenScores | None = None
    _identities: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def chosen_id(self) -> str | None:
        """Hexadecimal SHA-256 of the positions in `chosen`, or None."""
        return None if self.chosen is None else hashlib.sha256(self.chosen.numpy().tobytes()).hexdigest()

    @property
    def reads_for_features(self) -> bool:
        """Whether features are made by reading every sample."""
        return self.encoder is not None and self.encoder.reads_samples

    @cached_property
    def labels(self) -> Labels | None:
        """The class or group of every sample; a dataset that does not list its classes is read once in full to find them."""
        return self.source.labels()

    @property
    def classes(self) -> Labels | None:
        """The class of every sample where a network can be asked for it; None where labels only group the samples."""
        return self.labels if self.labels is not None and self.labels.are_classes else None

    @cached_property
    def draws_by_scores(self) -> bool:
        """Whether the draw inside the bins may use scores."""
        return draws_by_scores(self.config, self.scores, self.source.modality)

    @cached_property
    def store_kind(self) -> str:
        """Kind of the store with `"auto"` resolved: `"indices"` while images are kept as they are, except for streams."""
        if self.config.store == "auto":
            changed = self.patches is not None or self.config.max_bytes is not None or self.config.encoding.encodes
            return "packed" if changed or self.source.in_order else "indices"
        return self.config.store

    @property
    def candidates(self) -> Tensor:
        """Positions int64 [n] of the samples that may be kept: those in `chosen`, or else all."""
        return torch.arange(len(self.source)) if self.chosen is None else self.chosen

    @property
    def head(self) -> "Plan":
        """This plan for the first samples of a stream, to try them before a long pass; else the plan itself."""
        return replace(self, source=self.source.head(), chosen=None) if self.source.in_order else self

    def resolve(self, memory: DigestMemory) -> "Plan":
        """Return this plan with the commits of hub names fixed; no other method may send requests to a hub."""
        patches = self.patches and self.patches.resolve(memory)
        return replace(self, encoder=self.encoder and self.encoder.resolve(memory), patches=patches)

    def with_networks_of(self, other: "Plan") -> "Plan":
        """Return this plan with what is known of the networks of another plan, which was made of the same `Wanted`."""
        return replace(self, _identities=other._identities)

    @property
    def encoder_digest(self) -> str | None:
        """Identity of the encoder, once `identities` has computed it; None before, or without an encoder."""
        return self._identities.get("encoder")

    def identities(self, memory: DigestMemory) -> dict[str, str] | None:
        """Return the identities of the networks in use, by name; None when one was never resolved with this memory.

        Each is computed once for a plan, also where the plan is resolved afterwards, because the weights are hashed.
        """
        networks: dict[str, EncoderSpec | ReconstructorSpec | None] = {"encoder": self.encoder}
        if self.patches is not None:
            networks |= {"classifier": self.patches.classifier, "reconstructor": self.patches.reconstructor}
        known = self._identities
        for name, network in networks.items():
            identity = None if network is None or name in known else network.identity(memory)
            if identity is not None:
                known[name] = identity
        return dict(known) if all(name in known for name, network in networks.items() if network is not None) else None


def make_plan(dataset: Any, wanted: Wanted) -> Plan:
    """Make the plan of a run: adapt any dataset or `Source` to a source, and choose the networks.

    It reads a few images at most and loads no weights.

    Raises:
        DQError: the dataset cannot be read as a source, a network cannot be chosen, or settings contradict each other.
    """
    config, encoding = wanted.config, wanted.config.encoding
    if config.max_bytes is None and not encoding.encodes and encoding != EncodingConfig(encoding.codec):
        raise ConfigError(
            "encoding.quality, longest_side and least_psnr only have an effect when images are encoded anew: set "
            'encoding.codec="jpeg" or "webp", or max_bytes=, or leave them out'
        )
    encoder = config.features.encoder if wanted.encoder is None else wanted.encoder
    chosen_already = wanted.indices is not None or keeps_all(config)
    changes_images = config.patches.drops or encoding.encodes
    source = as_source(
        dataset,
        image_column=config.image_column,
        label_column=config.label_column,
        labels=wanted.labels,
        transform=wanted.transform,
        target_transform=wanted.target_transform,
        text=config.text,
        on_error=config.on_error,
        needs_images=changes_images or not (chosen_already or takes_any_sample(encoder)),
    )
    if config.max_bytes is not None and isinstance(source, ItemSource) and not source.in_order:
        source.check_one_image()
    if source.in_order:
        _check_stream(config)
    elif isinstance(source, ItemSource) and source.label_column is not None:
        source.target_leaf()  # A name that no item has is an error before the long work.
    if config.quality.score == "none" and config.quality.drop_worst != 0:
        get_logger().warning(
            'drop_worst= has no effect, because quality.score="none" allows no scores: leave one of the two out'
        )
    gives_scores = wanted.scores is not None or config.quality.score not in ("margin", "none")
    if gives_scores and not config.quality.drops and config.selection.draw != "scored":
        get_logger().warning(
            "the scores have no effect, because drop_worst= is 0: pass the share to leave out, or "
            'selection.draw="scored" to draw from the samples of the best scores'
        )
    chosen = None if wanted.indices is None else read_indices(wanted.indices, len(source))
    if chosen is None and keeps_all(config):
        chosen = torch.arange(len(source))
    spec = given = patches = None
    if chosen is None:
        check_weights(config.selection, config.bins.num_bins)
        spec = _encoder(source, config, encoder)
        given = given_scores(wanted.scores, config, source)
    if config.patches.drops:
        if source.modality != "image":
            raise ConfigError(
                f"drop_ratio= drops patches of images, but these samples are {source.modality}: leave it out"
            )
        if config.store == "indices":
            raise ConfigError(
                'store="indices" stores row numbers and no images, so no patches can be dropped: use store="packed", or '
                "leave drop_ratio= out"
            )
        width, height = _typical_size(source)
        patches = make_patch_plan(
            config.patches, (height, width), classifier=wanted.classifier, reconstructor=wanted.reconstructor
        )
    return Plan(source, spec, config, wanted.fingerprint, grouping_id(source), patches, chosen, given)


def _check_stream(config: QuantizeConfig) -> None:
    """Raise a ConfigError for settings that need the samples of a stream in any order."""
    if config.store == "indices":
        raise ConfigError(
            'store="indices" reads the chosen samples by their positions, which a stream does not allow: use store="packed" '
            '(or "auto"), which copies them'
        )
    if config.max_bytes is not None:
        raise ConfigError(
            "max_bytes= tries settings on samples from all over the data, which a stream does not allow: pass keep_ratio= and, "
            "if the images should take fewer bytes, encoding.codec="
        )


def keeps_all(config: QuantizeConfig) -> bool:
    """Whether the settings keep every sample and look for none to leave out, so that no selection is needed."""
    return config.selection.keep_ratio == 1 and config.bins.deduplicate is None and not config.quality.drops


def _encoder(source: Source, config: QuantizeConfig, encoder: Any) -> EncoderSpec:
    by_size = isinstance(encoder, str) and encoder == "auto" and source.modality == "image"
    spec = choose_encoder(
        encoder,
        weights=config.features.weights,
        image_size=_typical_size(source) if by_size else (0, 0),
        modality=source.modality,
        text=config.text,
    )
    if spec.needs_images:
        source.check_columns()
    if config.features.selection_epochs and not (source.modality == "image" and spec.needs_images):
        raise ConfigError(
            f"selection_epochs trains a network of images, and features come from {spec.description}: leave it out"
        )
    return spec


def _typical_size(source: Source) -> tuple[int, int]:
    """Return (width, height) in pixels of the image with the median longer side among a few evenly spaced images."""
    sizes, problem = [], None
    for index in source.spread(SIZE_SAMPLES):
        try:
            sizes.append(source.image(index).size)
        except SourceError as error:
            problem = error  # The step that reads every sample decides whether an unreadable sample ends the run.
    if problem is not None and not sizes:
        raise problem
    return sorted(sizes, key=max)[len(sizes) // 2]


def source_identity(plan: Plan, memory: DigestMemory) -> str:
    """Return the identity of the data; the dataset is read in full where its digest is not remembered."""
    if plan.fingerprint is not None:
        plan.source.know_length(memory, length_key(plan.fingerprint))
    known = known_identity(plan, memory) if plan.fingerprint is not None or plan.source.identity_is_certain else None
    return known or plan.source.digest(memory)


def length_key(fingerprint: str) -> str:
    """Return the key under which the length of a stream is remembered whose identity the user gave."""
    return f"stream of {GIVEN}{fingerprint}"


def known_identity(plan: Plan, memory: DigestMemory) -> str | None:
    """Return the identity of the data if the user gave it or it is remembered, else None; nothing is read in full."""
    if plan.fingerprint is None:
        return plan.source.quick_digest(memory)
    column = plan.config.image_column
    return f"{GIVEN}{plan.fingerprint}" + (f" column:{column}" if column is not None else "")


def station_parts(plan: Plan, source: str, identities: dict[str, str]) -> Parts:
    """Return the parts of each station's key: plain JSON of everything that the content of its entry depends on.

    `source` is the identity of the data, and `identities` holds those of the networks by name. The parts of a station
    contain the parts of the station before it.
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
    if plan.config.max_bytes is not None:
        # The number of samples follows from the budget, so there are no selection and no scores apart from the store.
        del parts[SELECTION]
        parts.pop(PATCHES, None)
        parts[STORE]["max_bytes"] = plan.config.max_bytes
    if plan.config.max_bytes is not None or plan.config.encoding.encodes:
        parts[STORE] |= {"encoding": plan.config.encoding.to_dict(), "encoding_version": version[ENCODED]}
    if plan.patches is not None and plan.patches.fills_ahead:
        # The full parts also need the digest of the finished store; `compact.filled_key` makes them.
        parts[FILLED] = {"reconstructor": identities["reconstructor"]}
    return parts


def parts_behind(store: dict[str, Any]) -> Parts:
    """Return the parts of the stations that a store was made from, given the parts of the store's own entry.

    This inverts `station_parts`, because the parts of a station contain those of the stations before it. Bins and
    features are missing where the samples were given or all kept, and filled images, whose key needs more, always are.
    """

    def without(parts: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
        return {name: value for name, value in parts.items() if name not in set(names)}

    behind: Parts = {STORE: store}
    rest = without(store, ("stored_patches", "store", "store_version", "max_bytes", "encoding", "encoding_version"))
    if "patches" in rest:
        behind[PATCHES] = rest
    behind[SELECTION] = rest = without(rest, ("patches", "patches_version"))
    if "features_version" not in rest:
        return behind
    behind[BINS] = rest = without(rest, (*SelectionConfig().to_dict(), "selection_version", "clusters_version"))
    training = FeatureConfig(selection_epochs=1).selection_training()
    names = ["source", "num_source_samples", "on_error", "encoder", "kind", "features_version", "text", *training]
    names += ["labels"] * (rest["kind"] == "gradient" or "selection_epochs" in rest)
    behind[FEATURES] = {name: rest[name] for name in names if name in rest}
    return behind


def _parts_of_choice(plan: Plan, data: dict[str, Any], identities: dict[str, str]) -> Parts:
    """Return the parts of the keys of features, bins and selection."""
    config, version = plan.config, ALGORITHM_VERSIONS
    features = data | {
        "encoder": identities["encoder"],
        "kind": config.features.kind,
        "features_version": version[FEATURES],
    }
    if plan.reads_for_features and (text := plan.source.text_identity()):
        features["text"] = text
    training = config.features.selection_training()
    features |= training
    if config.features.kind == "gradient" or training:
        features["labels"] = plan.labels_id
    grouped = {"labels": plan.labels_id, "whiten": config.features.whiten, "bins_version": version[BINS]}
    # The regime and its memory change how long the picks take, not which they are.
    settings = {k: value for k, value in config.bins.to_dict().items() if k not in ("engine", "matrix_memory")}
    bins = features | settings | grouped
    # Settings that change nothing are left out, so that entries of versions without them are found.
    if config.quality.drops:
        bins["quality"] = config.quality.to_dict() | {"score": plan.scores.identity if plan.scores else "margin"}
        bins["quality_version"] = QUALITY_VERSION
    if plan.draws_by_scores:
        # "auto" has no scores where labels are not judged, and "scored" has them there, too.
        bins["draw_scores"] = (
            plan.scores.identity if plan.scores else "auto" if config.selection.draw == "auto" else "margin"
        )
        bins["scores_version"] = SCORES_VERSION
    if config.features.whiten:
        bins["whiten_version"] = WHITEN_VERSION
    if config.bins.similarity == "rbf":
        bins["distances_version"] = DISTANCES_VERSION
    if config.bins.lam > LARGE_LAM:
        bins["large_lam_version"] = LARGE_LAM_VERSION
    if config.bins.deduplicate is not None:
        bins["duplicates_version"] = DUPLICATES_VERSION
    drawn = config.selection.to_dict()
    if config.max_bytes is None:
        drawn["keep_ratio"] = config.selection.share
    if config.selection.balance == "proportional":
        del drawn["balance"]
    selection = bins | drawn | {"selection_version": version[SELECTION]}
    if config.bins.clusters is not None:
        selection["clusters_version"] = CLUSTERS_VERSION
    return {FEATURES: features, BINS: bins, SELECTION: selection}


def usable_parts(plan: Plan, source: str, identities: dict[str, str]) -> list[Parts]:
    """Return the parts of all entries that equal what this plan would make, the plan's own parts first.

    An entry that was made with `on_error="raise"` skipped no sample, so it is also valid for `"skip"`. An entry made
    with `"skip"` is never used for `"raise"`.
    """
    own = [station_parts(plan, source, identities)]
    # Ready-made features are stored without reading the samples, so an entry that was made with on_error="raise" does
    # not show that all samples can be read.
    if plan.config.on_error == "raise" or (plan.chosen is None and not plan.reads_for_features):
        return own
    strict = replace(plan, config=replace(plan.config, on_error="raise"))
    return [*own, station_parts(strict, source, identities)]


def scored_parts(own: dict[str, Any], selection: Selection) -> dict[str, Any]:
    """Return the parts of the key of a selection's patch scores: the plan's own, and the selection's content hash.

    The settings alone are not enough, because the same settings may select other samples on another device, where
    features differ in their last bits.
    """
    return own | {"selection": selection.content_hash()}
