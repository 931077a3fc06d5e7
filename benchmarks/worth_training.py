"""One recipe for all rows of `worth.py`: the same network, augmentation, schedule and number of steps.

SGD with Nesterov momentum 0.9, weight decay 5e-4, batches of 128, a warm-up over a tenth of the steps to a rate of 0.2 and a
cosine to zero, crops of images padded by 4 reflected pixels, mirroring, bfloat16 autocast; the accuracy after the last step.
The networks are the residual network of the CIFAR experiments (He et al. 2016, section 4.2: three stages of three blocks with
16, 32 and 64 channels) and ResNet-18.

On a GPU one step is captured as a CUDA graph, because a network this small would otherwise wait for the launch of its kernels.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

from dq_lightning.features.bundled import CIFAR10_MEAN, CIFAR10_STD, SmallResNet

BATCH, PEAK, MOMENTUM, DECAY = 128, 0.2, 0.9, 5e-4
# Steps of a run before its capture as a CUDA graph.
WARM_UP = 3


def make_network(name: str) -> nn.Module:
    """Return a network with ten outputs for images of 32 pixels: `"small"` or `"resnet18"`."""
    if name == "resnet18":
        network = resnet18(num_classes=10)
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
        return network
    return SmallResNet(widths=(16, 32, 64), depths=(3, 3, 3))


class Data:
    """Images and labels on a device, padded for the crops.

    Args:
        images: uint8 [N, 32, 32, 3].
        labels: int64 [N].
        device: device that they are put on.
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64], device: str) -> None:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2)
        padded = [F.pad(part.float(), [4] * 4, mode="reflect").to(torch.uint8) for part in pixels.split(2000)]
        self.padded = torch.cat(padded).permute(0, 2, 3, 1).contiguous()
        self.labels = torch.from_numpy(np.ascontiguousarray(labels)).to(device)


class Run:
    """The training of one network, step by step.

    The order of the samples and the augmentation are drawn before the training from a generator of its own, so that they are
    the same on every device, whatever else runs beside it.

    Args:
        data: samples that are trained on.
        steps: number of steps.
        seed: seed of the weights, the order and the augmentation.
        network: name of the network.
        device: device that it is trained on.
        bfloat16: compute under bfloat16 autocast; on a processor without instructions for it that is very slow.
        compiled: compile the network with `torch.compile`, which fuses its small kernels.
    """

    def __init__(
        self,
        data: Data,
        steps: int,
        seed: int,
        network: str,
        device: str,
        bfloat16: bool = True,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        self.bfloat16 = bfloat16
        self.data, self.steps, self.device = data, steps, device
        self.network = make_network(network).to(device, memory_format=torch.channels_last).train()
        self.parameters = list(self.network.parameters())
        self.training = torch.compile(self.network) if compiled else self.network
        self.velocity = [torch.zeros_like(p) for p in self.parameters]
        draw = np.random.default_rng([seed, 77])
        total, epochs = len(data.labels), -(-steps * BATCH // len(data.labels))
        order = np.concatenate([draw.permutation(total) for _ in range(epochs)])[: steps * BATCH]
        shift = draw.integers(0, 9, (2, steps * BATCH))
        mirrored = draw.integers(0, 2, steps * BATCH)
        drawn = np.stack([order, *shift, mirrored]).reshape(4, steps, BATCH).transpose(1, 0, 2)
        self.drawn = torch.from_numpy(np.ascontiguousarray(drawn)).to(device)
        warm = max(1, steps // 10)
        rising = [PEAK * (i + 1) / warm for i in range(warm)]
        falling = [PEAK / 2 * (1 + math.cos(math.pi * i / (steps - warm))) for i in range(steps - warm)]
        self.rates = torch.tensor(rising + falling, device=device)
        self.number = torch.zeros(1, dtype=torch.int64, device=device)
        self.mean = 255 * torch.tensor(CIFAR10_MEAN, device=device)
        self.std = 255 * torch.tensor(CIFAR10_STD, device=device)
        self.pixel = torch.arange(32, device=device)

    def _forward(self, network: nn.Module, images: Tensor) -> Tensor:
        """Return the logits, float32 [B, 10], of images uint8 [B, 32, 32, 3]."""
        normal = ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2)
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.bfloat16):
            return network(normal).float()

    def step(self) -> None:
        """Do one step: augment, forward, backward, and SGD with Nesterov momentum."""
        index, down, right, mirrored = self.drawn.index_select(0, self.number)[0]
        rate = self.rates.index_select(0, self.number)[0]
        rows = down[:, None, None] + self.pixel[None, :, None]
        across = torch.where(mirrored[:, None, None] == 1, 31 - self.pixel, self.pixel)
        images = self.data.padded[index[:, None, None], rows, right[:, None, None] + across]
        loss = F.cross_entropy(self._forward(self.training, images), self.data.labels[index])
        gradients = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            gradients = torch._foreach_add(gradients, self.parameters, alpha=DECAY)
            torch._foreach_mul_(self.velocity, MOMENTUM)
            torch._foreach_add_(self.velocity, gradients)
            torch._foreach_add_(gradients, self.velocity, alpha=MOMENTUM)
            torch._foreach_mul_(gradients, rate)
            torch._foreach_sub_(self.parameters, gradients)
            self.number += 1

    @torch.inference_mode()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Return the share in percent of images uint8 [N, 32, 32, 3] that get their label, int64 [N]."""
        self.network.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        for part, wanted in zip(images.split(1000), labels.split(1000), strict=True):
            right += (self._forward(self.network, part).argmax(1) == wanted).sum()
        return 100 * right.item() / len(labels)


def train(runs: list[Run]) -> None:
    """Do all steps of runs that have the same number of steps; on a GPU they run side by side, each in a stream of its own."""
    if not runs[0].device.startswith("cuda"):
        for run in runs:
            for _ in range(run.steps):
                run.step()
        return
    torch.backends.cudnn.benchmark = True
    lanes = []
    for run in runs:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # The libraries choose their kernels in these steps, which count. The capture records a step without doing it.
            for _ in range(WARM_UP):
                run.step()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            run.step()
        lanes.append((stream, graph))
    for _ in range(runs[0].steps - WARM_UP):
        for stream, graph in lanes:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
