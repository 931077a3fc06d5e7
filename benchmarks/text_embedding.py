"""Tokens per second of `extract_features` against a bare forward loop of the same model, in one run.

    python benchmarks/text_embedding.py --rows FILE.json --model FOLDER_OR_NAME [--limit 600] [--device auto]

The bare loop is given batches that are tokenized, sorted by length over all rows, padded and on the device, and only runs the
network: reading rows, tokenizing, sorting, pooling and copying back are what ours does on top. Loading the network is left out
of both and printed by itself.
"""

import argparse
import time

import torch

from dq_lightning.core.devices import resolve_device
from dq_lightning.core.isolation import isolated
from dq_lightning.features.choose import choose_encoder
from dq_lightning.features.encoders import resolve_precision
from dq_lightning.features.extract import extract_features
from dq_lightning.features.text_loading import batches_by_length, pad
from dq_lightning.sources.adapt import as_source

ROUNDS = 3


class Loaded:
    """A choice whose network is loaded already."""

    def __init__(self, encoder):
        self.encoder = encoder

    def load(self, device, precision):
        return self.encoder


def bare_loop(model, batches, device):
    with isolated(), torch.inference_mode():
        for tokens in batches:
            model(input_ids=tokens.clamp(min=0), attention_mask=(tokens >= 0).long())
        if device.type == "cuda":
            torch.cuda.synchronize()


def seconds_of(function):
    """Wall time, and processor time of this process, which other processes disturb less."""
    started, busy = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - started, time.process_time() - busy


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", required=True, help="JSON or JSON Lines file")
    parser.add_argument("--model", required=True)
    parser.add_argument("--limit", type=int, default=600, help="rows at most")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    from transformers import AutoModel

    device = resolve_device(options.device)
    whole = as_source(options.rows)
    source = as_source([whole.plain(i) for i in range(min(options.limit, len(whole)))])
    started = time.perf_counter()
    encoder = choose_encoder(options.model, modality="text").load(str(device))
    loading = time.perf_counter() - started
    started = time.perf_counter()
    tokens = encoder.tokenize(source.texts(range(len(source))))
    tokenizing = time.perf_counter() - started
    total = sum(map(len, tokens))
    places = batches_by_length([len(row) for row in tokens], options.batch_size)
    batches = [pad([tokens[place] for place in batch]).to(device) for batch in places]
    model = AutoModel.from_pretrained(options.model, trust_remote_code=False, dtype=resolve_precision("auto", device))
    model = model.to(device).eval()

    def ours():
        extract_features(source, Loaded(encoder), device=str(device), batch_size=options.batch_size, progress=False)

    bare_loop(model, batches[-1:], device)
    # in turns, so that a change of the machine's load meets both
    times = [(seconds_of(lambda: bare_loop(model, batches, device)), seconds_of(ours)) for _ in range(ROUNDS)]
    bare, made = (min(one[0] for one in column) for column in zip(*times, strict=True))
    print(
        f"{len(source)} rows, {total} tokens, {device}, batch {options.batch_size}, {torch.get_num_threads()} threads"
    )
    print(f"  loading        {loading:9.2f} s")
    print(f"  tokenizing     {total / tokenizing:9.0f} tokens/s")
    print(f"  bare loop      {total / bare:9.0f} tokens/s")
    print(f"  extract        {total / made:9.0f} tokens/s")
    print(f"  ratio          {bare / made:9.3f}   (rounds: {', '.join(f'{b[0] / m[0]:.3f}' for b, m in times)})")
    if device.type == "cpu":
        busy = [b[1] / m[1] for b, m in times]
        print(
            f"  of processor time {sorted(busy)[len(busy) // 2]:6.3f}   (rounds: {', '.join(f'{r:.3f}' for r in busy)})"
        )


if __name__ == "__main__":
    main()
