"""Slow, obvious twins of the patch algorithms: Python loops, exact numbers, dense matrices."""

from fractions import Fraction

import numpy as np


def kept_count(num_patches: int, drop_ratio: str) -> int:
    """Floor of L * (1 - drop ratio) + 1/2 in fractions, the ratio given as text."""
    value = num_patches * (1 - Fraction(drop_ratio)) + Fraction(1, 2)
    return value.numerator // value.denominator


def cut(image: np.ndarray, size: int) -> list[np.ndarray]:
    """Patches of an image [C, H, W], row by row, the last ones smaller."""
    _, height, width = image.shape
    return [image[:, y : y + size, x : x + size] for y in range(0, height, size) for x in range(0, width, size)]


def keep_best(scores: list[float], count: int) -> list[int]:
    """The best patches, one after the other; the first of equal ones."""
    left = list(range(len(scores)))
    kept = []
    for _ in range(count):
        best = max(left, key=lambda patch: (scores[patch], -patch))
        left.remove(best)
        kept.append(best)
    return sorted(kept)


def spread(scores: list[list[float]], total: int, least: list[int]) -> list[list[int]]:
    """Of every image what it is owed, then patch by patch the best of all images."""
    kept = [set(keep_best(row, owed)) for row, owed in zip(scores, least, strict=True)]
    while sum(map(len, kept)) < total:
        free = [(i, p) for i, row in enumerate(scores) for p in range(len(row)) if p not in kept[i]]
        image, patch = max(free, key=lambda place: (scores[place[0]][place[1]], -place[0], -place[1]))
        kept[image].add(patch)
    return [sorted(patches) for patches in kept]


def harmonic(image: np.ndarray, stays: np.ndarray) -> np.ndarray:
    """Solve the dense linear system: every pixel [H, W] that does not stay is the mean of its neighbours."""
    height, width = image.shape
    matrix, right = np.eye(height * width), np.where(stays, image, 0).astype(float).ravel()
    for y, x in zip(*np.nonzero(~stays), strict=True):
        around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        inside = [(v, u) for v, u in around if 0 <= v < height and 0 <= u < width]
        for v, u in inside:
            matrix[y * width + x, v * width + u] = -1 / len(inside)
    return np.linalg.solve(matrix, right).reshape(height, width)
