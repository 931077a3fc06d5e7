"""Encoders that are ready to run, and the one implementation of them around a network."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from dq_lightning.core.config import Precision
from dq_lightning.core.devices import named_device
from dq_lightning.core.errors import FeatureError
from dq_lightning.core.resuming import Paid
from dq_lightning.features.collect import Rows
from dq_lightning.features.preprocessing import Preprocessing

HEAD_NAMES = ("head", "fc", "classifier", "linear")


class Encoder(Protocol):
    """A frozen network in eval mode on its device."""

    @property
    def num_classes(self) -> int | None:
        """Width C of the linear head, or None if there is none."""
        ...

    def preprocess(self, image: Image.Image, /) -> Tensor:
        """Tensor of one RGB image; runs in loader processes, so it must be picklable without the weights."""
        ...

    def embed(self, batch: Tensor, /) -> Tensor:
        """Pooled features float32 [B, D] of a stacked batch [B, ...], on the encoder's device."""
        ...

    def logits(self, embedding: Tensor, /) -> Tensor:
        """Output float32 [B, C] of the linear head for features [B, D]."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """A frozen network on its device that reads tokens."""

    num_classes: None
    max_length: int

    def tokenize(self, texts: list[str], /) -> list[list[int]]:
        """Token ids of texts, special tokens included, at least one and at most `max_length` each."""
        ...

    def embed(self, tokens: Tensor, /) -> Tensor:
        """Pooled features float32 [B, D] of token ids int64 [B, T], -1 behind the end, on the encoder's device."""
        ...


@runtime_checkable
class RowEncoder(Protocol):
    """Gives rows by itself: nothing is batched for it."""

    num_classes: None
    advice: str
    """What to do about rows that are not finite."""

    def rows(self, source: Any, batch_size: int, num_workers: int | Literal["auto"], paid: Paid, /) -> Iterator[Rows]:
        """Features of every sample, each once, in any order; `paid` has and keeps what costs money."""
        ...


def resolve_device(device: str | torch.device) -> torch.device:
    """The device itself; `"auto"` is the current GPU when there is one, and else the CPU."""
    if str(device) != "auto":
        return named_device(device)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of the convolutions: `"auto"` is float32 off the GPU; bfloat16 on one that computes in it, else float16."""
    if precision != "auto":
        dtype: torch.dtype = getattr(torch, precision)
        return dtype
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def find_head(module: nn.Module) -> nn.Linear | None:
    """The linear classification head: timm's `get_classifier()`, a usual attribute, or the last linear layer."""
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
    """Features [B, D] of a network's output: maps [B, D, H, W] are averaged over their places.

    Of an output with named parts, as transformers gives it, `pooler_output` is taken, or else the mean over the tokens
    of `last_hidden_state` [B, T, D].

    Raises:
        FeatureError: none of these.
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

    A network with timm's vocabulary gives `forward_head(forward_features(x), pre_logits=True)`. Of any other network the
    features are what enters its head, when the head's output is the network's output, and else the output itself.

    Args:
        module: the network; it is copied, so the caller's stays as it is.
        preprocess: from an RGB image to a tensor.
        device: where to run.
        precision: of the network's body; head and features are float32.
        mean: of the channels, in [0, 1]; used on uint8 batches, together with `std`.
        std: likewise.
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
        # one by one: a network of TorchScript has no `requires_grad_` of its own
        for parameter in own.parameters():
            parameter.requires_grad_(False)
        # convolutions are fastest with the channels last, on both kinds of device
        self._module: Any = own.to(memory_format=torch.channels_last)
        self._head = find_head(self._module)
        self._has_timm_vocabulary = hasattr(module, "forward_features") and hasattr(module, "forward_head")
        self._mean = self._std = None
        if mean is not None and std is not None:
            self._mean = 255 * torch.tensor(mean, device=device)[:, None, None]
            self._std = 255 * torch.tensor(std, device=device)[:, None, None]

    @property
    def network(self) -> nn.Module:
        """The whole network, on its device, frozen and in eval mode."""
        module: nn.Module = self._module
        return module

    @property
    def head(self) -> nn.Linear | None:
        """The linear head, a part of `network`; None when there is none that its output comes from."""
        return self._head

    @property
    def num_classes(self) -> int | None:
        """Width of the linear head, or None."""
        return None if self._head is None else self._head.out_features

    def embed(self, batch: Tensor) -> Tensor:
        """Features float32 [B, D] of a batch [B, 3, H, W], uint8 or normalised floating, from any device."""
        with torch.no_grad(), self._autocast():
            features = self.features(batch)
        return features.float()

    def features(self, batch: Tensor) -> Tensor:
        """Features [B, D] of a batch as `embed` takes it, in the caller's grad mode and precision."""
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
            return self._timm_features(batch) if self._has_timm_vocabulary else self._hooked_features(batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # torch tells of a lost loader process wherever this one happens to be
            if "DataLoader worker" in str(error):
                raise
            raise FeatureError(
                f"{type(self._module).__name__} fails on a batch {tuple(batch.shape)} of its preprocessing ({error}): pass "
                "(network, preprocessing), where preprocessing turns one RGB PIL image into what the first layer takes"
            ) from error

    def logits(self, embedding: Tensor) -> Tensor:
        """Logits float32 [B, C] of features [B, D]."""
        if self._head is None:
            raise FeatureError("this encoder has no linear head")
        with torch.no_grad():
            output: Tensor = self._head(embedding.to(self._device).float())
        return output

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, self._dtype)

    def _timm_features(self, batch: Tensor) -> Tensor:
        features = self._module.forward_head(self._module.forward_features(batch), pre_logits=True)
        return pool(features)

    def _hooked_features(self, batch: Tensor) -> Tensor:
        seen: list[tuple[Tensor, Tensor]] = []
        if self._head is None:
            return pool(self._module(batch))
        handle = self._head.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
        try:
            output = self._module(batch)
        finally:
            handle.remove()
        # transformers' classifiers name the head's output
        if seen and (seen[-1][1] is output or seen[-1][1] is getattr(output, "logits", None)):
            return pool(seen[-1][0])
        # the linear layer found is an inner one: what the network gives are the features
        self._head = None
        return pool(output)
