"""Origins of encoders: the bundled weight file, or a network in memory; those of timm are in `timm_encoder.py`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from torch import nn

from dq_lightning.core.config import Precision
from dq_lightning.core.devices import resolve_device
from dq_lightning.core.records import DigestMemory
from dq_lightning.features.bundled import BUNDLED_ENCODER_FILE, CIFAR10_MEAN, CIFAR10_STD, load_small_resnet
from dq_lightning.features.encoders import Encoder, NetworkEncoder, RowEncoder, TextEncoder
from dq_lightning.features.preprocessing import Preprocessing, ResizeToSquare
from dq_lightning.identity.networks import digest_encoder
from dq_lightning.identity.values import digest_text


class Origin(ABC):
    """Source of an encoder, which knows the encoder's identity without loading it, and how to load it."""

    @abstractmethod
    def identity(self, memory: DigestMemory) -> str | None:
        """Return a digest of weights, preprocessing and architecture, or None if the hub's commit is not known yet."""

    def resolve(self, memory: DigestMemory) -> Self:
        """Return this origin with its commit fixed, and record the commit in `memory`; this may contact a hub."""
        return self

    @abstractmethod
    def load(self, device: str, precision: Precision) -> Encoder | TextEncoder | RowEncoder:
        """Load the encoder, so that it is ready to run."""


class HubOrigin(Origin):
    """Weights in a repository of the Hugging Face hub, pinned to a commit before they are loaded.

    A commit that was used before is used again. Otherwise a commit in the local Hugging Face cache is taken, and the
    hub is contacted only if there is none. So the same name gives the same features until the cache or the name
    (`@revision`) changes.
    """

    name: str
    commit: str | None

    @abstractmethod
    def find_commit(self) -> str:
        """Return the commit in the local Hugging Face cache, or else that of the hub.

        Raises:
            FeatureError: the weights are neither in the cache nor can they be downloaded.
        """

    def known_commit(self, memory: DigestMemory) -> str | None:
        """Return the commit that is fixed or remembered, or None."""
        return self.commit or memory.recall(f"hub:{self.name}")

    def resolve(self, memory: DigestMemory) -> Self:
        commit = self.known_commit(memory) or self.find_commit()
        memory.remember(f"hub:{self.name}", commit)
        origin: Any = self
        fixed: Self = replace(origin, commit=commit)
        return fixed


@dataclass(frozen=True)
class BundledOrigin(Origin):
    """A file with a `SmallResNet`; by default the one in `assets/`.

    Attributes:
        path: safetensors file that `load_small_resnet` reads.
    """

    path: Path = BUNDLED_ENCODER_FILE

    def identity(self, memory: DigestMemory) -> str | None:
        return digest_text("small_resnet", memory.file(self.path), ResizeToSquare(32), CIFAR10_MEAN, CIFAR10_STD)

    def load(self, device: str, precision: Precision) -> NetworkEncoder:
        module, _ = load_small_resnet(self.path)
        target = resolve_device(device)
        return NetworkEncoder(module, ResizeToSquare(32), target, precision, CIFAR10_MEAN, CIFAR10_STD)


@dataclass(frozen=True)
class ModuleOrigin(Origin):
    """A network that the caller made, and how its images are preprocessed.

    Attributes:
        module: the network, which is copied when the encoder is loaded.
        preprocess: function from an RGB image to a tensor.
        mean: mean of each channel on the scale [0, 1], if the device is to normalise the output of `preprocess`.
        std: standard deviation of each channel on the scale [0, 1], used together with `mean`.
        preprocess_text: description of `preprocess` that identifies it better than its source code, or None.
    """

    module: nn.Module = field(repr=False, compare=False)
    preprocess: Preprocessing = field(compare=False)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    preprocess_text: str | None = None

    def identity(self, memory: DigestMemory) -> str | None:
        known = digest_encoder(self.module, self.preprocess, self.preprocess_text)
        return digest_text("module", known, self.mean, self.std)

    def load(self, device: str, precision: Precision) -> NetworkEncoder:
        return NetworkEncoder(self.module, self.preprocess, resolve_device(device), precision, self.mean, self.std)
