"""What a cache hit costs, and what importing the package adds to importing lightning.

python benchmarks/startup.py --cifar DATA_DIR [--rounds 5]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time


def import_seconds(code: str) -> float:
    script = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    statements = (
        "import dq_lightning",
        "import lightning",
        "import lightning; from dq_lightning import QuantizedDataModule",
    )
    times = {code: [] for code in statements}
    for _ in range(args.rounds + 1):
        for code in statements:
            times[code].append(import_seconds(code))
    medians = {code: statistics.median(values[1:]) for code, values in times.items()}
    for code, seconds in medians.items():
        print(f"{code}: {seconds:.2f} s, {seconds / medians['import lightning']:.2f} of importing lightning")

    import torch
    from torchvision.datasets import CIFAR10

    from dq_lightning import QuantizedDataModule

    dataset = CIFAR10(args.cifar)
    with tempfile.TemporaryDirectory() as cache:
        for attempt in range(args.rounds + 1):
            module = QuantizedDataModule(dataset, keep_ratio=0.125, cache_dir=cache)
            started = time.perf_counter()
            module.prepare_data()
            prepared = time.perf_counter()
            module.setup("fit")
            done = time.perf_counter()
            kind = "hit" if attempt else "miss"
            print(f"{kind}: prepare_data {prepared - started:.2f} s, setup {done - prepared:.2f} s", flush=True)
    print("timm loaded:", "timm" in sys.modules, "| CUDA touched:", torch.cuda.is_initialized())


if __name__ == "__main__":
    main()
