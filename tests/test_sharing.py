"""Pieces of a loop give the same bytes whoever does them, in whichever order, also after an interruption."""

import itertools
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dq_lightning.bins import make
from dq_lightning.bins.make import make_bins
from dq_lightning.cache import digests
from dq_lightning.core.config import BinConfig, FeatureConfig, PatchConfig
from dq_lightning.core.errors import ChangedError, DistributedError
from dq_lightning.core.isolation import isolated
from dq_lightning.core.launch import Launch, find_launch
from dq_lightning.core.records import Features, Labels
from dq_lightning.core.sharing import Job, Sharing, in_order
from dq_lightning.features import extract, streams, text_loading
from dq_lightning.features.choose import choose_encoder
from dq_lightning.features.selection_training import with_selection_epochs
from dq_lightning.packed import writer
from dq_lightning.packed.patches import pack_image
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.packed.writer import write_packed
from dq_lightning.patches import score
from dq_lightning.patches.saliency import VarianceScorer
from dq_lightning.pipeline import exchange, filling, identifying, meeting, together
from dq_lightning.pipeline.patch_plan import make_patch_plan
from dq_lightning.sources.adapt import as_source
from tests.features.conftest import ListSource, TinyNetwork, random_images, to_float_tensor
from tests.features.text_models import Texts, save_model
from tests.store.calls import DueShards
from tests.test_resume import odd_items_later_others


class Stop(Exception):  # noqa: N818
    """The end of a run."""


class Dealt(Sharing):
    """Two ranks that take pieces in an order drawn at random; the work stops after so many results."""

    num_ranks = 2

    def __init__(self, seed, stop_after=None):
        self.draw, self.stop_after = random.Random(seed), stop_after

    def share(self, job, work, unpack, size):
        numbers = list(range(job.pieces))
        self.draw.shuffle(numbers)
        half = len(numbers) // 3
        done = 0
        for hand in (numbers[:half], numbers[half:]):
            for result in work(iter(hand)):
                done += size(result)
                yield result
                if self.stop_after is not None:
                    self.stop_after -= 1
                    if not self.stop_after:
                        raise Stop
        assert done == job.total


def check(make):
    expected = make(None, Sharing())
    for seed in range(4):
        shards = DueShards(1 + seed % 2)
        with pytest.raises(Stop):
            make(shards, Dealt(seed, stop_after=4))
        shards.asked = 0
        found = make(shards, Dealt(seed + 10))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_features_of_images():
    source, labels = ListSource(random_images(22)), torch.arange(22) % 3
    spec = choose_encoder((TinyNetwork(), to_float_tensor))

    def make(shards, sharing):
        made = extract.extract_features(
            source, spec, device="cpu", batch_size=3, num_workers=0, progress=False, shards=shards, sharing=sharing,
            left_out=torch.tensor([4, 9]), labels=labels,
        )  # fmt: skip
        return (made.embedding,)

    check(make)


def test_features_of_text(monkeypatch, tmp_path):
    save_model(tmp_path)
    letters = np.random.default_rng(0)
    source = Texts(["".join(letters.choice(list("abcdefgh"), letters.integers(1, 40))) for _ in range(70)])
    spec = choose_encoder(str(tmp_path), modality="text")
    monkeypatch.setattr(text_loading, "BATCHES_PER_WINDOW", 4)
    monkeypatch.setattr(text_loading, "TOKENS_PER_BATCH", 90)

    def make(shards, sharing):
        made = extract.extract_features(
            source, spec, device="cpu", batch_size=4, progress=False, shards=shards, sharing=sharing
        )
        return (made.embedding,)

    check(make)


class OfBatch(VarianceScorer):
    """Scores that depend on which images share a batch, so that a batch that differs is seen."""

    def scores(self, images, labels, positions, patch_size):
        return super().scores(images, labels, positions, patch_size) + positions.sum()


def test_scores_of_patches():
    random_sizes = random.Random(0)
    images = [image.resize((random_sizes.randint(5, 8), random_sizes.randint(5, 8))) for image in random_images(70)]
    index = torch.randperm(70, generator=torch.Generator().manual_seed(0))[:60]
    loop = score.ScoreLoop(ListSource(images), index, OfBatch(), 4, batch_size=3)

    def make(shards, sharing):
        return score.score_images(loop, progress=False, shards=shards, sharing=sharing)

    check(make)
    missing = torch.arange(0, 60, 2)
    there = list(loop.scored(missing, iter([3, 0])))
    back = [score.unpacked(arrays) for arrays in loop.packed(missing, iter([3, 0]))]
    assert len(there) == len(back) > 2
    for one, other in zip(there, back, strict=True):
        assert all(torch.equal(part, same) for part, same in zip(one, other, strict=True))


def test_packed_samples(tmp_path, monkeypatch):
    """Samples of which some fit no column, encoded in pieces by two ranks, of which one sends them; a run that was stopped."""
    monkeypatch.setattr(writer, "LOOK_AHEAD_SAMPLES", 3)
    monkeypatch.setattr(writer, "PIECE_SAMPLES", 4)
    of_all = list(odd_items_later_others(0))

    def items(numbers):
        return map(of_all.__getitem__, numbers)

    class Sent(Dealt):
        def share(self, job, work, unpack, size):
            for number in range(job.pieces):
                if number % 2:
                    yield from map(unpack, writer.encode_pieces(job, iter([number]), items))
                else:
                    yield from work(iter([number]))
                if number == self.stop_after:
                    raise Stop

    def write(sharing, shards=None):
        folder = tmp_path / f"store-{len(list(tmp_path.iterdir()))}"
        write_packed(
            folder, writer.SharedItems(sharing, items, {}, {}), ids=list(map(str, range(23))), index=torch.arange(23),
            bins=torch.zeros(23, dtype=torch.int16), attributes={}, shards=shards,
        )  # fmt: skip
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    expected = write(Sharing())
    assert write(Dealt(0)) == expected
    for stop_after in (0, 3):
        shards = DueShards(2)
        with pytest.raises(Stop):
            write(Sent(0, stop_after), shards)
        assert shards.pieces
        assert write(Sent(0), shards) == expected


def test_filled_images(tmp_path):
    """Images of two shapes with unequal numbers of kept patches, and one that is stored whole."""
    patches = make_patch_plan(PatchConfig(patch_size=4, drop_ratio=0.2, batch_size=1), (8, 8))
    draw, samples = random.Random(0), []
    for number, image in enumerate(random_images(30, side=8)):
        image = image.crop((0, 0, 8, 6)) if number % 3 else image
        mask = torch.tensor([draw.random() < 0.8 for _ in range(4)])
        samples.append((image if number == 7 else pack_image(image, mask, 4, "raw"), number))
    write_packed(
        tmp_path / "store", [(sample, None) for sample in samples], ids=list(map(str, range(30))),
        index=torch.arange(30), bins=torch.zeros(30, dtype=torch.int16), attributes={"image_place": [0]},
    )  # fmt: skip
    packed = PackedDataset(tmp_path / "store", patches="packed")

    class Sent(Dealt):
        def share(self, job, work, unpack, size):
            with filling.help_filling(patches, lambda: tmp_path / "store", ["cpu"], job, iter([2, 0])) as results:
                yield from map(unpack, results)
            for number, filled in work(iter(range(job.pieces))):
                if number not in (0, 2):
                    yield number, filled

    def fill(sharing, start=0):
        with isolated():
            items = filling.filled_items(
                packed, (0,), patches, device="cpu", progress=False, start=start, sharing=sharing
            )
            return [(np.asarray(sample[0]).tobytes(), sample[1]) for sample, _ in items]

    expected = fill(None)
    assert fill(Sent(1)) == expected
    assert fill(Dealt(0), start=16) == expected[16:]


@pytest.mark.parametrize("settings", [{}, {"clusters": 2}, {"objective": "facility_location", "similarity": "rbf"}])
def test_bins_of_groups(settings):
    drawn = torch.Generator().manual_seed(0)
    features, labels = Features(torch.randn(90, 5, generator=drawn), None), torch.arange(90) % 7 % 4
    config = BinConfig(num_bins=3, **settings)

    class Sent(Dealt):
        def share(self, job, work, unpack, size):
            with make.help_bins(features, config, "cpu", 2, job, iter([2, 0])) as results:
                yield from map(unpack, results)
            yield from work(number for number in range(job.pieces) if number not in (0, 2))

    expected = make_bins(features, num_bins=3, labels=labels, **settings)
    for sharing in (Sent(0), Dealt(1)):
        made = make.make_shared_bins(features, config, labels=labels, sharing=sharing)
        for name in ("assignment", "rank", "gain", "group"):
            assert torch.equal(getattr(made, name), getattr(expected, name))


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def test_features_of_a_stream(tmp_path):
    """Each rank reads the whole stream, and only what it takes is encoded; a run that was stopped; a rank with other data."""
    items = [(image, number % 3) for number, image in enumerate(random_images(90))]
    spec = choose_encoder((TinyNetwork(), to_float_tensor))
    options = {"device": "cpu", "batch_size": 4, "progress": False}

    class Sent(Dealt):
        def __init__(self, others, stop_after=None):
            self.others, self.stop_after, self.made = others, stop_after, []

        def share(self, job, work, unpack, size):
            taken = (1, 2, 6, 22, 30)
            source = as_source(Stream(self.others))
            with streams.extract_stream_pieces(
                source, spec, job, iter(taken), device="cpu", precision="auto", batch_size=4
            ) as results:
                sent = {int(arrays["piece"]): arrays for arrays in results}
            # Number 30 is behind the end.
            assert set(sent) == {1, 2, 6, 22}
            for number, rows in work(number for number in itertools.count() if number not in taken):
                self.made.append(len(rows.positions))
                yield number, rows
                if number + 1 in sent:
                    yield unpack(sent.pop(number + 1))
                if number == self.stop_after:
                    raise Stop
            yield from map(unpack, sent.values())
            assert job.total() == len(self.made) + 4

    def extract(sharing=None, shards=None):
        source = as_source(Stream(items))
        made = streams.extract_stream(source, spec, tmp_path, **options, sharing=sharing, shards=shards)
        assert len(source.digests(0, 90)) == 90
        return made

    expected, sharing = extract(), Sent(items)
    assert torch.equal(extract(sharing), expected)
    assert sum(sharing.made) == 90 - 4 - 4 - 4 - 2
    others = [*items[:9], items[0], *items[10:]]
    with pytest.raises(ChangedError, match="from position 8 on"):
        extract(Sent(others))
    shards = DueShards(1)
    with pytest.raises(Stop):
        extract(Sent(items, stop_after=7), shards)
    assert shards.pieces
    assert torch.equal(extract(None, shards), expected)


def test_an_encoder_that_is_trained_first_is_not_trained_by_each_rank():
    class Refused(Sharing):
        num_ranks = 2

        def share(self, job, work, unpack, size):
            raise AssertionError("the other ranks would train it as well")

    source, labels = ListSource(random_images(12)), Labels(torch.arange(12) % 3)
    spec = with_selection_epochs(
        choose_encoder((TinyNetwork(), to_float_tensor)),
        source,
        labels,
        FeatureConfig(selection_epochs=1),
        progress=False,
    )
    options = {"device": "cpu", "batch_size": 4, "num_workers": 0, "progress": False}
    made = extract.extract_features(source, spec, **options, sharing=Refused())
    assert torch.equal(made.embedding, extract.extract_features(source, spec, **options).embedding)


def test_loader_processes_take_no_more_batches_than_are_asked_for():
    """What a rank reads ahead cannot be left to others."""
    source = ListSource(random_images(30))
    spec = choose_encoder((TinyNetwork(), to_float_tensor))
    taken = []

    class Watched(Sharing):
        num_ranks = 2

        def share(self, job, work, unpack, size):
            def numbers():
                for number in range(job.pieces):
                    taken.append(number)
                    yield number

            results = work(numbers())
            first = list(islice(results, 2))
            assert len(taken) <= 4
            yield from first
            yield from results

    made = extract.extract_features(source, spec, batch_size=2, num_workers=1, progress=False, sharing=Watched())
    expected = extract.extract_features(source, spec, batch_size=2, num_workers=0, progress=False)
    assert torch.equal(made.embedding, expected.embedding)
    assert taken == list(range(15))


def test_a_slurm_step_is_a_launch_and_a_batch_script_is_none():
    step = {
        "SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
        "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "0",
    }  # fmt: skip
    found = find_launch(step)
    assert (found.rank, found.num_ranks, found.local_rank, found.ranks_on_node) == (9, 16, 1, 8)
    assert found.address == "gpu07"
    assert found.port == find_launch(step | {"SLURM_PROCID": "0"}).port
    assert find_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "1234567"}) is None
    assert find_launch({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}) is None


def leader_and_helper():
    """A leader and a helper of one meeting in this process, which has two ranks."""
    store = torch.distributed.HashStore()
    launches = [Launch(rank, 2, is_hosted=True) for rank in (0, 1)]
    return (
        meeting.Leader(exchange.Exchange(store, "meeting", 0), launches[0]),
        meeting.Helper(exchange.Exchange(store, "meeting", 1), launches[1]),
    )


def test_failure_of_a_helper_that_the_heartbeat_sees_first():
    leader, helper = leader_and_helper()
    helper.leave("disk on fire", holds_store=False)
    assert leader._present() == []  # This is what the heartbeat's thread asks for.
    job = Job("features", {}, {}, 2, 2)
    with pytest.raises(DistributedError, match="disk on fire"):
        list(leader.share(job, lambda numbers: numbers, dict, lambda result: 1))
    leader.leave(None, holds_store=False)


def test_results_in_order_of_a_slow_and_a_fast_rank():
    """No rank is further ahead of what the leader has passed on than the job says."""
    leader, helper = leader_and_helper()
    job, passed, began = Job("numbers", {}, {}, 40, 40, ahead=2), [], []

    def work(seconds, numbers):
        for number in numbers:
            began.append((number, len(passed)))
            time.sleep(seconds)
            yield number, number**2

    @contextmanager
    def handler(job, numbers):
        yield ({"piece": np.array(one), "square": np.array(square)} for one, square in work(0.001, numbers))

    thread = threading.Thread(target=helper.help, args=({"numbers": handler},))
    thread.start()
    unpack = lambda arrays: (int(arrays["piece"]), int(arrays["square"]))  # noqa: E731
    for square in in_order(leader.share(job, partial(work, 0.02), unpack, lambda _: 1)):
        passed.append(square)
    leader._exchange.write("end", {"entries": []})
    thread.join()
    assert passed == [number**2 for number in range(40)]
    # What the leader has but has not passed on yet adds to it.
    assert max(number - before for number, before in began) <= 2 * 2 + 2
    helper.leave(None, holds_store=False)
    leader.leave(None, holds_store=False)


@pytest.mark.parametrize("hangs", [0, 1])
def test_a_rank_that_hangs_while_its_heart_beats_ends_the_run(monkeypatch, hangs):
    """Rank 0 leads and rank 1 helps; the other one waits by looking again and again."""
    monkeypatch.setattr(exchange, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(exchange, "WORK_SECONDS", 1e-6)
    monkeypatch.setattr(exchange, "STALLED_SECONDS", 0.6)
    store, taken, over = torch.distributed.HashStore(), threading.Event(), threading.Event()

    def work(rank, numbers):
        for number in numbers:
            if rank == hangs:
                taken.set()
                over.wait()
            while not taken.is_set():
                time.sleep(0.005)
            yield number

    @contextmanager
    def handler(job, numbers):
        yield ({"number": np.array(number)} for number in work(1, numbers))

    def run(rank):
        one = (meeting.Leader, meeting.Helper)[rank](
            exchange.Exchange(store, "meeting", rank), Launch(rank, 2, is_hosted=True)
        )
        try:
            if rank:
                one.help({"features": handler})
            else:
                job = Job("features", {}, {}, 5, 5)
                list(one.share(job, partial(work, 0), lambda arrays: arrays["number"], lambda _: 1))
        finally:
            one.leave(None, holds_store=False)

    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(run, rank) for rank in (0, 1)]
        try:
            with pytest.raises(DistributedError, match=rf"rank {hangs} on .* hangs"):
                ranks[1 - hangs].result()
        finally:
            over.set()


def test_files_are_hashed_once_by_all_ranks(tmp_path, monkeypatch):
    """One of them is unreadable, which both ranks are told."""
    store, paths, hashed, lock = torch.distributed.HashStore(), [], [], threading.Lock()
    for number in range(40):
        paths.append(str(tmp_path / f"{number}.bin"))
        Path(paths[-1]).write_bytes(bytes([number]) * number)
    Path(paths[7]).unlink()
    real, both = digests._hash_file, threading.Barrier(2)
    monkeypatch.setattr(identifying, "PIECE_FILES", 3)
    monkeypatch.setattr(meeting, "IDLE_SECONDS", 0.005)

    def counted(path):
        with lock:
            hashed.append((threading.current_thread().name, path))
        if len(hashed) < 3:
            time.sleep(0.2)
        return real(path)

    monkeypatch.setattr(digests, "_hash_file", counted)

    def rank(number):
        memory = digests.DigestMemory(tmp_path / f"memory-{number}")
        memory.spread = partial(identifying._hash_together, lambda: store, Launch(number, 2, is_hosted=True))
        both.wait()
        return memory.files(paths, skips=True)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(rank, (0, 1)))
    expected = digests.DigestMemory(tmp_path / "alone").files(paths, skips=True)
    assert expected[7] == "unreadable: FileNotFoundError"
    assert found == [expected, expected]
    # The file that is not there is looked for by each.
    assert sorted(Counter(path for _, path in hashed[: -len(paths)]).values())[-2] == 1


def test_a_rank_waits_for_others_as_long_as_their_hearts_beat(monkeypatch):
    monkeypatch.setattr(exchange, "BEAT_SECONDS", 0.05)
    store, began, ended = torch.distributed.HashStore(), threading.Event(), []

    def slow():
        began.set()
        time.sleep(0.6)
        ended.append(1)
        return "made"

    with ThreadPoolExecutor(2) as pool:
        one, other = (exchange.Exchange(store, "meeting", rank) for rank in (0, 1))
        made = pool.submit(exchange.finish_with_all, one, 2, slow)
        began.wait()
        assert exchange.finish_with_all(other, 2, lambda: "found") == "found"
        assert ended
        assert made.result() == "made"
    # Another rank began, and is silent since.
    monkeypatch.setattr(exchange, "SILENCE_SECONDS", 0.3)
    alone, silent = (exchange.Exchange(store, "other", rank) for rank in (0, 1))
    silent.write("beat/1/who", {"rank": 1, "host": "another machine", "pid": 1})
    silent.raise_count("beat/1")
    with pytest.raises(DistributedError, match="rank 1 on another machine has been silent"):
        exchange.finish_with_all(alone, 2, lambda: "found")
    # It was killed before it began.
    monkeypatch.setattr(exchange, "ARRIVAL_SECONDS", 0.3)
    with pytest.raises(DistributedError, match="rank 1 has not come"):
        exchange.finish_with_all(exchange.Exchange(store, "third", 0), 2, lambda: "found")


def test_a_rank_that_comes_late_is_waited_for_while_this_one_works(monkeypatch):
    monkeypatch.setattr(exchange, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(exchange, "SILENCE_SECONDS", 0.4)
    monkeypatch.setattr(exchange, "ARRIVAL_SECONDS", 0.4)
    store = torch.distributed.HashStore()

    def rank(number, late, works):
        time.sleep(late)
        return exchange.finish_with_all(exchange.Exchange(store, "meeting", number), 2, lambda: time.sleep(works))

    with ThreadPoolExecutor(2) as pool:
        for run in (pool.submit(rank, 0, 0, 2.0), pool.submit(rank, 1, 1.0, 0.1)):
            run.result()


def unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_rank_finds_a_store_that_opens_later_and_looks_for_none_that_is_needed_no_more():
    """Rank 0 may have made everything and ended before another rank looks for its store."""
    launch = Launch(1, 2, address="127.0.0.1", port=unused_port())
    asked = []
    assert exchange.find_store(launch, "all", lambda: bool(asked) or asked.append(1)) is None
    opened = []

    def rank_0():
        opened.append(exchange.find_store(Launch(0, 2, address="localhost", port=launch.port), "all"))

    timer = threading.Timer(0.3, rank_0)
    timer.start()
    store = exchange.find_store(launch, "all")
    timer.join()
    store.set("name", "text")
    assert opened[0].get("name") == b"text"


def test_a_call_of_a_store_that_never_answers_is_given_up(monkeypatch):
    """Its process was stopped, or its machine is gone."""
    port = unused_port()
    opened, stopped = (multiprocessing.get_context("fork").Event() for _ in range(2))

    def hold():
        store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        opened.set()
        stopped.wait()
        del store

    holder = multiprocessing.get_context("fork").Process(target=hold, daemon=True)
    holder.start()
    try:
        assert opened.wait(20)
        monkeypatch.setattr(exchange, "BEAT_SECONDS", 0.1)
        monkeypatch.setattr(exchange, "SILENCE_SECONDS", 0.5)
        exchange._watch_calls.cache_clear()
        one = exchange.Exchange(exchange.find_store(Launch(1, 2, address="127.0.0.1", port=port), "all"), "meeting", 1)
        one.write("name", 1)
        os.kill(holder.pid, signal.SIGSTOP)
        os.waitpid(holder.pid, os.WUNTRACED)  # The signal takes a moment, in which the store could still answer.
        with pytest.raises(exchange.StoreLostError, match="has ended or hangs"):
            one.count("count")
    finally:
        holder.kill()
        holder.join()


@pytest.mark.parametrize("distributed", ["auto", "all"])
def test_rank_that_nobody_helps_goes_on_without_the_store(monkeypatch, distributed):
    """Rank 0, which holds the store, may make something else and end earlier."""
    store = partial(torch.distributed.TCPStore, "127.0.0.1", wait_for_workers=False, timeout=timedelta(seconds=5))
    of_rank_0 = [store(port=0, is_master=True)]
    client = store(port=of_rank_0[0].port, is_master=False)
    monkeypatch.setattr(together, "find_launch", lambda: Launch(1, 2, address="127.0.0.1", port=client.port))
    monkeypatch.setattr(together, "find_store", lambda *given: client)
    monkeypatch.setattr(together, "_digest", lambda *given: "digest")
    build, calls = SimpleNamespace(devices=("cpu",), sharing=Sharing(), cache=None, entries=lambda *given: []), []

    def make():
        calls.append(type(build.sharing))
        of_rank_0.clear()
        while type(build.sharing) is not Sharing:
            build.sharing.check()
        return "made"

    if distributed == "all":
        with pytest.raises(DistributedError, match="lost the store"):
            together.build_together(build, distributed, (), make, lambda: None)
    else:
        assert together.build_together(build, distributed, (), make, lambda: None) == "made"
        assert calls == [meeting.Leader, Sharing]
