"""What a chosen tenth of instruction data is worth against a random one, on clean and on damaged data: loss on held-out rows.

    python benchmarks/worth_text.py prepare --work WORK --data alpaca_data.json --embeddings minilm_embeddings_int8.npz \
        --encoder MODEL --embedded FOLDER --model stories260K
    python benchmarks/worth_text.py train --work WORK --device cpu      # or cuda; any number of times, resumes
    python benchmarks/worth_text.py table --work WORK

Conditions x ways of choosing x seeds, all with one recipe: the rows that a way chooses train the model stories260K for equal
steps, and the loss per token is measured after the last one, paired by seed. The recipe is that of `finetune_text.py`: all
weights, AdamW (0.9, 0.95), weight decay 0.1, a rate of 3e-3 falling linearly, 16 rows of similar length a step, rows of at most
256 tokens, the loss on the responses alone.

`prepare` does all that needs the library and writes token ids, batches and the model into WORK, a few megabytes; `train` needs
NumPy, torch and safetensors alone. The encoder's embeddings of damaged rows are kept in FOLDER, and are made only once.
"""

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Index = NDArray[np.int64]

HELD_OUT, POOL, LENGTH, BATCH, STEPS, RATIO = 500, 8000, 256, 16, 450, 0.1
PEAK, BETAS, EPSILON, DECAY = 3e-3, (0.9, 0.95), 1e-8, 0.1
# Steps of a run before its capture as a CUDA graph.
WARM_UP = 3

MOVED = 0.2
# Each of the originals has this many near-copies, and together the copies are 30 % of the rows.
ORIGINALS, COPIES = 0.05, 6
SOURCES = {"short answer": 0.9, "long answer": 0.09, "with input": 0.01}

WAYS = {
    "clean": ("random", "published", "similarity 80", "similarity 50", "no copies 0.9", "whole"),
    "shuffled": ("random", "published", "similarity 80", "similarity 70", "similarity 50", "whole"),
    "duplicates": ("random", "published", "no copies 0.95", "no copies 0.9", "whole"),
    "skewed": ("random", "published", "sqrt", "equal", "random, equal", "whole"),
}


@dataclass(frozen=True)
class Job:
    """One training."""

    condition: str
    way: str
    seed: int
    kept: int
    steps: int = STEPS


@dataclass(frozen=True)
class Condition:
    """Data that rows are chosen from.

    Attributes:
        rows: int64 [N], number of each row in the table of all rows, damaged ones included.
        facts: bool [N] by name, what is damaged or which source a row is from; the table shows the share among the kept.
        origin: int64 [N], equal for near-copies, or None.
        source: int64 [N], number of the source of each row, or None.
        answer: int64 [N], place in the pool of the response of each row, where row i asks what the pool's row i asks; or None.
    """

    rows: Index
    facts: dict[str, NDArray[np.bool_]]
    origin: Index | None = None
    source: Index | None = None
    answer: Index | None = None


class Rows:
    """All rows that occur: those of the file, and after them the damaged ones.

    Args:
        rows: rows of the file, in the columns of Alpaca.
    """

    def __init__(self, rows: list[dict[str, str]]) -> None:
        self.rows = list(rows)
        order = np.random.default_rng(0).permutation(len(rows))
        # The held-out rows are those of examples/finetune_alpaca.py.
        self.held_out, self.rest = order[:HELD_OUT], order[HELD_OUT:]
        self.pool = self.rest[:POOL]
        kinds = np.array([_kind(row) for row in rows])[self.rest]
        each = [self.rest[kinds == name] for name in SOURCES]
        # The mix of sources is measured on as many rows of each; they are never trained on in this condition.
        share = HELD_OUT // len(SOURCES)
        self.balanced, self.sources = np.stack([part[:share] for part in each]), [part[share:] for part in each]

    def add(self, rows: list[dict[str, str]]) -> Index:
        """Append rows to the table and return their numbers."""
        self.rows += rows
        return np.arange(len(self.rows) - len(rows), len(self.rows))

    def condition(self, name: str, seed: int) -> Condition:
        """Return the data of a condition. The seed draws the mix of sources; other damage is the same for all seeds."""
        draw = np.random.default_rng([seed if name == "skewed" else 0, sorted(WAYS).index(name)])
        if name == "clean":
            return Condition(self.pool, {}, answer=np.arange(POOL))
        if name == "shuffled":
            moved = draw.permutation(POOL)[: round(MOVED * POOL)]
            answer, rows = np.arange(POOL), self.pool.copy()
            answer[moved] = np.roll(moved, 1)
            pairs = zip(self.pool[moved], self.pool[answer[moved]], strict=True)
            rows[moved] = self.add([self.rows[own] | {"output": self.rows[other]["output"]} for own, other in pairs])
            return Condition(rows, {"moved": answer != np.arange(POOL)}, answer=answer)
        if name == "duplicates":
            order = draw.permutation(POOL)
            originals = self.pool[order[: round(ORIGINALS * POOL)]]
            copied = np.repeat(originals, COPIES)
            copies = self.add([edited(self.rows[row], n % COPIES) for n, row in enumerate(copied)])
            rows = np.concatenate([self.pool[order[: POOL - len(copies)]], copies])
            mixed = draw.permutation(POOL)
            origin = np.concatenate([rows[: POOL - len(copies)], copied])[mixed]
            return Condition(rows[mixed], {}, origin=origin)
        parts = [
            draw.permutation(p)[: round(POOL * share)] for p, share in zip(self.sources, SOURCES.values(), strict=True)
        ]
        source = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        mixed = draw.permutation(POOL)
        source = source[mixed]
        facts = {title: source == number for number, title in enumerate(SOURCES)}
        return Condition(np.concatenate(parts)[mixed], facts, source=source)


def _kind(row: dict[str, str]) -> str:
    """Return the source that a row counts as; `""` for answers of middle length, which are left out."""
    if row["input"].strip():
        return "with input"
    length = len(row["output"])
    return "short answer" if length < 250 else "long answer" if length > 500 else ""


def edited(row: dict[str, str], number: int) -> dict[str, str]:
    """Return a near-copy of a row: other case, other punctuation, a prefix; each of six numbers gives another one."""
    asked, answer = row["instruction"].strip(), row["output"].strip()
    bare = asked.rstrip(".?!")
    asked = (
        asked.lower(),
        f"Please answer: {asked}",
        f"{bare}!",
        f"Task: {asked[:1].lower()}{asked[1:]}",
        f'"{asked}"',
        f"{bare} ...",
    )[number]
    answer = (answer, answer.rstrip("."), answer.lower(), answer, f"{answer}\n", f"{answer.rstrip('.')}.")[number]
    return row | {"instruction": asked, "output": answer}


def embedded(
    rows: list[dict[str, str]], parts: tuple[str, ...], length: int, name: str, args: argparse.Namespace
) -> NDArray[np.float32]:
    """Return embeddings float32 [N, D] of length 1 of the first tokens of some columns, from the folder if they are there."""
    from dq_lightning.core.config import TextConfig
    from dq_lightning.features.choose import choose_encoder
    from dq_lightning.features.extract import extract_features
    from dq_lightning.sources.adapt import as_source

    file = args.embedded / f"{name}.npy"
    if not file.exists():
        args.embedded.mkdir(parents=True, exist_ok=True)
        begun = time.process_time()
        texts = [{"text": "\n".join(row[part] for part in parts if row[part])} for row in rows]
        spec = choose_encoder(args.encoder, modality="text", text=TextConfig(max_length=length))
        made = extract_features(as_source(texts), spec, device=args.device, progress=False).embedding
        partial = args.embedded / f"{name}.partial.npy"
        np.save(partial, F.normalize(made, dim=1).numpy().astype(np.float16))
        partial.replace(file)
        print(f"{name}: {len(rows):,} texts embedded in {time.process_time() - begun:.0f} CPU seconds", flush=True)
    return np.load(file).astype(np.float32)


class Choosing:
    """One condition with what several ways need of it.

    Args:
        condition: data that is chosen from.
        features: float32 [N, D], embeddings of whole rows, of length 1.
        similarity: float64 [N], how near the embedding of a response is to that of its instruction; None where no way asks.
    """

    def __init__(
        self, condition: Condition, features: NDArray[np.float32], similarity: NDArray[np.float64] | None
    ) -> None:
        self.condition, self.features, self.similarity = condition, features, similarity
        self.count = round(RATIO * len(features))
        self._bins: dict[tuple, Any] = {}

    def choose(self, way: str, seed: int) -> Index:
        """Return the positions, ascending, that a way keeps."""
        total = len(self.features)
        if way == "whole":
            return np.arange(total)
        if way == "random":
            return np.sort(np.random.default_rng([seed, 1_000_003]).permutation(total)[: self.count])
        name, _, value = way.rpartition(" ")
        if name == "similarity":
            from dq_lightning.quality.mislabelled import drop_worst

            dropped = drop_worst(self.similarity, 1 - int(value) / 100, np.full(total, -1))
            return self._binned(np.flatnonzero(~dropped), seed)
        if name == "no copies":
            from dq_lightning.bins.duplicates import find_duplicates

            of = find_duplicates(self.features, float(value)).numpy()
            return self._binned(np.flatnonzero(of == np.arange(total)), seed)
        if way == "published":
            return self._binned(np.arange(total), seed)
        one_bin, balance = way.startswith("random"), way.removeprefix("random, ")
        return self._binned(np.arange(total), seed, 1 if one_bin else 10, self.condition.source, balance)

    def _binned(
        self, kept: Index, seed: int, num_bins: int = 10, source: Index | None = None, balance: str = "proportional"
    ) -> Index:
        from dq_lightning import make_bins, select

        key = (kept.tobytes(), num_bins, source is None)
        if key not in self._bins:
            features = torch.from_numpy(self.features[kept])
            self._bins[key] = make_bins(
                features, num_bins=num_bins, labels=source, similarity="dot", device="cpu", progress=False
            )
        drawn = select(self._bins[key], keep_ratio=self.count / len(kept), seed=seed, balance=balance)
        return kept[drawn.index.numpy()]


def prepare(args: argparse.Namespace) -> None:
    """Write tokens, batches, held-out rows and the model into the work folder."""
    import shutil

    from transformers import AutoTokenizer

    from dq_lightning.sources import jsonl
    from dq_lightning.tokens.rows import encode_rows
    from dq_lightning.tokens.sampler import EpochShuffle, LengthBatchSampler

    torch.set_num_threads(1)
    work: Path = args.work
    rows = Rows(jsonl.read_rows(args.data))
    made = np.load(args.embeddings)
    ready = made["q"].astype(np.float32) * made["scale"].astype(np.float32)[:, None]
    ready /= np.linalg.norm(ready, axis=1, keepdims=True)
    pool = [rows.rows[row] for row in rows.pool]
    asked = embedded(pool, ("instruction", "input"), 128, "asked", args)
    answers = embedded(pool, ("output",), 64, "answers", args)
    table: list[tuple[Job, dict[str, float], Index]] = []
    for name in args.conditions:
        for seed in range(args.seeds):
            if seed == 0 or name == "skewed":
                first_new = len(rows.rows)
                condition, features, similarity = rows.condition(name, seed), ready, None
                if len(rows.rows) > first_new:
                    new = embedded(rows.rows[first_new:], ("instruction", "input", "output"), 128, name, args)
                    between = np.zeros((first_new - len(ready), ready.shape[1]), np.float32)
                    features = np.concatenate([ready, between, new])
                if condition.answer is not None:
                    similarity = (asked * answers[condition.answer]).sum(1).astype(np.float64)
                choosing = Choosing(condition, features[condition.rows], similarity)
            for way in WAYS[name]:
                begun = time.process_time()
                index = choosing.choose(way, seed)
                facts = {fact: float(value[index].mean()) for fact, value in condition.facts.items()}
                if condition.origin is not None:
                    facts["copies of others"] = 1 - len(np.unique(condition.origin[index])) / len(index)
                table.append((Job(name, way, seed, len(index)), facts, condition.rows[index]))
                shown = ", ".join(f"{share:.1%} {fact}" for fact, share in facts.items())
                print(
                    f"{name}, {way}, seed {seed}: {len(index):,} rows {shown} ({time.process_time() - begun:.1f} s)",
                    flush=True,
                )
    table.sort(key=lambda entry: entry[0].seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    used = np.unique(np.concatenate([rows.held_out, rows.balanced.ravel(), *(index for _, _, index in table)]))
    encoded = encode_rows([rows.rows[row] for row in used], tokenizer, max_length=LENGTH)
    batches = np.empty((len(table), STEPS, BATCH), np.int32)
    for number, (job, _, index) in enumerate(table):
        here = np.searchsorted(used, index)
        shuffled = EpochShuffle(len(here), job.seed)
        sampler = LengthBatchSampler(shuffled, BATCH, True, encoded.lengths[torch.from_numpy(here)], job.seed)
        drawn: list[list[int]] = []
        while len(drawn) < STEPS:
            drawn += sampler
        batches[number] = here[np.array(drawn[:STEPS])]
    trained = np.unique(
        np.concatenate([batches.ravel(), np.searchsorted(used, np.concatenate([rows.held_out, rows.balanced.ravel()]))])
    )
    items = [encoded[int(row)] for row in trained]
    work.mkdir(parents=True, exist_ok=True)
    np.save(work / "tokens.npy", np.concatenate([item["input_ids"].numpy() for item in items]).astype(np.uint16))
    np.save(work / "lengths.npy", np.array([len(item["input_ids"]) for item in items], np.int32))
    np.save(work / "learned.npy", np.array([int((item["labels"] >= 0).int().argmax()) for item in items], np.int32))
    np.save(work / "batches.npy", np.searchsorted(trained, batches).astype(np.int32))
    for name, index in (("held_out", rows.held_out[None]), ("balanced", rows.balanced)):
        np.save(work / f"{name}.npy", np.searchsorted(trained, np.searchsorted(used, index)).astype(np.int32))
    lines = [{"job": asdict(job), "facts": facts} for job, facts, _ in table]
    (work / "jobs.json").write_text(json.dumps(lines, indent=1), encoding="utf-8")
    (work / "model").mkdir(exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(Path(args.model) / file, work / "model" / file)


class Llama:
    """The forward pass of a small Llama, whose steps can be captured as a CUDA graph; its logits are those of transformers.

    Rows are padded at their ends, where causal attention keeps padding from all that counts, so there is no mask.

    Args:
        folder: folder of `config.json` and `model.safetensors`, with tied embeddings.
        device: device of the weights.
    """

    def __init__(self, folder: Path, device: str) -> None:
        from safetensors.torch import load_file

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.layers, self.epsilon = config["num_hidden_layers"], config["rms_norm_eps"]
        self.heads, self.shared = config["num_attention_heads"], config["num_key_value_heads"]
        weights = load_file(folder / "model.safetensors")
        self.weights = {
            name.removeprefix("model."): weight.float().to(device).requires_grad_()
            for name, weight in weights.items()
            if name != "lm_head.weight"
        }
        size = config["hidden_size"] // self.heads
        theta = config.get("rope_parameters", config)["rope_theta"]
        speed = theta ** (-torch.arange(0, size, 2) / size)
        angle = torch.arange(LENGTH)[:, None] * torch.cat([speed, speed])
        self.cos, self.sin = angle.cos().to(device), angle.sin().to(device)

    def _turned(self, heads: Tensor) -> Tensor:
        """Return queries or keys [B, H, T, S], rotated by their positions."""
        left, right = heads.chunk(2, dim=-1)
        length = heads.shape[2]
        return heads * self.cos[:length] + torch.cat([-right, left], dim=-1) * self.sin[:length]

    def __call__(self, ids: Tensor) -> Tensor:
        """Return logits float32 [B, T, V] of token ids int64 [B, T], T <= 256."""
        weights, (batch, length) = self.weights, ids.shape
        states = weights["embed_tokens.weight"][ids]
        for number in range(self.layers):
            layer = f"layers.{number}."
            inner = self._norm(states, layer + "input_layernorm")
            query, key, value = (
                F.linear(inner, weights[f"{layer}self_attn.{name}_proj.weight"])
                .view(batch, length, count, -1)
                .transpose(1, 2)
                for name, count in (("q", self.heads), ("k", self.shared), ("v", self.shared))
            )
            query, key = self._turned(query), self._turned(key)
            key, value = (
                part[:, :, None].expand(-1, -1, self.heads // self.shared, -1, -1).flatten(1, 2)
                for part in (key, value)
            )
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            mixed = mixed.transpose(1, 2).reshape(batch, length, -1)
            states = states + F.linear(mixed, weights[layer + "self_attn.o_proj.weight"])
            inner = self._norm(states, layer + "post_attention_layernorm")
            gate, up = (F.linear(inner, weights[f"{layer}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
            states = states + F.linear(F.silu(gate) * up, weights[layer + "mlp.down_proj.weight"])
        return F.linear(self._norm(states, "norm"), weights["embed_tokens.weight"])

    def _norm(self, states: Tensor, name: str) -> Tensor:
        return F.rms_norm(states, states.shape[-1:], self.weights[f"{name}.weight"], self.epsilon)


class Tokens:
    """All rows that are trained on or measured, padded to 256 tokens, on a device."""

    def __init__(self, work: Path, device: str) -> None:
        lengths = np.load(work / "lengths.npy")
        ids = np.zeros((len(lengths), LENGTH), np.int64)
        ids[np.arange(LENGTH) < lengths[:, None]] = np.load(work / "tokens.npy")
        self.ids = torch.from_numpy(ids).to(device)
        self.lengths = torch.from_numpy(lengths).to(device)
        self.learned = torch.from_numpy(np.load(work / "learned.npy")).to(device)
        self.place = torch.arange(LENGTH, device=device)

    def losses(self, network: Llama, rows: Tensor, length: int = LENGTH) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses of the responses' tokens of rows int64 [B], cut to `length` tokens, and their number."""
        ids, place = self.ids[rows, :length], self.place[:length]
        counts = (place >= self.learned[rows, None]) & (place < self.lengths[rows, None])
        loss = F.cross_entropy(network(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return (loss * counts[:, 1:].flatten()).sum(), counts[:, 1:].sum()


class Run:
    """The training of one model, step by step.

    Args:
        tokens: all rows.
        batches: int64 [steps, B], the rows of each step.
        model: folder of the model.
        device: device that it is trained on.
    """

    def __init__(self, tokens: Tokens, batches: NDArray[np.integer], model: Path, device: str) -> None:
        self.tokens, self.device = tokens, device
        self.network = Llama(model, device)
        self.parameters = list(self.network.weights.values())
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]
        self.batches = torch.from_numpy(batches.astype(np.int64)).to(device)
        count = torch.arange(1, len(batches) + 1, dtype=torch.float64)
        rates = PEAK * (1 - (count - 1) / len(batches))
        # What AdamW multiplies weights and momenta by, and divides the root of the squares by, in every step.
        factors = (1 - rates * DECAY, -rates / (1 - BETAS[0] ** count), (1 - BETAS[1] ** count).sqrt())
        self.factors = torch.stack(factors, dim=1).float().to(device)
        self.number = torch.zeros(1, dtype=torch.int64, device=device)

    def step(self, length: int = LENGTH) -> None:
        """Do one step of AdamW on the next batch, whose rows have at most `length` tokens."""
        rows = self.batches.index_select(0, self.number)[0]
        decay, rate, root = self.factors.index_select(0, self.number)[0]
        total, count = self.tokens.losses(self.network, rows, length)
        gradients = torch.autograd.grad(total / count, self.parameters)
        with torch.no_grad():
            torch._foreach_lerp_(self.first, gradients, 1 - BETAS[0])
            torch._foreach_mul_(self.second, BETAS[1])
            torch._foreach_addcmul_(self.second, gradients, gradients, 1 - BETAS[1])
            below = torch._foreach_div(torch._foreach_sqrt(self.second), root)
            torch._foreach_add_(below, EPSILON)
            change = torch._foreach_div(self.first, below)
            torch._foreach_mul_(change, rate)
            torch._foreach_mul_(self.parameters, decay)
            torch._foreach_add_(self.parameters, change)
            self.number += 1

    @torch.no_grad()
    def loss(self, rows: Tensor) -> float:
        """Return the loss per token on rows int64 [M]."""
        sums = [torch.stack(self.tokens.losses(self.network, part)) for part in rows.split(50)]
        total, count = torch.stack(sums).double().sum(0).tolist()
        return total / count


def train_side_by_side(runs: list[Run]) -> None:
    """Do all steps of runs of as many steps; on a GPU each has a stream and a CUDA graph of its own."""
    steps = len(runs[0].batches)
    if not runs[0].device.startswith("cuda"):
        for run in runs:
            for length in run.tokens.lengths[run.batches].amax(1).tolist():
                run.step(length)
        return
    lanes = []
    for run in runs:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # These steps count. The capture records a step without doing it.
            for _ in range(WARM_UP):
                run.step()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            run.step()
        lanes.append((stream, graph))
    for _ in range(steps - WARM_UP):
        for stream, graph in lanes:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()


def train(args: argparse.Namespace) -> None:
    """Train the jobs that have no result yet."""
    torch.set_float32_matmul_precision("high")
    work, device = args.work, args.device
    batches = np.load(work / "batches.npy", mmap_mode="r")
    jobs = json.loads((work / "jobs.json").read_text(encoding="utf-8"))
    done = [line["job"] for line in results(work)]
    waiting = [number for number, line in enumerate(jobs) if line["job"] not in done]
    tokens = Tokens(work, device)
    measured = {
        name: torch.from_numpy(np.load(work / f"{name}.npy")).long().to(device) for name in ("held_out", "balanced")
    }
    lanes = args.lanes if device.startswith("cuda") else 1
    for start in range(0, len(waiting), lanes):
        begun, group = time.perf_counter(), waiting[start : start + lanes]
        runs = [Run(tokens, batches[number][: args.steps], work / "model", device) for number in group]
        train_side_by_side(runs)
        kept = work / ("results.jsonl" if args.steps is None else "tried.jsonl")
        with kept.open("a", encoding="utf-8") as file:
            for number, run in zip(group, runs, strict=True):
                rows = measured["balanced" if jobs[number]["job"]["condition"] == "skewed" else "held_out"]
                losses = [run.loss(part) for part in rows]
                name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
                file.write(json.dumps(jobs[number] | {"losses": losses, "device": name}) + "\n")
                print(jobs[number]["job"], [round(loss, 4) for loss in losses], flush=True)
        print(
            f"{len(waiting) - start - len(group)} left, {(time.perf_counter() - begun) / len(group):.2f} s a run",
            flush=True,
        )


def results(work: Path) -> list[dict]:
    """Return the lines of results so far."""
    file = work / "results.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def table(args: argparse.Namespace) -> None:
    """Print a Markdown table: loss (of several sources their mean), standard error, and the difference from random by seed."""
    rows: dict[tuple[str, str], dict[int, dict]] = defaultdict(dict)
    for line in results(args.work):
        rows[line["job"]["condition"], line["job"]["way"]][line["job"]["seed"]] = line
    columns = ("condition", "way", "rows", "of them", "held-out loss", "against random", "each seed")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for (condition, way), seeds in rows.items():
        losses = {seed: statistics.mean(line["losses"]) for seed, line in seeds.items()}
        random = {seed: statistics.mean(line["losses"]) for seed, line in rows.get((condition, "random"), {}).items()}
        facts = {
            name: statistics.mean(line["facts"][name] for line in seeds.values()) for name in seeds[min(seeds)]["facts"]
        }
        cells = (
            condition,
            way,
            f"{seeds[min(seeds)]['job']['kept']:,}",
            ", ".join(f"{share:.1%} {name}" for name, share in facts.items()),
            spread(list(losses.values()), ""),
            spread([losses[seed] - random[seed] for seed in losses if seed in random], "+"),
            ", ".join(f"{loss:.3f}" for loss in losses.values()),
        )
        print(f"| {' | '.join(cells)} |")


def spread(values: list[float], sign: str) -> str:
    """Return the mean and its standard error as text."""
    if not values:
        return ""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):{sign}.3f} +- {error:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("prepare", "train", "table"))
    parser.add_argument("--work", type=Path, required=True, help="folder of all that `train` needs, and of its results")
    parser.add_argument("--data", type=Path, help="Alpaca's JSON")
    parser.add_argument("--embeddings", type=Path, help="ready-made embeddings of its rows: .npz of `q` and `scale`")
    parser.add_argument("--encoder", help="the encoder that they were made with, a model of transformers")
    parser.add_argument("--embedded", type=Path, help="folder that keeps the embeddings that are made here")
    parser.add_argument("--model", help="folder of stories260K")
    parser.add_argument("--conditions", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lanes", type=int, default=6, help="models that are trained side by side on a GPU")
    parser.add_argument("--steps", type=int, help="stop each training after so many steps, to try the script")
    args = parser.parse_args()
    {"prepare": prepare, "train": train, "table": table}[args.stage](args)


if __name__ == "__main__":
    main()
