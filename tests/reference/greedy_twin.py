"""The slow, obvious way to make bins: a dense float64 similarity matrix, every gain summed again at every step."""

from fractions import Fraction

import numpy as np


def unit(values):
    values = np.asarray(values, dtype=np.float64)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return np.divide(values, lengths, out=np.zeros_like(values), where=lengths > 0)


def similarity_matrix(values, similarity="cosine"):
    """S [N, N] of embeddings [N, D]; the cosine with a zero vector is 0, so S is 1/2 there."""
    values = np.asarray(values, dtype=np.float64)
    return 0.5 + 0.5 * unit(values) @ unit(values).T if similarity == "cosine" else values @ values.T


def last_layer_gradient(embedding, head_gradient):
    """The vector g (x) [1, h] of every sample, written out: [N, C (D + 1)]."""
    ones = np.ones((len(embedding), 1))
    inputs = np.concatenate([ones, np.asarray(embedding, dtype=np.float64)], axis=1)
    return np.einsum("nc,nd->ncd", np.asarray(head_gradient, dtype=np.float64), inputs).reshape(len(inputs), -1)


def graph_cut_gains(S, left, picked, lam):
    return lam * S[np.ix_(left, left)].sum(axis=0) - 2.0 * S[np.ix_(picked, left)].sum(axis=0)


def make_bins_twin(S, num_bins, lam=1.0):
    """(bin, rank, gain) of one group; ties to the lowest position."""
    total = len(S)
    bins, ranks, gains = np.zeros(total, int), np.zeros(total, int), np.zeros(total)
    left = list(range(total))
    for number in range(num_bins):
        picked = []
        for _ in range(total // num_bins + (number < total % num_bins)):
            values = graph_cut_gains(S, left, picked, lam)
            values[[left.index(p) for p in picked]] = -np.inf
            best = left[int(values.argmax())]
            bins[best], ranks[best], gains[best] = number, len(picked), values.max()
            picked.append(best)
        left = [p for p in left if p not in set(picked)]
    return bins, ranks, gains


def rational_bins_twin(values, num_bins, lam=1, rounding=Fraction):
    """The same for the dot product, without any rounding but the one given for each gain."""
    rows = [[Fraction(v) for v in np.asarray(row).tolist()] for row in values]
    S = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]
    left, order = list(range(len(rows))), []
    for number in range(num_bins):
        picked = []
        for _ in range(len(rows) // num_bins + (number < len(rows) % num_bins)):
            free = [x for x in left if x not in picked]
            gains = {x: lam * sum(S[j][x] for j in left) - 2 * sum(S[s][x] for s in picked) for x in free}
            best = max(free, key=lambda x: (rounding(gains[x]), -x))
            picked.append(best)
        left = [x for x in left if x not in picked]
        order.append(picked)
    return order
