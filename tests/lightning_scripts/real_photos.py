"""Imagenette photos as an ImageFolder and as a Hugging Face dataset; as a script, both on two processes.

Usage: real_photos.py SHARED CACHE REPORTS
"""

import json
import sys
from pathlib import Path

import torch
from torch.utils.data import Subset, default_collate
from torchvision.datasets import ImageFolder

from dq_lightning import FeatureConfig, QuantizeConfig, QuantizedDataModule
from tests.lightning_scripts.common import Recorder, to_tensor, trainer

EVERY = 25  # 40 photos, 4 of each class


def tensor_rows(rows):
    return {"image": [to_tensor(image) for image in rows["image"]], "label": rows["label"]}


def dataset(kind, shared, every):
    """Every n-th of the 1,000 photos, with tensors as images."""
    folder = ImageFolder(shared / "data" / "imagenette_224_small" / "train", transform=to_tensor)
    picked = range(0, len(folder), every)
    if kind == "folder":
        return Subset(folder, picked)
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(mode="RGB"), "label": datasets.ClassLabel(names=folder.classes)}
    )
    rows = [folder.samples[i] for i in picked]
    columns = {"image": [path for path, _ in rows], "label": [label for _, label in rows]}
    made = datasets.Dataset.from_dict(columns, features=features)
    made.set_transform(tensor_rows)
    return made


def collate(items):
    """Pairs of image and label, whichever of the two datasets gave them."""
    return default_collate([(item["image"], item["label"]) if isinstance(item, dict) else item for item in items])


def quantized(kind, shared, every, cache_dir):
    """The photos with features of the ImageNet network."""
    weights = shared / "weights" / "tf_efficientnet_lite0.in1k.fp16.safetensors"
    features = FeatureConfig(encoder="tf_efficientnet_lite0", weights=str(weights), batch_size=32)
    return QuantizedDataModule(
        dataset(kind, shared, every),
        config=QuantizeConfig(features=features),
        keep_ratio=0.25,
        num_bins=5,
        batch_size=2,
        num_workers=0,
        cache_dir=cache_dir,
        collate_fn=collate,
    )


def main(shared, cache_dir, reports):
    for kind in ("folder", "hub"):
        model, module = Recorder(), quantized(kind, shared, EVERY, cache_dir)
        running = trainer(devices=2, strategy="ddp")
        running.fit(model, module)
        report = {"seen": model.seen, "hash": module.info.content_hash}
        (reports / f"{kind}-{running.global_rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))
