"""The settings of the step on patches."""

from dataclasses import dataclass
from typing import Literal

from dq_lightning.errors import ConfigError
from dq_lightning.fields import JsonFields, check_choice, check_ratio

Saliency = Literal[
    "gradcam", "gradcam++", "xgradcam", "hirescam", "layercam", "gradcamelementwise",
    "ablationcam", "eigencam", "eigengradcam", "fem", "fullgrad", "kpcacam", "scorecam", "segeigencam", "shapleycam",
    "variance", "random",
]  # fmt: skip
SaliencyTarget = Literal["auto", "label", "argmax"]
Reconstruct = Literal["prepare", "batch", "off"]
PatchCodec = Literal["auto", "raw", "png", "jpeg", "webp"]


@dataclass(frozen=True)
class PatchConfig(JsonFields):
    """Which patches of an image are kept, and how the others are filled (Zhou et al. 2023, section 3.3).

    Attributes:
        drop_ratio: share of patches dropped; floor(L * (1 - drop_ratio) + 0.5) of L are kept, exactly.
        patch_size: side of a patch in pixels; 4 for images up to 64 px and 16 for larger ones when None.
        spread: spread the same total over all images by how much saliency each patch holds.
        max_bytes: upper bound on the stored patches of all images, in bytes; more patches are dropped, of the least salient
            images first, until it holds. None: no bound.
        least_ratio: share of its patches that every image keeps when the total is spread.
        saliency: how patches are scored; `"variance"` and `"random"` need no classifier.
        classifier: as `FeatureConfig.encoder`, with a linear head.
        weights: local weight file (.safetensors or .pth) of the classifier.
        target: class explained: the `"label"`, the classifier's `"argmax"`, or the label where the classifier knows it.
        class_map: for every label the classifier's output that stands for it, or None.
        target_layer: name of the layer the map is read from; found by itself when None.
        seed: of `"random"`.
        reconstructor: `"auto"`, `"bundled"`, a hub name, a folder, or an original checkpoint file.
        num_heads: of the encoder in such a file when its size is not an official one; `decoder_num_heads` likewise.
        reconstruct: `"prepare"` once, `"batch"` on the device of the training, `"off"` fills with the mean colour.
        codec: of the kept patches; `"auto"` is raw for small images and PNG for others.
        quality: of JPEG and WebP, 1 to 100.
        batch_size: images per step. Not part of the identity.
    """

    drop_ratio: float = 0.0
    patch_size: int | None = None
    spread: bool = False
    max_bytes: int | None = None
    least_ratio: float = 0.25
    saliency: Saliency = "gradcam"
    classifier: str = "auto"
    weights: str | None = None
    target: SaliencyTarget = "auto"
    class_map: tuple[int, ...] | None = None
    target_layer: str | None = None
    seed: int = 0
    reconstructor: str = "auto"
    num_heads: int | None = None
    decoder_num_heads: int | None = None
    reconstruct: Reconstruct = "prepare"
    codec: PatchCodec = "auto"
    quality: int = 90
    batch_size: int = 64

    @property
    def drops(self) -> bool:
        """Whether any patch may be dropped."""
        return self.drop_ratio > 0 or self.max_bytes is not None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio("PatchConfig", "drop_ratio", self.drop_ratio, zero=True)
        for name, choices in (("saliency", Saliency), ("target", SaliencyTarget), ("codec", PatchCodec)):
            check_choice("PatchConfig", name, getattr(self, name), choices)
        check_choice("PatchConfig", "reconstruct", self.reconstruct, Reconstruct)
        for name, good in (
            ("patch_size", self.patch_size is None or self.patch_size >= 1),
            ("max_bytes", self.max_bytes is None or self.max_bytes >= 1),
            ("least_ratio", 0 <= self.least_ratio <= 1),
            ("class_map", self.class_map is None or min(self.class_map, default=-1) >= 0),
            ("seed", 0 <= self.seed < 2**64),
            ("quality", 1 <= self.quality <= 100),
            ("batch_size", self.batch_size >= 1),
        ):
            if not good:
                raise ConfigError(f"PatchConfig.{name} is out of range: {getattr(self, name)!r}")
