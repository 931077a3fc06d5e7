"""A compact and a random tenth of Alpaca, and the same language model fine-tuned on each: held-out loss over seeds.

    python benchmarks/finetune_text.py --data alpaca_data.json --encoder MODEL --embed 5000 \
        --embeddings minilm_embeddings_int8.npz --model stories260K --output runs [--keep-ratio 0.1] [--seeds 3]

The first `--embed` rows are embedded here by MODEL, a text encoder of transformers; the others take the ready-made embeddings
of the same encoder, and the cosine of both for the first rows is printed. Bins are made once over all rows but the held-out
ones; every seed draws a compact and a random set of one size, and `examples/finetune_alpaca.py` trains on it. A run
whose result is in the output folder is not repeated.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from dq_lightning.bins.make import make_bins
from dq_lightning.core.config import TextConfig
from dq_lightning.evaluation.baselines import baseline_selection
from dq_lightning.features.choose import choose_encoder
from dq_lightning.features.extract import extract_features
from dq_lightning.selection.select import select
from dq_lightning.sources.adapt import as_source

HELD_OUT = 500


def load_script(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HERE = Path(__file__).resolve().parent
text = load_script("benchmarks_text", HERE / "text.py")
example = load_script("finetune_alpaca", HERE.parent / "examples" / "finetune_alpaca.py")


def embed(rows: list[dict], args: argparse.Namespace) -> np.ndarray:
    """Embeddings float32 [N, D] of length 1: of the first rows by the encoder itself, of the others as they came."""
    embeddings = text.read_embeddings(args.embeddings)
    if not args.embed:
        return embeddings
    source = as_source(rows[: args.embed])
    started = time.perf_counter()
    spec = choose_encoder(args.encoder, modality="text", text=TextConfig(max_length=args.embedded_length))
    made = extract_features(source, spec, progress=False).embedding
    seconds = time.perf_counter() - started
    own = torch.nn.functional.normalize(made, dim=1).numpy()
    cosine = (own * embeddings[: len(own)]).sum(1)
    print(
        f"{len(own):,} rows embedded in {seconds:.0f} s ({len(own) / seconds:.0f} a second); cosine to the ready-made ones: "
        f"mean {cosine.mean():.5f}, least {cosine.min():.4f}"
    )
    embeddings[: len(own)] = own
    return embeddings


def choose(embeddings: np.ndarray, args: argparse.Namespace) -> dict[tuple[str, int], np.ndarray]:
    """Rows of the file for every way of choosing and seed; the held-out rows of the example are never among them."""
    held_out = np.random.default_rng(0).permutation(len(embeddings))[:HELD_OUT]
    pool = np.setdiff1d(np.arange(len(embeddings)), held_out)
    bins = make_bins(embeddings[pool], num_bins=10, similarity="dot", progress=False)
    chosen = {}
    for seed in range(args.seeds):
        chosen["DQ", seed] = select(bins, keep_ratio=args.keep_ratio, seed=seed).index.numpy()
        random = baseline_selection("random", pool, keep_ratio=args.keep_ratio, seed=seed)
        chosen["random", seed] = random.index.numpy()
    return {key: pool[index] for key, index in chosen.items()}


def held_out_loss(name: str, seed: int, rows: np.ndarray, args: argparse.Namespace) -> dict[str, float]:
    """Losses of one fine-tuning, from the folder if they are there."""
    folder = args.output / f"{name}-{seed}"
    result = folder / "losses.json"
    if not result.exists():
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "rows.npy", rows)
        given = {
            "model": args.model,
            "data": args.data,
            "rows": folder / "rows.npy",
            "learning-rate": args.learning_rate,
            "epochs": args.epochs,
            "output": folder / "tuned",
            "held-out": HELD_OUT,
            "max-length": args.max_length,
            "precision": args.precision,
            # 16 rows a step, as in the recipe, in one batch: the model is too small for less
            "batch-size": 16,
            "accumulate": 1,
            "eval-batch-size": 16,
            "seed": seed,
        }
        command = [part for key, value in given.items() for part in (f"--{key}", str(value))]
        sys.argv = ["finetune_alpaca.py", *command, "--quiet"]
        result.write_text(json.dumps(example.main()), encoding="utf-8")
    return json.loads(result.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder")
    parser.add_argument("--embed", type=int, default=5000)
    parser.add_argument(
        "--embedded-length", type=int, default=128, help="tokens; what the ready-made ones were made with"
    )
    parser.add_argument("--embeddings", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--keep-ratio", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--precision", default="32-true")
    args = parser.parse_args()
    rows = text.read_rows(args.data)
    chosen = choose(embed(rows, args), args)
    print("| rows | kept | untrained | held-out loss, each seed | mean and standard deviation |\n|---|---|---|---|---|")
    for name in ("DQ", "random"):
        losses = [held_out_loss(name, seed, chosen[name, seed], args) for seed in range(args.seeds)]
        tuned = [loss["tuned"] for loss in losses]
        spread = statistics.stdev(tuned) if len(tuned) > 1 else 0.0
        each = ", ".join(f"{loss:.3f}" for loss in tuned)
        print(
            f"| {name} | {len(chosen[name, 0]):,} | {losses[0]['untrained']:.3f} | {each} | "
            f"{statistics.mean(tuned):.3f} +- {spread:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
