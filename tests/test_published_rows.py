"""Every row of the table in docs/published.md is run as it is written, on small real data."""

import json
import lzma
import threading

import numpy as np
import pytest
from PIL import Image

from dq_lightning import cli
from dq_lightning.demo.sample_data import SampleCIFAR10
from dq_lightning.selection.given import read_index
from tests.published_table import published_rows, words
from tests.test_examples import run, write_small_cifar10

IMAGES = ("quantize_sample.py", "quantize_bin.py", "quantize_pixel.py", "the three at once", "validate_cifar.py")
TEXTS = (
    "embed.py --index 0 --nums 10000", "alpaca_embed.py --merge", "alpaca_sample.py --ratio 0.1 --k 10",
    "train.py (Stanford Alpaca)",
)  # fmt: skip
# run in test_recipes.py
PHOTOS = ("distributed_train.sh 8",)
SMALL = ["--accelerator", "cpu", "--quiet", "--epochs", "1"]


def here(name, home, *more, **files):
    """A row's command of the console script, in this process."""
    script, *arguments = words(name, home, **files)
    assert script == "dq-lightning"
    cli.main([*arguments, *more])


def example(name, home, *more, **files):
    """A row's example, in a process of its own."""
    python, script, *arguments = words(name, home, **files)
    assert python == "python"
    return run(script.removeprefix("examples/"), *arguments, *more, cwd=home)


def test_every_row_is_run():
    assert set(published_rows()) == {*IMAGES, *TEXTS, *PHOTOS}


@pytest.fixture
def home(tmp_path, monkeypatch, few_bundled_images):
    """A home folder with 400 of the bundled images as CIFAR-10's own files; torchvision knows their checksums."""
    from torchvision.datasets import CIFAR10

    for name in ("train_list", "test_list", "meta"):
        monkeypatch.setattr(CIFAR10, name, getattr(CIFAR10, name))
    (tmp_path / "data_cifar").mkdir()
    write_small_cifar10(tmp_path / "data_cifar")
    (tmp_path / "data_cifar" / "sitecustomize.py").rename(tmp_path / "sitecustomize.py")
    exec((tmp_path / "sitecustomize.py").read_text(encoding="utf-8"), {})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_cifar10_sequence(home):
    sample, bins, pixel, at_once, train = IMAGES
    here(sample, home, "--progress", "false")
    parts = [np.load(f"results/bin_cifar_010/select_indices_CIFAR10_exp{k}.npy") for k in range(10)]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(400))
    here(bins, home)
    index = read_index("results/sample_quantized_cifar_010/select_indices_CIFAR10_0.125.npy", 400)
    # the images of the five files follow one another
    targets = np.concatenate([SampleCIFAR10().targets[part::5] for part in range(5)])
    assert np.bincount(targets[index]).tolist() == [5] * 10
    here(pixel, home, "--progress", "false")
    folder = home / "results" / "pixel_quantized_cifar"
    assert sorted(np.load(folder / "index.npy")) == sorted(index)
    assert Image.open(next(folder.glob("*/*.png"))).size == (32, 32)
    here(at_once, home, "--progress", "false")
    assert np.array_equal(read_index(home / "results/cifar/select_indices_CIFAR10_0.125.npy"), index)
    printed = example(train, home, *SMALL, "--limit_batches", "1", "--eval_batch_size", "16", "--seeds", "0")
    assert "batches of 16, seed 0" in printed
    assert "(mean of 1 runs, last epoch)" in printed


@pytest.fixture
def alpaca(shared_dir, tmp_path, monkeypatch):
    """A folder with 200 rows of Alpaca."""
    with lzma.open(shared_dir / "data" / "alpaca" / "alpaca_data.json.xz") as file:
        rows = json.load(file)[:200]
    (tmp_path / "alpaca_data.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path, rows


@pytest.fixture
def openai_server(monkeypatch):
    """Speaks the protocol of the embeddings API on this machine."""
    pytest.importorskip("openai", reason="the optional extra openai is not installed")
    from tests.features.test_openai_embeddings import Server

    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-this-test")
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    yield server
    server.end()


def test_alpaca_sequence(alpaca, openai_server, shared_dir):
    folder, rows = alpaca
    embed, merge, sample, train = TEXTS
    here(embed, folder, "--progress", "false")
    assert {body["model"] for _, _, body in openai_server.requests} == {"text-embedding-ada-002"}
    here(merge, folder)
    assert np.load("alpaca_embeds.npy").shape == (200, 8)
    here(sample, folder, "--progress", "false")
    chosen = read_index("alpaca_data_dq_k10.npy", 200)
    assert len(chosen) == 20
    assert json.loads((folder / "alpaca_data_dq_k10.json").read_text()) == [rows[i] for i in chosen]
    model = shared_dir / "weights" / "stories260K"
    printed = example(train, folder, *SMALL, "--precision", "32-true", "--held-out", "4", MODEL=model)
    assert "20 training rows, 4 held out" in printed
    assert (folder / "tuned" / "model.safetensors").is_file()
