"""Every objective as the set function it is: the value of a set from its definition, gains as differences of values."""

import numpy as np


def similarity_matrix(values, kind, gamma=1.0):
    values = np.asarray(values, dtype=np.float64)
    if kind == "rbf":
        return np.exp(-gamma * ((values[:, None] - values[None]) ** 2).sum(axis=2))
    if kind == "dot":
        return values @ values.T
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    unit = np.divide(values, lengths, out=np.zeros_like(values), where=lengths > 0)
    return 0.5 + 0.5 * unit @ unit.T


def mean_squared_distance(values):
    values = np.asarray(values, dtype=np.float64)
    return ((values[:, None] - values[None]) ** 2).sum(axis=2).mean()


def value(objective, chosen, S, values, lam):
    """f(chosen) over the samples that S and values are about."""
    A = list(chosen)
    if not A:
        return 0.0
    if objective == "graph_cut":
        # the published gain leaves out S[x, x]
        return lam * S[:, A].sum() - (S[np.ix_(A, A)].sum() - S[A, A].sum())
    if objective == "sum_redundancy":
        return -S[np.ix_(A, A)].sum()
    if objective == "facility_location":
        return np.maximum(0.0, S[:, A].max(axis=1)).sum()
    if objective == "log_determinant":
        return np.linalg.slogdet(np.eye(len(A)) + S[np.ix_(A, A)])[1]
    if objective == "feature_based":
        return np.sqrt(values[A].sum(axis=0)).sum()
    raise ValueError(objective)


def gains(objective, chosen, S, values, lam):
    """f(chosen + x) - f(chosen) for every x not chosen; minus infinity for the others."""
    before = value(objective, chosen, S, values, lam)
    return np.array(
        [-np.inf if x in chosen else value(objective, [*chosen, x], S, values, lam) - before for x in range(len(S))]
    )
