"""Whitening: embeddings without correlation, every principal component of unit variance. PURE."""

import torch
from torch import Tensor

from dq_lightning.core.errors import FeatureError

ROWS_AT_ONCE = 8192


def whiten(embedding: Tensor) -> Tensor:
    """Centre the rows, turn them to their principal components and scale each to variance 1.

    Whitening a whole set by its own mean and covariance is that of Su et al. 2021, "Whitening Sentence Representations",
    section 3.2; the covariance is summed in float64, a block of rows at a time. Directions in which the rows do not vary
    (a variance of at most D eps^2 times the largest variance plus the largest squared mean, eps of the embedding's own
    dtype) are left out, since scaling would only blow up rounding errors. Each component points so that its largest weight
    is positive, which makes the answer one.

    Args:
        embedding: floating [N, D], finite.

    Returns:
        float32 [N, R], R <= min(N - 1, D) components, the largest variance first; one column of zeros when all rows are
        equal. Takes O(N D^2 + D^3) time and O(D^2) memory beside the result.

    Raises:
        FeatureError: no rows, or values that are not finite.
    """
    if embedding.ndim != 2 or not embedding.is_floating_point() or 0 in embedding.shape:
        raise FeatureError(f"whitening needs floating embeddings [N, D], got {embedding.dtype} {list(embedding.shape)}")
    mean, covariance = _moments(embedding)
    if not covariance.isfinite().all():
        raise FeatureError("whitening needs finite embeddings: some are NaN or infinite, or too large to be squared")
    variance, directions = torch.linalg.eigh(covariance)
    # rounding of the stored values, and of the sums over them
    step = max(torch.finfo(embedding.dtype).eps ** 2, torch.finfo(torch.float64).eps)
    floor = step * embedding.shape[1] * (variance[-1].clamp(min=0) + mean.square().max())
    kept = (variance > floor).nonzero().flatten().flip(0)
    if len(kept) == 0:
        return torch.zeros(len(embedding), 1, device=embedding.device)
    directions = directions[:, kept]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    directions = directions * largest.sign() / variance[kept].sqrt()
    made = torch.empty(len(embedding), len(kept), device=embedding.device)
    for start in range(0, len(embedding), ROWS_AT_ONCE):
        block = embedding[start : start + ROWS_AT_ONCE].double() - mean
        made[start : start + ROWS_AT_ONCE] = (block @ directions).float()
    return made


def _moments(embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] (divided by N), float64; centred first, so that a large mean costs no digits."""
    blocks = [slice(start, start + ROWS_AT_ONCE) for start in range(0, len(embedding), ROWS_AT_ONCE)]
    mean = torch.stack([embedding[block].double().sum(dim=0) for block in blocks]).sum(dim=0) / len(embedding)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=embedding.device)
    for block in blocks:
        centred = embedding[block].double() - mean
        covariance += centred.T @ centred
    return mean, covariance / len(embedding)
