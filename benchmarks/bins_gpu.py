"""Seconds of `make_bins` on a GPU, with the regime that was used, and whether the picks are those of the CPU.

    python benchmarks/bins_gpu.py [--seconds 100] [--regimes]

One line is printed for each row as soon as it is done. A row ends when it has taken 25 seconds or the given time is over,
and then tells how many picks were made. The first rows compare the picks with the float64 greedy on the CPU.

`--regimes` runs other rows: 20,000 x 64 and 20,000 x 384 in each regime, and then 1,000,000 x 128 gaussian and clusters, which
may take all of the time that is left, the first of them two thirds of it.
"""

import argparse
import logging
import time
import traceback
from typing import ClassVar

import numpy as np
import torch

from dq_lightning.bins.graph_cut import engine as graph_cut
from dq_lightning.bins.graph_cut.device import DevicePicks
from dq_lightning.bins.make import make_bins

BEGIN = time.perf_counter()
LIMIT = 100.0


def gaussian(total, width, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(total, width, generator=generator, device="cuda")


def clusters(total, width, count=1000, seed=0):
    """Clusters with a common mean on a falling spectrum."""
    spectrum = torch.arange(1, width + 1, device="cuda", dtype=torch.float32) ** -0.5
    centres = gaussian(count, width, seed) * spectrum
    generator = torch.Generator("cuda").manual_seed(seed + 1)
    which = torch.randint(0, count, (total,), generator=generator, device="cuda")
    return 0.5 * spectrum + centres[which] + 0.7 * gaussian(total, width, seed + 2) * spectrum


def centred(total, width):
    values = clusters(total, width)
    return values - values.mean(dim=0)


def so_far():
    return time.perf_counter() - BEGIN


class StoppedError(Exception):
    """Raised to end a row whose time is over."""


class Watched(graph_cut._Run):
    """The engine, which notes the regime that finishes each bin and the seconds that each bin takes."""

    regimes: ClassVar = []
    seconds: ClassVar = []
    picks = 0
    end = float("inf")

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        tick = self._tick

        def counted(made):
            Watched.picks += made
            if time.perf_counter() > Watched.end:
                Watched.regimes.append(self._name())
                raise StoppedError
            return tick(made)

        self._tick = counted

    def _name(self):
        if self._scores is None:
            return "candidates"
        name = "stream" if self._scores.matrix is None else "dense"
        return name if isinstance(self._scores, DevicePicks) else f"{name} (host)"

    def one_bin(self, sizes):
        start = time.perf_counter()
        gains = super().one_bin(sizes)
        self.seconds.append(time.perf_counter() - start)
        self.regimes.append(self._name())
        return gains


graph_cut._Run = Watched


def timed(values, seconds=25.0, **settings):
    Watched.regimes, Watched.seconds, Watched.picks = [], [], 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    Watched.end = min(start + seconds, BEGIN + LIMIT)
    bins = None
    try:
        bins = make_bins(values, device="cuda", progress=False, **settings)
        torch.cuda.synchronize()
    except StoppedError:
        pass
    seconds = time.perf_counter() - start
    regimes = " ".join(f"{name}:{Watched.regimes.count(name)}" for name in dict.fromkeys(Watched.regimes))
    return seconds, regimes, torch.cuda.max_memory_allocated() / 2**30, bins


def plain(values):
    """(bin, rank) of each row by running float64 gains over the matrix of inner products, on the CPU."""
    S = values.double().cpu().numpy()
    S = S @ S.T
    total, left = len(S), np.ones(len(S), dtype=bool)
    bins, ranks = np.zeros(total, int), np.zeros(total, int)
    for number in range(10):
        gains = np.where(left, S[left].sum(axis=0), -np.inf)
        for rank in range(total // 10 + (number < total % 10)):
            best = int(gains.argmax())
            bins[best], ranks[best], left[best] = number, rank, False
            gains -= 2.0 * S[best]
            gains[best] = -np.inf
    return bins, ranks


def check(name, values, engines, against="plain", **settings):
    start = time.perf_counter()
    if against == "plain":
        right = plain(values)
    else:
        bins = make_bins(values.cpu(), device="cpu", engine=against, progress=False, **settings)
        right = bins.assignment.numpy(), bins.rank.numpy()
    on_cpu = time.perf_counter() - start
    answers = []
    for engine in engines:
        try:
            seconds, _, _, bins = timed(values, engine=engine, **settings)
            equal = np.array_equal(bins.assignment, right[0]) and np.array_equal(bins.rank, right[1])
            answers.append(f"{engine} {seconds:.2f} s {'equal' if equal else 'DIFFERENT'}")
        except Exception as error:
            traceback.print_exc()
            answers.append(f"{engine} FAILED {error!r:.200}")
    print(
        f"| {name}, {len(values):,} x {values.shape[1]} | picks against {against} on the CPU ({on_cpu:.2f} s): "
        f"{'; '.join(answers)} |",
        flush=True,
    )


def row(name, values, **settings):
    """Run one row; `settings` are `seconds` and those of `make_bins`."""
    try:
        seconds, regimes, memory, bins = timed(values, **settings)
    except Exception as error:
        traceback.print_exc()
        print(f"| {name}, {len(values):,} x {values.shape[1]} | FAILED {error!r:.200} |", flush=True)
        return
    each = " ".join(f"{part:.2f}" for part in Watched.seconds) if len(Watched.seconds) <= 10 else "many"
    part = "" if bins is not None else f" for {Watched.picks:,} picks"
    print(
        f"| {name}, {len(values):,} x {values.shape[1]} | {seconds:.2f} s{part} | bins by regime: {regimes} | "
        f"{memory:.1f} GiB | finished bins: {each} |",
        flush=True,
    )


def on_the_host(name, values):
    """The matrix is made on the GPU, and the processor picks from it."""
    device_from, graph_cut.MATRIX_FROM = graph_cut.MATRIX_FROM, 1 << 60
    row(f"{name}, picks on the host", values, engine="dense")
    graph_cut.MATRIX_FROM = device_from


def main():
    global LIMIT
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=95.0)
    parser.add_argument("--regimes", action="store_true")
    options = parser.parse_args()
    LIMIT = options.seconds
    logging.getLogger("dq_lightning").setLevel(logging.WARNING)
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    make_bins(gaussian(3000, 16), device="cuda", engine="dense")  # first-use costs
    make_bins(gaussian(3000, 16), device="cuda", engine="stream")
    twice = gaussian(1000, 32).repeat(3, 1)
    labels = np.arange(50_000) % 10
    million = 1_000_000
    works = [
        lambda: check("gaussian", gaussian(4000, 32), ["dense", "stream", "auto"], similarity="dot"),
        lambda: check("clusters", clusters(4000, 64, 20), ["dense", "stream", "candidates"], similarity="dot"),
        lambda: check("duplicates", twice, ["dense", "stream"], against="dense"),
        lambda: row("gaussian", gaussian(20_000, 64)),
        lambda: row("gaussian, stream", gaussian(20_000, 64), engine="stream"),
        lambda: on_the_host("gaussian", gaussian(20_000, 64)),
        lambda: row("gaussian", gaussian(5_000, 64)),
        lambda: on_the_host("gaussian", gaussian(5_000, 64)),
        lambda: row("centred", centred(20_000, 64)),
        lambda: row("gaussian", gaussian(20_000, 384)),
        lambda: row("centred", centred(20_000, 384)),
        lambda: row("10 classes, clusters", clusters(50_000, 1280), labels=labels),
        lambda: row("10 classes, gaussian", gaussian(50_000, 1280), labels=labels),
        lambda: row("gaussian", gaussian(million, 128)),
        lambda: row("clusters", clusters(million, 128)),
    ]
    if options.regimes:
        works = [
            lambda width=width, engine=engine: row(f"gaussian, {engine}", gaussian(20_000, width), engine=engine)
            for width in (64, 384)
            for engine in ("auto", "stream", "dense")
        ]
        works.append(lambda: row("gaussian", gaussian(million, 128), seconds=(LIMIT - so_far()) * 2 / 3))
        works.append(lambda: row("clusters", clusters(million, 128), seconds=LIMIT))
    for work in works:
        if so_far() > LIMIT * 0.9:
            print(f"| stopped after {so_far():.0f} s |", flush=True)
            return
        work()
    print(f"| all done after {so_far():.0f} s |", flush=True)


if __name__ == "__main__":
    main()
