"""Packed patches of whole real sets, in every mode: CIFAR-10's selection, and photos with a real ImageNet classifier."""

import pytest
import torch

from dq_lightning import FeatureConfig, PatchConfig, QuantizeConfig, QuantizedDataModule
from tests.lightning_scripts import patched_images
from tests.lightning_scripts.common import to_tensor
from tests.lightning_scripts.patched_images import MODES
from tests.test_patched_runs import delivered, fit, kept_pixels


@pytest.mark.slow
@pytest.mark.parametrize("drop_ratio", [0.2])
def test_the_whole_selection_of_cifar10(cifar_root, tmp_path, drop_ratio):
    from torchvision.datasets import CIFAR10

    images, data = {}, CIFAR10(cifar_root, transform=to_tensor)
    for mode in MODES:
        settings = {"batch_transform": patched_images.as_floats} if mode == "batch" else {}
        config = patched_images.drop(mode, drop_ratio=drop_ratio)
        module = QuantizedDataModule(data, config=config, cache_dir=tmp_path, batch_size=125, **settings)
        assert len(set(fit(module).seen)) == 6250
        images[mode] = delivered(module)[0]
        print(mode, module.info)  # noqa: T201
    # other batches, other roundings: at most one grey level, and seldom
    gap = ((images["prepare"] - images["batch"]) * 255).round().abs()
    assert gap.max() <= 1
    assert (gap > 0).float().mean() < 1e-4
    kept = kept_pixels(module)
    originals = torch.stack([data[i][0] for i in module.selection.index.tolist()])
    for mode in MODES:
        assert torch.equal(images[mode] * kept, originals * kept)
    error = {mode: float(((images[mode] - originals) ** 2 * ~kept).sum() / (3 * (~kept).sum())) for mode in MODES}
    print(error)  # noqa: T201
    assert error["prepare"] < error["off"]


@pytest.mark.slow
def test_all_photos_with_the_real_classifier(shared_dir, tmp_path):
    from torchvision.datasets import ImageFolder

    root = shared_dir / "data" / "imagenette_224_small" / "train"
    # for every folder the output of the ImageNet classifier
    classes = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
    weights = str(shared_dir / "weights" / "tf_efficientnet_lite0.in1k.fp16.safetensors")
    network = {"classifier": "tf_efficientnet_lite0", "weights": weights, "class_map": classes, "target": "label"}
    features = FeatureConfig(encoder="tf_efficientnet_lite0", weights=weights)
    images = {}
    for mode in MODES:
        patches = PatchConfig(drop_ratio=0.2, reconstruct=mode, reconstructor="bundled", codec="jpeg", **network)
        settings = {"batch_transform": patched_images.as_floats} if mode == "batch" else {}
        module = QuantizedDataModule(
            ImageFolder(root, transform=to_tensor),
            config=QuantizeConfig(features=features, patches=patches),
            keep_ratio=0.25,
            batch_size=10,
            cache_dir=tmp_path,
            **settings,
        )
        assert len(set(fit(module).seen)) == module.info.num_samples == 250
        images[mode] = delivered(module)[0]
        print(mode, module.info)  # noqa: T201
    assert module.info.bytes < 0.87 * module.info.unpatched_bytes
    assert ((images["prepare"] - images["batch"]) * 255).round().abs().max() <= 1
    kept = kept_pixels(module, (224, 224), 16)
    for mode in ("prepare", "batch"):
        assert torch.equal(images[mode] * kept, images["off"] * kept)
        assert not torch.equal(images[mode], images["off"])
