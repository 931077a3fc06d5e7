"""Choose an encoder: this is the only place that decides which encoder a name or an object stands for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from dq_lightning.core.config import TextConfig
from dq_lightning.core.errors import FeatureError
from dq_lightning.features.bundled import BUNDLED_ENCODER_FILE
from dq_lightning.features.image_transformer import PREFIX as TRANSFORMERS
from dq_lightning.features.image_transformer import image_origin
from dq_lightning.features.openai_embeddings import PREFIX as OPENAI
from dq_lightning.features.openai_embeddings import openai_origin
from dq_lightning.features.origins import BundledOrigin, EncoderSpec, ModuleOrigin
from dq_lightning.features.ready_made import is_ready_made, ready_origin
from dq_lightning.features.sample_function import function_origin, is_function
from dq_lightning.features.text_encoder import INSTEAD as TEXT_INSTEAD
from dq_lightning.features.text_encoder import text_origin

AUTO_SMALL_SIDE = 64
# timm's most used network has ImageNet-1k weights under Apache-2.0 and a linear head, and is not too slow on a CPU.
AUTO_PHOTO_ENCODER = "resnet50.a1_in1k"
# The most used sentence encoder is small, is trained on a billion sentence pairs, and is under Apache-2.0.
AUTO_TEXT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


def choose_encoder(
    encoder: Any,
    *,
    weights: str | Path | None = None,
    image_size: tuple[int, int] = (0, 0),
    modality: str = "image",
    text: TextConfig | None = None,
) -> EncoderSpec:
    """Decide which encoder an argument stands for, without loading it or contacting a hub.

    For images:

    | `encoder` | choice |
    |---|---|
    | `"auto"` | bundled for images up to 64 px (longer side), else `resnet50.a1_in1k` of timm; only the size counts |
    | `"bundled"` | the CIFAR-10 network in `assets/` (with `weights`: another file of the same format) |
    | timm name | weights from the hub, or from the local file `weights` (.safetensors or .pth) |
    | `"hf-hub:OWNER/NAME"` | a timm network on the Hugging Face hub |
    | `"local-dir:FOLDER"` or a folder | a folder with timm's `config.json` and weights |
    | `"transformers:OWNER/NAME[@REVISION]"` | an image model of transformers (DINOv2, CLIP, SigLIP) with its processor |
    | `"transformers:FOLDER"` | the same in a local folder |
    | `nn.Module` | the network, with the preprocessing of its own `pretrained_cfg` (timm) or `preprocess` attribute |
    | `(nn.Module, callable)` | the network, with a callable that turns one RGB image into a tensor |
    | array or tensor [N, D], `"FILE.npy"` | ready-made embeddings, of samples of any kind |
    | a function | features [D] of one raw sample of any kind; called in this process, one sample at a time |

    For text:

    | `encoder` | choice |
    |---|---|
    | `"auto"` | `sentence-transformers/all-MiniLM-L6-v2` |
    | `"OWNER/NAME[@REVISION]"` | a transformers model on the Hugging Face hub |
    | a folder | a transformers model with `config.json`, tokenizer and weights |
    | `"openai:MODEL"` | OpenAI's embeddings API; the key is read only from the variable `OPENAI_API_KEY` |

    Args:
        encoder: name, path, network or array as in the tables above.
        weights: local weight file for a timm name or for the bundled encoder.
        image_size: (height, width) of a typical image, in pixels.
        modality: `"image"` or `"text"`.
        text: pooling, normalisation and length of a text encoder; None takes the defaults of `TextConfig`.

    Raises:
        FeatureError: the choice is unknown or incomplete, or a local file is missing.
    """
    if is_ready_made(encoder):
        _refuse_weights(weights, "ready-made embeddings need none")
        return ready_origin(encoder)
    if is_function(encoder):
        _refuse_weights(weights, "a function needs none")
        return function_origin(encoder)
    if modality == "text":
        return _text_spec(encoder, weights, text or TextConfig())
    if modality != "image":
        raise FeatureError(f"modality must be 'image' or 'text', got {modality!r}")
    if isinstance(encoder, nn.Module) or (isinstance(encoder, tuple) and len(encoder) == 2):
        _refuse_weights(weights, "a given network has its own weights")
        return _module_spec(*encoder) if isinstance(encoder, tuple) else _module_spec(encoder, None)
    if not isinstance(encoder, str | Path):
        raise FeatureError(
            "encoder must be a name, a folder, an nn.Module, (nn.Module, preprocessing), ready features [N, D] or a function "
            f"of one sample, got {type(encoder).__name__}"
        )
    path = _existing_weights(weights)
    if encoder == "auto" and path is not None:
        raise FeatureError('weights= needs encoder= to be the timm name that the weights belong to, not "auto"')
    if encoder == "auto":
        longer = max(image_size)
        if longer <= AUTO_SMALL_SIDE:
            return _bundled_spec(None, f" (auto: images up to {AUTO_SMALL_SIDE} px)")
        return _timm_spec(AUTO_PHOTO_ENCODER, None, f" (auto: images over {AUTO_SMALL_SIDE} px)")
    if encoder == "bundled":
        return _bundled_spec(path, "")
    if str(encoder).startswith(TRANSFORMERS):
        _refuse_weights(weights, "a transformers model has its own weights")
        return image_origin(str(encoder))
    return _timm_spec(str(encoder), path, "")


def takes_any_sample(encoder: Any) -> bool:
    """Return whether an `encoder` argument makes features of samples of any kind, so that they need no image."""
    return is_ready_made(encoder) or is_function(encoder)


def _refuse_weights(weights: str | Path | None, reason: str) -> None:
    if weights is not None:
        raise FeatureError(f"weights= goes with a timm name; leave it out, since {reason}")


def _text_spec(encoder: Any, weights: str | Path | None, text: TextConfig) -> EncoderSpec:
    if not isinstance(encoder, str | Path) or encoder == "bundled" or weights is not None:
        seen = "weights=" if weights is not None else repr(encoder) if encoder == "bundled" else type(encoder).__name__
        raise FeatureError(f"{seen} is for images, but the samples are text: {TEXT_INSTEAD}")
    name, reason = (AUTO_TEXT_ENCODER, " (auto: text)") if encoder == "auto" else (str(encoder), "")
    name = name.removeprefix(TRANSFORMERS)
    if name.startswith(OPENAI):
        return openai_origin(name, text)
    return text_origin(name, f"transformers {name}{reason}", text)


def _existing_weights(weights: str | Path | None) -> Path | None:
    if weights is None:
        return None
    path = Path(weights).expanduser().absolute()
    if not path.is_file():
        raise FeatureError(f"weights={str(weights)!r}: there is no such file")
    return path


def _bundled_spec(path: Path | None, reason: str) -> EncoderSpec:
    if path is not None:
        return BundledOrigin("bundled", f"small residual network, weights {path}{reason}", path)
    if not BUNDLED_ENCODER_FILE.is_file():
        raise FeatureError(f"the bundled encoder {BUNDLED_ENCODER_FILE} is missing: install the package again")
    return BundledOrigin("bundled", f"bundled CIFAR-10 encoder{reason}")


def _timm_spec(name: str, weights: Path | None, reason: str) -> EncoderSpec:
    from dq_lightning.features.timm_encoder import TimmFileOrigin, TimmFolderOrigin, TimmHubOrigin

    folder = Path(name.removeprefix("local-dir:")).expanduser()
    path_like = name.startswith("local-dir:") or len(folder.parts) > 1 or folder.suffix in (".safetensors", ".pth")
    # A folder that happens to have the name of a timm model is only taken if it holds a model.
    if name.startswith("local-dir:") or (folder.exists() and (path_like or (folder / "config.json").is_file())):
        if folder.is_file():
            raise FeatureError(f'{name} is a file: pass encoder="NAME OF ITS timm MODEL", weights={name!r}')
        if not (folder / "config.json").is_file():
            raise FeatureError(
                f"{folder} is not the folder of a timm model: such a folder has a config.json and weights"
            )
        _refuse_weights(weights, "a folder has its own weights")
        return TimmFolderOrigin(f"local-dir:{folder}", f"timm model in {folder}", folder.absolute())
    if name.startswith("hf-hub:"):
        _refuse_weights(weights, "an hf-hub: repository has its own weights")
        return TimmHubOrigin(name, f"{name}{reason}")
    if "/" in name or "\\" in name or ":" in name:
        raise FeatureError(
            f"{name!r} is neither an existing folder nor a timm name: for the Hugging Face hub pass 'hf-hub:{name}' (a timm "
            f"network) or 'transformers:{name}'"
        )
    if weights is not None:
        return TimmFileOrigin(name, f"timm {name}, weights {weights}{reason}", weights)
    return TimmHubOrigin(name, f"timm {name}{reason}")


def _module_spec(module: Any, preprocess: Callable[..., Any] | None) -> EncoderSpec:
    name = type(module).__name__
    if not isinstance(module, nn.Module):
        raise FeatureError(f"encoder=(network, preprocessing): the network must be an nn.Module, got {name}")
    mean = std = text = None
    if preprocess is None and getattr(module, "pretrained_cfg", None):
        from dq_lightning.features.timm_encoder import module_preprocessing

        preprocess, mean, std, text = module_preprocessing(module)
    preprocess = preprocess or getattr(module, "preprocess", None)
    if not callable(preprocess):
        raise FeatureError(
            f"nothing says how images are prepared for {name}: pass encoder=(network, preprocessing), where preprocessing "
            "turns one RGB PIL image into a tensor, for instance torchvision's Compose([Resize(..), ToTensor(), "
            "Normalize(mean, std)]), or give the network a `preprocess` attribute"
        )
    spec = ModuleOrigin(name, f"the given {name}", module, preprocess, mean, std, text)
    _check_channels(spec, module, preprocess)
    return spec


def _check_channels(spec: EncoderSpec, module: nn.Module, preprocess: Callable[..., Any]) -> None:
    """Raise a FeatureError early if the preprocessing gives another number of channels than the network takes."""
    first = next((child for child in module.modules() if isinstance(child, nn.Conv2d)), None)
    try:
        prepared = preprocess(Image.new("RGB", (64, 64)))
        if first is None or prepared.ndim != 3 or prepared.shape[0] == first.in_channels:
            return
        # The convolution that is listed first need not be the one that receives the image, so a trial run decides.
        encoder: Any = spec.load("cpu", "float32")
        encoder.embed(prepared[None])
    except Exception as error:
        # All other errors are reported later, when real images are read.
        if "channels" not in str(error):
            return
        count = first.in_channels if first is not None else 0
        wanted = f"{count} channel" + ("s" if count != 1 else "")
        grey = ", which for one channel begins with torchvision's Grayscale()" if count == 1 else ""
        raise FeatureError(
            f"the first convolution of {spec.name} takes images of {wanted}, but its preprocessing gives {prepared.shape[0]}: "
            f"pass (network, preprocessing), where preprocessing turns one RGB PIL image into a tensor of {wanted}{grey}"
        ) from error
