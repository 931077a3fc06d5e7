"""The demo, its bundled images and weights."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from dq_lightning.demo import run as demo
from dq_lightning.demo.sample_data import SampleCIFAR10, cut_sheet, decode_sheet

MAKE_SAMPLE = runpy.run_path(str(Path(__file__).resolve().parents[1] / "examples" / "make_sample.py"))


@pytest.mark.usefixtures("few_bundled_images")
def test_the_demo_runs_and_prints_what_came_out(monkeypatch, capsys, tmp_path):
    for name, value in {"EPOCHS": 1, "SEEDS": (0, 1), "KEEP_RATIO": 0.2}.items():
        monkeypatch.setattr(demo, name, value)
    accuracies = demo.run_demo(progress=False, output=tmp_path)
    printed = capsys.readouterr().out
    assert {name: len(values) for name, values in accuracies.items()} == dict.fromkeys(demo.NAMES, 2)
    assert all(0 <= value <= 100 for values in accuracies.values() for value in values)
    assert "kept 80 of 400 samples" in printed
    assert "15.9% of all patches" in printed
    left_out, wrong = re.search(
        r"(\d+) samples left out; (.*)% of the kept labels are wrong, 40.0% of all", printed
    ).groups()
    assert int(left_out) >= 140
    assert float(wrong) < 10
    assert printed.rstrip().endswith(f"the report on step 4, to open in a browser: {tmp_path / 'report.html'}")
    assert f"{left_out} samples were left out" in (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in accuracies:
        assert f"{np.mean(accuracies[name]):.1f} %" in printed


@pytest.mark.parametrize(("train", "per_class"), [(True, 200), (False, 50)])
def test_the_bundled_images_are_balanced(train, per_class):
    sample = SampleCIFAR10(train=train)
    assert np.bincount(sample.targets).tolist() == [per_class] * 10
    image, label = sample[7]
    assert (image.size, image.mode, label) == ((32, 32), "RGB", sample.targets[7])


@pytest.mark.parametrize("train", [True, False])
def test_the_bundled_images_are_those_of_cifar10(cifar_root, train):
    from torchvision.datasets import CIFAR10

    sample, whole = SampleCIFAR10(train=train), CIFAR10(cifar_root, train=train)
    rows = {image.tobytes(): label for image, label in zip(whole.data, whole.targets, strict=True)}
    assert all(rows[image.tobytes()] == label for image, label in zip(sample.data, sample.targets, strict=True))


def test_sheets_come_back_bit_for_bit():
    images = np.zeros((53, 32, 32, 3), np.uint8)
    # noise takes long to encode
    images[[0, 49, 50, 52]] = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    sheet = MAKE_SAMPLE["encode_sheet"](MAKE_SAMPLE["make_sheet"](images))
    assert np.array_equal(cut_sheet(decode_sheet(sheet), 53), images)


def test_balanced_choice_takes_as_many_of_each_class():
    labels, balanced_choice = np.repeat([0, 1, 2], [5, 50, 9]), MAKE_SAMPLE["balanced_choice"]
    chosen = balanced_choice(labels, 4, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [4, 4, 4]
    assert np.array_equal(chosen, np.unique(chosen))
    assert not np.array_equal(chosen, balanced_choice(labels, 4, seed=1))
