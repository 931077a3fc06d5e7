"""The one place that decides which encoder a name or an object stands for."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from dq_lightning.core.config import Precision, TextConfig
from dq_lightning.core.errors import FeatureError
from dq_lightning.core.isolation import isolated
from dq_lightning.core.records import DigestMemory
from dq_lightning.features.bundled import BUNDLED_ENCODER_FILE
from dq_lightning.features.encoders import Encoder, RowEncoder, TextEncoder
from dq_lightning.features.openai_embeddings import PREFIX as OPENAI
from dq_lightning.features.openai_embeddings import openai_origin
from dq_lightning.features.origins import BundledOrigin, ModuleOrigin, Origin
from dq_lightning.features.ready_made import ReadyOrigin, is_ready_made, ready_origin
from dq_lightning.features.text_encoder import INSTEAD as TEXT_INSTEAD
from dq_lightning.features.text_encoder import text_origin

AUTO_SMALL_SIDE = 64
# ImageNet-1k weights under Apache-2.0 with a linear head, and moderate on a CPU; timm's most used network
AUTO_PHOTO_ENCODER = "resnet50.a1_in1k"
# small, trained on a billion sentence pairs, under Apache-2.0; the most used encoder of sentences
AUTO_TEXT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class EncoderSpec:
    """A resolved choice that is not loaded.

    Attributes:
        name: what was chosen, in short.
        description: the line to print.
        origin: where it comes from.
    """

    name: str
    description: str
    origin: Origin

    @property
    def reads_samples(self) -> bool:
        """False for ready-made embeddings, which take the samples' place."""
        return not isinstance(self.origin, ReadyOrigin)

    def identity(self, memory: DigestMemory) -> str | None:
        """Hexadecimal digest of weights, preprocessing and architecture, without loading the network.

        Files are digested through `memory`; a network in memory by its parameters and buffers; a hub name by its commit,
        which `resolve` has recorded. Device and precision do not enter.

        Returns:
            The digest, or None if the hub name was never resolved with this memory: then `resolve` first.
        """
        return self.origin.identity(memory)

    def resolve(self, memory: DigestMemory) -> "EncoderSpec":
        """The same choice with its hub commit fixed and recorded in `memory`; the only method that may ask a hub.

        Raises:
            FeatureError: the weights are neither in the local cache nor reachable; the message says what to pass.
        """
        return replace(self, origin=self.origin.resolve(memory))

    def load(self, device: str = "auto", precision: Precision = "auto") -> Encoder | TextEncoder | RowEncoder:
        """The encoder on its device, frozen, in eval mode; random state and flags of the process stay as they are.

        Raises:
            FeatureError: the weights cannot be found or do not fit. Random weights are never used in their place.
        """
        with isolated():
            return self.origin.load(device, precision)


def choose_encoder(
    encoder: Any,
    *,
    weights: str | Path | None = None,
    image_size: tuple[int, int] = (0, 0),
    modality: str = "image",
    text: TextConfig | None = None,
) -> EncoderSpec:
    """Decide on an encoder; nothing is loaded and no hub is asked.

    | `encoder` | choice |
    |---|---|
    | `"auto"` | images up to 64 px (longer side): bundled; larger: `resnet50.a1_in1k` of timm. Nothing else changes it. |
    | `"bundled"` | the CIFAR-10 network in `assets/` (with `weights`: another file of the same format) |
    | timm name | weights from the hub, or from the local file `weights` (.safetensors or .pth) |
    | `"hf-hub:OWNER/NAME"` | a timm network on the Hugging Face hub |
    | `"local-dir:FOLDER"` or a folder | a folder with timm's `config.json` and weights |
    | `nn.Module` | its own `pretrained_cfg` (timm) or `preprocess` says how images are prepared |
    | `(nn.Module, callable)` | the callable makes a tensor of one RGB image |
    | array or tensor [N, D], `"FILE.npy"` | ready-made embeddings, of images or text |

    For text:

    | `encoder` | choice |
    |---|---|
    | `"auto"` | `sentence-transformers/all-MiniLM-L6-v2` |
    | `"OWNER/NAME[@REVISION]"` | a transformers model on the Hugging Face hub |
    | a folder | one with `config.json`, tokenizer and weights |
    | `"openai:MODEL"` | OpenAI's embeddings API; the key is taken from `OPENAI_API_KEY` alone |

    Args:
        encoder: see the table.
        weights: local weight file for a timm name.
        image_size: (height, width) of a typical image, in pixels.
        modality: `"image"` or `"text"`.
        text: pooling, normalisation and length of a text encoder.

    Raises:
        FeatureError: the choice is unknown or incomplete, or a local file is missing.
    """
    if is_ready_made(encoder):
        if weights is not None:
            raise FeatureError("weights= goes with a timm name; ready-made embeddings need none")
        ready = ready_origin(encoder)
        return EncoderSpec("ready-made", ready.describe(), ready)
    if modality == "text":
        return _text_spec(encoder, weights, text or TextConfig())
    if modality != "image":
        raise FeatureError(f"there are encoders of images and of text, got modality {modality!r}")
    if isinstance(encoder, nn.Module) or (isinstance(encoder, tuple) and len(encoder) == 2):
        if weights is not None:
            raise FeatureError("weights= goes with a timm name; a network that is passed as an object has its own")
        return _module_spec(*encoder) if isinstance(encoder, tuple) else _module_spec(encoder, None)
    if not isinstance(encoder, str | Path):
        raise FeatureError(
            f"encoder must be a name, a folder, an nn.Module or (nn.Module, preprocessing), got {type(encoder).__name__}"
        )
    path = _existing_weights(weights)
    if encoder == "auto" and path is not None:
        raise FeatureError('weights= needs the timm name it belongs to as encoder, not "auto"')
    if encoder == "auto":
        longer = max(image_size)
        if longer <= AUTO_SMALL_SIDE:
            return _bundled_spec(None, f" (auto: images up to {AUTO_SMALL_SIDE} px)")
        return _timm_spec(AUTO_PHOTO_ENCODER, None, f" (auto: images over {AUTO_SMALL_SIDE} px)")
    if encoder == "bundled":
        return _bundled_spec(path, "")
    return _timm_spec(str(encoder), path, "")


def _text_spec(encoder: Any, weights: str | Path | None, text: TextConfig) -> EncoderSpec:
    if not isinstance(encoder, str | Path) or encoder == "bundled" or weights is not None:
        seen = "weights=" if weights is not None else repr(encoder) if encoder == "bundled" else type(encoder).__name__
        raise FeatureError(f"{seen} does not go with text: {TEXT_INSTEAD}")
    name, reason = (AUTO_TEXT_ENCODER, " (auto: text)") if encoder == "auto" else (str(encoder), "")
    if name.startswith(OPENAI):
        return EncoderSpec(name, f"OpenAI's {name.removeprefix(OPENAI)}", openai_origin(name, text))
    return EncoderSpec(name, f"transformers {name}{reason}", text_origin(name, text))


def _existing_weights(weights: str | Path | None) -> Path | None:
    if weights is None:
        return None
    path = Path(weights).expanduser().absolute()
    if not path.is_file():
        raise FeatureError(f"weights={str(weights)!r}: there is no such file")
    return path


def _bundled_spec(path: Path | None, reason: str) -> EncoderSpec:
    if path is not None:
        return EncoderSpec("bundled", f"small residual network, weights {path}{reason}", BundledOrigin(path))
    if not BUNDLED_ENCODER_FILE.is_file():
        raise FeatureError(f"the bundled encoder {BUNDLED_ENCODER_FILE} is missing: install the package again")
    return EncoderSpec("bundled", f"bundled CIFAR-10 encoder{reason}", BundledOrigin())


def _timm_spec(name: str, weights: Path | None, reason: str) -> EncoderSpec:
    from dq_lightning.features.timm_encoder import TimmFileOrigin, TimmFolderOrigin, TimmHubOrigin

    folder = Path(name.removeprefix("local-dir:")).expanduser()
    path_like = name.startswith("local-dir:") or len(folder.parts) > 1 or folder.suffix in (".safetensors", ".pth")
    # a folder that happens to be called like a timm model is not meant, unless it holds a model
    if name.startswith("local-dir:") or (folder.exists() and (path_like or (folder / "config.json").is_file())):
        if folder.is_file():
            raise FeatureError(f'{name} is a file: pass encoder="NAME OF ITS timm MODEL", weights={name!r}')
        if not (folder / "config.json").is_file():
            raise FeatureError(f"{folder} is no timm model folder: it must have a config.json and weights")
        if weights is not None:
            raise FeatureError("weights= goes with a timm name; a folder has its own weights")
        return EncoderSpec(f"local-dir:{folder}", f"timm model in {folder}", TimmFolderOrigin(folder.absolute()))
    if name.startswith("hf-hub:"):
        if weights is not None:
            raise FeatureError("weights= goes with a timm name; hf-hub: names a repository with its own weights")
        return EncoderSpec(name, f"{name}{reason}", TimmHubOrigin(name))
    if "/" in name or "\\" in name or ":" in name:
        raise FeatureError(
            f"{name!r} is no existing folder and no timm name; for the Hugging Face hub pass 'hf-hub:{name}'"
        )
    if weights is not None:
        return EncoderSpec(name, f"timm {name}, weights {weights}{reason}", TimmFileOrigin(name, weights))
    return EncoderSpec(name, f"timm {name}{reason}", TimmHubOrigin(name))


def _module_spec(module: Any, preprocess: Callable[..., Any] | None) -> EncoderSpec:
    name = type(module).__name__
    if not isinstance(module, nn.Module):
        raise FeatureError(f"encoder=(network, preprocessing): the network must be an nn.Module, got {name}")
    if preprocess is None and getattr(module, "pretrained_cfg", None):
        from dq_lightning.features.timm_encoder import module_preprocessing

        transform, mean, std, text = module_preprocessing(module)
        spec = EncoderSpec(name, f"the given {name}", ModuleOrigin(module, transform, mean, std, text))
        _check_channels(spec, module, transform)
        return spec
    preprocess = preprocess or getattr(module, "preprocess", None)
    if not callable(preprocess):
        raise FeatureError(
            f"nothing says how images are prepared for {name}: pass encoder=(network, preprocessing), where preprocessing "
            "turns one RGB PIL image into a tensor, for instance torchvision's Compose([Resize(..), ToTensor(), "
            "Normalize(mean, std)]), or give the network a `preprocess` attribute"
        )
    spec = EncoderSpec(name, f"the given {name}", ModuleOrigin(module, preprocess))
    _check_channels(spec, module, preprocess)
    return spec


def _check_channels(spec: EncoderSpec, module: nn.Module, preprocess: Callable[..., Any]) -> None:
    """Tell at once that the preprocessing gives images of another number of channels than the network takes."""
    first = next((child for child in module.modules() if isinstance(child, nn.Conv2d)), None)
    try:
        prepared = preprocess(Image.new("RGB", (64, 64)))
        if first is None or prepared.ndim != 3 or prepared.shape[0] == first.in_channels:
            return
        # the layer that is listed first need not be the one that sees the image
        encoder: Any = spec.load("cpu", "float32")
        encoder.embed(prepared[None])
    except Exception as error:
        # all else is told where images are read
        if "channels" not in str(error):
            return
        count = first.in_channels if first is not None else 0
        wanted = f"{count} channel" + ("s" if count != 1 else "")
        grey = ", which for one channel begins with torchvision's Grayscale()" if count == 1 else ""
        raise FeatureError(
            f"the first convolution of {spec.name} takes images of {wanted}, but its preprocessing gives {prepared.shape[0]}: "
            f"pass (network, preprocessing), where preprocessing turns one RGB PIL image into a tensor of {wanted}{grey}"
        ) from error
