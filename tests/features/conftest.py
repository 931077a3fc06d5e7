import socket

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dq_lightning.core.errors import SourceError
from tests.memories import DictMemory


class ListSource:
    """Images in memory, with samples that warn or cannot be read where asked for."""

    def __init__(self, images, doubtful=(), broken=()):
        self.images, self.doubtful, self.broken = images, set(doubtful), set(broken)

    def __len__(self):
        return len(self.images)

    def image(self, index):
        if index in self.broken:
            raise SourceError(f"sample {index} (cat.jpg) cannot be decoded")
        return self.images[index]

    def decode_warning(self, index):
        return "16-bit image clipped" if index in self.doubtful else None


def to_float_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class TinyNetwork(nn.Module):
    """One convolution and a linear head, with nothing that names it as a network of timm."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.output = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.output(self.drop(self.norm(self.convolution(x)).relu().mean(dim=(2, 3))))


def random_images(count, side=32, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


@pytest.fixture
def memory():
    return DictMemory()


@pytest.fixture
def make_source():
    return lambda count=10, side=32, **options: ListSource(random_images(count, side), **options)


@pytest.fixture
def tiny():
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        return TinyNetwork()


@pytest.fixture
def to_float():
    return to_float_tensor


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
