"""Where an encoder comes from: the bundled file, or a network in memory; timm's are in `timm_encoder.py`."""

import hashlib
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from dq_lightning.config import Precision
from dq_lightning.errors import FeatureError
from dq_lightning.features.bundled import BUNDLED_ENCODER_FILE, CIFAR10_MEAN, CIFAR10_STD, load_small_resnet
from dq_lightning.features.describe import describe_callable, describe_settings, digest_text, is_library
from dq_lightning.features.encoders import Encoder, NetworkEncoder, RowEncoder, TextEncoder, resolve_device
from dq_lightning.features.preprocessing import Preprocessing, ResizeToSquare
from dq_lightning.records import DigestMemory


class Origin(Protocol):
    """Knows the identity of an encoder without loading it, and how to load it."""

    def identity(self, memory: DigestMemory) -> str | None:
        """Digest of weights, preprocessing and architecture; None when only a hub knows the weights' revision."""
        ...

    def resolve(self, memory: DigestMemory) -> Self:
        """This origin with its revision fixed and remembered; may ask a hub."""
        ...

    def load(self, device: str, precision: Precision) -> Encoder | TextEncoder | RowEncoder:
        """The encoder, ready to run."""
        ...


@dataclass(frozen=True)
class BundledOrigin:
    """A file with a `SmallResNet`; by default the one in `assets/`.

    Attributes:
        path: safetensors file that `load_small_resnet` reads.
    """

    path: Path = BUNDLED_ENCODER_FILE

    def identity(self, memory: DigestMemory) -> str | None:
        return digest_text("small_resnet", memory.file(self.path), ResizeToSquare(32), CIFAR10_MEAN, CIFAR10_STD)

    def resolve(self, memory: DigestMemory) -> Self:
        return self

    def load(self, device: str, precision: Precision) -> NetworkEncoder:
        module, _ = load_small_resnet(self.path)
        target = resolve_device(device)
        return NetworkEncoder(module, ResizeToSquare(32), target, precision, CIFAR10_MEAN, CIFAR10_STD)


@dataclass(frozen=True)
class ModuleOrigin:
    """A network that the caller made, and how its images are preprocessed.

    Attributes:
        module: the network; copied when loaded.
        preprocess: from an RGB image to a tensor.
        mean: of the channels in [0, 1], when `preprocess` leaves the normalisation to the device.
        std: likewise.
        preprocess_text: description of `preprocess` when its owner knows a better one than its source.
    """

    module: nn.Module = field(repr=False, compare=False)
    preprocess: Preprocessing = field(compare=False)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    preprocess_text: str | None = None

    def identity(self, memory: DigestMemory) -> str | None:
        text = self.preprocess_text or describe_callable(self.preprocess)
        return digest_text("module", digest_module(self.module), text, self.mean, self.std)

    def resolve(self, memory: DigestMemory) -> Self:
        return self

    def load(self, device: str, precision: Precision) -> NetworkEncoder:
        return NetworkEncoder(self.module, self.preprocess, resolve_device(device), precision, self.mean, self.std)


def digest_module(module: nn.Module) -> str:
    """Digest of a network: its printed structure, source and attributes of its own classes, every parameter and buffer.

    Reads every byte of the weights once; device, precision and train mode do not enter.
    """
    digest = hashlib.sha256(repr(module).encode())
    for kind in sorted(
        {type(child) for child in module.modules()}, key=lambda kind: f"{kind.__module__}.{kind.__name__}"
    ):
        digest.update(f"{kind.__module__}.{kind.__qualname__}".encode())
        # the forward pass of a network written for the occasion is not visible in its structure
        if not is_library(kind):
            try:
                digest.update(inspect.getsource(kind).encode())
            except (OSError, TypeError):
                continue
    digest.update(describe_settings(module).encode())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> bytes:
    if tensor.is_meta or isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
        raise FeatureError("the encoder has parameters without values (meta or lazy); load or initialise it first")
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
