"""Images per second of `extract_features` against a bare loop of the same network over ready-made batches, in one run.

    python benchmarks/features.py --cifar ROOT [--photos FOLDER --weights FILE] [--device auto]

ROOT holds torchvision's CIFAR10; FOLDER is an ImageFolder; FILE has weights of tf_efficientnet_lite0. The bare loop is given
batches that are decoded, resized and stacked, so on a CPU its lead is the price of decoding: the line "decode only" says what
decoding alone costs in one process.
"""

import argparse
import time
from pathlib import Path

import torch
from torchvision.datasets import CIFAR10, ImageFolder

from dq_lightning.core.devices import resolve_device
from dq_lightning.core.isolation import isolated
from dq_lightning.features.choose import choose_encoder
from dq_lightning.features.extract import extract_features
from dq_lightning.features.loading import ImageBatches, choose_num_workers

ROUNDS = 3


class DatasetSource:
    def __init__(self, dataset, count):
        self.dataset = dataset
        self.count = min(count, len(dataset))

    def __len__(self):
        return self.count

    def image(self, index):
        return self.dataset[index][0]

    def decode_warning(self, index):
        return None


def seconds_of(function, device):
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(name, source, spec, device, batch_size, num_workers):
    with isolated():
        encoder = spec.load(str(device))
        batches = ImageBatches(source, encoder.preprocess, list(torch.arange(len(source)).split(batch_size)))
        workers = choose_num_workers(batches, device) if num_workers == "auto" else num_workers
        started = time.perf_counter()
        ready = [batches[b].images for b in range(len(batches))]
        decode = time.perf_counter() - started
        if device.type == "cuda":
            ready = [images.pin_memory() for images in ready]

        def bare():
            with isolated():
                return torch.cat([encoder.embed(images).cpu() for images in ready])

        def ours():
            return extract_features(
                source, spec, device=str(device), batch_size=batch_size, num_workers=num_workers, progress=False
            )

        encoder.embed(ready[0])
        # in turns, so that a change of the machine's load meets both
        times = [(seconds_of(bare, device), seconds_of(ours, device)) for _ in range(ROUNDS)]
    bare_best, ours_best = (len(source) / min(column) for column in zip(*times, strict=True))
    print(f"{name}: {len(source)} images on {device}, batch {batch_size}, {workers} loader processes")
    print(f"  decode only    {len(source) / decode:9.1f} images/s in one process")
    print(f"  bare loop      {bare_best:9.1f} images/s")
    print(f"  extract        {ours_best:9.1f} images/s, loading the network included")
    print(f"  ratio          {ours_best / bare_best:9.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--num-workers", type=lambda text: text if text == "auto" else int(text), default="auto")
    parser.add_argument("--limit", type=int, default=10_000, help="images at most")
    options = parser.parse_args()
    device = resolve_device(options.device)
    if options.cifar:
        source = DatasetSource(CIFAR10(options.cifar, train=False), options.limit)
        spec = choose_encoder("bundled", image_size=(32, 32))
        compare("CIFAR-10, bundled network", source, spec, device, 256, options.num_workers)
    if options.photos and options.weights:
        source = DatasetSource(ImageFolder(options.photos), options.limit)
        spec = choose_encoder("tf_efficientnet_lite0", weights=options.weights, image_size=(224, 224))
        compare("photos, tf_efficientnet_lite0", source, spec, device, 64, options.num_workers)


if __name__ == "__main__":
    main()
