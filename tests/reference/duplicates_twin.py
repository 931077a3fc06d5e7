"""Near-duplicates, the obvious way: one row after the other against all rows kept so far, in double precision."""

import numpy as np


def find_duplicates_twin(features, threshold):
    rows = np.asarray(features, dtype=np.float64)
    kept, result = [], []
    for i, row in enumerate(rows):
        of = i
        for j in kept:
            lengths = np.linalg.norm(row) * np.linalg.norm(rows[j])
            if lengths > 0 and row @ rows[j] / lengths >= threshold - 1e-12:
                of = j
                break
        if of == i:
            kept.append(i)
        result.append(of)
    return result
