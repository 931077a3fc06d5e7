"""Every example runs as its help says, at a small size."""

import os
from pathlib import Path

import pytest

from tests import warm_processes

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *arguments: str, cwd: Path) -> str:
    # the folder of the run comes first, so that a test can put a sitecustomize.py there
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(cwd), str(EXAMPLES.parent)])}
    done = warm_processes.run([EXAMPLES / name, *arguments], environment, cwd, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_swap_in_trains_on_the_compact_set(cifar_root, tmp_path):
    printed = run(
        "swap_in.py",
        "--data",
        cifar_root,
        "--epochs",
        "1",
        "--limit-batches",
        "2",
        "--accelerator",
        "cpu",
        cwd=tmp_path,
    )
    assert "6,250 of 50,000 samples: 49 steps per epoch instead of 391" in printed
    assert "accuracy after the last epoch" in printed


def test_swap_in_trains_on_the_bundled_images(tmp_path):
    """The same script on a stand-in CIFAR-10 with the bundled images in torchvision's format."""
    write_small_cifar10(tmp_path, every=10)
    printed = run(
        "swap_in.py", "--data", str(tmp_path), "--epochs", "1", "--limit-batches", "1", "--batch-size", "10",
        "--accelerator", "cpu", cwd=tmp_path,
    )  # fmt: skip
    assert "25 of 200 samples: 3 steps per epoch instead of 20" in printed
    assert "accuracy after the last epoch" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"), [("draw_bins.py", (5 * 68 - 4, 208 - 4)), ("draw_patches.py", (4 * 134 - 6, 264))]
)
def test_pictures_are_drawn(name, size, tmp_path):
    from PIL import Image

    options = (
        ["--count", "5", "--classes", "cat", "--cache-dir", tmp_path] if name == "draw_bins.py" else ["--count", "2"]
    )
    assert "bytes" in run(name, "--output", str(tmp_path / "picture.png"), *map(str, options), cwd=tmp_path)
    with Image.open(tmp_path / "picture.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 1000
        assert abs(picture.width - size[0]) <= 8
        assert abs(picture.height - size[1]) <= 8


@pytest.mark.slow
def test_make_sample_makes_the_bundled_file_again(cifar_root, tmp_path):
    import numpy as np

    from dq_lightning.demo.sample_data import SAMPLE_FILE

    run(
        "make_sample.py",
        "--data",
        cifar_root,
        "--output",
        str(tmp_path / "again.npz"),
        "--per-class",
        "20",
        "5",
        cwd=tmp_path,
    )
    with np.load(tmp_path / "again.npz") as again, np.load(SAMPLE_FILE) as bundled:
        assert np.isin(again["train_positions"], bundled["train_positions"]).all()


@pytest.mark.slow
def test_train_encoder_writes_weights_that_load(tmp_path):
    from dq_lightning.features.bundled import load_small_resnet

    write_small_cifar10(tmp_path, every=10)
    output = tmp_path / "encoder.safetensors"
    printed = run(
        "train_encoder.py",
        "--data",
        str(tmp_path),
        "--output",
        str(output),
        "--epochs",
        "1",
        "--limit-batches",
        "2",
        "--batch-size",
        "16",
        cwd=tmp_path,
    )
    assert "test accuracy" in printed
    assert "test_accuracy" in load_small_resnet(output)[1]


def write_small_cifar10(root: Path, every: int = 1) -> None:
    """Every n-th bundled image in a folder `cifar-10-batches-py`, with a module that teaches torchvision their checksums."""
    import hashlib
    import pickle

    from dq_lightning.demo.sample_data import SampleCIFAR10

    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    sums = {}

    def write(name: str, content: dict) -> None:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()

    train, test = SampleCIFAR10(train=True), SampleCIFAR10(train=False)
    for part in range(5):
        rows = slice(part * every, None, 5 * every)
        pixels = train.data[rows].transpose(0, 3, 1, 2).reshape(-1, 3072)
        write(f"data_batch_{part + 1}", {"data": pixels, "labels": train.targets[rows]})
    write(
        "test_batch",
        {"data": test.data[::every].transpose(0, 3, 1, 2).reshape(-1, 3072), "labels": test.targets[::every]},
    )
    write("batches.meta", {"label_names": train.classes})
    patch = [
        "from torchvision.datasets import CIFAR10",
        f"sums = {sums!r}",
        "CIFAR10.train_list = [[name, sums[name]] for name, _ in CIFAR10.train_list]",
        "CIFAR10.test_list = [[name, sums[name]] for name, _ in CIFAR10.test_list]",
        "CIFAR10.meta = {**CIFAR10.meta, 'md5': sums['batches.meta']}",
    ]
    (root / "sitecustomize.py").write_text("\n".join(patch), encoding="utf-8")
