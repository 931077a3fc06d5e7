"""Combine the keywords of a data module and its config into one record of what the user asked for."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dq_lightning.core.config import (
    AnyConfig,
    Balance,
    OnError,
    QuantizeConfig,
    StoreKind,
    replace_fields,
    with_short_forms,
)
from dq_lightning.core.errors import ConfigError
from dq_lightning.pipeline.plan import Plan, make_plan
from dq_lightning.selection.given import Indices, check_alone, read_indices
from dq_lightning.sources.strip import KEEP


@dataclass(frozen=True)
class Wanted:
    """Everything that the user asked for, apart from the data.

    Attributes:
        config: every setting.
        encoder: a module, or `(module, preprocessing)`; None uses the name in the config.
        labels: as in `quantize`.
        transform: `"keep"`, or the transform that replaces the dataset's own; None means no transform.
        target_transform: `"keep"`, or the transform that replaces the dataset's own target transform; None means none.
        fingerprint: identity of the data given by the user, in place of the digest of their content.
        seed: seed of the random state in which a wrapped data module makes its split.
        classifier: a network, or `(network, preprocessing)`; None uses the name in the config.
        reconstructor: a `ViTMAEForPreTraining`; None uses the name in the config.
        indices: int64 [M], the positions to keep if the user gave them, else None.
        scores: numbers [N] that the user gave, or None, where the config says which scores are used.
        choosing: names of those keywords that the user gave which choose among the samples of a dataset.
    """

    config: QuantizeConfig
    encoder: Any = None
    labels: Any = None
    transform: Any = "keep"
    target_transform: Any = "keep"
    fingerprint: str | None = None
    seed: int = 0
    classifier: Any = None
    reconstructor: Any = None
    indices: Tensor | None = None
    scores: Any = None
    choosing: tuple[str, ...] = ()

    @property
    def fills_late(self) -> bool:
        """Whether dropped patches are filled during training, batch by batch (`reconstruct="batch"`)."""
        patches = self.config.patches
        return patches.drops and patches.reconstruct == "batch"

    def plan(self, dataset: Any) -> Plan:
        """Make the plan for a dataset; nothing is computed."""
        return make_plan(
            dataset,
            self.config,
            encoder=self.encoder,
            classifier=self.classifier,
            reconstructor=self.reconstructor,
            labels=self.labels,
            indices=self.indices,
            scores=self.scores,
            transform=self.transform,
            target_transform=self.target_transform,
            fingerprint=self.fingerprint,
        )


def want(
    *,
    config: AnyConfig | None,
    keep_ratio: float | None,
    num_bins: int | None,
    seed: int | None,
    store: StoreKind | None,
    encoder: Any,
    labels: Any,
    indices: Indices,
    transform: Any,
    target_transform: Any,
    fingerprint: str | None,
    drop_ratio: float | None = None,
    classifier: Any = None,
    reconstructor: Any = None,
    on_error: OnError | None = None,
    max_bytes: int | str | None = None,
    scores: Any = None,
    drop_worst: float | Literal["auto"] | None = None,
    balance: Balance | None = None,
) -> Wanted:
    """Combine the keywords of a data module and its config; the arguments are those of `QuantizedDataModule`.

    Raises:
        ConfigError: a keyword contradicts another keyword or the config, or a value is invalid.
    """
    check_alone(
        indices,
        keep_ratio=keep_ratio,
        num_bins=num_bins,
        encoder=encoder,
        scores=scores,
        drop_worst=drop_worst,
        balance=balance,
    )
    choosing = {"keep_ratio": keep_ratio, "num_bins": num_bins, "drop_ratio": drop_ratio, "encoder": encoder}
    choosing |= {
        "classifier": classifier,
        "labels": labels,
        "indices": indices,
        "store": store,
        "fingerprint": fingerprint,
        "scores": scores,
        "drop_worst": drop_worst,
        "max_bytes": max_bytes,
        "balance": balance,
    }
    short_forms: dict[str, Any] = {
        "selection.keep_ratio": keep_ratio,
        "selection.seed": seed,
        "selection.balance": balance,
        "quality.drop_worst": drop_worst,
        "bins.num_bins": num_bins,
        "patches.drop_ratio": drop_ratio,
        "max_bytes": max_bytes,
        "store": store,
        "on_error": on_error,
    }
    named = isinstance(encoder, str | Path)
    if named:
        short_forms["features.encoder"] = str(encoder)
    for name, value in (("classifier", classifier), ("reconstructor", reconstructor)):
        if isinstance(value, str | Path):
            short_forms[f"patches.{name}"] = str(value)
    if isinstance(scores, str | Path):
        short_forms["quality.score"] = str(scores)
    config = with_short_forms(config, short_forms)
    check_alone(indices, config)
    return Wanted(
        config,
        encoder=None if named else encoder,
        labels=labels,
        # A file of indices is read now, because it may be removed or replaced before another process reads it.
        indices=None if indices is None else read_indices(indices),
        transform=transform,
        target_transform=target_transform,
        fingerprint=fingerprint,
        seed=config.selection.seed,
        classifier=None if isinstance(classifier, str | Path) else classifier,
        reconstructor=None if isinstance(reconstructor, str | Path) else reconstructor,
        scores=None if isinstance(scores, str | Path) else scores,
        choosing=tuple(name for name, value in choosing.items() if value is not None),
    )


def in_one_process(wanted: Wanted) -> Wanted:
    """Return a copy in which features and saliency read the dataset in one process, unless the config sets a number."""
    if wanted.config.features.num_workers != "auto":
        return wanted
    return replace(wanted, config=replace_fields(wanted.config, {"features.num_workers": 0}))


def without_transform(wanted: Wanted) -> Wanted:
    """Return a copy without an image transform if images are filled batch by batch, else the given object.

    Raises:
        ConfigError: images are filled batch by batch and the user passed an image transform.
    """
    if not wanted.fills_late:
        return wanted
    if not (isinstance(wanted.transform, str) and wanted.transform == KEEP):
        raise ConfigError(
            'transform= cannot run before the filling of reconstruct="batch": pass it as batch_transform='
        )
    return replace(wanted, transform=None)
