"""What a compact set under a budget of bytes costs beyond its features and bins, beside a bare loop over the same images.

The bare loop reads every image, saves it with Pillow as the codec and the quality that were chosen, and decodes the file
again. Half of it runs before and half after, because a busy machine changes what a CPU second is worth.

    python benchmarks/packing_cost.py --root data --max-bytes 5% 10%
"""

import argparse
import io
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Subset
from torchvision.datasets import CIFAR10

from dq_lightning import FeatureConfig, QuantizeConfig, SelectionConfig, quantize


class Clock:
    """Adds up CPU and wall seconds by name."""

    def __init__(self) -> None:
        self.spent: dict[str, np.ndarray] = {}
        self._since = self._now()

    def _now(self) -> np.ndarray:
        # Loader processes count once they have ended.
        times = os.times()
        return np.array([time.process_time() + times.children_user + times.children_system, time.perf_counter()])

    def note(self, name: str | None) -> None:
        """Add the time since the last call to a name, or to none."""
        now = self._now()
        if name is not None:
            self.spent[name] = self.spent.get(name, np.zeros(2)) + now - self._since
        self._since = now


def bare_loop(data: Subset, positions: range, codec: str, quality: int, clock: Clock) -> None:
    """Read, save and decode images."""
    for start in range(positions.start, positions.stop, 1000):
        clock.note(None)
        images = [data[i][0] for i in range(start, min(positions.stop, start + 1000))]
        clock.note("read")
        files = []
        for image in images:
            file = io.BytesIO()
            image.save(file, codec.upper(), quality=quality)
            files.append(file)
        clock.note("save")
        for file in files:
            Image.open(file).load()
        clock.note("decode")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("--max-bytes", nargs="+", default=["5%", "10%"])
    parser.add_argument("--limit", type=int, default=50_000)
    arguments = parser.parse_args()
    count = arguments.limit
    data = Subset(CIFAR10(arguments.root, train=True), range(count))
    with tempfile.TemporaryDirectory() as folder:
        features = Path(folder) / "features.npy"
        np.save(features, np.random.default_rng(0).normal(size=(count, 128)).astype(np.float32))
        encoder = FeatureConfig(encoder=str(features))
        first = QuantizeConfig(features=encoder, selection=SelectionConfig(keep_ratio=0.1))
        quantize(data, first, cache_dir=folder, progress=False)
        for share in arguments.max_bytes:
            clock = Clock()
            info = quantize(data, QuantizeConfig(max_bytes=share, features=encoder), cache_dir=folder, progress=False)
            clock.note("prepare")
            codec, quality = info.encoding["codec"], info.encoding["quality"]
            bare_loop(data, range(count // 2), codec, quality, clock)
            clock.note(None)
            shutil.rmtree(info.path)
            clock.note(None)
            quantize(data, QuantizeConfig(max_bytes=share, features=encoder), cache_dir=folder, progress=False)
            clock.note("prepare")
            bare_loop(data, range(count // 2, count), codec, quality, clock)
            clock.spent["prepare"] /= 2
            bare = clock.spent["read"] + clock.spent["save"] + clock.spent["decode"]
            print(f"{share}: {info.num_samples:,} samples as {codec} {quality}, {info.bytes:,} bytes")
            for name, (cpu, wall) in clock.spent.items():
                print(f"  {name}: {cpu:.1f} CPU seconds, {wall:.1f} s")
            cpu, wall = clock.spent["prepare"] / bare
            print(f"  prepare / (read + save + decode): {cpu:.2f} in CPU seconds, {wall:.2f} in seconds")


if __name__ == "__main__":
    main()
