"""What the step on patches will use: patch size, classifier, reconstructor, and their identity. Computes nothing."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dq_lightning.core.config import PatchConfig
from dq_lightning.core.errors import ConfigError, PatchError
from dq_lightning.core.records import DigestMemory
from dq_lightning.features.choose import EncoderSpec, choose_encoder
from dq_lightning.features.encoders import NetworkEncoder
from dq_lightning.patches.reconstructors import ReconstructorSpec, choose_reconstructor
from dq_lightning.patches.saliency import PatchScorer, make_scorer

SMALL_SIDE = 64
SMALL_PATCH, PHOTO_PATCH = 4, 16
# what needs no classifier
PLAIN_SALIENCY = ("random", "variance")


@dataclass(frozen=True)
class PatchPlan:
    """The step on patches, resolved and not loaded.

    Attributes:
        config: its settings.
        patch_size: P in pixels.
        classifier: of the saliency, or None for a method that needs none.
        reconstructor: fills what was dropped before or during training; None leaves the mean colour.
        image_size: (height, width) of a typical image.
    """

    config: PatchConfig
    patch_size: int
    classifier: EncoderSpec | None
    reconstructor: ReconstructorSpec | None
    image_size: tuple[int, int]

    @property
    def codec(self) -> str:
        """`"auto"` resolved: raw pixels for small images, where a file's header would cost more than it saves; else PNG."""
        if self.config.codec != "auto":
            return self.config.codec
        return "raw" if max(self.image_size) <= SMALL_SIDE else "png"

    @property
    def fills_ahead(self) -> bool:
        """Whether the images are filled once, before training."""
        return self.config.reconstruct == "prepare"

    def identities(self, memory: DigestMemory) -> dict[str, str] | None:
        """Identity of every network used, by name; None when a hub name was never resolved with this memory."""
        found = {}
        for name in ("classifier", "reconstructor"):
            spec = getattr(self, name)
            if spec is None:
                continue
            identity = spec.identity(memory)
            if identity is None:
                return None
            found[name] = identity
        return found

    def resolve(self, memory: DigestMemory) -> "PatchPlan":
        """The same plan with the commits of hub names fixed; the only method that may ask a hub."""
        return replace(
            self,
            classifier=self.classifier and self.classifier.resolve(memory),
            reconstructor=self.reconstructor and self.reconstructor.resolve(memory),
        )

    def saliency_parts(self, identities: dict[str, str]) -> dict[str, Any]:
        """What the scores depend on, beside the samples and their labels."""
        config = self.config
        parts: dict[str, Any] = {"saliency": config.saliency, "patch_size": self.patch_size}
        if config.saliency == "random":
            return parts | {"seed": config.seed}
        if self.classifier is None:
            return parts
        target = {"target": config.target, "class_map": config.class_map, "target_layer": config.target_layer}
        return parts | target | {"classifier": identities["classifier"]}

    def store_parts(self) -> dict[str, Any]:
        """What the stored bytes depend on, beside the scores."""
        config = self.config
        parts: dict[str, Any] = {"drop_ratio": config.drop_ratio, "max_bytes": config.max_bytes, "codec": self.codec}
        if config.spread or config.max_bytes is not None:
            parts |= {"spread": config.spread, "least_ratio": config.least_ratio}
        if self.codec in ("jpeg", "webp"):
            parts["quality"] = config.quality
        return parts

    def load_scorer(self, device: str, num_classes: int | None) -> PatchScorer:
        """The scorer on its device.

        Raises:
            PatchError: the classifier cannot explain itself.
            FeatureError: its weights cannot be found or do not fit.
        """
        if self.classifier is None:
            return make_scorer(self.config)
        encoder = self.classifier.load(device, "float32")
        if not isinstance(encoder, NetworkEncoder) or encoder.num_classes is None:
            raise PatchError(
                f"{self.classifier.description} has no classes to explain: pass a classifier with a linear head, or use "
                'saliency="variance"'
            )
        prepared = encoder.preprocess(Image.new("RGB", (self.image_size[1], self.image_size[0])))
        if prepared.dtype == torch.uint8:
            size = (prepared.shape[1], prepared.shape[2])
            options: dict[str, Any] = {"mean": encoder.mean, "std": encoder.std, "input_size": size}
        else:
            options = {"preprocess": _OfTensor(encoder.preprocess)}
        return make_scorer(self.config, encoder.network, num_classes=num_classes, **options)


@dataclass(frozen=True)
class _OfTensor:
    """A preprocessing of Pillow images, called with uint8 tensors [3, H, W]."""

    preprocess: Any

    def __call__(self, image: Tensor) -> Tensor:
        prepared: Tensor = self.preprocess(Image.fromarray(image.permute(1, 2, 0).cpu().numpy()))
        return prepared


def make_patch_plan(
    config: PatchConfig, image_size: tuple[int, int], *, classifier: Any = None, reconstructor: Any = None
) -> PatchPlan:
    """Choose patch size, classifier and reconstructor. Loads no weights and asks no hub.

    Args:
        config: settings.
        image_size: (height, width) of a typical image in pixels.
        classifier: network, or `(network, preprocessing)`, in place of the config's name.
        reconstructor: `ViTMAEForPreTraining` in place of the config's name.

    Raises:
        FeatureError: the classifier's name is unknown.
        PatchError: the reconstructor's is.
    """
    size = config.patch_size or (SMALL_PATCH if max(image_size) <= SMALL_SIDE else PHOTO_PATCH)
    chosen = None
    if config.saliency not in PLAIN_SALIENCY:
        wanted = config.classifier if classifier is None else classifier
        chosen = choose_encoder(wanted, weights=config.weights, image_size=image_size)
    filler = None
    if config.reconstruct != "off":
        filler = choose_reconstructor(
            config.reconstructor if reconstructor is None else reconstructor,
            image_size=image_size,
            num_heads=config.num_heads,
            decoder_num_heads=config.decoder_num_heads,
        )
    return PatchPlan(config, size, chosen, filler, image_size)


def check_modality(modality: str) -> None:
    """Raise ConfigError unless samples of this kind have patches."""
    if modality != "image":
        raise ConfigError(f"drop_ratio= drops patches of images, but these samples are {modality}: leave it out")
