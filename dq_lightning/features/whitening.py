"""Whitening of embeddings, which makes their components uncorrelated and of unit variance."""

import torch
from torch import Tensor

from dq_lightning.core.errors import FeatureError

ROWS_AT_ONCE = 8192


def whiten(embedding: Tensor) -> Tensor:
    """Centre the rows, rotate them to their principal components and scale each component to variance 1.

    The mean and the covariance are those of the whole set, as in Su et al. 2021, "Whitening Sentence Representations",
    section 3.2; they are summed in float64, a block of rows at a time. Directions in which the rows do not vary are
    left out, because scaling them would only amplify rounding errors. These are directions whose variance is at most
    D times max(eps^2, e) of the largest variance and max(eps^2, (1024 e)^2) of the largest squared mean, where eps is
    that of the embedding's dtype and e that of float64. The sign of each component is chosen so that its largest
    weight is positive, which makes the result unique. This takes O(N D^2 + D^3) time and O(D^2) memory besides the
    result.

    Args:
        embedding: floating [N, D] with finite values.

    Returns:
        float32 [N, R] with R <= min(N - 1, D) components, the one of largest variance first; one column of zeros if all
        rows are equal.

    Raises:
        FeatureError: the embedding is empty or not a floating matrix, or holds values that are not finite or too large
            to be squared.
    """
    if embedding.ndim != 2 or not embedding.is_floating_point() or 0 in embedding.shape:
        raise FeatureError(f"whitening needs floating embeddings [N, D], got {embedding.dtype} {list(embedding.shape)}")
    mean, covariance = _moments(embedding)
    if not covariance.isfinite().all():
        raise FeatureError("whitening needs finite embeddings: some are NaN or infinite, or too large to be squared")
    variance, directions = torch.linalg.eigh(covariance)
    # Stored values are rounded to eps of what they are. The rest is the rounding of the decomposition, and that of the
    # mean, which rows are centred by before they are multiplied.
    stored, double = torch.finfo(embedding.dtype).eps ** 2, torch.finfo(torch.float64).eps
    spread, centre = variance[-1].clamp(min=0), mean.square().max()
    floor = embedding.shape[1] * (max(stored, double) * spread + max(stored, (1024 * double) ** 2) * centre)
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
    """Return the mean [D] and the covariance [D, D] (divided by N) in float64.

    Rows are centred before they are multiplied, so that a large mean does not reduce the precision.
    """
    blocks = [slice(start, start + ROWS_AT_ONCE) for start in range(0, len(embedding), ROWS_AT_ONCE)]
    mean = torch.stack([embedding[block].double().sum(dim=0) for block in blocks]).sum(dim=0) / len(embedding)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=embedding.device)
    for block in blocks:
        centred = embedding[block].double() - mean
        covariance += centred.T @ centred
    return mean, covariance / len(embedding)
