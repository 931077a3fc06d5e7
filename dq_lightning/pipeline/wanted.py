"""What the user asked for: the keywords of `quantize` and of the data module, combined with the config into one record."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from dq_lightning.core.config import (
    SHORT_FORMS,
    AnyConfig,
    Balance,
    OnError,
    Preset,
    QuantizeConfig,
    StoreKind,
    with_short_forms,
)
from dq_lightning.selection.given import Indices, check_alone


class Choices(TypedDict, total=False):
    """Keywords that choose among the samples of a dataset and say how they are stored; a finished set takes none."""

    keep_ratio: float | None
    num_bins: int | None
    drop_ratio: float | None
    max_bytes: int | str | None
    encoder: Any
    classifier: Any
    labels: Any
    indices: Indices
    scores: Any
    drop_worst: float | Literal["auto"] | None
    balance: Balance | None
    preset: Preset | None
    store: StoreKind | None
    fingerprint: str | None


class Delivery(TypedDict, total=False):
    """Keywords that say how kept samples are delivered."""

    reconstructor: Any
    transform: Any
    target_transform: Any
    seed: int | None


class Keywords(Choices, Delivery, total=False):
    """All keywords that are combined with the config."""

    on_error: OnError | None


@dataclass(frozen=True)
class Wanted:
    """Everything that the user asked for, apart from the data.

    Attributes:
        config: every setting.
        encoder: a module, `(module, preprocessing)`, or ready-made features; None uses the name in the config.
        classifier: a network, or `(network, preprocessing)`; None uses the name in the config.
        reconstructor: a `ViTMAEForPreTraining`; None uses the name in the config.
        labels: as in `quantize`.
        indices: positions to keep, as in `quantize`; None where the settings choose them.
        scores: numbers [N] that the user gave, or None, where the config says which scores are used.
        transform: `"keep"`, or the transform that replaces the dataset's own; None means no transform.
        target_transform: `"keep"`, or the transform that replaces the dataset's own target transform; None means none.
        fingerprint: identity of the data given by the user, in place of the digest of their content.
        choosing: names of the keywords of `Choices` that the user passed.
    """

    config: QuantizeConfig
    encoder: Any = None
    classifier: Any = None
    reconstructor: Any = None
    labels: Any = None
    indices: Indices = None
    scores: Any = None
    transform: Any = "keep"
    target_transform: Any = "keep"
    fingerprint: str | None = None
    choosing: tuple[str, ...] = ()

    @property
    def fills_late(self) -> bool:
        """Whether dropped patches are filled during training, batch by batch (`reconstruct="batch"`)."""
        patches = self.config.patches
        return patches.drops and patches.reconstruct == "batch"


def want(config: AnyConfig | None, **given: Unpack[Keywords]) -> Wanted:
    """Combine keywords and config.

    Args:
        config: settings, as `quantize` takes them.
        **given: keywords as in `quantize` and `QuantizedDataModule`. A path or name of a network or of scores goes into
            the config, an object into the record.

    Raises:
        ConfigError: a keyword contradicts another keyword or the config, or a value is invalid.
    """
    values: dict[str, Any] = dict(given)
    indices = values.pop("indices", None)
    check_alone(indices, **values)
    objects = {name: values.pop(name, None) for name in ("encoder", "classifier", "reconstructor", "scores")}
    short: dict[str, Any] = {SHORT_FORMS[name]: values.pop(name) for name in list(values) if name in SHORT_FORMS}
    for name, value in objects.items():
        if isinstance(value, str | Path):
            short[SHORT_FORMS[name]], objects[name] = str(value), None
    made = with_short_forms(config, short)
    check_alone(indices, made)
    return Wanted(
        made,
        indices=indices,
        choosing=tuple(name for name in Choices.__annotations__ if given.get(name) is not None),
        **objects,
        **values,
    )
