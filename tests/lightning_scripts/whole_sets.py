"""Packed patches of whole real sets; as a script, training on two processes in every mode, from the set or its store.

Usage: whole_sets.py cifar|photos|store DATA CACHE REPORTS

Each process writes the images that it saw, by mode, to REPORTS/report-RANK.json.
"""

import json
import sys
from pathlib import Path

import torch

from dq_lightning import FeatureConfig, PatchConfig, QuantizeConfig, QuantizedDataModule
from tests.lightning_scripts import patched_images
from tests.lightning_scripts.common import Recorder, to_tensor, trainer
from tests.lightning_scripts.patched_images import MODES, as_floats

# for every folder of the photos the output of the ImageNet classifier
CLASSES = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)


def cifar(root, cache_dir, mode):
    """12.5 % of CIFAR-10 without a fifth of their patches, by the bundled networks."""
    from torchvision.datasets import CIFAR10

    data = CIFAR10(root, transform=to_tensor)
    settings = {"batch_transform": as_floats} if mode == "batch" else {}
    config = patched_images.drop(mode)
    return QuantizedDataModule(data, config=config, cache_dir=cache_dir, batch_size=125, **settings)


def photos(shared, cache_dir, mode):
    """A quarter of the photos without a fifth of their patches, by a real ImageNet classifier."""
    from torchvision.datasets import ImageFolder

    weights = str(Path(shared) / "weights" / "tf_efficientnet_lite0.in1k.fp16.safetensors")
    network = {"classifier": "tf_efficientnet_lite0", "weights": weights, "class_map": CLASSES, "target": "label"}
    patches = PatchConfig(drop_ratio=0.2, reconstruct=mode, reconstructor="bundled", codec="jpeg", **network)
    features = FeatureConfig(encoder="tf_efficientnet_lite0", weights=weights)
    return QuantizedDataModule(
        ImageFolder(Path(shared) / "data" / "imagenette_224_small" / "train", transform=to_tensor),
        config=QuantizeConfig(features=features, patches=patches),
        keep_ratio=0.25,
        batch_size=5,
        cache_dir=cache_dir,
        **({"batch_transform": as_floats} if mode == "batch" else {}),
    )


def store(path, cache_dir, mode):
    """The same from a store, whatever it holds; the original data may be gone."""
    wanted = {"batch_transform": as_floats} if mode == "batch" else {"transform": to_tensor}
    return QuantizedDataModule.from_store(path, reconstruct=mode, cache_dir=cache_dir, batch_size=125, **wanted)


def main(kind, data, cache_dir, reports):
    report = {}
    for mode in MODES:
        module = {"cifar": cifar, "photos": photos, "store": store}[kind](data, cache_dir, mode)
        model, running = Recorder(), trainer(devices=2, strategy="ddp")
        running.fit(model, module)
        report[mode] = {"seen": model.seen, "hash": module.info.content_hash, "path": module.info.path}
    (Path(reports) / f"report-{running.global_rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
