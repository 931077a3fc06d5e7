"""CPU seconds of `make_bins` on eight distributions, beside plain ways to make the same bins, in one run.

    python benchmarks/bins_regimes.py [--sizes 5000x64 20000x64] [--candidates-up-to 5000]

All columns are CPU seconds of one process (`time.process_time`), so other work on the machine matters little. "dense" keeps
running gains over a float32 matrix and "pass" makes one float32 product a pick (scaled from 50 picks); neither checks its
picks. "candidates" is the engine that knew candidates and proof alone. The regime is the one that finished each bin.
"""

import argparse
import time
from typing import ClassVar

import numpy as np
import torch

from dq_lightning.bins.graph_cut import engine as graph_cut
from dq_lightning.bins.make import make_bins


class Watched(graph_cut._Run):
    """The engine, which notes the regime that finishes each bin."""

    regimes: ClassVar = []

    def one_bin(self, sizes):
        gains = super().one_bin(sizes)
        names = {"MatrixScores": "dense", "PassScores": "stream", "NoneType": "candidates"}
        self.regimes.append(names[type(self._scores).__name__])
        return gains


graph_cut._Run = Watched


def distribution(name, total, width):
    generator = np.random.default_rng(0)
    values = generator.standard_normal((total, width), dtype=np.float32)
    if name in ("clusters", "centred"):
        spectrum = np.arange(1, width + 1, dtype=np.float32) ** -0.5
        centres = generator.standard_normal((50, width), dtype=np.float32)
        values = (0.5 + centres[generator.integers(0, 50, total)] + 0.7 * values) * spectrum
    if name == "centred":
        values -= values.mean(axis=0)
    if name == "relu":
        values = np.maximum(values, 0)
    if name == "rank 8 + noise":
        values = values[:, :8] @ generator.standard_normal((8, width), dtype=np.float32) + 0.01 * values
    if name == "duplicates":
        values = values[generator.integers(0, total // 10, total)]
    if name == "one-hot":
        values = np.eye(width, dtype=np.float32)[generator.integers(0, width, total)] + 0.01 * values
    if name == "strong mean":
        values = values + 3.0
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def dense(values):
    start = time.process_time()
    matrix = values @ values.T
    matrix *= 2.0
    left = np.ones(len(values), dtype=bool)
    for number in range(10):
        gains = values @ values[left].sum(axis=0)
        gains[~left] = -np.inf
        for _ in range(len(values) // 10 + (number < len(values) % 10)):
            best = gains.argmax()
            gains -= matrix[best]
            gains[best] = -np.inf
            left[best] = False
    return time.process_time() - start


def passes(values, picks=50):
    start = time.process_time()
    gains = values @ values.sum(axis=0)
    for _ in range(picks):
        best = gains.argmax()
        gains -= 2.0 * (values @ values[best])
        gains[best] = -np.inf
    # Later bins have 0.9, 0.8, ... of the rows.
    return (time.process_time() - start) / picks * len(values) * 0.55


def ours(values, engine):
    Watched.regimes.clear()
    start = time.process_time()
    bins = make_bins(values, similarity="dot", engine=engine, device="cpu", progress=False)
    return time.process_time() - start, bins


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="*", default=["5000x64", "20000x64"])
    parser.add_argument("--candidates-up-to", type=int, default=5000)
    options = parser.parse_args()
    make_bins(np.eye(64, dtype=np.float32), num_bins=2, device="cpu")  # first-use costs are not ours
    print("| rows, features | `make_bins` | bins by regime | dense | pass | candidates | ours / best (wanted <= 1.5) |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for size in options.sizes:
        total, width = map(int, size.split("x"))
        for name in (
            "gaussian",
            "clusters",
            "relu",
            "rank 8 + noise",
            "duplicates",
            "centred",
            "one-hot",
            "strong mean",
        ):
            values = distribution(name, total, width)
            seconds, bins = ours(values, "auto")
            regimes = ", ".join(f"{way} {Watched.regimes.count(way)}" for way in dict.fromkeys(Watched.regimes))
            others = [dense(values), passes(values)]
            shown = ""
            if total <= options.candidates_up_to:
                again, same = ours(values, "candidates")
                assert torch.equal(bins.rank, same.rank)
                others.append(again)
                shown = f"{again:.2f}"
            print(
                f"| {total:,} x {width} {name} | {seconds:.2f} | {regimes} | {others[0]:.2f} | ~{others[1]:.2f} | {shown} | "
                f"{seconds / min(others):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
