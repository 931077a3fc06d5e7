"""Slow twin of the leave-one-out margins: one ridge regression is solved for every sample that is left out."""

import numpy as np
from numpy.typing import NDArray


def predictions(features: NDArray[np.float64], own: NDArray[np.int64], ridge: float) -> NDArray[np.float64]:
    """Return what a fit to all other samples predicts for each sample, float64 [N, C].

    Args:
        features: float64 [N, D].
        own: int64 [N], number of the class of each sample; all of 0 to C - 1 occur.
        ridge: penalty of the squared weights; the intercept has none.
    """
    features = features - features.mean(axis=0)
    total, width = features.shape
    inputs = np.hstack([features, np.ones((total, 1))])
    truth = np.eye(own.max() + 1)[own]
    weight = (total / len(truth.T) / np.bincount(own))[own]
    penalty = np.diag([ridge] * width + [0.0])
    rows = []
    for sample in range(total):
        others = np.arange(total) != sample
        weighted = inputs[others] * weight[others, None]
        rows.append(inputs[sample] @ np.linalg.solve(weighted.T @ inputs[others] + penalty, weighted.T @ truth[others]))
    return np.array(rows)
