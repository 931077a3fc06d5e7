"""The curve of the gain from pick to pick in each bin, as numbers and as an SVG picture."""

import torch
from torch import Tensor

from dq_lightning.core.records import Bins

_WIDTH, _HEIGHT, _MARGIN = 640, 400, 48


def gain_curve(bins: Bins) -> Tensor:
    """Compute the mean gain over the groups at every rank of every bin.

    Args:
        bins: bins of N samples; those that were left out of the bins do not count.

    Returns:
        float64 [num_bins, size of the largest bin]; NaN where no group has a sample of that rank.
    """
    inside = bins.assignment >= 0
    rank = bins.rank[inside].long()
    length = int(rank.max()) + 1 if len(rank) else 0
    cell = bins.assignment[inside].long() * length + rank
    total = torch.zeros(bins.num_bins * length, dtype=torch.float64).index_add_(0, cell, bins.gain[inside].double())
    count = torch.bincount(cell, minlength=bins.num_bins * length)
    return (total / count).reshape(bins.num_bins, length)


def draw_gain_curve(bins: Bins, title: str = "gain by rank") -> str:
    """Draw `gain_curve` as an SVG picture with one line for each bin, from blue for the first to red for the last.

    >>> bins = Bins(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), torch.tensor([3.0, 2.0, 1.0]), torch.zeros(3))
    >>> draw_gain_curve(bins).count("<polyline")
    2
    """
    curve = gain_curve(bins)
    finite = curve[torch.isfinite(curve)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    span, length = (high - low) or 1.0, max(1, curve.shape[1] - 1)
    lines = []
    for number, row in enumerate(curve):
        known = torch.nonzero(torch.isfinite(row)).flatten().tolist()
        # The picture is 640 units wide, so more points would only make the file larger.
        step = max(1, len(known) // _WIDTH)
        points = " ".join(
            f"{_MARGIN + (_WIDTH - 2 * _MARGIN) * x / length:.1f},"
            f"{_HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * (float(row[x]) - low) / span:.1f}"
            for x in known[::step]
        )
        hue = 240 - 240 * number / max(1, bins.num_bins - 1)
        style = f'fill="none" stroke="hsl({hue:.0f},70%,45%)"'
        lines.append(f'<polyline {style} points="{points}"><title>bin {number}</title></polyline>')
    text = (
        f'<text x="{_WIDTH / 2}" y="24" text-anchor="middle">{title}</text>'
        f'<text x="{_MARGIN}" y="{_HEIGHT - 16}">rank 0</text>'
        f'<text x="{_WIDTH - _MARGIN}" y="{_HEIGHT - 16}" text-anchor="end">{length}</text>'
        f'<text x="4" y="{_MARGIN}">{high:.3g}</text><text x="4" y="{_HEIGHT - _MARGIN}">{low:.3g}</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="12">'
        f"{text}{''.join(lines)}</svg>"
    )
