"""What a chosen part of CIFAR-10 is worth against a random one, on clean and on damaged data, and at equal bytes.

    python benchmarks/worth.py prepare --cifar DATA_DIR --weights tf_efficientnet_lite0.safetensors --work WORK
    python benchmarks/worth.py choose --work WORK --processes 2
    python benchmarks/worth.py train --work WORK --device cpu          # or cuda; any number of times, resumes
    python benchmarks/worth.py table --work WORK
    python benchmarks/worth.py plot --work WORK --output worth.svg

Conditions (`worth_conditions.py`) x ways of choosing (`worth_ways.py`) x ratios x seeds, all with one recipe
(`worth_training.py`): equal steps, the accuracy after the last step, paired by seed. The rows of a plan are done seed by seed,
so that a run that is stopped has whole seeds. `--plan search` compares candidates on 5,000 training images that nothing is
chosen from; the plans that are reported use the test set, which no default was chosen by.
"""

import argparse
import io
import json
import multiprocessing
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import worth_conditions
import worth_training
import worth_ways
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets import CIFAR10
from worth_conditions import Condition

from dq_lightning import QuantizedDataModule
from dq_lightning.core.records import StoredImage
from dq_lightning.packed.file_stream import shared_starts, write_file
from dq_lightning.packed.lossy import encode_lossy

# Steps of every run that keeps a tenth or less: 30 epochs of 5,000 samples in batches of 128. Larger parts get as many more.
STEPS = 1170
VALIDATION = 5000


# What the plot calls the conditions and the ways.
TITLES = {
    "clean": "clean",
    "wrong20": "20 % of the\nlabels wrong",
    "wrong40": "40 % of the\nlabels wrong",
    "swapped20": "20 % in\nsimilar\nclasses",
    "swapped40": "40 % in\nsimilar\nclasses",
    "long_tail": "long tail\n1:100",
    "duplicates": "30 % near-\nduplicates",
    "foreign": "20 % foreign\nimages",
}
WAY_TITLES = {
    "random": ("a random tenth", "#9aa5b1"),
    "published": ('a tenth, preset="published"', "#5b8def"),
    "bins, best 50": ("a tenth, by default", "#e07a3f"),
    "auto": ('a tenth, DQ with drop_worst="auto"', "#b5452c"),
    "whole": ("the whole set, as many steps", "#3d4451"),
}
BYTES_TITLES = {
    "random": ("samples as they are, drawn at random", "#9aa5b1"),
    "dropped 20": ("the same, a fifth of the patches dropped and filled", "#5b8def"),
    "planned": ("whole images as small files (max_bytes=)", "#e07a3f"),
}


@dataclass(frozen=True)
class Job:
    """One row and seed of the table."""

    split: str
    condition: str
    way: str
    ratio: float
    seed: int
    network: str = "small"
    steps: int = STEPS

    @property
    def data(self) -> str:
        """Name of the folder of the condition's data."""
        name = "clean" if self.condition == "bytes" else self.condition
        return f"{self.split}-{name}-{self.seed}"

    @property
    def choice(self) -> str:
        """Name of the file of the positions that are trained on."""
        return f"{self.split}-{self.condition}-{self.way}-{self.ratio}-{self.seed}".replace(" ", "_").replace(",", "")


DIRTY = ("wrong20", "wrong40", "swapped20", "swapped40", "duplicates", "foreign")
MAIN = (
    "random",
    "published",
    "default",
    "auto",
    "auto, default",
    "margin 50",
    "margin 50, stratified",
    "bins, best 50",
)
MAIN_TOO = {
    "long_tail": ("equal", "equal, stratified"),
    "duplicates": ("no copies 0.95", "no copies 0.9", "no copies 0.9, margin 50"),
    "foreign": ("auto, stratified",),
    "wrong20": ("auto, stratified",),
}
# Candidates for the default on clean data at every ratio, and how many seeds the search compares them with.
CANDIDATES = {
    0.1: ("margin 50", "margin 70", "margin 50, stratified", "bins, best 50", "bins, best 70"),
    0.05: ("margin 30", "margin 50", "margin 50, stratified", "bins, best 30", "bins, best 50"),
    0.2: ("margin 50", "margin 70", "bins, best 50", "bins, best 70"),
    0.5: ("margin 90", "bins, best 70", "bins, best 90"),
}
SEARCH_SEEDS = {0.1: 6, 0.05: 4, 0.2: 3, 0.5: 2}
# What is compared at a share of the raw bytes: `max_bytes=` takes the first, as its plan says for CIFAR-10.
BYTES = {
    0.1: ("jpeg 75", "webp 65"),
    0.05: ("jpeg 28", "webp 30"),
    0.02: ("jpeg 27", "jpeg 10"),
    0.2: ("jpeg 90", "webp 90"),
}
# The share of the patches that is dropped and filled in the way of the same name.
DROPPED = "dropped 20"
CODED = tuple(sorted({way for ways in BYTES.values() for way in ways}))


def plan_rows(name: str, seeds: int, work: Path) -> Iterator[Job]:
    """Yield the jobs of a plan in the order in which they are done, the most telling first."""
    if name == "candidates":
        for ratio, ways in CANDIDATES.items():
            for seed in range(SEARCH_SEEDS[ratio]):
                for way in ("random", "published", *ways):
                    yield Job("search", "clean", way, ratio, 100 + seed, steps=_steps(ratio))
        return
    for seed in range(seeds):
        if name == "search":
            for condition in ("clean", "wrong20", "duplicates", "foreign", "long_tail"):
                for way in (*worth_ways.SEARCHED, *worth_ways.SEARCHED_TOO.get(condition, ())):
                    yield Job("search", condition, way, 0.1, 100 + seed)
        elif name == "main":
            for condition in ("clean", *DIRTY, "long_tail"):
                for way in (*MAIN, *MAIN_TOO.get(condition, ())):
                    yield Job("test", condition, way, 0.1, seed)
                yield Job("test", condition, "whole", 1.0, seed)
        elif name in ("ratios", "winners"):
            for ratio, ways in CANDIDATES.items():
                shown = ways if name == "ratios" else _winner(work, ratio)
                for way in ("random", "published", *shown):
                    yield Job("test", "clean", way, ratio, seed, steps=_steps(ratio))
        elif name == "bytes":
            for ratio, codecs in BYTES.items():
                for way in ("random", "margin 50, stratified", DROPPED, *codecs):
                    yield Job("test", "bytes", way, ratio, seed)
            for steps in (2 * STEPS, 5 * STEPS):
                for way in (BYTES[0.1][0], "random", "published", "whole"):
                    yield Job("test", "bytes", way, 0.1, seed, steps=steps)
        elif name == "resnet18":
            for condition in ("wrong20", "clean"):
                for way in ("random", "published", "auto", "margin 50, stratified"):
                    yield Job("test", condition, way, 0.1, seed, "resnet18", 200 * 5000 // 128)
        else:
            raise SystemExit(f"no plan {name!r}; plans: candidates, search, main, ratios, winners, bytes, resnet18")


def _steps(ratio: float) -> int:
    """Return the number of steps for a part of the training set."""
    return round(STEPS * max(1, ratio / 0.1))


def _winner(work: Path, ratio: float) -> tuple[str, ...]:
    """Return the candidate of the best mean accuracy in the search, of those that have a result for every seed."""
    values = defaultdict(list)
    for line in _lines(work / "results.jsonl"):
        job = Job(**line["job"])
        if (job.split, job.condition, job.ratio) == ("search", "clean", ratio) and job.way in CANDIDATES[ratio]:
            values[job.way].append(line["accuracy"])
    complete = {way: statistics.mean(seen) for way, seen in values.items() if len(seen) == SEARCH_SEEDS[ratio]}
    return (max(complete, key=complete.__getitem__),) if complete else ()


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Return the jobs of the plans, in the order in which they are done."""
    return list(dict.fromkeys(job for name in args.plan for job in plan_rows(name, args.seeds, args.work)))


def waiting_jobs(args: argparse.Namespace, part: int = 0, parts: int = 1) -> list[Job]:
    """Return every `parts`-th job from `part` on, of those that have no result yet."""
    done = {Job(**line["job"]) for line in _lines(args.work / "results.jsonl")}
    return [job for job in jobs_of(args)[part::parts] if job not in done]


def load(work: Path, job: Job) -> Condition:
    """Return the data of a job; what equals the clean data is kept once."""
    fields = {}
    for name in Condition.__dataclass_fields__:
        own, clean = work / job.data / f"{name}.npy", work / f"{job.split}-clean-{job.seed}" / f"{name}.npy"
        shared = work / f"{name}.npy"
        found = next(path for path in (own, clean, shared) if path.exists())
        fields[name] = np.load(found, mmap_mode="r")
    return Condition(**fields)


def prepare(args: argparse.Namespace) -> None:
    """Write the clean data, their features, and every condition and seed of the plan into the work folder."""
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    train, test = CIFAR10(args.cifar), CIFAR10(args.cifar, train=False)
    if not (work / "features.npy").exists():
        encode = worth_conditions.Lite0(args.weights, args.device, args.side)
        features = np.load(args.features) if args.features is not None else encode(train.data)
        whole = worth_conditions.as_condition(train.data, np.array(train.targets), features)
        for name in ("images", "labels", "truth", "origin", "features"):
            np.save(work / f"{name}.npy", getattr(whole, name))
        np.save(work / "test_images.npy", test.data)
        np.save(work / "test_labels.npy", np.array(test.targets))
    wanted = {job.data: job for job in waiting_jobs(args) if not (work / job.data).exists()}
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        for line in pool.map(_prepare, [args] * len(wanted), wanted.values()):
            print(line, flush=True)
        ways = {job.way for job in waiting_jobs(args)}
        coded = [way for way in CODED if way in ways]
        list(pool.map(_recode, [work] * len(coded), coded))
        if DROPPED in ways:
            _drop_patches(args)


def _prepare(args: argparse.Namespace, job: Job) -> str:
    """Write the data of one condition and seed, and return a line of text."""
    started, work = time.perf_counter(), args.work
    fields = {name: np.load(work / f"{name}.npy", mmap_mode="r") for name in Condition.__dataclass_fields__}
    clean = whole = Condition(**fields)
    if job.split == "search":
        order = np.random.default_rng([job.seed, worth_ways.DRAW, 3]).permutation(len(whole.labels))
        np.save(work / f"held_out-{job.seed}.npy", order[:VALIDATION])
        clean = whole.at(np.sort(order[VALIDATION:]))
    name = "clean" if job.condition == "bytes" else job.condition

    def encode(images: NDArray[np.uint8]) -> NDArray[np.floating]:
        return worth_conditions.Lite0(args.weights, args.device, args.side)(images)

    made = worth_conditions.damage(clean, name, job.seed, encode=encode, foreign=args.foreign)
    folder = work / f"{job.data}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for field in fields:
        value = getattr(made, field)
        if value is not getattr(whole, field) and (name == "clean" or value is not getattr(clean, field)):
            np.save(folder / f"{field}.npy", value)
    folder.rename(work / job.data)
    return f"{job.data}: {len(made.labels)} samples, {time.perf_counter() - started:.1f} s"


def _recode(work: Path, name: str) -> None:
    """Write the decoded images and the stored bytes of each of all training images in a codec and quality."""
    if (work / f"{name}-sizes.npy").exists():
        return
    codec, quality = name.split()
    images = np.load(work / "images.npy", mmap_mode="r")
    decoded = np.empty_like(images)
    for position, image in enumerate(images):
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, codec.upper(), quality=int(quality))
        decoded[position] = np.asarray(Image.open(stream).convert("RGB"))
    np.save(work / f"{name}.npy", decoded)
    # What a store holds once for all of them is not counted; the first images decide what that is.
    encoded = (encode_lossy(Image.fromarray(image), codec, int(quality)) for image in images)
    files = [StoredImage(data, "pil", properties=b"") for data in encoded]
    starts = shared_starts(files[:64])
    np.save(work / f"{name}-sizes.npy", np.array([len(write_file(file, starts)) for file in files]))


def _drop_patches(args: argparse.Namespace) -> None:
    """Write all training images with a fifth of their patches dropped and filled again by the bundled networks."""
    path = args.work / f"{DROPPED}.npy"
    if path.exists():
        return
    every = np.arange(50_000)
    module = QuantizedDataModule(
        CIFAR10(args.cifar),
        indices=every,
        drop_ratio=0.2,
        store="packed",
        device=args.device,
        cache_dir=args.work / "cache",
    )
    module.prepare_data()
    module.setup("fit")
    filled = module.train_dataloader().dataset
    np.save(path, np.stack([np.asarray(filled[position][0]) for position in every]))


def choose(args: argparse.Namespace) -> None:
    """Write the positions that every job trains on."""
    (args.work / "choices").mkdir(exist_ok=True)
    groups: dict[str, dict[str, Job]] = defaultdict(dict)
    for job in waiting_jobs(args):
        if not (args.work / "choices" / f"{job.choice}.npy").exists():
            groups[job.data][job.choice] = job
    tasks = [list(group.values()) for group in groups.values()]
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        for lines in pool.map(_choose, [args.work] * len(tasks), tasks, [args.device] * len(tasks)):
            print("\n".join(lines), flush=True)


def _choose(work: Path, jobs: list[Job], device: str) -> list[str]:
    """Choose for all jobs of one condition and seed, and return a line of text for each."""
    torch.set_num_threads(1)
    started, lines = time.perf_counter(), []
    data = worth_ways.Choosing(load(work, jobs[0]), device)
    for job in jobs:
        if job.way in CODED:
            sizes = np.load(work / f"{job.way}-sizes.npy")
            order = np.random.default_rng([job.seed, worth_ways.DRAW]).permutation(len(sizes))
            index = np.sort(order[np.cumsum(sizes[order]) <= job.ratio * 3072 * len(sizes)])
        elif job.way == DROPPED:
            index = worth_ways.random(data, int(len(data) * job.ratio / 0.8 + 0.5), job.seed)
        else:
            index = worth_ways.WAYS[job.way](data, int(len(data) * job.ratio + 0.5), job.seed)
        partial = work / "choices" / f"{job.choice}.partial.npy"
        np.save(partial, index)
        partial.replace(work / "choices" / f"{job.choice}.npy")
        lines.append(f"{job.choice}: {len(index)} samples, {time.perf_counter() - started:.1f} s")
        started = time.perf_counter()
    return lines


def train(args: argparse.Namespace) -> None:
    """Train the jobs that have no result yet; jobs whose positions are not chosen yet come later."""
    results = args.work / "results.jsonl"
    part, parts = (int(number) for number in args.part.split("/"))
    started = time.perf_counter()
    lanes: dict[str, list[worth_training.Lane]] = {}
    while time.perf_counter() - started < args.seconds:
        # The winners of the search are known once it is done, so the jobs are listed anew each time.
        waiting = waiting_jobs(args, part, parts)
        if not waiting:
            break
        ready = [job for job in waiting[:200] if (args.work / "choices" / f"{job.choice}.npy").exists()]
        if not ready:
            time.sleep(0.2)
            continue
        network = ready[0].network
        if network not in lanes:
            lanes[network] = _lanes(args, network)
        group = [job for job in ready if (job.network, job.steps) == (network, ready[0].steps)][: len(lanes[network])]
        begun = time.perf_counter()
        facts = [_begin(args, lane, job) for lane, job in zip(lanes[network], group, strict=False)]
        worth_training.train(lanes[network][: len(group)], group[0].steps)
        with results.open("a") as file:
            for job, lane, fact in zip(group, lanes[network], facts, strict=False):
                images, labels = _measured_on(args.work, job, args.device)
                accuracy = lane.accuracy(images, labels)
                line = {"job": asdict(job), "accuracy": accuracy, **fact, "device": _device_name(args.device)}
                file.write(json.dumps(line) + "\n")
        each = (time.perf_counter() - begun) / len(group)
        print(f"{len(waiting) - len(group)} left, {each:.2f} s a run, {group[0].condition} {group[0].way}", flush=True)


def _lanes(args: argparse.Namespace, network: str) -> list[worth_training.Lane]:
    """Return what the trainings of a network run in: on a GPU several lanes for the small one, which does not fill it."""
    started, on_gpu = time.perf_counter(), args.device.startswith("cuda")
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 64
    lanes, steps = [], max(job.steps for job in jobs_of(args) if job.network == network)
    for _ in range(args.lanes if on_gpu and network == "small" else 1):
        bfloat16 = args.precision == "bfloat16"
        lane = worth_training.Lane(network, args.device, 50_000, steps, bfloat16=bfloat16, compiled=args.compile)
        if on_gpu:
            lane.begin(np.zeros((256, 32, 32, 3), np.uint8), np.zeros(256, np.int64), 10, 0)
            lane.capture()
        lanes.append(lane)
    print(f"{len(lanes)} lanes for {network} made ready in {time.perf_counter() - started:.1f} s", flush=True)
    return lanes


def _begin(args: argparse.Namespace, lane: worth_training.Lane, job: Job) -> dict[str, float]:
    """Make a lane ready for the training of a job, and return facts about what it is trained on."""
    work = args.work
    condition = load(work, job)
    index = np.load(work / "choices" / f"{job.choice}.npy")
    changed = job.way in CODED or job.way == DROPPED
    images = np.load(work / f"{job.way}.npy", mmap_mode="r") if changed else condition.images
    labels, truth = condition.labels[index], condition.truth[index]
    lane.begin(images[index], labels, job.steps, job.seed)
    return {
        "samples": len(index),
        "wrong": float(np.mean(labels != truth)),
        "copies": 1 - len(np.unique(condition.origin[index])) / len(index),
        "smallest_class": int(np.bincount(labels, minlength=10).min()),
    }


_cached: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}


def _measured_on(work: Path, job: Job, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images uint8 [N, 32, 32, 3] and labels int64 [N] that the accuracy of a job is measured on."""
    key = "test" if job.split == "test" else str(job.seed)
    if key not in _cached:
        if job.split == "test":
            images, labels = np.load(work / "test_images.npy"), np.load(work / "test_labels.npy")
        else:
            index = np.load(work / f"held_out-{job.seed}.npy")
            images, labels = np.load(work / "images.npy")[index], np.load(work / "labels.npy")[index]
        _cached[key] = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)
    return _cached[key]


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(args: argparse.Namespace) -> None:
    """Print the results as a Markdown table: mean, standard error, the difference from random by seed, every seed's mean."""
    rows: dict[tuple, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for line in _lines(args.work / "results.jsonl"):
        job = line["job"]
        key = job["split"], job["network"], job["condition"], job["ratio"], job["steps"], job["way"]
        # `worth_results.jsonl` holds several trainings of some rows, which differ by the noise of a GPU's arithmetic.
        rows[key][job["seed"]].append(line)
    columns = ("split", "network", "condition", "ratio", "steps", "way")
    measured = ("samples", "wrong", "copies", "accuracy", "against random", "each seed")
    print(f"| {' | '.join(columns + measured)} |\n|{'---|' * len(columns + measured)}")
    for key, seeds in sorted(rows.items()):
        values = {seed: _mean(lines, "accuracy") for seed, lines in sorted(seeds.items())}
        lines = [line for trained in seeds.values() for line in trained]
        random = rows.get((*key[:3], 0.1 if key[5] == "whole" else key[3], key[4], "random"), {})
        paired = [value - _mean(random[seed], "accuracy") for seed, value in values.items() if seed in random]
        print(
            f"| {' | '.join(str(part) for part in key)} | {lines[0]['samples']:,} | {_mean(lines, 'wrong'):.1%} "
            f"| {_mean(lines, 'copies'):.1%} | {_spread(list(values.values()), '')} | {_spread(paired, '+')} "
            f"| {', '.join(f'{value:.1f}' for value in values.values())} |"
        )


def plot(args: argparse.Namespace) -> None:
    """Draw the accuracy of the ways in every condition, and at every number of bytes, into an SVG or PNG file."""
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "dq_lightning"
    trained: dict[tuple, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for line in _lines(args.work / "results.jsonl"):
        job = Job(**line["job"])
        if job.split == "test" and job.network == "small" and job.steps == STEPS:
            planned = job.condition == "bytes" and job.way == BYTES[job.ratio][0]
            trained[job.condition, "planned" if planned else job.way, job.ratio][job.seed].append(line)
    values = defaultdict(
        list, {key: [_mean(lines, "accuracy") for lines in seeds.values()] for key, seeds in trained.items()}
    )
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(12, 4.6), layout="constrained", gridspec_kw={"width_ratios": [1.9, 1]}
    )
    conditions = [name for name in worth_conditions.NAMES if (name, "published", 0.1) in values]
    for number, (way, (title, colour)) in enumerate(WAY_TITLES.items()):
        ratio = 1.0 if way == "whole" else 0.1
        shown = [place for place, name in enumerate(conditions) if (name, way, ratio) in values]
        means, errors = zip(*[_mean_and_error(values[conditions[place], way, ratio]) for place in shown], strict=True)
        left.bar(np.array(shown) + 0.16 * (number - 2), means, 0.15, yerr=errors, label=title, color=colour)
    equal = values[("long_tail", "equal", 0.1)]
    if equal:
        place = conditions.index("long_tail") + 0.16 * 3
        mean, error = _mean_and_error(equal)
        left.bar(place, mean, 0.15, yerr=error, label='a tenth, DQ with balance="equal"', color="#4f9d69")
    left.set_xticks(range(len(conditions)), [TITLES[name] for name in conditions], fontsize=8)
    left.set_ylabel("test accuracy, %")
    left.set_ylim(bottom=30)
    left.set_title("CIFAR-10, clean and damaged, equal steps")
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    for way, (title, colour) in BYTES_TITLES.items():
        points = [(100 * ratio, *_mean_and_error(values["bytes", way, ratio])) for ratio in sorted(BYTES)]
        x, y, error = zip(*points, strict=True)
        right.errorbar(x, y, error, marker="o", label=title, color=colour)
    right.set_xscale("log")
    right.set_xticks([2, 5, 10, 20], ["2", "5", "10", "20"])
    right.minorticks_off()
    right.set_xlabel("bytes, % of the raw images")
    right.set_title("Equal bytes, equal steps")
    right.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    figure.savefig(args.output, metadata={"Date": None})


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error; the error of a single value is 0."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _mean(lines: list[dict], name: str) -> float:
    return statistics.mean(line[name] for line in lines)


def _spread(values: list[float], sign: str) -> str:
    """Return the mean and its standard error as text."""
    if not values:
        return ""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):{sign}.1f} ± {error:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("prepare", "choose", "train", "table", "plot"))
    parser.add_argument("--output", type=Path, default=Path("worth.svg"), help="file that `plot` writes")
    parser.add_argument("--work", type=Path, required=True, help="folder of everything that is made; keep it to resume")
    parser.add_argument(
        "--plan", nargs="+", default=["main"], help="candidates, search, main, ratios, winners, bytes, resnet18"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cifar", help="torchvision's data folder of CIFAR-10")
    parser.add_argument("--weights", help="safetensors file of timm's tf_efficientnet_lite0")
    parser.add_argument(
        "--foreign", type=Path, help=".npy of photos uint8 [P, 64, 64, 3] that foreign images are cut from"
    )
    parser.add_argument(
        "--features", help=".npy of ready features [50000, D], in place of the encoder's for the clean images"
    )
    parser.add_argument("--side", type=int, default=224, help="side in pixels that the encoder sees")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--precision",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="float32 for processors without bfloat16",
    )
    parser.add_argument("--compile", action="store_true", help="compile the networks with torch.compile")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--part", default="0/1", help="i/n: train every n-th job from the i-th on")
    parser.add_argument("--lanes", type=int, default=6, help="small networks that are trained side by side on a GPU")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no further training after so many seconds"
    )
    args = parser.parse_args()
    {"prepare": prepare, "choose": choose, "train": train, "table": table, "plot": plot}[args.stage](args)


if __name__ == "__main__":
    main()
