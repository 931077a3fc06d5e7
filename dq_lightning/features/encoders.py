"""Protocols of loaded encoders, and `NetworkEncoder`, which makes an image encoder of a network."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from dq_lightning.core.batching import images_at_once
from dq_lightning.core.config import Precision
from dq_lightning.core.errors import FeatureError
from dq_lightning.features.collect import Rows
from dq_lightning.features.preprocessing import Preprocessing
from dq_lightning.features.samples import SampleSource

HEAD_NAMES = ("head", "fc", "classifier", "linear")


class Encoder(Protocol):
    """A frozen network of images in eval mode on its device."""

    @property
    def num_classes(self) -> int | None:
        """Number C of outputs of the linear head, or None if the encoder has no linear head."""

    def preprocess(self, image: Image.Image, /) -> Tensor:
        """Turn one RGB image into a tensor.

        The method runs in loader processes, so it must be picklable without the weights of the network.
        """

    def embed(self, batch: Tensor, /) -> Tensor:
        """Return pooled features, float32 [B, D] on the encoder's device, of a stacked batch [B, ...]."""

    def logits(self, embedding: Tensor, /) -> Tensor:
        """Return the output of the linear head, float32 [B, C], for features [B, D]."""

    def replica(self, device: torch.device, /) -> "Encoder":
        """Return a copy with networks of its own on another device, of the same precision."""


@runtime_checkable
class TextEncoder(Protocol):
    """A frozen network of token ids on its device."""

    num_classes: None
    max_length: int

    def tokenize(self, texts: list[str], /) -> list[list[int]]:
        """Return the token ids of each text, special tokens included: at least one and at most `max_length`."""

    def embed(self, tokens: Tensor, /) -> Tensor:
        """Return pooled features, float32 [B, D] on the encoder's device, of token ids [B, T], padded with -1."""

    def replica(self, device: torch.device, /) -> "TextEncoder":
        """Return a copy with networks of its own on another device, of the same precision."""


@runtime_checkable
class RowEncoder(Protocol):
    """An encoder that reads the source itself and returns finished rows, so no batches are made for it."""

    num_classes: None
    advice: str
    """Advice to the user about rows that are not finite, for messages."""

    def rows(
        self,
        source: SampleSource,
        batch_size: int,
        num_workers: int | Literal["auto"],
        api_embeddings: Path | None,
        positions: Tensor,
        /,
    ) -> Iterator[Rows]:
        """Yield the features of every sample at `positions` once, in any order.

        Args:
            source: dataset of N samples.
            batch_size: largest number of samples in one request.
            num_workers: number of concurrent requests.
            api_embeddings: folder of the stored embeddings of APIs; those that are found are not requested again, and
                new ones are added. None stores nothing.
            positions: int64 [n], ascending.
        """


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype that the body of a network computes in.

    `"auto"` is bfloat16 on a GPU that supports it natively, float16 on any other GPU, and float32 on all other devices.
    """
    if precision != "auto":
        dtype: torch.dtype = getattr(torch, precision)
        return dtype
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def find_head(module: nn.Module) -> nn.Linear | None:
    """Find the linear classification head of a network, or return None.

    The head is what timm's `get_classifier()` returns, else the linear layer in an attribute of `HEAD_NAMES`, else the
    last linear layer.
    """
    network: Any = module
    if hasattr(network, "get_classifier"):
        head = network.get_classifier()
        return head if isinstance(head, nn.Linear) else None
    for name in HEAD_NAMES:
        head = getattr(network, name, None)
        if isinstance(head, nn.Linear):
            return head
    linear = [child for child in module.modules() if isinstance(child, nn.Linear)]
    return linear[-1] if linear else None


def pool(output: Any) -> Tensor:
    """Return the features [B, D] of a network's output.

    Feature maps [B, D, H, W] are averaged over height and width. If the output is a record as transformers returns it,
    its `pooler_output` is taken, or else the mean of `last_hidden_state` [B, T, D] over the tokens.

    Raises:
        FeatureError: the output is neither a tensor of one of these shapes nor such a record.
    """
    features = output
    if not isinstance(output, Tensor):
        features = getattr(output, "pooler_output", None)
        tokens = getattr(output, "last_hidden_state", None)
        if features is None and isinstance(tokens, Tensor):
            features = tokens.mean(dim=1) if tokens.ndim == 3 else tokens
    if not isinstance(features, Tensor):
        raise FeatureError(
            f"the encoder gives a {type(output).__module__}.{type(output).__qualname__}; it must give a tensor [B, D] or "
            "[B, D, H, W], or an output with pooler_output or last_hidden_state: wrap it in a module that returns one"
        )
    if features.ndim == 4:
        features = features.mean(dim=(2, 3))
    if features.ndim != 2:
        raise FeatureError(
            f"the encoder gives a tensor of shape {tuple(features.shape)}; it must give [B, D] or [B, D, H, W]"
        )
    return features


class NetworkEncoder:
    """An encoder made of a network and its preprocessing.

    The features of a network with timm's methods are `forward_head(forward_features(x), pre_logits=True)`. The features
    of any other network are the input of its head if the head's output is the network's output, else the output itself.

    Args:
        module: the network; it is copied, so the caller's network does not change.
        preprocess: function from an RGB image to a tensor.
        device: device that the network runs on.
        precision: precision of the network's body; the head and the features are float32.
        mean: mean of each channel on the scale [0, 1], which uint8 batches are normalised with; None if `preprocess`
            normalises.
        std: standard deviation of each channel on the scale [0, 1], used together with `mean`.

    Attributes:
        network: the whole network, on its device, frozen and in eval mode.
        head: linear head inside `network` that produces its output, or None if there is no such layer.
    """

    def __init__(
        self,
        module: nn.Module,
        preprocess: Preprocessing,
        device: torch.device,
        precision: Precision = "auto",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        self.preprocess = preprocess
        self.mean, self.std = mean, std
        self._device = device
        self._dtype = resolve_precision(precision, device)
        own: Any = copy.deepcopy(module).to(device).float().eval()
        # A TorchScript network has no method `requires_grad_`, so its parameters are frozen one by one.
        for parameter in own.parameters():
            parameter.requires_grad_(False)
        # Convolutions are fastest in the channels-last layout, both on CPUs and on GPUs.
        self.network: Any = own.to(memory_format=torch.channels_last)
        self.head = find_head(self.network)
        self._has_timm_methods = hasattr(module, "forward_features") and hasattr(module, "forward_head")
        self._mean = self._std = None
        if mean is not None and std is not None:
            self._mean = 255 * torch.tensor(mean, device=device)[:, None, None]
            self._std = 255 * torch.tensor(std, device=device)[:, None, None]

    @property
    def num_classes(self) -> int | None:
        """Number of outputs of the linear head, or None if there is no head."""
        return None if self.head is None else self.head.out_features

    def embed(self, batch: Tensor) -> Tensor:
        """Return the features, float32 [B, D], of images [B, 3, H, W] on any device, uint8 or already normalised.

        Raises:
            FeatureError: the network fails on the batch, or the batch is uint8 and there are no mean and std.
        """
        half = self._dtype != torch.float32
        pieces = torch.split(batch, images_at_once(batch, self._device))
        with torch.no_grad(), torch.autocast(self._device.type, self._dtype) if half else nullcontext():
            return torch.cat([self.features(piece).float() for piece in pieces])

    def features(self, batch: Tensor) -> Tensor:
        """Return the features [B, D] of a batch as `embed` does, but in the caller's grad mode and precision.

        Raises:
            FeatureError: the network fails on the batch, or the batch is uint8 and there are no mean and std.
        """
        batch = batch.to(self._device, non_blocking=True)
        if batch.dtype == torch.uint8:
            if self._mean is None or self._std is None:
                raise FeatureError(
                    "the preprocessing gives uint8 images, but the network has no mean and std to normalise them with; "
                    "let it return floating point, for instance with torchvision's ToTensor() and Normalize(mean, std)"
                )
            batch = (batch.float() - self._mean) / self._std
        if batch.ndim == 4:
            batch = batch.contiguous(memory_format=torch.channels_last)
        try:
            if self._has_timm_methods:
                return pool(self.network.forward_head(self.network.forward_features(batch), pre_logits=True))
            return self._hooked_features(batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # torch raises the error about a lost loader process at whatever code runs at that moment.
            if "DataLoader worker" in str(error):
                raise
            raise FeatureError(
                f"{type(self.network).__name__} fails on a batch {tuple(batch.shape)} of its preprocessing ({error}): pass "
                "(network, preprocessing), where preprocessing turns one RGB PIL image into what the first layer takes"
            ) from error

    def logits(self, embedding: Tensor) -> Tensor:
        """Return the logits, float32 [B, C], of features [B, D].

        Raises:
            FeatureError: the encoder has no linear head.
        """
        if self.head is None:
            raise FeatureError("this encoder has no linear head, so it gives no logits")
        with torch.no_grad():
            output: Tensor = self.head(embedding.to(self._device).float())
        return output

    def replica(self, device: torch.device) -> "NetworkEncoder":
        """Return a copy with a network of its own on another device, of the same precision."""
        twin = copy.copy(self)
        twin._device = device
        # The head is a layer of the network, and is so in the copy as well.
        twin.network, twin.head = copy.deepcopy((self.network, self.head))
        twin.network.to(device)
        if self._mean is not None and self._std is not None:
            twin._mean, twin._std = self._mean.to(device), self._std.to(device)
        return twin

    def _hooked_features(self, batch: Tensor) -> Tensor:
        seen: list[tuple[Tensor, Tensor]] = []
        if self.head is None:
            return pool(self.network(batch))
        handle = self.head.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
        try:
            output = self.network(batch)
        finally:
            handle.remove()
        # Classifiers of transformers return a record with the output of the head in `logits`.
        if seen and (seen[-1][1] is output or seen[-1][1] is getattr(output, "logits", None)):
            return pool(seen[-1][0])
        # The linear layer that was found is an inner layer, so the output of the network is taken as the features.
        self.head = None
        return pool(output)
