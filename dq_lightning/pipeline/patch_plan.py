"""The plan of the step on patches: patch size, classifier and reconstructor.

Nothing in this file scores or fills patches.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from dq_lightning.cache.digests import DigestMemory
from dq_lightning.core.arrays import as_image
from dq_lightning.core.config import PatchConfig
from dq_lightning.core.errors import PatchError
from dq_lightning.features.choose import choose_encoder
from dq_lightning.features.encoders import NetworkEncoder
from dq_lightning.features.origins import EncoderSpec
from dq_lightning.patches.reconstructors import ReconstructorSpec, choose_reconstructor
from dq_lightning.patches.saliency import PatchScorer, make_scorer

SMALL_SIDE = 64
SMALL_PATCH, PHOTO_PATCH = 4, 16
# These methods of saliency need no classifier.
PLAIN_SALIENCY = ("random", "variance")


@dataclass(frozen=True)
class PatchPlan:
    """The plan of the step on patches; its networks are chosen but not loaded.

    Attributes:
        config: settings of the step.
        patch_size: P, side of a patch in pixels.
        classifier: network whose saliency maps score the patches, or None for a method that needs none.
        reconstructor: network that fills the dropped patches before or during training; None leaves them in the mean
            colour.
        image_size: (height, width) of a typical image in pixels.
    """

    config: PatchConfig
    patch_size: int
    classifier: EncoderSpec | None
    reconstructor: ReconstructorSpec | None
    image_size: tuple[int, int]

    @property
    def codec(self) -> str:
        """Codec of the kept patches with `"auto"` resolved: `"raw"` for images of up to 64 pixels a side, else `"png"`.

        In small images the header of a PNG would take more bytes than its compression saves.
        """
        if self.config.codec != "auto":
            return self.config.codec
        return "raw" if max(self.image_size) <= SMALL_SIDE else "png"

    @property
    def fills_ahead(self) -> bool:
        """Whether the images are filled once, before training."""
        return self.config.reconstruct == "prepare"

    def resolve(self, memory: DigestMemory) -> "PatchPlan":
        """Return this plan with the commits of hub names fixed; no other method may send requests to a hub."""
        return replace(
            self,
            classifier=self.classifier and self.classifier.resolve(memory),
            reconstructor=self.reconstructor and self.reconstructor.resolve(memory),
        )

    def saliency_parts(self, identities: dict[str, str]) -> dict[str, Any]:
        """Return everything that the scores depend on besides the samples and their labels, as plain JSON.

        `identities` holds the identities of the networks, by name.
        """
        config = self.config
        parts: dict[str, Any] = {"saliency": config.saliency, "patch_size": self.patch_size}
        if config.saliency == "random":
            return parts | {"seed": config.seed}
        if self.classifier is None:
            return parts
        target = {"target": config.target, "class_map": config.class_map, "target_layer": config.target_layer}
        return parts | target | {"classifier": identities["classifier"]}

    def store_parts(self) -> dict[str, Any]:
        """Return everything that the stored bytes depend on besides the scores, as plain JSON."""
        config = self.config
        parts: dict[str, Any] = {"drop_ratio": config.drop_ratio, "max_bytes": config.max_bytes, "codec": self.codec}
        if config.spread or config.max_bytes is not None:
            parts |= {"spread": config.spread, "least_ratio": config.least_ratio}
        if self.codec in ("jpeg", "webp"):
            parts["quality"] = config.quality
        return parts

    def load_scorer(self, device: str, num_classes: int | None) -> PatchScorer:
        """Load the scorer of patches on a device; `num_classes` is None for a dataset without labels.

        Raises:
            PatchError: the classifier has no output for classes, so no saliency can be computed from it.
            FeatureError: the classifier's weights cannot be found or do not fit.
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
            options = {"preprocess": lambda image: encoder.preprocess(as_image(image))}
        return make_scorer(self.config, encoder.network, num_classes=num_classes, **options)


def make_patch_plan(
    config: PatchConfig, image_size: tuple[int, int], *, classifier: Any = None, reconstructor: Any = None
) -> PatchPlan:
    """Choose patch size, classifier and reconstructor; it loads no weights and sends no requests to a hub.

    `image_size` is (height, width) of a typical image in pixels. A classifier (a network, or `(network,
    preprocessing)`) and a reconstructor (`ViTMAEForPreTraining`, or a name or path) replace the names in the config.

    Raises:
        FeatureError: the name of the classifier is unknown.
        PatchError: the name of the reconstructor is unknown.
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
