"""Streams of small images, from tar files or made on the way: the whole flow, one epoch, and the memory that it takes.

    python benchmarks/streams.py make FOLDER NUMBER    write NUMBER images of 16 x 16 pixels (JPEG) into 100 tars
    python benchmarks/streams.py run FOLDER            the whole flow over them; seconds and peak memory
    python benchmarks/streams.py made FOLDER NUMBER    the same for NUMBER images of a torch stream with ready features
    python benchmarks/streams.py bare FOLDER NUMBER    the features against a bare loop over the first NUMBER tars

The encoder of the tars is a tiny convolution. Memory is the peak of the process, with mapped files and without them.
"""

import argparse
import io
import itertools
import resource
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import IterableDataset

TARS, SIDE, WIDTH, BATCH = 100, 16, 32, 256


def make(folder: Path, number: int) -> None:
    """Write images whose class, of 100, is their colour and coarse pattern, so that bins have something to find."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (100, 4, 4, 3), dtype=np.int16)
    each = number // TARS
    for tar_number in range(TARS):
        with tarfile.open(folder / f"{tar_number:03}.tar", "w") as tar:
            for i in range(each):
                label = (tar_number * each + i) % 100
                noise = random.integers(-40, 40, (SIDE, SIDE, 3), dtype=np.int16)
                pixels = coarse[label].repeat(SIDE // 4, 0).repeat(SIDE // 4, 1) + noise
                file = io.BytesIO()
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=80)
                for name, data in ((f"{i:06}.jpg", file.getvalue()), (f"{i:06}.cls", str(label).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def encoder() -> tuple[nn.Module, "Scale"]:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, WIDTH, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return body.eval(), Scale()


class Scale:
    """The preprocessing: [3, H, W] in [0, 1]."""

    identity = "scale"

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


class Memory(threading.Thread):
    """Notes the largest memory of the process that no file backs, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest = 0

    def run(self) -> None:
        while True:
            facts = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.largest = max(self.largest, int(facts["RssAnon"].split()[0]) * 1024)
            time.sleep(0.2)


class Made(IterableDataset):
    """Images that are made anew in each pass."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self):
        random = np.random.default_rng(0)
        for start in range(0, self.number, 10000):
            pixels = random.integers(0, 256, (10000, SIDE, SIDE, 3), dtype=np.uint8)
            for i in range(10000):
                yield pixels[i], (start + i) % 100


def ready(path: Path, number: int) -> Path:
    """Write features of 100 classes, a file of float32 [number, WIDTH]."""
    random = np.random.default_rng(1)
    centres = random.normal(size=(100, WIDTH)).astype(np.float32)
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (number, WIDTH))
    for start in range(0, number, 10000):
        noise = random.normal(size=(10000, WIDTH)) / 2
        rows[start : start + 10000] = centres[np.arange(start, start + 10000) % 100] + noise
    rows.flush()
    return path


def run(folder: Path, cache: Path, number: int | None = None) -> None:
    """Print seconds and memory of the whole flow over the tars of a folder, or over `number` images that are made."""
    from dq_lightning import QuantizedDataModule

    memory = Memory()
    memory.start()
    started = time.perf_counter()

    def transform(row: dict) -> dict:
        return {"image": [Scale()(image.convert("RGB")) for image in row["jpg"]], "label": row["cls"]}

    if number is None:
        own = {"train": str(folder), "encoder": encoder(), "transform": transform}
    else:
        folder.mkdir(parents=True, exist_ok=True)
        own = {"train": Made(number), "encoder": ready(folder / "ready.npy", number)}
    module = QuantizedDataModule(**own, keep_ratio=0.05, cache_dir=cache, batch_size=BATCH)
    module.prepare_data()
    module.setup("fit")
    print({**module.info.seconds, "all": round(time.perf_counter() - started, 1)}, flush=True)
    started, count = time.perf_counter(), 0
    for batch in module.train_dataloader():
        count += len(batch["label"] if number is None else batch[1])
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{count:,} of {module.info.num_source_samples:,} samples; epoch {time.perf_counter() - started:.1f} s")
    print(f"peak memory {whole / 2**30:.2f} GiB with mapped files, {memory.largest / 2**30:.2f} GiB without")


def bare(folder: Path, number: int) -> None:
    """Print the CPU seconds of features and of a bare loop over the first `number` tars, three times in turn."""
    from datasets import load_dataset

    from dq_lightning.features.choose import choose_encoder
    from dq_lightning.features.streams import extract_stream
    from dq_lightning.sources.adapt import as_source

    tars = sorted(map(str, folder.glob("*.tar")))[:number]
    network, scale = encoder()
    for _ in range(3):
        source, spec = as_source(tars), choose_encoder((network, scale))
        started = time.process_time()
        with tempfile.TemporaryDirectory() as place:
            made = extract_stream(source, spec, Path(place), device="cpu", batch_size=BATCH, progress=False)
        ours = time.process_time() - started
        started, rows = time.process_time(), []
        stream = iter(load_dataset("webdataset", data_files={"train": tars}, split="train", streaming=True))
        with torch.inference_mode():
            while batch := list(itertools.islice(stream, BATCH)):
                rows.append(network(torch.stack([scale(row["jpg"].convert("RGB")) for row in batch])))
        loop = time.process_time() - started
        assert torch.allclose(made, torch.cat(rows), atol=1e-5)
        speed = f"features {ours:.1f} s, bare loop {loop:.1f} s: {loop / ours:.2f} of its speed"
        print(f"{len(made):,} samples: {speed}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "run", "made", "bare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("number", type=int, nargs="?", default=10**6)
    parser.add_argument("--cache", type=Path)
    given = parser.parse_args()
    if given.what in ("run", "made"):
        cache = given.cache or Path(tempfile.mkdtemp())
        run(given.folder, cache, given.number if given.what == "made" else None)
    else:
        {"make": make, "bare": bare}[given.what](given.folder, given.number)
