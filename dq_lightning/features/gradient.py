"""Gradient of the loss with respect to the logits, which is one of the two factors of the last layer's gradient."""

import torch
from torch import Tensor


def head_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the gradient of each sample's loss with respect to its logits, as the published code does.

    The published code applies the cross-entropy to the softmax output p instead of the logits, so p passes through a
    second softmax q: `g = (diag(p) - p p^T)(q - onehot)`. This gradient vanishes for every sample that is classified
    with high confidence, rightly or wrongly.

    Args:
        logits: floating [N, C].
        labels: int64 [N], 0 <= label < C.

    Returns:
        float32 [N, C] on the device of `logits`. It is computed in float64, because saturated gradients are differences
        of nearly equal numbers. Rows sum to zero up to rounding.
    """
    labels = labels.to(logits.device, torch.int64)[:, None]
    probability = logits.double().softmax(1)
    inner = probability.softmax(1)
    residual = inner.scatter_add(1, labels, -torch.ones_like(labels, dtype=inner.dtype))
    mean = (probability * residual).sum(1, keepdim=True)
    return (probability * (residual - mean)).float()
