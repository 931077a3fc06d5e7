"""Chosen encoders that are not loaded yet: the base classes, the bundled weight file, and a network in memory."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import nn

from dq_lightning.cache.digests import DigestMemory
from dq_lightning.core.config import Precision
from dq_lightning.core.devices import resolve_device
from dq_lightning.core.errors import FeatureError
from dq_lightning.core.isolation import isolated
from dq_lightning.features.bundled import BUNDLED_ENCODER_FILE, CIFAR10_MEAN, CIFAR10_STD, load_small_resnet
from dq_lightning.features.encoders import Encoder, NetworkEncoder, RowEncoder, TextEncoder
from dq_lightning.features.preprocessing import Preprocessing, ResizeToSquare
from dq_lightning.identity.networks import WEIGHT_FILES, digest_encoder, find_commit
from dq_lightning.identity.values import digest_text


@dataclass(frozen=True)
class EncoderSpec(ABC):
    """A chosen encoder that is not loaded yet.

    Attributes:
        name: short name of the encoder.
        description: one line about the encoder, for messages.
        reads_samples: whether the encoder reads the samples; False for ready-made embeddings.
        needs_images: whether it reads the images, or texts, in the samples; False where samples may be of any kind.
    """

    name: str
    description: str
    reads_samples: ClassVar[bool] = True
    needs_images: ClassVar[bool] = True

    @abstractmethod
    def identity(self, memory: DigestMemory) -> str | None:
        """Compute a digest of weights, preprocessing and architecture without loading the network.

        The digest covers the content of weight files, the parameters and buffers of a network in memory, or the commit
        of a hub name that `resolve` has recorded. It does not depend on device and precision.

        Args:
            memory: remembered digests of files and commits of hub names.

        Returns:
            The digest, or None if the hub name was never resolved with this memory; call `resolve` first then.
        """

    def resolve(self, memory: DigestMemory) -> Self:
        """Return the same choice with its hub commit fixed, and record the commit in `memory`.

        Apart from `load`, no other method contacts a hub.

        Raises:
            FeatureError: the weights are neither in the local cache nor can they be downloaded; the message says what
                to pass instead.
        """
        return self

    def load(self, device: str = "auto", precision: Precision = "auto") -> Encoder | TextEncoder | RowEncoder:
        """Load the encoder onto its device, frozen and in eval mode.

        The random state and the global flags of the process do not change.

        Args:
            device: device that the encoder runs on; `"auto"` takes the GPU if there is one.
            precision: precision of the network, see `resolve_precision`.

        Raises:
            FeatureError: the weights cannot be found or do not fit the network. Random weights are never used instead.
        """
        with isolated():
            return self._load(resolve_device(device), precision)

    @abstractmethod
    def _load(self, device: torch.device, precision: Precision) -> Encoder | TextEncoder | RowEncoder: ...


@dataclass(frozen=True)
class HubOrigin(EncoderSpec):
    """Weights in a repository of the Hugging Face hub, pinned to a commit before they are loaded.

    A commit that was used before is used again. Otherwise a commit in the local Hugging Face cache is taken, and the
    hub is contacted only if there is none. So the same name gives the same features until the cache or the name
    (`@revision`) changes.

    Attributes:
        commit: hash of the commit, or None as long as it is unknown.
    """

    commit: str | None = field(default=None, kw_only=True)
    instead: ClassVar[str]
    """What the user can pass if the weights cannot be had, for messages."""

    @property
    @abstractmethod
    def repository(self) -> str:
        """The repository, as `OWNER/NAME[@REVISION]`."""

    @property
    def weight_files(self) -> tuple[str, ...]:
        """Names of the files that may hold the weights, the preferred one first."""
        return WEIGHT_FILES

    def find_commit(self) -> str:
        """Return the commit that is fixed, or else that in the local Hugging Face cache, or else that of the hub.

        Raises:
            FeatureError: the weights are neither in the cache nor can they be downloaded.
        """
        wanted = f"encoder {self.name!r}"
        return self.commit or find_commit(self.repository, self.weight_files, wanted, self.instead, FeatureError)

    def known_commit(self, memory: DigestMemory) -> str | None:
        """Return the commit that is fixed or remembered, or None."""
        return self.commit or memory.recall(f"hub:{self.name}")

    def resolve(self, memory: DigestMemory) -> Self:
        commit = self.known_commit(memory) or self.find_commit()
        memory.remember(f"hub:{self.name}", commit)
        return replace(self, commit=commit)


@dataclass(frozen=True)
class BundledOrigin(EncoderSpec):
    """A safetensors file with a `SmallResNet`, which `load_small_resnet` reads; by default the one in `assets/`."""

    path: Path = BUNDLED_ENCODER_FILE

    def identity(self, memory: DigestMemory) -> str | None:
        return digest_text("small_resnet", memory.file(self.path), ResizeToSquare(32), CIFAR10_MEAN, CIFAR10_STD)

    def _load(self, device: torch.device, precision: Precision) -> NetworkEncoder:
        module, _ = load_small_resnet(self.path)
        return NetworkEncoder(module, ResizeToSquare(32), device, precision, CIFAR10_MEAN, CIFAR10_STD)


@dataclass(frozen=True)
class ModuleOrigin(EncoderSpec):
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

    def _load(self, device: torch.device, precision: Precision) -> NetworkEncoder:
        return NetworkEncoder(self.module, self.preprocess, device, precision, self.mean, self.std)
