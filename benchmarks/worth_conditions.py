"""The damaged copies of CIFAR-10 that `worth.py` chooses from: wrong labels, a long tail, near-duplicates, foreign images.

Every condition is made from the clean training set by a seed, so that all ways of choosing see the same data. The test set is
never changed. Features come from EfficientNet-Lite0, which has seen ImageNet alone: an encoder that was trained on
CIFAR-10's clean labels would know what the conditions damage.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

NAMES = ("clean", "wrong20", "wrong40", "swapped20", "swapped40", "long_tail", "duplicates", "foreign")
# Class-dependent mistakes as in Patrini et al. 2017: truck to automobile, bird to airplane, deer to horse, cat to dog and back.
SWAPS = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}


@dataclass(frozen=True)
class Condition:
    """One training set to choose from.

    Attributes:
        images: uint8 [N, 32, 32, 3].
        labels: int64 [N], the labels that are given; some are wrong in some conditions.
        truth: int64 [N], the true labels; -1 for a foreign image.
        features: float16 or float32 [N, D], from the encoder.
        origin: int64 [N], position of the image that a near-duplicate was made from; its own position otherwise.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    truth: NDArray[np.int64]
    features: NDArray[np.floating]
    origin: NDArray[np.int64]

    def at(self, index: NDArray[np.int64]) -> "Condition":
        """Return the part of the training set at some positions, int64 [M]; `origin` keeps the old positions."""
        fields = {name: getattr(self, name)[index] for name in self.__dataclass_fields__}
        return Condition(**fields)


def as_condition(images: NDArray[np.uint8], labels: NDArray[np.int64], features: NDArray[np.floating]) -> Condition:
    """Return the clean condition of images uint8 [N, 32, 32, 3], labels int64 [N] and features [N, D]."""
    return Condition(images, labels, labels, features, np.arange(len(labels)))


def damage(
    clean: Condition,
    name: str,
    seed: int,
    *,
    encode: Callable[[NDArray[np.uint8]], NDArray[np.floating]],
    foreign: Path | None,
) -> Condition:
    """Return a condition by its name.

    Args:
        clean: the clean training set.
        name: one of `NAMES`.
        seed: seed of everything that is drawn.
        encode: function from images uint8 [B, 32, 32, 3] to features [B, D], for images that are new.
        foreign: `.npy` file of photos uint8 [P, 64, 64, 3] that foreign images are cut from; only for `"foreign"`.
    """
    draw = np.random.default_rng([seed, NAMES.index(name)])
    if name == "clean":
        return clean
    if name.startswith("wrong"):
        return replace(clean, labels=_wrong_labels(clean.labels, int(name[5:]) / 100, draw))
    if name.startswith("swapped"):
        wrong = draw.random(len(clean.labels)) < int(name[7:]) / 100
        swapped = np.array([SWAPS.get(label, label) for label in range(10)])[clean.labels]
        return replace(clean, labels=np.where(wrong, swapped, clean.labels))
    if name == "long_tail":
        return clean.at(_long_tail(clean.labels, 100, draw))
    if name == "duplicates":
        return _near_duplicates(clean, draw, encode)
    if foreign is None:
        raise SystemExit("the condition 'foreign' needs --foreign, a .npy file of photos uint8 [P, 64, 64, 3]")
    return _foreign(clean, np.load(foreign), draw, encode)


def _wrong_labels(labels: NDArray[np.int64], share: float, draw: np.random.Generator) -> NDArray[np.int64]:
    """Give exactly this share of the samples another label, each of the other classes with the same probability."""
    wrong = draw.permutation(len(labels))[: round(share * len(labels))]
    changed = labels.copy()
    changed[wrong] = (labels[wrong] + draw.integers(1, 10, len(wrong))) % 10
    return changed


def _long_tail(labels: NDArray[np.int64], factor: float, draw: np.random.Generator) -> NDArray[np.int64]:
    """Keep class c with 5000 * factor ** (-c / 9) samples (Cui et al. 2019), and return their positions, ascending."""
    kept = []
    for label in range(10):
        members = draw.permutation(np.flatnonzero(labels == label))
        kept.append(members[: round(len(members) * factor ** (-label / 9))])
    return np.sort(np.concatenate(kept))


def _near_duplicates(clean: Condition, draw: np.random.Generator, encode: Callable) -> Condition:
    """Replace 30 % of the set by shifted and re-encoded copies of 5 % of its images, six of each."""
    total = len(clean.labels)
    order = draw.permutation(total)
    originals, rest = order[: total // 20], order[total // 20 : total - 6 * (total // 20)]
    source = np.repeat(originals, 6)
    copies = np.stack([_shifted(clean.images[i], draw) for i in source])
    kept = np.concatenate([originals, rest])
    return Condition(
        np.concatenate([clean.images[kept], copies]),
        np.concatenate([clean.labels[kept], clean.labels[source]]),
        np.concatenate([clean.truth[kept], clean.truth[source]]),
        np.concatenate([clean.features[kept], encode(copies).astype(clean.features.dtype)]),
        np.concatenate([kept, source]),
    )


def _shifted(image: NDArray[np.uint8], draw: np.random.Generator) -> NDArray[np.uint8]:
    """Return an image moved by up to two pixels with a reflected border, and stored once as a JPEG of quality 70 to 95."""
    down, right = draw.integers(0, 5, 2)
    moved = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")[down : down + 32, right : right + 32]
    stream = io.BytesIO()
    Image.fromarray(moved).save(stream, "JPEG", quality=int(draw.integers(70, 96)))
    return np.asarray(Image.open(stream))


def _foreign(clean: Condition, photos: NDArray[np.uint8], draw: np.random.Generator, encode: Callable) -> Condition:
    """Replace 20 % of the images by pieces of photos of another dataset, under the labels that stand there."""
    where = draw.permutation(len(clean.labels))[: len(clean.labels) // 5]
    pieces = []
    for number in draw.integers(0, len(photos), len(where)):
        side = int(draw.integers(36, 65))
        top, left = draw.integers(0, 65 - side, 2)
        piece = Image.fromarray(photos[number, top : top + side, left : left + side]).resize(
            (32, 32), Image.Resampling.BICUBIC
        )
        pieces.append(np.asarray(piece)[:, :: int(draw.choice([-1, 1]))])
    images, truth, features = clean.images.copy(), clean.truth.copy(), clean.features.copy()
    images[where], truth[where] = np.stack(pieces), -1
    features[where] = encode(images[where])
    return replace(clean, images=images, truth=truth, features=features)


class Lite0:
    """EfficientNet-Lite0 as a function from images to features.

    Args:
        weights: safetensors file of timm's `tf_efficientnet_lite0`.
        device: device that the network runs on.
        side: side in pixels that the images are enlarged to; the network was trained at 224.
    """

    def __init__(self, weights: str, device: str, side: int = 224) -> None:
        overlay = {"file": weights}
        network = timm.create_model(
            "tf_efficientnet_lite0", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0
        )
        self.network = network.eval().to(device, memory_format=torch.channels_last)
        self.device, self.side = device, side

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.floating]:
        """Return features float16 [B, 1280] of images uint8 [B, 32, 32, 3]."""
        parts = []
        for start in range(0, len(images), 500):
            batch = torch.from_numpy(images[start : start + 500]).to(self.device).permute(0, 3, 1, 2).float() / 255
            batch = F.interpolate(batch, size=(self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)
            batch = ((batch - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cuda", torch.bfloat16, enabled=self.device.startswith("cuda")):
                parts.append(self.network(batch).float().half().cpu())
        return torch.cat(parts).numpy()
