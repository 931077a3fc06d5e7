"""Several devices share the batches of a network: the same bytes as one, in order, in bounded memory, ending together."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dq_lightning import quantize
from dq_lightning.core.config import FeatureConfig
from dq_lightning.core.devices import device_names
from dq_lightning.core.errors import ConfigError, SourceError
from dq_lightning.core.replicas import BATCHES_PER_REPLICA, run_in_order
from dq_lightning.features import extract
from dq_lightning.features.choose import choose_encoder
from dq_lightning.features.extract import extract_features
from dq_lightning.features.selection_training import with_selection_epochs
from dq_lightning.loading.preparation import Preparation
from dq_lightning.loading.trainer_facts import TrainerFacts
from dq_lightning.patches import score
from dq_lightning.pipeline import filling
from tests.features.conftest import ListSource, TinyNetwork, random_images, to_float_tensor
from tests.features.text_models import Texts, save_model
from tests.lightning_scripts.common import photos
from tests.lightning_scripts.patched_images import small_mae

CPU = torch.device("cpu")
SECONDS = 20.0


class Together:
    """A function whose first calls in two threads, the main one aside, wait for each other: both are seen to work."""

    def __init__(self, function):
        self.function, self.barrier, self.threads = function, threading.Barrier(2), set()

    def __call__(self, *given):
        own = threading.get_ident()
        if own not in self.threads and threading.current_thread() is not threading.main_thread():
            self.threads.add(own)
            self.barrier.wait(SECONDS)
        return self.function(*given)


def test_results_come_in_order_and_only_a_few_items_are_read_ahead():
    read, yielded, most = 0, 0, 0

    def items():
        nonlocal read, most
        for number in range(200):
            read += 1
            most = max(most, read - yielded)
            yield number

    pause = threading.Event()

    def double(number):
        # Some items take longer, so others overtake them.
        pause.wait(0.002 * (number % 7 == 0))
        return number * 2, torch.is_grad_enabled()

    spy = Together(double)
    with torch.no_grad():
        for number, (doubled, grad_mode) in enumerate(run_in_order([(CPU, spy), (CPU, spy)], items())):
            assert doubled == 2 * number
            assert not grad_mode
            yielded += 1
    assert yielded == 200
    assert most <= 2 * BATCHES_PER_REPLICA + 1


def test_the_error_of_the_first_item_that_failed_ends_all():
    called, slow_runs = [], threading.Event()

    def run(number):
        called.append(number)
        if number == 4:
            # Item 5 fails first, while this one is in work.
            slow_runs.wait(SECONDS)
            raise SourceError("item 4")
        if number == 5:
            slow_runs.set()
            raise RuntimeError("item 5")
        return number

    results = run_in_order([(CPU, run), (CPU, run)], iter(range(10**9)))
    seen = [next(results) for _ in range(4)]
    with pytest.raises(SourceError, match="item 4"):
        next(results)
    assert seen == [0, 1, 2, 3]
    assert max(called) <= 5 + BATCHES_PER_REPLICA
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("replica")]


def test_a_consumer_that_stops_and_a_source_that_fails_end_the_threads():
    results = run_in_order([(CPU, abs), (CPU, abs)], iter(range(10**9)))
    assert next(results) == 0
    results.close()

    def failing():
        yield from range(3)
        raise SourceError("cat.jpg")

    with pytest.raises(SourceError, match=r"cat\.jpg"):
        list(run_in_order([(CPU, abs), (CPU, abs)], failing()))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("replica")]


def make_features(source, spec, device, **options):
    return extract_features(
        source, spec, device=device, progress=False, **{"num_workers": 0, "batch_size": 3} | options
    )


def both_work(monkeypatch, owner, name):
    """Make the first calls of a method in two threads wait for each other."""
    spy = Together(getattr(owner, name))
    monkeypatch.setattr(owner, name, lambda *given, **more: spy(*given, **more))
    return spy


@pytest.mark.parametrize("trains", [False, True])
def test_features_of_images_are_the_bytes_of_one_device(monkeypatch, trains):
    labels, source = torch.arange(20) % 3, ListSource(random_images(20), doubtful=[4])
    spec = choose_encoder((TinyNetwork(), to_float_tensor))
    if trains:
        settings = FeatureConfig(kind="gradient", selection_epochs=1, selection_batch_size=4, num_workers=0)
        of_classes = SimpleNamespace(values=labels, num_classes=3)
        spec = with_selection_epochs(spec, source, of_classes, settings, progress=False)
    one = make_features(source, spec, "cpu", kind="gradient", labels=labels)
    spy = both_work(monkeypatch, extract, "head_gradient")
    two = make_features(source, spec, ["cpu", "cpu"], kind="gradient", labels=labels)
    assert len(spy.threads) == 2
    assert torch.equal(one.embedding, two.embedding)
    assert torch.equal(one.head_gradient, two.head_gradient)


def test_features_of_texts_are_the_bytes_of_one_device(tmp_path):
    save_model(tmp_path / "model")
    texts = Texts(["abc" * (n % 7 + 1) for n in range(30)])
    spec = choose_encoder(str(tmp_path / "model"), modality="text")
    assert torch.equal(make_features(texts, spec, "cpu").embedding, make_features(texts, spec, "cpu,cpu").embedding)


class CountingEncoder:
    """Stands where a spec and its encoder stand; each replica holds so many samples at once."""

    num_classes = None

    def __init__(self, rooms, error_at=-1):
        self.rooms, self.error_at, self.taken = list(rooms), error_at, {}
        self.barrier = threading.Barrier(len(rooms))

    def load(self, device, precision):
        self.number = 0
        return self

    def replica(self, device):
        twin = CountingEncoder.__new__(CountingEncoder)
        twin.__dict__.update(self.__dict__)
        twin.number = len(self.taken) + 1
        self.taken[twin.number] = []
        return twin

    def preprocess(self, image):
        return torch.from_numpy(np.array(image)).float().mean(dim=(0, 1))

    def embed(self, batch):
        taken = self.taken.setdefault(self.number, [])
        if not taken:
            taken.append(0)
            self.barrier.wait(SECONDS)
        taken.append(len(batch))
        if len(batch) > self.rooms[self.number]:
            raise torch.OutOfMemoryError
        return batch * 2


def test_memory_that_runs_out_on_one_device_makes_its_pieces_alone_smaller():
    source = ListSource(random_images(40))
    whole = make_features(source, CountingEncoder([99]), "cpu", batch_size=8)
    short = CountingEncoder([99, 2])
    assert torch.equal(whole.embedding, make_features(source, short, ["cpu", "cpu"], batch_size=8).embedding)
    assert set(short.taken[0][1:]) == {8}
    assert short.taken[1][1:4] == [8, 4, 2]
    assert set(short.taken[1][3:]) == {2}


def test_an_unreadable_sample_is_named_on_several_devices():
    source = ListSource(random_images(40), broken=[17])
    with pytest.raises(SourceError, match="sample 17"):
        make_features(source, CountingEncoder([99, 99]), ["cpu", "cpu"], batch_size=4)


def test_a_whole_build_gives_the_files_of_one_device(tmp_path, monkeypatch):
    """Features, saliency and filling on two replicas of the bundled classifier and of a masked autoencoder."""
    config = {
        "selection": {"keep_ratio": 0.5},
        "bins": {"num_bins": 2},
        "features": {"batch_size": 8, "num_workers": 0},
        "patches": {"drop_ratio": 0.2, "batch_size": 1},
    }
    made, spies = {}, []
    for name, device in (("one", "cpu"), ("two", ["cpu", "cpu"])):
        if name == "two":
            places = ((extract.ImageRows, "__call__"), (score.ScoreLoop, "_score"), (filling, "_fill_window"))
            spies = [both_work(monkeypatch, *place) for place in places]
        root = tmp_path / name
        quantize(photos(40), config, reconstructor=small_mae(), device=device, cache_dir=root, progress=False)
        files = [path for path in root.glob("[1-9]-*/**/*") if path.is_file()]
        # These two hold times.
        named = {str(p.relative_to(root)): p for p in files if p.name not in ("manifest.json", "compact.json")}
        made[name] = {place: path.read_bytes() for place, path in named.items()}
    assert made["one"] == made["two"]
    assert [len(spy.threads) for spy in spies] == [2, 2, 2]


@pytest.mark.parametrize("device", ["", [], "cpu,", ["auto", "cuda:0"], "auto,cuda:1"])
def test_devices_that_are_not_named_are_refused(device):
    with pytest.raises(ConfigError, match="does not name devices"):
        device_names(device)


def strategy(*devices):
    given = [torch.device(name) for name in devices]
    return SimpleNamespace(root_device=given[0], parallel_devices=given)


@pytest.mark.parametrize(
    ("devices", "used"),
    [
        (("cuda:1", "cuda:0", "cuda:1"), ("cuda:1", "cuda:0")),
        (("cuda:0",), ("cuda:0",)),
        # Only two are within reach of this process.
        (("cuda:0", "cuda:1", "cuda:2"), ("cuda:0", "cuda:1")),
        (("cpu", "cpu"), ("cpu",)),
    ],
)
@pytest.mark.parametrize("asked", ["auto", "cuda:7"])
def test_a_trainer_lends_the_devices_of_its_node(monkeypatch, tmp_path, devices, used, asked):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    trainer = SimpleNamespace(
        state=SimpleNamespace(fn=None), world_size=1, num_devices=len(devices), strategy=strategy(*devices),
        current_epoch=0, reload_dataloaders_every_n_epochs=0, progress_bar_callback=None, distributed_sampler_kwargs=None,
    )  # fmt: skip
    options = []
    train = SimpleNamespace(prepare=lambda cache, given: options.append(given))
    Preparation(train, None, cache_dir=tmp_path, verify="size", device=asked, force=False, seed=0).prepare(trainer)
    assert tuple(options[0].device) == (used if asked == "auto" else ("cuda:7",))
    assert TrainerFacts.of(None).node_devices == ()
