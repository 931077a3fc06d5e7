"""Seconds and memory of `make_bins`, each beside what a user would run instead, in one run.

    python benchmarks/bins.py [--alpaca minilm_embeddings_int8.npz] [--rows NAME ...] [--device cpu]

Every row runs in a process of its own. "extra" is the greatest private memory above what was there before. "instead" is
    recompute   the dense matrix, every gain summed again at every pick (what the published code does)
    matvec      the matrix-free running gains, one float32 matrix-vector product a pick
and where it would take too long it is measured on the first picks of the first bin and scaled to all picks, marked ~.
apricot and submodlib are measured where they are installed: pip install apricot-select submodlib-py
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from dq_lightning.bins.make import make_bins
from dq_lightning.core.records import Features

ROWS = {}


def row(function):
    ROWS[function.__name__] = function
    return function


def private_bytes():
    with Path("/proc/self/status").open() as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def measure(function):
    """(seconds, greatest extra private bytes, result)"""
    before, peak, done = private_bytes(), [0], threading.Event()

    def watch():
        while not done.wait(0.01):
            peak[0] = max(peak[0], private_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    return seconds, max(0, peak[0] - before), result


def clusters(total, width, count=1000, dtype=np.float32, out=None, seed=0):
    """Clusters with a common mean on a falling spectrum, as image and text embeddings have."""
    generator = np.random.default_rng(seed)
    spectrum = np.arange(1, width + 1, dtype=np.float32) ** -0.5
    centres = generator.standard_normal((count, width), dtype=np.float32) * spectrum
    values = np.empty((total, width), dtype) if out is None else out
    for start in range(0, total, 50_000):
        size = min(50_000, total - start)
        noise = generator.standard_normal((size, width), dtype=np.float32)
        values[start : start + size] = (
            0.5 * spectrum + centres[generator.integers(0, count, size)] + 0.7 * noise * spectrum
        )
    return values


def unit(values):
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-30)


def recompute(S, sizes, limit=None):
    """Bins as published: every gain is summed again at every pick."""
    left, done = np.arange(len(S)), 0
    start = time.perf_counter()
    for size in sizes:
        inside = S[np.ix_(left, left)]
        picked = np.zeros(len(left), dtype=bool)
        for _ in range(size):
            gains = inside.sum(axis=0) - 2.0 * inside[picked].sum(axis=0)
            gains[picked] = -np.inf
            picked[gains.argmax()] = True
            done += 1
            if done == limit:
                return time.perf_counter() - start
        left = left[~picked]
    return time.perf_counter() - start


def matvec(values, picks):
    """Running gains of the first bin, one product a pick."""
    start = time.perf_counter()
    gains = values @ values.sum(axis=0)
    for _ in range(picks):
        best = gains.argmax()
        gains -= 2.0 * (values @ values[best])
        gains[best] = -np.inf
    return time.perf_counter() - start


def scaled_matvec(values, picks=50):
    """Time of all picks of ten bins, from some of the first bin: later bins have 0.9, 0.8, ... of the rows."""
    seconds = matvec(values, picks) / picks
    return seconds * len(values) * 0.55


def report(seconds, extra, stored, instead=None, scaled=False):
    return {"seconds": seconds, "extra": extra, "stored": stored, "instead": instead, "scaled": scaled}


@row
def cifar_class_gradients(options):
    """one class, 5,000 x (10 x 513) gradients | recompute"""
    embedding = clusters(5000, 512, 5)
    gradient = clusters(5000, 10, 5, seed=1)
    features = Features(torch.from_numpy(embedding), torch.from_numpy(gradient))
    seconds, extra, _ = measure(lambda: make_bins(features, device=options.device))
    inputs = np.concatenate([np.ones((5000, 1), np.float32), embedding], axis=1)
    S = 0.5 + 0.5 * (unit(gradient) @ unit(gradient).T) * (unit(inputs) @ unit(inputs).T)
    return report(seconds, extra, embedding.nbytes + gradient.nbytes, recompute(S, [500] * 10))


@row
def cifar_class_embeddings(options):
    """one class, 5,000 x 64 | recompute"""
    values = clusters(5000, 64, 5)
    seconds, extra, _ = measure(lambda: make_bins(values, device=options.device))
    return report(seconds, extra, values.nbytes, recompute(0.5 + 0.5 * unit(values) @ unit(values).T, [500] * 10))


@row
def cifar_all(options):
    """50,000 x 64, 10 classes | recompute"""
    values, labels = clusters(50_000, 64, 50), np.arange(50_000) % 10
    seconds, extra, _ = measure(lambda: make_bins(values, labels=labels, device=options.device))
    one = unit(values[labels == 0])
    # the first 100 picks work on all 5,000 rows; a bin of the ten works on 0.385 times as many numbers in the mean
    instead = recompute(0.5 + 0.5 * one @ one.T, [500] * 10, limit=100) / 100 * 50_000 * 0.385
    return report(seconds, extra, values.nbytes, instead, True)


@row
def imagenet(options):
    """1,281,167 x 768 float16, 1,000 classes | matvec"""
    labels = np.arange(1_281_167) % 1000
    values = np.empty((len(labels), 768), np.float16)
    generator = np.random.default_rng(0)
    spectrum = np.arange(1, 769, dtype=np.float32) ** -0.5
    centres = generator.standard_normal((1000, 768), dtype=np.float32) * spectrum
    for start in range(0, len(labels), 50_000):
        part = labels[start : start + 50_000]
        noise = generator.standard_normal((len(part), 768), dtype=np.float32)
        values[start : start + 50_000] = 0.5 * spectrum + centres[part] + 0.7 * noise * spectrum
    seconds, extra, _ = measure(lambda: make_bins(values, labels=labels, device=options.device))
    one = unit(values[labels == 0].astype(np.float32))
    return report(seconds, extra, values.nbytes, scaled_matvec(one) * 1000, True)


@row
def alpaca(options):
    """Alpaca, 52,002 x 384, dot product | matvec"""
    if options.alpaca:
        stored = np.load(options.alpaca)
        values = unit(stored["q"].astype(np.float32) * stored["scale"][:, None])
    else:
        values = unit(clusters(52_002, 384))
    seconds, extra, _ = measure(lambda: make_bins(values, similarity="dot", device=options.device))
    return report(seconds, extra, values.nbytes, scaled_matvec(values, 200), True)


@row
def one_class_200k(options):
    """200,000 x 512, one class | matvec"""
    values = clusters(200_000, 512)
    seconds, extra, _ = measure(lambda: make_bins(values, device=options.device))
    return report(seconds, extra, values.nbytes, scaled_matvec(unit(values)), True)


@row
def million(options):
    """1,000,000 x 128, no labels | matvec"""
    values = clusters(1_000_000, 128)
    seconds, extra, _ = measure(lambda: make_bins(values, device=options.device))
    return report(seconds, extra, values.nbytes, scaled_matvec(unit(values)), True)


@row
def ten_million(options):
    """10,000,000 x 64 float16, mapped from a file"""
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        path = Path(folder) / "features.npy"
        values = np.lib.format.open_memmap(path, "w+", np.float16, (10_000_000, 64))
        clusters(len(values), 64, out=values)
        values.flush()
        del values
        mapped = np.load(path, mmap_mode="r")
        seconds, extra, _ = measure(lambda: make_bins(mapped, device=options.device))
        return report(seconds, extra, mapped.nbytes)


def peer_values():
    return np.abs(clusters(4000, 64, 10)).astype(np.float64)


def first_bin(bins):
    members = torch.nonzero(bins.assignment == 0).flatten()
    return members[bins.rank[members].argsort()].tolist()


@row
def apricot(options):
    """4,000 x 64, all 4,000 picks; the first 400 compared | apricot"""
    import apricot

    values = unit(peer_values())
    make_bins(values, device=options.device)  # first-use costs are no more ours than theirs
    S = 0.5 + 0.5 * values @ values.T
    apricot.GraphCutSelection(5, metric="precomputed", optimizer="naive").fit(S[:200, :200])  # compiles
    start = time.perf_counter()
    S = 0.5 + 0.5 * values @ values.T
    theirs = apricot.GraphCutSelection(4000, metric="precomputed", optimizer="naive").fit(S).ranking.tolist()
    instead = time.perf_counter() - start
    seconds, extra, bins = measure(lambda: make_bins(values, device=options.device))
    print("same picks as apricot:", first_bin(bins) == theirs[:400], file=sys.stderr)
    # as many picks, ours in ten bins
    return report(seconds, extra, values.nbytes, instead)


@row
def submodlib(options):
    """4,000 x 64, first 400 picks | submodlib"""
    import submodlib

    values = unit(peer_values())
    make_bins(values, similarity="dot", device=options.device)
    start = time.perf_counter()
    function = submodlib.GraphCutFunction(n=4000, mode="dense", lambdaVal=1.0, data=values, metric="cosine")
    theirs = [pick for pick, _ in function.maximize(budget=400, optimizer="NaiveGreedy", show_progress=False)]
    instead = time.perf_counter() - start
    seconds, extra, bins = measure(lambda: make_bins(values, similarity="dot", device=options.device))
    print("same picks as submodlib:", first_bin(bins) == theirs, file=sys.stderr)
    return report(seconds, extra, values.nbytes, instead)


def growth(count):
    def run(options):
        values = clusters(count, 128)
        seconds, extra, _ = measure(lambda: make_bins(values, device=options.device))
        return report(seconds, extra, values.nbytes)

    run.__doc__ = f"growth: {count:,} x 128, no labels"
    return run


for number in (25_000, 50_000, 100_000):
    ROWS[f"growth_{number}"] = growth(number)


def machine(device):
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    gpu = f", {torch.cuda.get_device_name()}" if device.startswith("cuda") else ""
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{name}, {cores}{gpu}; torch {torch.__version__}, numpy {np.__version__}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--alpaca", help="npz of int8 sentence embeddings, q [52002, 384] and scale")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scratch", help="folder for the mapped file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        make_bins(np.eye(64, dtype=np.float32), num_bins=2, device=options.device)  # first-use costs are not ours
        print(json.dumps(ROWS[options.one](options)))
        return
    print(machine(options.device))
    print("| work | seconds | extra memory | instead | times faster |\n|---|---|---|---|---|", flush=True)
    passed = ["--device", options.device]
    passed += ["--alpaca", options.alpaca] if options.alpaca else []
    passed += ["--scratch", options.scratch] if options.scratch else []
    for name in options.rows:
        work, _, what = ROWS[name].__doc__.partition(" | ")
        run = subprocess.run([sys.executable, __file__, "--one", name, *passed], capture_output=True, text=True)
        notes = [line for line in run.stderr.splitlines() if line.startswith("same picks")]
        if run.returncode:
            reason = [f"status {run.returncode}", *run.stderr.strip().splitlines()][-1]
            print(f"| {work} | not run: {reason} | | {what} | |", flush=True)
            continue
        got = json.loads(run.stdout.splitlines()[-1])
        memory = f"{got['extra'] / 2**20:.0f} MiB ({got['extra'] / got['stored']:.1f} x the features)"
        instead, faster = "", ""
        if got["instead"]:
            mark = "~" if got["scaled"] else ""
            instead = f"{what}: {mark}{got['instead']:.1f} s"
            faster = f"{mark}{got['instead'] / got['seconds']:.0f}"
        work += "".join(f" ({note})" for note in notes)
        print(f"| {work} | {got['seconds']:.2f} | {memory} | {instead} | {faster} |", flush=True)


if __name__ == "__main__":
    main()
