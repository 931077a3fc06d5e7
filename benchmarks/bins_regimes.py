"""CPU seconds of `make_bins` on data of many distributions, beside plain ways to make the same bins, in one run.

    export OMP_NUM_THREADS=1
    python benchmarks/bins_regimes.py --results rows.jsonl [--rows NAME ...] [--alpaca FILE.npz] [--before FOLDER]

All columns are CPU seconds of one process (`time.process_time`), so other work on the machine matters less. "dense" keeps
running gains over a float32 matrix, and "pass" makes one float32 product a pick (~, scaled from 200 picks); neither checks
its picks. "published" sums every gain again at every pick. "before" is the engine that knew candidates and proof alone,
in the folder of an older copy of the project: `git archive 384ba2e | tar -x -C FOLDER`. The regime is the one that
finished each bin. Work of less than 1, 5 and 20 seconds is done 7, 3 and 2 times, all ways in turn, and the shortest
counts. "extra" is the greatest private memory beyond what was there before. A row that `--results` holds already is not run
again; the table of all of them is printed in the end.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

from dq_lightning.bins.make import make_bins
from dq_lightning.core.records import Features
from dq_lightning.features.whitening import whiten

DISTRIBUTIONS = (
    "gaussian",
    "clusters",
    "relu",
    "rank 8 + noise",
    "duplicates",
    "centred",
    "one-hot",
    "strong mean",
)


def unit(values):
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-30)


def distribution(name, total, width, seed=0):
    generator = np.random.default_rng(seed)
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
        values = values[:, :8] @ generator.standard_normal((min(8, width), width), dtype=np.float32) + 0.01 * values
    if name == "duplicates":
        values = values[generator.integers(0, max(1, total // 10), total)]
    if name == "one-hot":
        values = np.eye(width, dtype=np.float32)[generator.integers(0, width, total)] + 0.01 * values
    if name == "strong mean":
        values = values + 3.0
    return unit(values)


def gradients(clustered):
    """5,000 embeddings of 512 numbers and head gradients of ten classes."""
    generator = np.random.default_rng(0)
    embedding = generator.standard_normal((5000, 512), dtype=np.float32)
    gradient = generator.standard_normal((5000, 10), dtype=np.float32)
    if clustered:
        embedding += 3.0 * generator.standard_normal((8, 512), dtype=np.float32)[generator.integers(0, 8, 5000)]
        gradient *= 0.01
    return Features(torch.from_numpy(embedding), torch.from_numpy(gradient))


def alpaca(path, total=None, whitened=False):
    stored = np.load(path)
    values = unit(stored["q"].astype(np.float32) * stored["scale"][:, None])[:total]
    if whitened:
        values = unit(whiten(torch.from_numpy(values)).numpy())
    return values


def all_rows(options):
    """Return what every row is made of: its data, the settings of `make_bins`, and what it is compared with."""
    rows = {}
    for total, width in ((5000, 64), (20_000, 64), (20_000, 384)):
        for name in DISTRIBUTIONS:
            data = lambda name=name, total=total, width=width: distribution(name, total, width)  # noqa: E731
            rows[f"{total:,} x {width} {name}"] = data, {"similarity": "dot"}, ["dense", "pass"]
    for name, clustered in (("8 clusters", True), ("no clusters", False)):
        rows[f"gradients 5,000 x (10 x 513), {name}"] = lambda c=clustered: gradients(c), {}, ["published"]
    labels = np.arange(50_000) % 10
    for name in DISTRIBUTIONS:
        data = lambda name=name: distribution(name, 50_000, 128)  # noqa: E731
        rows[f"50,000 x 128 {name}, ten classes"] = data, {"similarity": "dot", "labels": labels}, []
    if options.alpaca:
        for total in (20_000, 52_002):
            data = lambda total=total: alpaca(options.alpaca, total, whitened=True)  # noqa: E731
            against = ["dense"] if total == 20_000 else []
            rows[f"Alpaca {total:,} x 384, whitened"] = data, {"similarity": "dot"}, against
        rows["Alpaca 52,002 x 384"] = lambda: alpaca(options.alpaca), {"similarity": "dot"}, ["before"]
    for total, width in ((200_000, 512), (1_000_000, 128)):
        for name in ("clusters", "gaussian"):
            data = lambda name=name, total=total, width=width: distribution(name, total, width)  # noqa: E731
            rows[f"{total:,} x {width} {name}"] = data, {"similarity": "dot"}, ["before"] if name == "clusters" else []
    return rows


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


def passes(values, picks=200):
    start = time.process_time()
    gains = values @ values.sum(axis=0)
    for _ in range(picks):
        best = gains.argmax()
        gains -= 2.0 * (values @ values[best])
        gains[best] = -np.inf
    # Later bins have 0.9, 0.8, ... of the rows.
    return (time.process_time() - start) / picks * len(values) * 0.55


def published(features):
    gradient = unit(features.head_gradient.numpy())
    inputs = unit(np.concatenate([np.ones((len(gradient), 1), np.float32), features.embedding.numpy()], axis=1))
    start = time.process_time()
    matrix = 0.5 + 0.5 * (gradient @ gradient.T) * (inputs @ inputs.T)
    left = np.arange(len(matrix))
    for number in range(10):
        inside = matrix[np.ix_(left, left)]
        picked = np.zeros(len(left), dtype=bool)
        for _ in range(len(matrix) // 10 + (number < len(matrix) % 10)):
            gains = inside.sum(axis=0) - 2.0 * inside[picked].sum(axis=0)
            gains[picked] = -np.inf
            picked[gains.argmax()] = True
        left = left[~picked]
    return time.process_time() - start


def watch_regimes():
    """Make the engine note the regime that finishes each bin."""
    from dq_lightning.bins.graph_cut import engine

    regimes = []

    class Watched(engine._Run):
        def one_bin(self, sizes):
            gains = super().one_bin(sizes)
            matrix = getattr(self._scores, "matrix", None) is not None
            regimes.append("candidates" if self._scores is None else "dense" if matrix else "stream")
            return gains

    engine._Run = Watched
    return regimes


def private_bytes():
    with Path("/proc/self/status").open() as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def ours(values, settings):
    """CPU seconds and greatest extra private bytes of `make_bins`."""
    before, peak, done = private_bytes(), [0], threading.Event()

    def watch():
        while not done.wait(0.05):
            peak[0] = max(peak[0], private_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.process_time()
    make_bins(values, device="cpu", progress=False, **settings)
    seconds = time.process_time() - start
    done.set()
    thread.join()
    return seconds, max(0, peak[0] - before)


def measure(name, row, options):
    data, settings, against = row
    values = data()
    regimes = watch_regimes()
    seconds, extra = ours(values, settings)
    used = ", ".join(f"{way} {regimes.count(way)}" for way in dict.fromkeys(regimes))
    ways = {"dense": dense, "pass": passes, "published": published}
    others = {way: float("inf") for way in against if way in ways}
    for turn in range(7 if seconds < 1 else 3 if seconds < 5 else 2 if seconds < 20 else 1):
        seconds = min(seconds, ours(values, settings)[0]) if turn else seconds
        others = {way: min(shortest, ways[way](values)) for way, shortest in others.items()}
    if "before" in against and options.before:
        command = [sys.executable, __file__, "--only", name, "--alpaca", options.alpaca or ""]
        old = os.environ | {"PYTHONPATH": options.before}
        result = subprocess.run(command, env=old, capture_output=True, text=True, check=True)
        others["before"] = float(result.stdout.split()[-1])
    return {"row": name, "seconds": seconds, "regimes": used, "extra": extra, "others": others}


def show(results):
    print("| rows, features | `make_bins` | bins by regime | extra memory | instead | ours / best of them |")
    print("|---|---|---|---|---|---|")
    for result in results:
        others = result["others"]
        instead = ", ".join(f"{way} {'~' * (way == 'pass')}{seconds:.2f}" for way, seconds in others.items())
        ratio = f"{result['seconds'] / min(others.values()):.2f}" if others else ""
        extra = f"{result['extra'] / 2**20:,.0f} MiB"
        print(f"| {result['row']} | {result['seconds']:.2f} | {result['regimes']} | {extra} | {instead} | {ratio} |")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path, default=Path("bins_regimes.jsonl"), help="file of finished rows")
    parser.add_argument("--rows", nargs="*", default=[""], help="beginnings of the names of rows to run")
    parser.add_argument("--alpaca", help="embeddings of the Alpaca instructions")
    parser.add_argument("--before", help="folder of the older copy of the project")
    parser.add_argument("--only", help="print the CPU seconds of make_bins for one row, and no more")
    options = parser.parse_args()
    torch.set_num_threads(1)
    make_bins(distribution("one-hot", 1000, 16), device="cpu")  # first-use costs are not ours
    rows = all_rows(options)
    if options.only:
        data, settings, _ = rows[options.only]
        print(ours(data(), settings)[0])
        return
    done = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    for name, row in rows.items():
        if name.startswith(tuple(options.rows)) and name not in {result["row"] for result in done}:
            done.append(measure(name, row, options))
            with options.results.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
    show(done)


if __name__ == "__main__":
    main()
