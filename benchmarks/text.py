"""Instruction data: diversity of subsets, and time and memory from embeddings to the compact JSON.

python benchmarks/text.py --alpaca-json alpaca_data.json --embeddings embeddings.npy
python benchmarks/text.py --alpaca-json ... --embeddings ... --only cost        # in a process of its own: the memory counts

Embeddings are a .npy [N, D], or a .npz with `q` int8 [N, D] and `scale` [N]. The JSON may be packed by xz.
"""

import argparse
import json
import lzma
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diversity import measure_diversity

from dq_lightning.bins.clusters import kmeans
from dq_lightning.bins.make import make_bins
from dq_lightning.evaluation.baselines import baseline_selection
from dq_lightning.exports.rows import write_json
from dq_lightning.selection.select import select

CLUSTERS = 1000


def read_rows(path: Path) -> list[dict]:
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def read_embeddings(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        rows = np.load(path).astype(np.float32)
    else:
        with np.load(path) as file:
            rows = file["q"].astype(np.float32)
            rows *= file["scale"].astype(np.float32)[:, None]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def cost(args: argparse.Namespace) -> None:
    """Wall seconds of every part of selecting 10 %, and the peak memory of the process."""
    marks = [time.perf_counter()]

    def mark() -> float:
        marks.append(time.perf_counter())
        return marks[-1] - marks[-2]

    rows, embeddings = read_rows(args.alpaca_json), read_embeddings(args.embeddings)
    reading = mark()
    bins = make_bins(embeddings, num_bins=10, similarity="dot", progress=False)
    binning = mark()
    kept = select(bins, keep_ratio=0.1)
    with tempfile.TemporaryDirectory() as folder:
        size = write_json(rows, kept.index, Path(folder) / "kept.json").stat().st_size
    writing = mark()
    processor = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        "| rows | kept | read | bins | select and write | all | of all cores | JSON | peak memory |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    print(
        f"| {len(rows):,} | {len(kept):,} | {reading:.1f} s | {binning:.1f} s | {writing:.1f} s | "
        f"{marks[-1] - marks[0]:.1f} s | {processor:.1f} s | "
        f"{size / 1e6:.1f} MB | {peak:.2f} GiB |",
        flush=True,
    )


def diversity(args: argparse.Namespace) -> None:
    """A row for every way of choosing at 1 % and 10 %."""
    rows, embeddings = read_rows(args.alpaca_json), read_embeddings(args.embeddings)
    _, clusters = kmeans(embeddings, CLUSTERS)
    bins = make_bins(embeddings, num_bins=10, similarity="dot", progress=False)
    features = torch.from_numpy(embeddings)
    print(
        f"| kept | by | rows | distance to the nearest | clusters of {CLUSTERS:,} | verbs | characters of a response | "
        "chosen in |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for ratio in (0.01, 0.1):
        for name, data in (("DQ", None), ("random", rows), ("longest", rows), ("kmeans", features)):
            started = time.perf_counter()
            kept = (
                select(bins, keep_ratio=ratio, seed=args.seed)
                if data is None
                else baseline_selection(name, data, keep_ratio=ratio, seed=args.seed)
            )
            seconds = time.perf_counter() - started
            seen = measure_diversity(rows, embeddings, clusters, kept.index.numpy())
            print(
                f"| {ratio:.0%} | {name} | {seen.rows:,} | {seen.neighbour_distance:.3f} | {seen.clusters} | {seen.verbs} | "
                f"{seen.response_length:.0f} | {seconds:.1f} s{' after the bins' if data is None else ''} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alpaca-json", type=Path, required=True)
    parser.add_argument("--embeddings", type=Path, required=True)
    parser.add_argument("--only", choices=["cost", "diversity"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, measure in (("cost", cost), ("diversity", diversity)):
        if args.only in (None, name):
            measure(args)


if __name__ == "__main__":
    main()
