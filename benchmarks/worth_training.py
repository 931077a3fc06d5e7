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
# Steps before a capture as a CUDA graph.
WARM_UP = 3


def make_network(name: str) -> nn.Module:
    """Return a network with ten outputs for images of 32 pixels: `"small"` or `"resnet18"`."""
    if name == "resnet18":
        network = resnet18(num_classes=10)
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
        return network
    return SmallResNet(widths=(16, 32, 64), depths=(3, 3, 3))


class Lane:
    """One network and the buffers that its training needs, used for one training after the other.

    Everything that a step reads or writes keeps its place in memory, so one captured CUDA graph serves all trainings. The order
    of the samples and the augmentation are drawn before the training from a generator of its own, so that they are the same on
    every device, whatever else runs beside it.

    Args:
        network: name of the network.
        device: device that it is trained on.
        samples: largest number of samples that is trained on.
        steps: largest number of steps.
        bfloat16: compute under bfloat16 autocast; on a processor without instructions for it that is very slow.
        compiled: compile the network with `torch.compile`, which fuses its small kernels.
    """

    def __init__(
        self, network: str, device: str, samples: int, steps: int, *, bfloat16: bool = True, compiled: bool = False
    ) -> None:
        self.name, self.device, self.bfloat16 = network, device, bfloat16
        self.network = make_network(network).to(device, memory_format=torch.channels_last).train()
        self.parameters = list(self.network.parameters())
        self.training = torch.compile(self.network) if compiled else self.network
        self.velocity = [torch.zeros_like(p) for p in self.parameters]
        self.padded = torch.zeros(samples, 40, 40, 3, dtype=torch.uint8, device=device)
        self.labels = torch.zeros(samples, dtype=torch.int64, device=device)
        self.drawn = torch.zeros(steps, 4, BATCH, dtype=torch.int64, device=device)
        self.rates = torch.zeros(steps, device=device)
        self.number = torch.zeros(1, dtype=torch.int64, device=device)
        self.mean = 255 * torch.tensor(CIFAR10_MEAN, device=device)
        self.std = 255 * torch.tensor(CIFAR10_STD, device=device)
        self.pixel = torch.arange(32, device=device)
        self.stream = torch.cuda.Stream() if device.startswith("cuda") else None
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def begin(self, images: NDArray[np.uint8], labels: NDArray[np.int64], steps: int, seed: int) -> None:
        """Make ready for a training from its first step.

        Args:
            images: uint8 [N, 32, 32, 3].
            labels: int64 [N].
            steps: number of steps.
            seed: seed of the weights, the order and the augmentation.
        """
        torch.manual_seed(seed)
        self.network.load_state_dict(make_network(self.name).state_dict())
        self.network.train()
        for velocity in self.velocity:
            velocity.zero_()
        self.number.zero_()
        for start in range(0, len(images), 2000):
            part = torch.from_numpy(np.ascontiguousarray(images[start : start + 2000])).to(self.device)
            padded = F.pad(part.permute(0, 3, 1, 2).float(), [4] * 4, mode="reflect").to(torch.uint8)
            self.padded[start : start + len(part)] = padded.permute(0, 2, 3, 1)
        self.labels[: len(labels)] = torch.from_numpy(np.ascontiguousarray(labels))
        draw = np.random.default_rng([seed, 77])
        epochs = -(-steps * BATCH // len(labels))
        order = np.concatenate([draw.permutation(len(labels)) for _ in range(epochs)])[: steps * BATCH]
        shift = draw.integers(0, 9, (2, steps * BATCH))
        mirrored = draw.integers(0, 2, steps * BATCH)
        drawn = np.stack([order, *shift, mirrored]).reshape(4, steps, BATCH).transpose(1, 0, 2)
        self.drawn[:steps] = torch.from_numpy(np.ascontiguousarray(drawn))
        warm = max(1, steps // 10)
        rising = [PEAK * (i + 1) / warm for i in range(warm)]
        falling = [PEAK / 2 * (1 + math.cos(math.pi * i / (steps - warm))) for i in range(steps - warm)]
        self.rates[:steps] = torch.tensor(rising + falling)

    def capture(self) -> None:
        """Record one step as a CUDA graph, after a few steps in which the libraries choose their kernels.

        Call `begin` afterwards, because these steps change the weights.
        """
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP):
                self.step()
        self.stream.synchronize()
        with torch.cuda.graph(graph, stream=self.stream):
            self.step()
        self.graph = graph

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
        images = self.padded[index[:, None, None], rows, right[:, None, None] + across]
        loss = F.cross_entropy(self._forward(self.training, images), self.labels[index])
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


def train(lanes: list[Lane], steps: int) -> None:
    """Do the steps of the trainings that the lanes were made ready for; on a GPU they run side by side."""
    if lanes[0].graph is None:
        for lane in lanes:
            for _ in range(steps):
                lane.step()
        return
    torch.cuda.synchronize()
    for _ in range(steps):
        for lane in lanes:
            with torch.cuda.stream(lane.stream):
                lane.graph.replay()
    torch.cuda.synchronize()
