"""After a kill the next run does the rest, at most a shard of the work twice, and leaves the bytes of an undisturbed run."""

import contextlib
import os
import signal
import traceback

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Subset

from dq_lightning import BinConfig, FeatureConfig, PatchConfig, QuantizeConfig, SelectionConfig, as_source, quantize
from dq_lightning.cache import entries as cache
from dq_lightning.cache import files, shards
from dq_lightning.core.batching import HalvedBatches
from dq_lightning.features import extract, text_loading
from dq_lightning.features.choose import choose_encoder
from dq_lightning.packed import writer as packed
from dq_lightning.packed.writer import write_packed
from dq_lightning.patches import score
from dq_lightning.patches.saliency import VarianceScorer
from dq_lightning.pipeline import filling, packing
from tests.features.text_models import Texts, save_model
from tests.lightning_scripts.common import photos, to_tensor
from tests.lightning_scripts.patched_images import small_mae
from tests.store.calls import DueShards

COUNT = 60


@pytest.fixture(autouse=True)
def one_thread():
    """A forked child must not wait for threads that it has not inherited."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Stop(Exception):  # noqa: N818
    """The end of a run."""


class Batches:
    """Remembers the batches that go through a network, as bytes, and stops before a given one."""

    def __init__(self, monkeypatch):
        self.seen, self.stop_at = [], None
        real = HalvedBatches.run

        def watched(this, function, batch, *others):
            if len(self.seen) == self.stop_at:
                raise Stop
            self.seen.append(batch.numpy().tobytes())
            return real(this, function, batch, *others)

        monkeypatch.setattr(HalvedBatches, "run", watched)

    def of(self, run, stop_at=None):
        self.seen, self.stop_at = [], stop_at
        try:
            return run(), self.seen
        except Stop:
            return None, self.seen


def check_every_stop(work, batches, per_shard):
    """Stop a run before each of its batches: the batches done before and after are those of an undisturbed run."""
    expected, undisturbed = batches.of(lambda: work(None))
    assert len(undisturbed) > 6
    for stop_at in range(len(undisturbed)):
        memory = DueShards(per_shard)
        nothing, before = batches.of(lambda memory=memory: work(memory), stop_at)
        assert nothing is None
        assert before == undisturbed[:stop_at]
        memory.asked = 0
        found, after = batches.of(lambda memory=memory: work(memory))
        assert after == undisturbed[stop_at // per_shard * per_shard :]
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
    return undisturbed


class Edges(nn.Module):
    """A classifier of ten classes with fixed weights."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 10)
        with torch.no_grad():
            for number, weights in enumerate(self.parameters()):
                weights.copy_(torch.linspace(-9, 9, weights.numel()).sin().view_as(weights) * (number + 1))

    def forward(self, images):
        return self.head(torch.relu(self.convolution(images)).mean(dim=(2, 3)))


@pytest.mark.parametrize("per_shard", [1, 3])
def test_features_of_images_and_gradients(per_shard, monkeypatch):
    source = as_source(photos(30, None))
    spec = choose_encoder((Edges(), to_tensor), image_size=(32, 32))

    def work(memory):
        features = extract.extract_features(
            source, spec, kind="gradient", labels=source.labels().values, num_classes=10, device="cpu", batch_size=4,
            num_workers=0, progress=False, shards=memory,
        )  # fmt: skip
        return features.embedding, features.head_gradient

    undisturbed = check_every_stop(work, Batches(monkeypatch), per_shard)
    assert len(undisturbed) == 8


@pytest.mark.parametrize("per_shard", [1, 3])
def test_features_of_text(per_shard, monkeypatch, tmp_path):
    save_model(tmp_path)
    letters = np.random.default_rng(0)
    source = Texts(["".join(letters.choice(list("abcdefgh"), letters.integers(1, 40))) for _ in range(30)])
    spec = choose_encoder(str(tmp_path), modality="text")
    monkeypatch.setattr(text_loading, "BATCHES_PER_WINDOW", 4)
    monkeypatch.setattr(text_loading, "TOKENS_PER_BATCH", 90)

    def work(memory):
        features = extract.extract_features(source, spec, device="cpu", batch_size=4, progress=False, shards=memory)
        return (features.embedding,)

    check_every_stop(work, Batches(monkeypatch), per_shard)


class Sized:
    """Images of several sizes in no order, more of them than may wait for their batch."""

    def __init__(self, count):
        random = np.random.default_rng(3)
        sizes = [(int(h), int(w)) for h, w in random.integers(5, 9, (count, 2))]
        self.all = [Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]

    def image(self, index):
        return self.all[index]


@pytest.mark.parametrize("per_shard", [1, 3])
def test_saliency_of_images_of_many_sizes(per_shard, monkeypatch):
    source, index = Sized(70), torch.randperm(70, generator=torch.Generator().manual_seed(0))[:60]
    monkeypatch.setattr(score, "WINDOW_BATCHES", 4)

    def work(memory):
        return score.score_images(
            score.ScoreLoop(source, index, VarianceScorer(), 4, batch_size=3), progress=False, shards=memory
        )

    check_every_stop(work, Batches(monkeypatch), per_shard)


def test_another_batch_size_goes_on_as_well(monkeypatch):
    source, spec = as_source(photos(30, None)), choose_encoder((Edges(), to_tensor), image_size=(32, 32))

    def work(memory, batch_size):
        made = extract.extract_features(
            source, spec, device="cpu", batch_size=batch_size, num_workers=0, progress=False, shards=memory
        )
        return made.embedding

    expected, memory = work(None, 4), DueShards()
    batches = Batches(monkeypatch)
    batches.of(lambda: work(memory, 4), stop_at=5)
    found, after = batches.of(lambda: work(memory, 7))
    assert sum(len(batch) for batch in after) == 10 * 3 * 32 * 32 * 4
    torch.testing.assert_close(found, expected)


def test_rows_that_are_not_finite_are_made_again():
    source = as_source(photos(30, None))
    broken = [True]

    class Sometimes(Edges):
        def forward(self, images):
            made = images.mean(dim=(2, 3))
            return torch.where(torch.tensor(broken[0]) & (made[:, :1] > 0.5), torch.nan, made)

    def work(memory):
        spec = choose_encoder((Sometimes(), to_tensor), image_size=(32, 32))
        return extract.extract_features(
            source, spec, device="cpu", batch_size=4, num_workers=0, progress=False, shards=memory
        ).embedding

    memory = DueShards()
    with pytest.raises(extract.FeatureError, match="NaN or infinite"):
        work(memory)
    broken[0] = False
    expected = work(None)
    assert int((expected[:, 0] > 0.5).sum()) > 3
    assert torch.equal(work(memory), expected)


def odd_items(start):
    """Samples of which some fit no column, with arrays, text, images and nothing."""
    for number in range(start, 23):
        image = Image.fromarray(np.full((9, 70 + number, 3), number, np.uint8))
        yield {"a": np.full((2, 0), 1), "b": number, "c": ("x" * number, image), "d": torch.full((3,), number)}, None


def odd_items_later_others(start):
    for number, (sample, _) in enumerate(odd_items(start), start):
        yield (["other", number] if number % 7 == 5 else sample), None


@pytest.mark.parametrize("items", [odd_items, odd_items_later_others])
@pytest.mark.parametrize("per_shard", [1, 3])
def test_packing_of_samples_of_all_kinds(items, per_shard, tmp_path, monkeypatch):
    grain = 2
    # what was looked at to lay the samples out is written at once, and so it can be kept
    monkeypatch.setattr(packed, "LOOK_AHEAD_SAMPLES", 3)

    def write(folder, items, memory):
        write_packed(
            folder, items, ids=[f"é{i}" for i in range(23)], index=torch.arange(23),
            bins=torch.zeros(23, dtype=torch.int16), attributes={"a": 1}, shards=memory, grain=grain,
        )  # fmt: skip

    write(tmp_path / "undisturbed", items, None)
    for stop_at in range(3, 23):
        memory, started = DueShards(per_shard), []

        def until(start, stop_at=stop_at, started=started):
            started.append(start)
            for number, item in enumerate(items(start), start):
                if number == stop_at and len(started) == 1:
                    raise Stop
                yield item

        with pytest.raises(Stop):
            write(tmp_path / f"{stop_at} killed", until, memory)
        write(tmp_path / f"{stop_at}", until, memory)
        shard = grain * per_shard
        assert started == [0, stop_at // shard * shard]
        assert content(tmp_path / f"{stop_at}") == content(tmp_path / "undisturbed")


def content(folder):
    """Digest of every file of every entry but the manifests, which tell when they were made."""
    return {
        str(path.relative_to(folder)): files.file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != "manifest.json"
        and not {".locks", "0-digests"} & set(path.parts)
        # what a later run cleans up
        and not any(part.startswith(".tmp-") for part in path.parts)
    }


IMAGES = {
    "encoder": (Edges(), to_tensor),
    "classifier": (Edges(), to_tensor),
    "reconstructor": small_mae(),
}
# its folder, once there is one
TEXT_MODEL = []
# all are kept, and yet chosen by their features
WHOLE = SelectionConfig(keep_ratio=0.995)
FEW_A_BATCH = FeatureConfig(batch_size=4, num_workers=0)
# a window of images to be filled holds eight batches
DROPPED = PatchConfig(drop_ratio=0.5, batch_size=1)


def image_run(root, encoder=IMAGES["encoder"], force_recompute=False, **settings):
    wanted = QuantizeConfig(**({"bins": BinConfig(num_bins=3), "features": FEW_A_BATCH, "selection": WHOLE} | settings))
    options = IMAGES if wanted.patches.drops else {}
    options = options | {"encoder": encoder, "force_recompute": force_recompute}
    return quantize(photos(COUNT, None), wanted, cache_dir=root, device="cpu", progress=False, **options)


def text_run(root):
    rows = [{"instruction": "abc" * (1 + i % 7), "input": "", "output": "de" * (1 + i % 5)} for i in range(COUNT)]
    wanted = QuantizeConfig(bins=BinConfig(num_bins=3), features=FEW_A_BATCH, selection=WHOLE)
    return quantize(rows, wanted, encoder=TEXT_MODEL[0], cache_dir=root, device="cpu", progress=False)


def count_batches(work):
    """Return a function that calls another with the number of samples before each batch of some work."""

    def watch(call):
        real = HalvedBatches.run

        def counted(this, function, batch, *others):
            if this._work == work:
                call(len(batch))
            return real(this, function, batch, *others)

        HalvedBatches.run = counted

    return watch


def count_filled(call):
    real = filling.fill_pixels

    def counted(model, images, *others, **more):
        call(len(images))
        return real(model, images, *others, **more)

    filling.fill_pixels = counted


def count_items(name, call):
    """Likewise for a generator of all samples, from a number on."""
    real = getattr(packing, name)

    def counted(plan, *others, **more):
        of_all = any(hasattr(one, "__len__") and len(one) == COUNT for one in others)
        for item in real(plan, *others, **more):
            if of_all:
                call(1)
            yield item

    setattr(packing, name, counted)


def gradient_run(root):
    return image_run(root, features=FeatureConfig(kind="gradient", batch_size=4, num_workers=0))


def trained_run(root):
    trained = FeatureConfig(batch_size=4, num_workers=0, selection_epochs=1, selection_batch_size=16)
    return image_run(root, features=trained)


def packed_run(root):
    return image_run(root, store="packed")


def dropped_run(root):
    return image_run(root, patches=DROPPED)


count_features = count_batches("features")

# stage: what runs it, what counts its samples, samples of a shard when it is cut wherever it may be
STAGES = {
    "features": (image_run, count_batches("features"), 4),
    "gradients": (gradient_run, count_batches("features"), 4),
    "trained encoder": (trained_run, count_batches("features"), 4),
    "text": (text_run, count_batches("features"), 4),
    "saliency": (dropped_run, count_batches("saliency"), 1),
    "packing whole samples": (packed_run, lambda call: count_items("encoded_items", call), 1),
    "packing patches": (dropped_run, lambda call: count_items("packed_items", call), 1),
    "filling": (dropped_run, count_filled, 8),
}


class _Undisturbed:
    def __init__(self, place):
        self._place, self._known = place, {}

    def content(self, run):
        if run not in self._known:
            run(self._place / run.__name__)
            # work that is soon done writes no shards
            assert not (self._place / run.__name__ / "0-partial").exists()
            self._known[run] = content(self._place / run.__name__)
        return self._known[run]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What runs leave behind that nobody disturbs, by the function that makes them."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    TEXT_MODEL.append(str(folder))
    return _Undisturbed(tmp_path_factory.mktemp("undisturbed"))


def killed(run, root, count, at):
    """Run in a forked child that keeps whatever it may, and is killed before it does a stage's sample number `at`."""
    child = os.fork()
    if child == 0:
        try:
            shards.MIN_SECONDS = shards.MAX_SECONDS = 0.0
            done = [0]

            def call(samples):
                done[0] += samples
                if done[0] > at:
                    os.kill(os.getpid(), signal.SIGKILL)

            packed.LOOK_AHEAD_SAMPLES = 1
            count(call)
            run(root)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def counted_in_child(run, root, count):
    """How many samples of a stage a run still does, in a child, so that what counts goes with it; its log as well."""
    report, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            done = []
            count(done.append)
            run(root)
            os.write(told, b"%d" % sum(done))
        except BaseException:
            os.write(told, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(told)
    with os.fdopen(report, "rb") as file:
        text = file.read()
    assert os.waitpid(child, 0)[1] == 0
    assert text.isdigit(), f"the child failed: {text.decode(errors='replace')}"
    return int(text)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_at_ninety_percent(stage, tmp_path, undisturbed):
    run, count, shard = STAGES[stage]
    expected = undisturbed.content(run)
    at = COUNT * 9 // 10
    assert killed(run, tmp_path, count, at)
    assert content(tmp_path) != expected
    (partial,) = (tmp_path / "0-partial").glob("*/*")
    assert len(list(partial.glob("*.shard"))) == at // shard
    assert counted_in_child(run, tmp_path, count) == COUNT - at // shard * shard
    assert content(tmp_path) == expected
    assert not partial.exists()


def shards_of(root):
    return sorted((root / "0-partial").glob("*/*/*.shard"))


def test_killed_again_and_again(tmp_path, undisturbed):
    for at in (10, 20, 10):
        assert killed(image_run, tmp_path, count_features, at)
    assert len(shards_of(tmp_path)) == (8 + 20 + 8) // 4
    assert counted_in_child(image_run, tmp_path, count_features) == COUNT - 36
    assert content(tmp_path) == undisturbed.content(image_run)


def test_a_damaged_shard_of_a_killed_run(tmp_path, undisturbed, caplog):
    assert killed(image_run, tmp_path, count_features, 54)
    path = shards_of(tmp_path)[10]
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)
    with caplog.at_level("INFO", "dq_lightning"):
        image_run(tmp_path)
    dropped = [message for message in caplog.messages if message.startswith("features: a file of finished work")]
    assert len(dropped) == 1
    assert "resuming features: 40 of 60 samples are done already" in caplog.messages
    assert content(tmp_path) == undisturbed.content(image_run)


def test_settings_that_do_not_enter_the_key_go_on_as_well(tmp_path):
    def other_batches(root):
        return image_run(root, features=FeatureConfig(batch_size=7, num_workers=1))

    assert killed(image_run, tmp_path, count_features, 54)
    assert counted_in_child(other_batches, tmp_path, count_features) == COUNT - 52


def test_what_was_asked_to_be_made_again_begins_again(tmp_path, undisturbed):
    def again(root):
        return image_run(root, force_recompute=True)

    assert killed(image_run, tmp_path, count_features, 54)
    assert counted_in_child(again, tmp_path, count_features) == COUNT
    assert content(tmp_path) == undisturbed.content(image_run)


def test_other_weights_do_not_go_on(tmp_path):
    def other_network(root):
        network = Edges()
        network.head.bias.data += 1
        return image_run(root, encoder=(network, to_tensor))

    assert killed(image_run, tmp_path, count_features, 54)
    assert counted_in_child(other_network, tmp_path, count_features) == COUNT


def test_two_builders_where_no_lock_holds(tmp_path, undisturbed):
    expected = undisturbed.content(dropped_run)
    assert killed(dropped_run, tmp_path, count_features, 54)
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                cache.work_lock = lambda *given: contextlib.nullcontext()
                shards.MIN_SECONDS = shards.MAX_SECONDS = 0.0
                dropped_run(tmp_path)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert {name: digest for name, digest in content(tmp_path).items() if "0-partial" not in name} == expected


def test_a_real_run_over_cifar(cifar_root, tmp_path):
    from torchvision.datasets import CIFAR10

    data = Subset(CIFAR10(cifar_root, train=False), range(0, 10_000, 80))

    def run(root):
        wanted = QuantizeConfig(
            features=FeatureConfig(batch_size=32, num_workers=0),
            patches=PatchConfig(drop_ratio=0.25, saliency="variance"),
        )
        return quantize(data, wanted, cache_dir=root, device="cpu", progress=False)

    run(tmp_path / "undisturbed")
    assert killed(run, tmp_path / "killed", count_features, 110)
    assert counted_in_child(run, tmp_path / "killed", count_features) == 125 - 96
    assert content(tmp_path / "killed") == content(tmp_path / "undisturbed")
