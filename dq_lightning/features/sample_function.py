"""A function of the user's own that turns one raw sample, of whatever kind, into its features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from dq_lightning.cache.digests import DigestMemory
from dq_lightning.core.config import Precision
from dq_lightning.core.errors import FeatureError
from dq_lightning.features.origins import EncoderSpec
from dq_lightning.identity.callables import describe_callable
from dq_lightning.identity.values import digest_text


@dataclass(frozen=True)
class FunctionOrigin(EncoderSpec):
    """A function from a sample, as the dataset gives it without its transforms, to its features, [D] numbers.

    Attributes:
        function: the function; it is called in this process, with one sample at a time.
    """

    function: Callable[[Any], Any] = field(repr=False, compare=False)
    needs_images: ClassVar[bool] = False

    def identity(self, memory: DigestMemory) -> str | None:
        """Return a digest of the function's code and all that it uses, or of its attribute `identity`.

        Raises:
            FeatureError: something that it uses cannot be followed, so that a change of it could go unnoticed.
        """
        text, unknown = describe_callable(self.function)
        if unknown:
            raise FeatureError(
                f"{self.description} cannot be followed to its end ({unknown[0]}), so old features might be reused after a "
                "change of it: give it a string attribute `identity` that you change whenever it does, such as "
                f'{self.name}.identity = "1"; or compute the features yourself and pass them as an array'
            )
        return digest_text("function", text)

    def _load(self, device: torch.device, precision: Precision) -> "SampleEncoder":
        return SampleEncoder(self.function, self.description)


class SampleEncoder:
    """An encoder that calls a function with each sample; see `encoders.Encoder`.

    Args:
        function: function from a sample to [D] numbers.
        name: description of the function, for messages.
    """

    num_classes: None = None

    def __init__(self, function: Callable[[Any], Any], name: str) -> None:
        self._function, self._name, self._width = function, name, 0

    def preprocess(self, sample: Any) -> Tensor:
        """Return the features of one sample, float32 [D] on the CPU.

        Raises:
            FeatureError: the function gives something else, or another number of features than for the first sample.
        """
        with torch.no_grad():
            given = self._function(sample)
        row = (
            given.detach().float().cpu()
            if isinstance(given, Tensor)
            else torch.from_numpy(np.asarray(given, np.float32))
        )
        self._width = self._width or row.numel()
        if row.ndim != 1 or row.numel() != self._width or not self._width:
            raise FeatureError(
                f"{self._name} must give one row of numbers [D] for each sample, with the same D for all; it gave "
                f"{list(row.shape)}{f' where it gave [{self._width}] before' if row.ndim == 1 else ''}"
            )
        return row

    def embed(self, batch: Tensor) -> Tensor:
        """Return the batch, whose rows are the features, float32 [B, D]."""
        return batch

    def logits(self, embedding: Tensor) -> Tensor:
        """Raise FeatureError, because a function has no linear head."""
        raise FeatureError(f"{self._name} has no linear head, so it gives no logits")

    def replica(self, device: torch.device) -> "SampleEncoder":
        """Return this encoder: its features are ready before a device sees them."""
        return self


class RawSamples:
    """A source whose samples take the place of images: they are passed on as they are, without transforms.

    Args:
        source: dataset with a method `plain`.
    """

    def __init__(self, source: Any) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def image(self, index: int) -> Any:
        """Return the sample as the dataset gives it without the user's transforms."""
        return self._source.plain(index)

    def decode_warning(self, index: int) -> str | None:
        """Return None: nothing is known of samples of any kind."""
        return None

    def texts(self, positions: Sequence[int]) -> list[str]:
        """Return the texts of the source, if it has any."""
        texts: list[str] = self._source.texts(positions)
        return texts


def is_function(encoder: Any) -> bool:
    """Return whether `encoder` is a function of samples: anything that can be called, but no network and no class."""
    return callable(encoder) and not isinstance(encoder, nn.Module | type)


def function_origin(function: Callable[[Any], Any]) -> FunctionOrigin:
    """Return the origin of an `encoder` argument that `is_function` accepts."""
    name = getattr(function, "__name__", type(function).__name__)
    return FunctionOrigin(name, f"the function {name}", function)
