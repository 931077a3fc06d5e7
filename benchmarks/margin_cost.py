"""What the margin scores cost on a CPU: seconds and memory for synthetic features, and what follows for more rows.

Time grows linearly with the rows: it is measured at two sizes, and the line through them gives a third.

    python benchmarks/margin_cost.py --rows 20000 60000 --width 2048 --classes 1000 --scale-to 1281167
"""

import argparse
import resource
import time

import numpy as np
import torch

from dq_lightning import margin_scores


def features_of(rows: int, width: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float16 features [rows, width] that are noise around the mean of their class, and their labels."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, classes, rows)
    means = 0.15 * draw.standard_normal((classes, width), dtype=np.float32)
    features = np.empty((rows, width), np.float16)
    for start in range(0, rows, 4096):
        part = labels[start : start + 4096]
        features[start : start + 4096] = draw.standard_normal((len(part), width), dtype=np.float32) + means[part]
    return torch.from_numpy(features), torch.from_numpy(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000])
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scale-to", type=int, help="rows that the time is extrapolated to; needs two --rows")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cpu = []
    for rows in arguments.rows:
        features, labels = features_of(rows, arguments.width, arguments.classes)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        wall, processor = time.perf_counter(), time.process_time()
        margin_scores(features, labels)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        cpu.append(processor)
        size = f"{rows:,} x {arguments.width:,}, {arguments.classes:,} classes"
        print(f"{size}: {wall:.1f} s, {processor:.1f} CPU seconds, peak memory +{memory:.0f} MiB")
    if arguments.scale_to and len(cpu) == 2:
        slope = (cpu[1] - cpu[0]) / (arguments.rows[1] - arguments.rows[0])
        total = cpu[0] + slope * (arguments.scale_to - arguments.rows[0])
        print(f"{arguments.scale_to:,} rows: {total:.0f} CPU seconds by extrapolation")


if __name__ == "__main__":
    main()
