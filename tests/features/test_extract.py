import logging
import os
import random
import signal
import sys
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from dq_lightning.core.errors import FeatureError, SourceError
from dq_lightning.features import loading
from dq_lightning.features.choose import choose_encoder
from dq_lightning.features.extract import extract_features
from dq_lightning.features.gradient import head_gradient
from dq_lightning.features.loading import ImageBatches, choose_num_workers
from dq_lightning.features.origins import EncoderSpec
from tests import warm_processes

SIZE = (32, 32)


@pytest.fixture
def spec(tiny, to_float):
    return choose_encoder((tiny, to_float), image_size=SIZE)


def extract(source, spec, **options):
    return extract_features(source, spec, device="cpu", progress=False, **{"num_workers": 0, **options})


class GivenEncoder:
    """Stands where a spec and its encoder stand."""

    num_classes = None

    def __init__(self, embed):
        self.embed = embed

    def load(self, device, precision):
        return self

    def preprocess(self, image):
        return torch.from_numpy(np.array(image)).float().mean(dim=(0, 1))


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (4, 0), (64, 0), (4, 2), (3, "auto")])
def test_rows_are_the_networks_in_order_whatever_the_batches(
    tiny, spec, to_float, make_source, batch_size, num_workers
):
    source = make_source(11)
    features = extract(source, spec, batch_size=batch_size, num_workers=num_workers)
    tiny.eval()
    for index in range(11):
        with torch.no_grad():
            x = to_float(source.image(index))[None]
            alone = tiny.norm(tiny.convolution(x)).relu().mean(dim=(2, 3))
        torch.testing.assert_close(features.embedding[index : index + 1], alone)
    assert not features.embedding.requires_grad
    assert not features.embedding.is_inference()


def test_same_bits_every_time(spec, make_source):
    source = make_source(9)
    assert torch.equal(extract(source, spec).embedding, extract(source, spec, num_workers=2).embedding)


def test_gradient_is_that_of_the_heads_logits(tiny, spec, make_source):
    labels = torch.tensor([0, 1, 2, 0, 1])
    features = extract(make_source(5), spec, kind="gradient", labels=labels, batch_size=2)
    wanted = head_gradient(tiny.output(features.embedding).detach(), labels)
    torch.testing.assert_close(features.head_gradient, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": None}, "needs class labels"),
        ({"labels": torch.tensor([0, 1, 3, 0])}, "3 outputs"),
        ({"labels": torch.tensor([0, 1, 1, 0])}, "2 classes"),
        ({"labels": torch.tensor([0, 1, 1, 0]), "num_classes": 5}, "5 classes"),
        ({"labels": torch.tensor([0, 1, 2, -1])}, "-1"),
        ({"labels": torch.tensor([0, 1, 2])}, "3 labels for 4"),
    ],
)
def test_gradient_without_the_right_head_is_refused(spec, make_source, options, message):
    with pytest.raises(FeatureError, match=message):
        extract(make_source(4), spec, kind="gradient", **options)


def test_gradient_with_a_class_that_does_not_occur(spec, make_source):
    labels = torch.tensor([0, 1, 1, 0])
    assert extract(make_source(4), spec, kind="gradient", labels=labels, num_classes=3).head_gradient.shape == (4, 3)


def test_gradient_without_head(to_float, make_source):
    spec = choose_encoder((nn.Conv2d(3, 4, 3), to_float), image_size=SIZE)
    with pytest.raises(FeatureError, match="has none"):
        extract(make_source(2), spec, kind="gradient", labels=torch.tensor([0, 1]))


def everything():
    cudnn = torch.backends.cudnn
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        str(np.random.get_state()),
        cudnn.benchmark,
        cudnn.deterministic,
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("fails", [False, True])
def test_the_process_is_left_as_it_was(spec, make_source, num_workers, fails):
    before_flags = (torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision())
    try:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("medium")
        torch.set_default_dtype(torch.float64)
        before = everything()
        source = make_source(6, broken=[4] if fails else [])
        try:
            features = extract(source, spec, num_workers=num_workers, batch_size=2)
            assert features.embedding.dtype == torch.float32
        except SourceError:
            assert fails
        assert everything() == before
    finally:
        torch.set_default_dtype(torch.float32)
        torch.backends.cudnn.benchmark = before_flags[0]
        torch.set_float32_matmul_precision(before_flags[1])


def test_a_seed_that_waits_for_the_gpu_is_still_the_callers(tmp_path):
    """Until there is a context, torch keeps the call that will seed the GPU; in a process of its own there is none."""
    code = (
        "import torch\n"
        "from dq_lightning.core.isolation import isolated\n"
        "torch.manual_seed(42)\n"
        "with isolated():\n"
        "    torch.rand(3)\n"
        "waiting, _ = torch.cuda._lazy_seed_tracker.get_calls()[-1]\n"
        "assert not torch.cuda.is_initialized()\n"
        "print([cell.cell_contents for cell in waiting.__closure__], torch.initial_seed())\n"
    )
    (tmp_path / "script.py").write_text(code)
    done = warm_processes.run([tmp_path / "script.py"], warm_processes.environment())
    assert done.stdout.split() == ["[42]", "42"], done.stderr


def test_random_preprocessing_does_not_depend_on_the_callers_seed(tiny, to_float, make_source):
    def noisy(image):
        return to_float(image) + torch.rand(())

    spec = choose_encoder((tiny, noisy), image_size=SIZE)
    torch.manual_seed(1)
    first = extract(make_source(3), spec)
    torch.manual_seed(2)
    assert torch.equal(extract(make_source(3), spec).embedding, first.embedding)


def test_short_memory_halves_the_batch_and_goes_on(make_source, caplog):
    sizes = []

    def embed(batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch[:, :2].clone()

    source = make_source(21)
    encoder = GivenEncoder(embed)
    with caplog.at_level(logging.WARNING, "dq_lightning"):
        features = extract(source, encoder, batch_size=8)
    torch.testing.assert_close(features.embedding, torch.stack([encoder.preprocess(i)[:2] for i in source.images]))
    # 8 -> 4 -> 2, and never more again
    assert sizes[:2] == [8, 4]
    assert max(sizes[2:]) == 2
    assert len(caplog.records) == 2


def test_one_image_too_large_for_the_memory(make_source):
    def embed(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(FeatureError, match='device="cpu"'):
        extract(make_source(4), GivenEncoder(embed))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_counted_and_named(make_source, value):
    source = make_source(40)
    bad = {3, 7, 30, 31, 32, 33, 39}
    embed_rows = iter(range(40))

    def embed(batch):
        rows = [next(embed_rows) for _ in batch]
        return torch.tensor([[1.0, value if row in bad else 2.0] for row in rows])

    with pytest.raises(FeatureError, match=r"7 of 40 samples.*samples 3, 7, 30, 31, 32\."):
        extract(source, GivenEncoder(embed), batch_size=2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_sample_is_the_sources_own_error(spec, make_source, num_workers):
    with pytest.raises(SourceError) as caught:
        extract(make_source(12, broken=[7, 9]), spec, batch_size=2, num_workers=num_workers)
    assert str(caught.value) == "sample 7 (cat.jpg) cannot be decoded"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_doubtful_decodes_are_reported_once_with_a_count(spec, make_source, num_workers, caplog):
    with caplog.at_level(logging.WARNING, "dq_lightning"):
        extract(make_source(20, doubtful=range(2, 12)), spec, batch_size=3, num_workers=num_workers)
    (record,) = caplog.records
    text = record.getMessage()
    assert text.startswith("10 of 20 images")
    assert "sample 2: 16-bit image clipped" in text
    assert "sample 6:" in text
    assert "sample 7:" not in text
    assert "5 more" in text


def test_empty_source(spec, make_source):
    with pytest.raises(FeatureError, match="empty"):
        extract(make_source(0), spec)


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        (lambda image: image, "ToTensor"),
        (lambda image: 1 / 0, "sample 0: ZeroDivisionError"),
        (lambda image: torch.zeros(3, 4, 3 + np.array(image)[0, 0, 0] % 7), "sample 0 and"),
    ],
)
def test_preprocessing_that_does_not_fit(tiny, make_source, preprocess, message):
    spec = choose_encoder((tiny, preprocess), image_size=SIZE)
    with pytest.raises(FeatureError, match=message):
        extract(make_source(12), spec)


def test_model_is_freed(make_source):
    seen = []

    class Spec:
        def load(self, device, precision):
            encoder = choose_encoder("bundled", image_size=SIZE).load(device, precision)
            seen.append(weakref.ref(encoder))
            return encoder

    extract(make_source(3), Spec())
    assert seen[0]() is None


def test_rows_are_written_where_the_caller_wants_them(spec, make_source, tmp_path):
    made = {}

    def allocate(name, shape):
        array = np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", np.float32, shape)
        made[name] = torch.from_numpy(array)
        return made[name]

    labels = torch.tensor([0, 1, 2])
    features = extract(make_source(3), spec, kind="gradient", labels=labels, out=allocate)
    assert features.embedding is made["embedding"]
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "embedding.npy")), extract(make_source(3), spec).embedding)
    assert set(made) == {"embedding", "head_gradient"}


def test_progress_bar_is_for_terminals_and_silent_when_asked(spec, make_source, capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    extract_features(make_source(3), spec, device="cpu", num_workers=0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    extract_features(make_source(3), spec, device="cpu", num_workers=0)
    assert "sample/s" in capsys.readouterr().err
    extract_features(make_source(3), spec, device="cpu", num_workers=0, progress=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    extract_features(make_source(3), spec, device="cpu", num_workers=0)
    assert capsys.readouterr().err == ""


def test_without_fork_an_unpicklable_dataset_goes_on_without_processes(spec, make_source, caplog, monkeypatch):
    source = make_source(5)
    wanted = extract(source, spec).embedding
    source.hook = lambda: None
    monkeypatch.setattr(loading, "FORK", "spawn")
    with caplog.at_level(logging.WARNING, "dq_lightning"):
        features = extract(source, spec, num_workers=2)
    assert "read in one process" in caplog.text
    assert torch.equal(features.embedding, wanted)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="loader processes are forked on Linux only")
def test_loaders_are_forked_so_unpicklable_datasets_work(spec, make_source, caplog):
    source = make_source(5)
    source.hook = lambda: None
    extract(source, spec, num_workers=1)
    assert caplog.text == ""


def test_processes_are_started_only_for_work_worth_it(make_source, to_float, monkeypatch):
    cpu = torch.device("cpu")
    batches = ImageBatches(make_source(8), to_float, list(torch.arange(8).split(4)))
    assert choose_num_workers(batches, cpu) == 0
    monkeypatch.setattr(loading, "WORKER_START_SECONDS", 0.0)
    workers = choose_num_workers(batches, cpu)
    assert 1 <= workers <= max(1, (os.cpu_count() or 1) // 2)


@pytest.mark.gpu
def test_gpu_agrees_with_cpu_and_gives_its_memory_back(make_source):
    spec = choose_encoder("bundled", image_size=SIZE)
    source = make_source(50)
    torch.zeros(1, device="cuda")
    held = torch.cuda.memory_allocated()
    exact = extract(source, spec).embedding
    run = {"progress": False, "batch_size": 16, "device": "cuda"}
    full = extract_features(source, spec, precision="float32", **run).embedding
    half = extract_features(source, spec, **run).embedding
    torch.testing.assert_close(full, exact, rtol=1e-3, atol=1e-4)
    assert (half - exact).norm() < 0.05 * exact.norm()
    assert torch.equal(half, extract_features(source, spec, **run).embedding)
    assert torch.cuda.memory_allocated() == held
    assert isinstance(spec, EncoderSpec)


def test_a_loader_process_that_ends_is_told_with_its_place(spec, make_source):
    class Deadly:
        def __init__(self, source):
            self.source = source

        def __len__(self):
            return len(self.source)

        def image(self, index):
            if index == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            return self.source.image(index)

        def decode_warning(self, index):
            return None

    with pytest.raises(FeatureError, match=r"a loader process ended .* num_workers=0"):
        extract(Deadly(make_source(12)), spec, batch_size=4, num_workers=1)


@pytest.mark.parametrize(
    "change", [lambda image: image, lambda image: image.contiguous(), lambda image: image.double()]
)
def test_a_batch_is_the_stack_of_its_images_whatever_their_layout(change):
    pixels = torch.rand(4, 5, 6, 3)
    images = [image.permute(2, 0, 1) for image in pixels]
    images[1] = change(images[1])
    whole = loading.stack(images, [0, 1, 2, 3])
    assert torch.equal(whole, torch.stack(images))
    assert whole.dtype == torch.stack(images).dtype
