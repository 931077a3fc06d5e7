"""What each policy of verification costs: opening and reading a packed eighth of CIFAR-10, and its features.

Usage: python benchmarks/verify.py
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dq_lightning.cache.entries import Cache
from dq_lightning.cache.tensors import read_features, write_features
from dq_lightning.core.records import Features
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.packed.writer import write_packed

KEPT, WHOLE, WIDTH = 6_250, 50_000, 128


def write_store(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (KEPT, 32, 32, 3), dtype=np.uint8)
    items = (((Image.fromarray(image), i % 10), None) for i, image in enumerate(pixels))
    ids = [str(i) for i in range(KEPT)]
    index, bins = torch.arange(KEPT), torch.zeros(KEPT, dtype=torch.int16)
    write_packed(folder, items, ids=ids, index=index, bins=bins, attributes={})


def seconds(act, repeats: int) -> float:
    """Median time of an act, files in memory."""
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        act()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def measure(root: Path, repeats: int) -> None:
    built = Cache(root)
    store = built.build("5-store", {"n": KEPT}, write_store)
    features = Features(torch.randn(WHOLE, WIDTH))
    table = built.build("1-features", {"n": WHOLE}, lambda folder: write_features(folder, features))
    print("| policy | find packed | open packed | read a sample | find features | load features |")
    print("|---|---|---|---|---|---|")
    for verify in ("off", "size", "hash"):
        cache = Cache(root, verify=verify)
        opened = PackedDataset(store, verify=verify)
        times = (
            seconds(lambda cache=cache: cache.find("5-store", {"n": KEPT}), repeats),
            seconds(lambda verify=verify: PackedDataset(store, verify=verify), repeats),
            seconds(lambda opened=opened: [opened[i] for i in range(KEPT)], repeats) / KEPT,
            seconds(lambda cache=cache: cache.find("1-features", {"n": WHOLE}), repeats),
            seconds(lambda verify=verify: read_features(table, verify=verify), repeats),
        )
        shown = [f"{1e6 * t:.1f} µs" if t < 1e-4 else f"{1e3 * t:.2f} ms" for t in times]
        print(f"| `{verify}` | {' | '.join(shown)} |")
    size = sum(path.stat().st_size for path in store.iterdir())
    print(f"packed: {size / 1e6:.1f} MB; features: {4 * WHOLE * WIDTH / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        measure(Path(place), given.repeats)
