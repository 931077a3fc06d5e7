"""The map of the embeddings: a sample of them in two dimensions, with small pictures or texts."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dq_lightning.core.errors import ConfigError
from dq_lightning.core.packages import needed_for
from dq_lightning.core.records import Bins, Features
from dq_lightning.report.material import Material
from dq_lightning.report.records import STATES, EmbeddingMap, MapPoint
from dq_lightning.report.samples import Samples, as_sprite, fitted, some_of

MOST_POINTS = 2000
# At least so many of the points are kept samples, if there are as many.
KEPT_POINTS = 400
WIDTH, HEIGHT, _EDGE = 1000, 640, 24
# So many rows the directions of the map are computed from.
_MOST_FITTED = 4000
# So many pixels of images are decoded for the small pictures at most, but at least 100 images.
_DECODED_PIXELS = 400_000_000
_COLUMNS = 50


def make_map(material: Material, samples: Samples, projection: str = "pca") -> EmbeddingMap | str:
    """Return the map of the embeddings of up to 2,000 samples, or a sentence that says why there is none."""
    features = material.features
    if isinstance(features, str):
        return features
    if len(features) < 3 or features.embedding.shape[1] < 2:
        return "A map needs at least three samples with two numbers each."
    chosen = _chosen(material)
    unit = material.compact.config.get("bins", {}).get("similarity", "cosine") == "cosine"
    if projection == "umap":
        flat, method = _umap(_rows(features, chosen, unit=unit)), "by UMAP"
    else:
        flat, explained = principal_plane(
            _rows(features, _fitted_rows(features), unit=unit), _rows(features, chosen, unit=unit)
        )
        method = f"along the two directions in which they vary most (PCA; {explained:.0%} of the variance)"
    places = _scaled(flat)
    samples.read_texts(chosen)
    tiles, sprite, tile = _pictures(samples, chosen)
    points = []
    for (x, y), position in zip(places, chosen, strict=True):
        shown = samples.show(position, side=None)
        points.append(MapPoint(x, y, samples.label_number(position), tiles.get(position), shown))
    points.sort(key=lambda point: point.sample.state == "kept")
    bins = material.bins
    num_bins = bins.num_bins if isinstance(bins, Bins) else 0
    names = material.class_names()
    return EmbeddingMap(tuple(points), method, len(features), sprite, tile, _COLUMNS, names, num_bins)


def principal_plane(fitted: Tensor, rows: Tensor) -> tuple[Tensor, float]:
    """Project rows on the two directions in which other rows vary most.

    The directions are found by subspace iteration from a fixed start, which takes a few products of matrices also for wide
    rows, and draws no random number from the global state.

    Args:
        fitted: float32 [n, D], rows that the directions are computed from.
        rows: float32 [m, D].

    Returns:
        float32 [m, 2], and the share of the variance of the fitted rows along both directions.

    >>> plane, explained = principal_plane(torch.tensor([[0.0, 1, 0], [0, -1, 0], [5, 0, 0], [-5, 0, 0]]), torch.eye(3))
    >>> plane.round().abs().tolist(), round(explained, 3)
    ([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], 1.0)
    """
    mean = fitted.mean(0)
    centred = fitted - mean
    width = min(6, fitted.shape[1])
    start = torch.randn(fitted.shape[1], width, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(start).Q
    for _ in range(30):
        basis = torch.linalg.qr(centred.T @ (centred @ basis)).Q
    small = centred @ basis
    values, vectors = torch.linalg.eigh((small.T @ small).double())
    directions = basis @ vectors[:, [-1, -2]].to(basis.dtype)
    # The sign of a direction is arbitrary, so its largest entry is made positive.
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    directions = directions * torch.where(largest < 0, -1.0, 1.0)
    explained = float(values[-2:].sum() / centred.double().pow(2).sum().clamp(min=1e-30))
    return (rows - mean) @ directions, min(1.0, explained)


def _chosen(material: Material) -> list[int]:
    """Return the positions that are shown: of the kept samples their share of the points, but at least 400."""
    total = len(material.state)
    readable = material.state != STATES.index("unreadable")
    kept = (material.state == STATES.index("kept")).nonzero().flatten()
    others = ((material.state != STATES.index("kept")) & readable).nonzero().flatten()
    share = max(round(MOST_POINTS * len(kept) / total), KEPT_POINTS, MOST_POINTS - len(others))
    first = some_of(kept, min(share, MOST_POINTS))
    return sorted([*first, *some_of(others, MOST_POINTS - len(first))])


def _fitted_rows(features: Features) -> list[int]:
    step = -(-len(features) // _MOST_FITTED)
    return list(range(0, len(features), step))


def _rows(features: Features, positions: list[int], *, unit: bool) -> Tensor:
    rows = features.embedding[positions].float()
    return torch.nn.functional.normalize(rows) if unit else rows


def _umap(rows: Tensor) -> Tensor:
    with needed_for('projection="umap"', ConfigError):
        import umap
    made: Any = umap.UMAP(n_components=2, random_state=0)
    return torch.from_numpy(np.asarray(made.fit_transform(rows.numpy()), dtype=np.float32))


def _scaled(flat: Tensor) -> list[tuple[int, int]]:
    """Return coordinates as whole numbers inside the map; one point in a hundred may lie on its edge on each side."""
    low, high = (flat.quantile(share, dim=0) for share in (0.005, 0.995))
    wide = flat.clamp(low, high) - low
    share = wide / (high - low).clamp(min=1e-12)
    x = _EDGE + share[:, 0] * (WIDTH - 2 * _EDGE)
    y = HEIGHT - _EDGE - share[:, 1] * (HEIGHT - 2 * _EDGE)
    return list(zip(x.round().int().tolist(), y.round().int().tolist(), strict=True))


def _pictures(samples: Samples, chosen: list[int]) -> tuple[dict[int, int], str | None, int]:
    """Return the number of the small picture of each position, the picture that holds them all, and the side of one."""
    there = [position for position in chosen if samples.place(position) is not None]
    first = next((image for image in map(samples.image, there[:8]) if image is not None), None)
    if first is None:
        return {}, None, 0
    tile = 32 if max(first.size) <= 64 else 48
    count = max(100, _DECODED_PIXELS // (first.width * first.height))
    there = some_of(torch.tensor(there), count)
    read = ((position, samples.image(position)) for position in there)
    images = {position: fitted(image, tile) for position, image in read if image is not None}
    numbers = {position: number for number, position in enumerate(images)}
    return numbers, as_sprite(list(images.values()), tile, _COLUMNS), tile
