"""Decides how many patches of an image are kept, and which: exact counts, and ties go to the lowest index.

The code is pure: it reads and writes no files.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import floor

import torch
from torch import Tensor

from dq_lightning.core.errors import PatchError
from dq_lightning.core.records import Grid, PatchChoice, pack_mask


def kept_count(num_patches: int, drop_ratio: float) -> int:
    """Return the number of L patches to keep: floor(L * (1 - drop_ratio) + 1/2), computed with the decimal ratio.

    Masks, stores and models all take their counts from this function. The ratio is read as the decimal number that was
    written, and the computation is done with fractions, because in binary floating point 15 * (1 - 0.9) is
    1.4999999999999996, which would be rounded down.

    >>> kept_count(64, 0.2), kept_count(15, 0.9), kept_count(196, 0.1)
    (51, 2, 176)

    Raises:
        PatchError: if the ratio is outside [0, 1).
    """
    if not 0 <= drop_ratio < 1:
        raise PatchError(f"drop_ratio must be in [0, 1), got {drop_ratio!r}")
    return floor(num_patches * (1 - Fraction(repr(float(drop_ratio)))) + Fraction(1, 2))


def choose_kept(scores: Tensor, count: int) -> Tensor:
    """Choose the `count` patches with the highest scores [B, L] in every image; ties go to the lowest index.

    They are returned as int64 [B, k], ascending.

    Raises:
        PatchError: if scores are not finite, do not have two dimensions, or there are fewer than `count` patches.
    """
    _check_finite(scores)
    if scores.ndim != 2 or not 0 <= count <= scores.shape[1]:
        raise PatchError(f"cannot keep {count} patches with scores of shape {tuple(scores.shape)}")
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values


def mask_of(kept: Tensor, num_patches: int) -> Tensor:
    """Return a mask bool [B, num_patches] that is True at the kept patches, int64 [B, k].

    >>> mask_of(torch.tensor([[0, 2]]), 4).tolist()
    [[True, False, True, False]]
    """
    mask = torch.zeros(len(kept), num_patches, dtype=torch.bool, device=kept.device)
    return mask.scatter_(1, kept, True)


def spread_budget(scores: Sequence[Tensor], total: int, least: Sequence[int] | None = None) -> list[Tensor]:
    """Keep the `total` best patches of all images together, but at least some of every image, as masks bool [L_i].

    So an image whose saliency is concentrated on few patches loses more of the others than an image that is salient
    everywhere. The scores, a finite [L_i] for each of M images, must be comparable across images. Of image i the
    `least[i]` best patches are kept in any case. Ties go to the image with the lowest position, then to the patch with
    the lowest index.

    Raises:
        PatchError: if scores are not finite, or no masks can have `total` patches and at least `least` of every image.

    Complexity: O(n log n) time and O(n) memory for n patches in all.
    """
    lengths = torch.tensor([len(row) for row in scores], dtype=torch.int64)
    minimum = torch.zeros_like(lengths) if least is None else torch.tensor(least, dtype=torch.int64)
    if (
        bool((minimum > lengths).any())
        or bool((minimum < 0).any())
        or not int(minimum.sum()) <= total <= int(lengths.sum())
    ):
        raise PatchError(
            f"cannot keep {total} of {int(lengths.sum())} patches when the images' own minimums add up to {int(minimum.sum())} "
            "patches"
        )
    if not len(scores):
        return []
    flat = torch.cat([row.detach().cpu().double() for row in scores])
    _check_finite(flat)
    image = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    # Two stable sorts, by score and then by image, put the patches of each image in a row, best first. So a patch's
    # place in this row is its rank in the image.
    by_score = flat.sort(descending=True, stable=True).indices
    by_image = by_score[image[by_score].sort(stable=True).indices]
    starts = lengths.cumsum(0) - lengths
    rank = torch.empty_like(by_image)
    rank[by_image] = torch.arange(len(flat)) - starts[image[by_image]]
    mask = rank < minimum[image]
    remaining = by_score[~mask[by_score]]
    mask[remaining[: total - int(minimum.sum())]] = True
    return list(torch.split(mask, lengths.tolist()))


def make_choice(masks: Sequence[Tensor], sizes: Sequence[tuple[int, int]], patch_size: int) -> PatchChoice:
    """Make the record of the kept patches of images, from masks bool [L_i] and sizes (height, width) in pixels."""
    packed = bytearray(b"".join(map(pack_mask, masks)))
    return PatchChoice(
        patch_size,
        torch.tensor(sizes, dtype=torch.int32).reshape(-1, 2),
        torch.frombuffer(packed, dtype=torch.uint8) if packed else torch.zeros(0, dtype=torch.uint8),
    )


def choose_patches(
    scores: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    patch_size: int,
    drop_ratio: float,
    *,
    spread: bool = False,
    least_ratio: float = 0.0,
) -> PatchChoice:
    """Choose the kept patches of M images by their scores [L_i]; the images' sizes are (height, width) in pixels.

    Each image keeps `kept_count(L_i, drop_ratio)` patches. With `spread`, the same total number is distributed over all
    images by `spread_budget` instead; then every image keeps the share `least_ratio` of its patches in any case, but
    never more for that than `kept_count` gives.

    Raises:
        PatchError: if scores do not fit the images' grids, or are not finite, or `drop_ratio` is outside [0, 1).
    """
    for row, size in zip(scores, sizes, strict=True):
        if len(row) != Grid(*size, patch_size).num_patches:
            raise PatchError(f"{len(row)} scores do not fit {Grid(*size, patch_size)}")
    counts = [kept_count(len(row), drop_ratio) for row in scores]
    if not spread:
        return make_choice(_best_of_each(scores, counts), sizes, patch_size)
    share = Fraction(repr(float(least_ratio)))
    least = [min(count, floor(len(row) * share + Fraction(1, 2))) for row, count in zip(scores, counts, strict=True)]
    return make_choice(spread_budget(scores, sum(counts), least), sizes, patch_size)


def _best_of_each(scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Return masks bool [L_i] of the best `counts[i]` patches; images with equally many patches are sorted together."""
    masks: list[Tensor] = [torch.empty(0)] * len(scores)
    groups: dict[int, list[int]] = {}
    for position, row in enumerate(scores):
        groups.setdefault(len(row), []).append(position)
    for length, members in groups.items():
        stacked = torch.stack([scores[position] for position in members])
        rows = mask_of(choose_kept(stacked, counts[members[0]]), length)
        for position, row in zip(members, rows, strict=True):
            masks[position] = row
    return masks


def _check_finite(scores: Tensor) -> None:
    if not bool(torch.isfinite(scores).all()):
        raise PatchError(
            "patch scores are not finite: the classifier gives NaN or infinity on these images. "
            'Pass another classifier=, or saliency="variance"'
        )
