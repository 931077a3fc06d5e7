"""Golden answers and known accuracies on real images and weights."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import transforms
from torchvision.datasets import CIFAR10, ImageFolder

from dq_lightning.features.bundled import load_small_resnet
from dq_lightning.features.choose import choose_encoder
from dq_lightning.features.extract import extract_features

IMAGENETTE_CLASSES = torch.tensor([0, 217, 482, 491, 497, 566, 569, 571, 574, 701])


class DatasetSource:
    def __init__(self, dataset, index):
        self.dataset, self.index = dataset, index

    def __len__(self):
        return len(self.index)

    def image(self, index):
        return self.dataset[int(self.index[index])][0]

    def decode_warning(self, index):
        return None


class Block(nn.Module):
    def __init__(self, width_in, width):
        super().__init__()
        self.stride = 1 if width_in == width else 2
        self.conv1 = nn.Conv2d(width_in, width, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        # option A of He et al. 2016: every other pixel, and new channels of zeros on both sides
        missing = (out.shape[1] - x.shape[1]) // 2
        return F.relu(out + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, missing, missing)))


class ResNet20(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32), *(Block(32, 32) for _ in range(2)))
        self.layer3 = nn.Sequential(Block(32, 64), *(Block(64, 64) for _ in range(2)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        out = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(out.mean(dim=(2, 3)))


def test_golden_embedding_and_published_gradient(shared_dir, cifar_root):
    network = ResNet20()
    path = next((shared_dir / "weights" / "cifar10_resnet").glob("resnet20*.th"))
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    spec = choose_encoder((network, transforms.Compose([transforms.ToTensor(), normalize])), image_size=(32, 32))
    golden = np.load(shared_dir / "golden" / "cifar10_resnet20_500_per_class.npz")
    golden = {name: torch.from_numpy(golden[name][::20]) for name in ("index", "label", "embedding", "head_gradient")}
    labels = golden["label"].long()
    source = DatasetSource(CIFAR10(cifar_root, train=True), golden["index"])
    features = extract_features(source, spec, kind="gradient", labels=labels, device="cpu", progress=False)
    torch.testing.assert_close(features.embedding, golden["embedding"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features.head_gradient, golden["head_gradient"], rtol=1e-4, atol=1e-4)


def test_bundled_network_knows_the_test_split_as_well_as_its_metadata_say(cifar_root):
    dataset = CIFAR10(cifar_root, train=False)
    spec = choose_encoder("auto", image_size=(32, 32))
    features = extract_features(DatasetSource(dataset, range(400)), spec, device="cpu", progress=False)
    predicted = spec.load("cpu").logits(features.embedding).argmax(1)
    accuracy = (predicted == torch.tensor(dataset.targets[:400])).float().mean()
    said = float(load_small_resnet()[1]["test_accuracy"])
    assert said >= 0.85
    # 400 images of 10,000: within three standard errors of the figure of all
    assert abs(accuracy - said) < 3 * (0.92 * 0.08 / 400) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("count", [100])
def test_photos_through_timm_weights_reach_their_accuracy(shared_dir, count):
    # with the wrong normalisation, size or channel order the network falls below two in three
    dataset = ImageFolder(shared_dir / "data" / "imagenette_224_small" / "val")
    index = torch.linspace(0, len(dataset) - 1, count).long()
    path = shared_dir / "weights" / "tf_efficientnet_lite0.in1k.fp16.safetensors"
    spec = choose_encoder("tf_efficientnet_lite0", weights=path, image_size=(224, 224))
    features = extract_features(DatasetSource(dataset, index), spec, device="cpu", progress=False, batch_size=64)
    predicted = spec.load("cpu").logits(features.embedding).argmax(1)
    accuracy = (predicted == IMAGENETTE_CLASSES[torch.tensor(dataset.targets)[index]]).float().mean()
    assert accuracy > 0.69
