"""The step on patches against the two networks alone, and the loader of filled images against the plain packed store's.

    python benchmarks/patches.py --photos IMAGE_FOLDER [--count 64] [--rounds 3] [--threads 1] [--device auto]

The first table: seconds of saliency, packing and filling, as `quantize` reports them, against a forward and a backward pass
through the classifier and a forward pass through the autoencoder on the same images, in memory, in the same batches. Reading,
decoding, encoding, measuring and writing are on our side alone. Photos: ResNet-18 and a ViT-MAE of 12 layers of 192, both with
random weights; small images: those of the package. The second: images per second of the train loader, in turns, in one run.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from dq_lightning import BinConfig, PatchConfig, QuantizeConfig, QuantizedDataModule, SelectionConfig, quantize
from dq_lightning.core.devices import resolve_device
from dq_lightning.demo.sample_data import SampleCIFAR10
from dq_lightning.features.bundled import load_small_resnet
from dq_lightning.patches.mae import bundled_folder

DROP = 0.2
TENSOR = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


class MeanColour(nn.Module):
    """The cheapest encoder: the choice of samples is not measured here."""

    def forward(self, images):
        return images.mean((2, 3))


def photo_networks():
    classifier = timm.create_model("resnet18", num_classes=1000)
    small = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    decoder = {f"decoder_{name}": value for name, value in (small | {"num_hidden_layers": 4}).items()}
    return classifier.eval(), ViTMAEForPreTraining(ViTMAEConfig(**small, **decoder))


def timed(function, device) -> float:
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def bare(classifier, autoencoder, images, batch_size, device):
    """What the two networks take alone; gradients stop at the images."""
    model = (
        ViTMAEForPreTraining.from_pretrained(autoencoder, trust_remote_code=False, dtype=torch.float32)
        if isinstance(autoencoder, Path)
        else autoencoder
    )
    model = model.to(device).eval()
    model.config.mask_ratio = DROP
    classifier = classifier.to(device).requires_grad_(False)

    def forward_and_backward():
        for batch in images.split(batch_size):
            leaf = batch.to(device).requires_grad_()
            torch.autograd.grad(classifier(leaf).sum(), leaf)

    def forward():
        with torch.inference_mode():
            for batch in images.split(batch_size):
                model(batch.to(device))

    return timed(forward_and_backward, device), timed(forward, device)


def step(name, dataset, given, networks, batch_size, args, device) -> None:
    """One row: the shortest of some rounds on either side."""
    patches = PatchConfig(drop_ratio=DROP, batch_size=batch_size, target="argmax")
    config = QuantizeConfig(
        bins=BinConfig(num_bins=1, by_label=False), selection=SelectionConfig(keep_ratio=1.0), patches=patches
    )
    images = torch.stack([TENSOR(image) for image, _ in dataset])
    ours, theirs = [], []
    for _ in range(args.rounds):
        theirs.append(bare(*networks, images, batch_size, device))
        with tempfile.TemporaryDirectory() as cache:
            options = {"cache_dir": cache, "device": str(device), "progress": False}
            info = quantize(dataset, config, encoder=(MeanColour(), TENSOR), **given, **options)
        ours.append([info.seconds[station] for station in ("saliency", "store", "filling")])
    mine, other = min(ours, key=sum), min(theirs, key=sum)
    cells = " | ".join(f"{1000 * value / len(images):.2f}" for value in (*mine, *other))
    print(f"| {name}, {len(images)} images | {cells} | {sum(other) / sum(mine):.2f} |", flush=True)


def samples_per_second(loader) -> float:
    started, count = time.perf_counter(), 0
    for images, _ in loader:
        count += len(images)
    return count / (time.perf_counter() - started)


def loaders(name, dataset, args) -> None:
    """One row: the loader of filled images and that of the same samples, whole, in a packed store."""
    with tempfile.TemporaryDirectory() as cache:
        pair = []
        for patches in (PatchConfig(drop_ratio=DROP, saliency="variance", reconstructor="bundled"), PatchConfig()):
            config = QuantizeConfig(store="packed", selection=SelectionConfig(keep_ratio=1.0), patches=patches)
            module = QuantizedDataModule(
                dataset, config=config, encoder=(MeanColour(), TENSOR), cache_dir=cache, num_workers=0, transform=TENSOR
            )
            module.prepare_data()
            module.setup("fit")
            pair.append(module.train_dataloader())
        rates = [[samples_per_second(loader) for loader in pair] for _ in range(args.rounds + 2)][1:]
    ratio = statistics.median(ours / theirs for ours, theirs in rates)
    ours, theirs = (statistics.median(column) for column in zip(*rates, strict=True))
    print(f"| {name} | {ours:,.0f} | {theirs:,.0f} | {ratio:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="an ImageFolder of images of one size")
    parser.add_argument("--count", type=int, default=64, help="photos; of the small images 96 times as many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = resolve_device(args.device)
    folder = ImageFolder(args.photos)
    photos = Subset(folder, range(0, len(folder), max(1, len(folder) // args.count))[: args.count])
    whole = SampleCIFAR10()
    # enough of them that loading the networks does not count
    small = Subset(whole, [i % len(whole) for i in range(96 * args.count)])
    print(
        "| ms an image | saliency | packing | filling | classifier, forward and backward | autoencoder, forward | "
        "networks alone / ours |\n|---|---|---|---|---|---|---|"
    )
    networks = photo_networks()
    given = {"classifier": (networks[0], TENSOR), "reconstructor": networks[1]}
    step("photos", photos, given, networks, 16, args, device)
    step("small", small, {}, (load_small_resnet()[0].eval(), bundled_folder()), 64, args, device)
    print("\n| train loader | filled, images/s | plain packed store, images/s | ratio |\n|---|---|---|---|")
    loaders("small", small, args)
    loaders("photos", photos, args)


if __name__ == "__main__":
    main()
