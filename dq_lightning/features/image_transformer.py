"""Image encoders of transformers (DINOv2, CLIP, SigLIP, ViT and others), with the processor that belongs to them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from dq_lightning.cache.digests import DigestMemory
from dq_lightning.core.config import Precision
from dq_lightning.core.errors import FeatureError
from dq_lightning.core.libraries import library_version
from dq_lightning.features.encoders import NetworkEncoder, pool
from dq_lightning.features.origins import EncoderSpec, HubOrigin
from dq_lightning.features.text_encoder import model_files
from dq_lightning.identity.values import digest_text

PREFIX = "transformers:"
INSTEAD = (
    'pass "transformers:FOLDER" with a folder of config.json, preprocessor_config.json and weights, '
    '"transformers:OWNER/NAME" of the Hugging Face hub, a timm name, or encoder="bundled"'
)


def _libraries() -> str:
    # torchvision resizes the images where a model's processor has a version for it.
    return f"{library_version('transformers')} {library_version('torchvision')}"


@dataclass(frozen=True)
class ImageFolderOrigin(EncoderSpec):
    """A local folder with an image model of transformers and its processor.

    Attributes:
        path: the folder.
    """

    path: Path

    def identity(self, memory: DigestMemory) -> str | None:
        files = model_files(self.path)
        names = [file.name for file in files]
        return digest_text("image_folder", _libraries(), *names, *memory.files([str(file) for file in files]))

    def _load(self, device: torch.device, precision: Precision) -> NetworkEncoder:
        return _load(str(self.path), {"local_files_only": True}, device, precision)


@dataclass(frozen=True)
class ImageHubOrigin(HubOrigin):
    """An image model of transformers on the Hugging Face hub, `transformers:OWNER/NAME[@REVISION]`."""

    instead: ClassVar[str] = INSTEAD

    @property
    def repository(self) -> str:
        return self.name.removeprefix(PREFIX)

    def identity(self, memory: DigestMemory) -> str | None:
        commit = self.known_commit(memory)
        return None if commit is None else digest_text("image_hub", _libraries(), self.name, commit)

    def _load(self, device: torch.device, precision: Precision) -> NetworkEncoder:
        return _load(self.repository.partition("@")[0], {"revision": self.find_commit()}, device, precision)


def image_origin(name: str) -> ImageFolderOrigin | ImageHubOrigin:
    """Decide whether a name stands for a local folder or a model on the hub, without loading anything.

    Args:
        name: `transformers:` and the path of a folder, or `OWNER/NAME[@REVISION]`.

    Raises:
        FeatureError: it is neither.
    """
    place = name.removeprefix(PREFIX)
    folder = Path(place).expanduser()
    if (folder / "config.json").is_file():
        return ImageFolderOrigin(name, f"transformers model in {folder}", folder.absolute())
    parts = place.partition("@")[0].split("/")
    if folder.exists() or place.startswith(("/", ".", "~")) or "\\" in place or len(parts) != 2 or not all(parts):
        raise FeatureError(f"{place!r} is not a folder with a transformers model: {INSTEAD}")
    return ImageHubOrigin(name, f"transformers {place}")


class ProcessedImage:
    """Preprocessing by the image processor of a model: its resizing, cropping and normalisation.

    Args:
        processor: image processor of transformers.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> Tensor:
        pixels: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels


class ImageFeatures(nn.Module):
    """The features of images that a model of transformers gives.

    They are `get_image_features` where the model has it (CLIP, SigLIP), else its pooled output, else the mean of its
    tokens. Where the weights lack the pooling layer, they are the first token, which that layer would read.

    Args:
        model: the model.
        has_pooler: whether the weights of its pooling layer were loaded.
    """

    def __init__(self, model: nn.Module, has_pooler: bool) -> None:
        super().__init__()
        self.model, self.has_pooler = model, has_pooler

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features [B, D] of normalised images [B, 3, H, W]."""
        model: Any = self.model
        if hasattr(model, "get_image_features"):
            return pool(model.get_image_features(pixel_values=pixels))
        output = model(pixel_values=pixels)
        if not self.has_pooler:
            first: Tensor = output.last_hidden_state[:, 0]
            return first
        return pool(output)

    def get_classifier(self) -> None:
        """Return None: no layer of the model is a head for the classes of images."""


def _load(place: str, pinned: dict[str, Any], device: torch.device, precision: Precision) -> NetworkEncoder:
    from transformers import AutoImageProcessor, AutoModel

    try:
        processor = AutoImageProcessor.from_pretrained(place, trust_remote_code=False, **pinned)  # type: ignore[no-untyped-call]
        model, report = AutoModel.from_pretrained(
            place, trust_remote_code=False, dtype=torch.float32, output_loading_info=True, **pinned
        )
    except Exception as error:
        raise FeatureError(
            f"transformers cannot load an image model from {place}: {type(error).__name__}: {error}; {INSTEAD}"
        ) from error
    missing = list(report["missing_keys"])
    others = [name for name in missing if "pooler" not in name]
    if others:
        raise FeatureError(f"the weights in {place} lack {len(others)} parameters, first {others[0]}: {INSTEAD}")
    if getattr(model, "main_input_name", "pixel_values") != "pixel_values" and not hasattr(model, "get_image_features"):
        raise FeatureError(f"{type(model).__name__} in {place} reads {model.main_input_name}, not images: {INSTEAD}")
    preprocess = ProcessedImage(processor)
    shapes = {tuple(preprocess(Image.new("RGB", size)).shape) for size in ((64, 48), (48, 96))}
    if len(shapes) > 1 or len(next(iter(shapes))) != 3:
        raise FeatureError(
            f"the processor of {place} gives {' and '.join(map(str, sorted(shapes)))} for two images, but batches need "
            "[3, H, W] of one size: take a model that works at a fixed size"
        )
    return NetworkEncoder(ImageFeatures(model, not missing), preprocess, device, precision)
