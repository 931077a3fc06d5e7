"""Gradient of the loss with respect to the logits, which is one of the two factors of the last layer's gradient."""

from typing import Literal, get_args

import torch
from torch import Tensor

from dq_lightning.core.errors import ConfigError

HeadLoss = Literal["softmax_cross_entropy", "cross_entropy"]


def head_gradient(logits: Tensor, labels: Tensor, loss: HeadLoss = "softmax_cross_entropy") -> Tensor:
    """Compute the gradient of each sample's loss with respect to its logits.

    `"softmax_cross_entropy"` is what the published Dataset Quantization code computes; it is the default, so that
    results can be compared with the published ones. The cross-entropy is applied to the softmax output p instead of the
    logits, so p passes through a second softmax q: `g = (diag(p) - p p^T)(q - onehot)`. This gradient vanishes for
    every sample that is classified with high confidence, rightly or wrongly. `"cross_entropy"` is the gradient of the
    usual training loss, `g = p - onehot`, which stays large for samples that are confidently misclassified.

    Args:
        logits: floating [N, C].
        labels: int64 [N], 0 <= label < C.
        loss: `"softmax_cross_entropy"` or `"cross_entropy"`.

    Returns:
        float32 [N, C] on the device of `logits`. It is computed in float64, because saturated gradients are differences
        of nearly equal numbers. Rows sum to zero up to rounding.

    Raises:
        ConfigError: `loss` is unknown.
    """
    if loss not in get_args(HeadLoss):
        raise ConfigError(f"loss must be one of {', '.join(map(repr, get_args(HeadLoss)))}, got {loss!r}")
    labels = labels.to(logits.device, torch.int64)[:, None]
    log_probability = logits.double().log_softmax(1)
    probability = log_probability.exp()
    if loss == "cross_entropy":
        # expm1 computes p - 1 accurately where p is almost one.
        own = torch.expm1(log_probability.gather(1, labels))
        return probability.scatter(1, labels, own).float()
    inner = probability.softmax(1)
    residual = inner.scatter_add(1, labels, -torch.ones_like(labels, dtype=inner.dtype))
    mean = (probability * residual).sum(1, keepdim=True)
    return (probability * (residual - mean)).float()
