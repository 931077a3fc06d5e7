"""The small residual network whose weights are shipped in `assets/`, and functions to read and prepare its weights."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

BUNDLED_ENCODER_FILE = Path(__file__).resolve().parent.parent / "assets" / "cifar10_encoder.safetensors"
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation and a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.bn2(self.conv2(out)))


class SmallResNet(nn.Module):
    """A residual network for images of about 32 pixels, with the methods of timm's networks.

    Args:
        widths: number of channels of each stage; every stage after the first halves height and width.
        depths: number of residual blocks of each stage.
        num_classes: number of outputs of the linear head.
    """

    def __init__(
        self, widths: tuple[int, ...] = (32, 64, 128), depths: tuple[int, ...] = (1, 1, 2), num_classes: int = 10
    ) -> None:
        super().__init__()
        self.num_features = widths[-1]
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        blocks: list[nn.Module] = []
        channels = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for position in range(depth):
                stride = 2 if stage > 0 and position == 0 else 1
                blocks.append(ResidualBlock(channels, width, stride))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return feature maps [B, num_features, H/4, W/4] (for three stages) of normalised images [B, 3, H, W]."""
        out: Tensor = self.blocks(self.stem(x))
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits [B, num_classes] of feature maps; with `pre_logits` return the pooled maps.

        The pooled maps, averaged over height and width, have the shape [B, num_features].
        """
        pooled = x.mean(dim=(2, 3))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, num_classes] of normalised images [B, 3, H, W]."""
        return self.forward_head(self.forward_features(x))


def load_small_resnet(path: str | Path = BUNDLED_ENCODER_FILE) -> tuple[SmallResNet, dict[str, str]]:
    """Read a `SmallResNet` in eval mode from a safetensors file (float16 on disk, float32 in memory) with metadata.

    The metadata have the keys `widths`, `depths`, `num_classes` (all JSON), `test_accuracy` and those that the training
    script adds.
    """
    with safe_open(str(path), framework="pt") as file:
        metadata: dict[str, str] = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    model = SmallResNet(
        tuple(json.loads(metadata["widths"])), tuple(json.loads(metadata["depths"])), int(metadata["num_classes"])
    )
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return model.eval(), metadata


def to_half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with contiguous tensors and floating tensors in float16, ready for safetensors."""
    return {k: (v.to(torch.float16) if v.is_floating_point() else v).contiguous() for k, v in state.items()}
