"""Real images and a real classifier, where they are."""

import pytest
import torch


@pytest.fixture(scope="session")
def photos(shared_dir):
    """Sixteen validation photos as uint8 [16, 3, 224, 224], and their ImageNet classes."""
    from torchvision.datasets import ImageFolder

    classes = torch.tensor([0, 217, 482, 491, 497, 566, 569, 571, 574, 701])
    folder = ImageFolder(str(shared_dir / "data" / "imagenette_224_small" / "val"))
    positions = range(0, len(folder), len(folder) // 16)[:16]
    import numpy as np

    images = torch.stack([torch.from_numpy(np.array(folder[i][0])).permute(2, 0, 1) for i in positions])
    return images, classes[torch.tensor([folder.targets[i] for i in positions])]


@pytest.fixture(scope="session")
def photo_classifier(shared_dir):
    """An ImageNet network; mean and std are 0.5."""
    import timm

    file = str(shared_dir / "weights" / "tf_efficientnet_lite0.in1k.fp16.safetensors")
    return (
        timm.create_model("tf_efficientnet_lite0", pretrained=True, pretrained_cfg_overlay={"file": file})
        .float()
        .eval()
    )
