"""Scores every patch of an image by a classifier's saliency map, by variance, or at random."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dq_lightning.core.batching import images_at_once
from dq_lightning.core.config import PatchConfig
from dq_lightning.core.errors import DQError, PatchError
from dq_lightning.core.grid import grid_of, pool_to_patches
from dq_lightning.patches.activation_maps import METHODS, ActivationMaps, SaliencyMaps, TargetChoice
from dq_lightning.patches.package_maps import PackageMaps
from dq_lightning.patches.target_layer import HOW_TO_NAME


class PatchScorer(Protocol):
    """Computes how informative each patch is; a score does not depend on which images share a batch."""

    def scores(self, images: Tensor, labels: Tensor | None, positions: Tensor, patch_size: int) -> Tensor:
        """Score every patch.

        Args:
            images: uint8 [B, 3, H, W], or floating as the classifier takes them, on the scorer's device.
            labels: int64 [B], class of each image, or None.
            positions: int64 [B], positions of the images in the source.
            patch_size: P, side of a patch in pixels.

        Returns:
            float32 [B, L] on the images' device; a patch with a higher score is more informative.
        """

    def replica(self, device: torch.device, /) -> "PatchScorer":
        """Return a scorer for another device, which runs in another thread.

        The first images that a classifier is given, such as those of `check`, decide at which layer all replicas compute
        their maps, so two replicas may run at the same time only after them.
        """
        ...


@dataclass(frozen=True)
class RandomScorer:
    """Draws independent uniform scores, as a baseline; they depend only on the seed and the image's position."""

    seed: int = 0

    def scores(self, images: Tensor, labels: Tensor | None, positions: Tensor, patch_size: int) -> Tensor:
        count = grid_of(images, patch_size).num_patches
        drawn = [
            np.random.Generator(np.random.Philox(key=[self.seed, position])).random(count, dtype=np.float32)
            for position in positions.tolist()
        ]
        return torch.from_numpy(np.stack(drawn)).to(images.device)

    def replica(self, device: torch.device) -> Self:
        return self


@dataclass(frozen=True)
class VarianceScorer:
    """Scores a patch by the variance of its pixels, summed over the channels: a baseline that needs no classifier."""

    def scores(self, images: Tensor, labels: Tensor | None, positions: Tensor, patch_size: int) -> Tensor:
        # float64 is used, because the difference of two means loses half of the digits.
        pixels = images.double().flatten(0, 1)
        variance = pool_to_patches(pixels**2, patch_size) - pool_to_patches(pixels, patch_size) ** 2
        return variance.clamp(min=0).view(*images.shape[:2], -1).sum(1).float()

    def replica(self, device: torch.device) -> Self:
        return self


class ClassifierScorer:
    """Scores a patch by the mean of a classifier's saliency map over its pixels.

    Args:
        maps: object that computes the saliency maps.
        mean: mean of each channel, for pixels in [0, 1], that uint8 images are normalised with.
        std: standard deviation of each channel, for pixels in [0, 1], that uint8 images are normalised with.
        input_size: (height, width) that the whole image is resized to for the classifier; None keeps its size.
        preprocess: function from one uint8 image [3, H, W] to the classifier's input; it replaces `mean`, `std` and
            `input_size`. It must keep the whole image, because the map is stretched over the whole image: a part that
            it crops gets no score of its own.
    """

    def __init__(
        self,
        maps: SaliencyMaps,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        input_size: tuple[int, int] | None = None,
        preprocess: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._maps = maps
        self._mean, self._std = mean, std
        self._input_size = input_size
        self._preprocess = preprocess

    def scores(self, images: Tensor, labels: Tensor | None, positions: Tensor, patch_size: int) -> Tensor:
        size, prepared = (images.shape[2], images.shape[3]), self._prepare(images)
        at_once = images_at_once(prepared, prepared.device)
        pieces = torch.split(prepared, at_once)
        labels_of = [None] * len(pieces) if labels is None else torch.split(labels, at_once)
        maps = [self._maps(piece, own, size) for piece, own in zip(pieces, labels_of, strict=True)]
        return pool_to_patches(torch.cat(maps), patch_size)

    def replica(self, device: torch.device) -> Self:
        twin = copy.copy(self)
        twin._maps = self._maps.replica(device)
        return twin

    def check(self, images: Tensor, labels: Tensor | None) -> None:
        """Find the target layer and try the classifier on some images; the arguments are as for `scores`.

        Raises:
            PatchError: if scores cannot be computed for images like these.
        """
        try:
            self._maps.check(self._prepare(images), labels)
        except (DQError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise PatchError(
                f"the classifier fails when its saliency is tried on images of {tuple(images.shape[2:])} pixels "
                f"({type(error).__name__}: {error}). Check that its preprocessing gives what its first layer takes; or "
                f"{HOW_TO_NAME}"
            ) from error

    def _prepare(self, images: Tensor) -> Tensor:
        whole = images
        if self._preprocess is not None:
            return torch.stack([self._preprocess(image).to(images.device) for image in images])
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if self._input_size is not None and tuple(images.shape[2:]) != tuple(self._input_size):
            # The whole image is resized, because a centre crop would leave patches without a score.
            images = F.interpolate(images, self._input_size, mode="bilinear", align_corners=False, antialias=True)
        if whole.dtype != torch.uint8:
            return images
        if self._mean is None or self._std is None:
            raise PatchError("the images are uint8: pass mean= and std= of the classifier, or pass normalised images")
        mean = torch.tensor(self._mean, device=images.device)[:, None, None]
        return (images - mean) / torch.tensor(self._std, device=images.device)[:, None, None]


def make_scorer(
    config: PatchConfig,
    classifier: nn.Module | None = None,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    input_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    preprocess: Callable[[Tensor], Tensor] | None = None,
) -> PatchScorer:
    """Make the scorer that a config names.

    The settings `saliency`, `target`, `class_map`, `target_layer` and `seed` are used. The classifier is on its device;
    `"random"` and `"variance"` need none. `num_classes` is the number of classes in the dataset, None without labels.
    The other arguments are those of `ClassifierScorer`.

    Raises:
        PatchError: if there is no classifier for a method that needs one.
    """
    method = config.saliency
    if method == "random":
        return RandomScorer(config.seed)
    if method == "variance":
        return VarianceScorer()
    if classifier is None:
        raise PatchError(f'saliency={method!r} needs a classifier; "variance" and "random" need none')
    targets = TargetChoice(config.target, num_classes, config.class_map)
    make = ActivationMaps if method in METHODS else PackageMaps
    return ClassifierScorer(make(classifier, method, targets, config.target_layer), mean, std, input_size, preprocess)
