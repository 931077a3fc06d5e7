"""Datasets that break in one way each, and a quick encoder for them."""

import io

import numpy as np
import torch
from PIL import Image

from dq_lightning import BinConfig, QuantizeConfig, SelectionConfig, quantize
from tests.lightning_scripts.common import to_tensor


class MeanColour(torch.nn.Module):
    """An encoder: the mean colour; it has a head of three classes."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 3)
        torch.nn.init.eye_(self.fc.weight)
        torch.nn.init.zeros_(self.fc.bias)

    def forward(self, images):
        return self.fc(images.mean(dim=(2, 3)))


def encode(image):
    return to_tensor(image.resize((4, 4)))


def settings(keep_ratio=0.5, num_bins=2, **more):
    bins = BinConfig(num_bins=num_bins, deduplicate=more.pop("deduplicate", None))
    return QuantizeConfig(bins=bins, selection=SelectionConfig(keep_ratio=keep_ratio), **more)


def compact(dataset, cache, config=None, model=None, **more):
    return quantize(
        dataset,
        config or settings(),
        cache_dir=cache,
        encoder=(model or MeanColour(), encode),
        device="cpu",
        progress=False,
        **more,
    )


def picture(seed, size=(6, 5), mode="RGB"):
    drawn = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(drawn).convert(mode)


def encoded(seed=0, kind="PNG", **more):
    file = io.BytesIO()
    picture(seed, **more).save(file, kind)
    return file.getvalue()


class Pictures:
    """Map-style items (image, class); those in `broken` raise, or are what `broken` says."""

    def __init__(self, count=20, broken=None, classes=2):
        self.count, self.broken, self.classes = count, broken or {}, classes

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        item = self.broken.get(index, (picture(index), index % self.classes))
        if isinstance(item, Exception):
            raise item
        return item
