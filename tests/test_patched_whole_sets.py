"""Packed patches of whole real sets, in every mode: CIFAR-10's selection, and photos with a real ImageNet classifier."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.lightning_scripts import whole_sets
from tests.lightning_scripts.common import Recorder, name_of, to_tensor, trainer
from tests.lightning_scripts.patched_images import MODES
from tests.test_patched_runs import delivered, kept_pixels

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def trained(module):
    """The images of one epoch."""
    model = Recorder()
    trainer().fit(model, module)
    return set(model.seen)


def check_two_processes(kind, data, cache_dir, folder, images):
    """Two processes share the images of a set, and of a copy of its store in a place that knows nothing else."""
    names = ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

    def run(kind, data, cache_dir, name):
        reports = folder / name
        reports.mkdir()
        command = [sys.executable, whole_sets.__file__, kind, str(data), str(cache_dir), str(reports)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return [json.loads((reports / f"report-{rank}.json").read_text()) for rank in (0, 1)]

    first = run(kind, data, cache_dir, "from the set")
    copied = shutil.copytree(first[0]["off"]["path"], folder / "another machine" / "set")
    for reports in (first, run("store", copied, folder / "another cache", "from the store")):
        for mode in MODES:
            one, other = (report[mode] for report in reports)
            assert one["hash"] == other["hash"]
            assert len(one["seen"]) == len(other["seen"]) == len(images[mode]) // 2
            seen = {*one["seen"], *other["seen"]}
            expected = {name_of(image) for image in images[mode]}
            assert len(seen) == len(expected) == len(images[mode])
            if mode != "batch":
                # filled in other batches a pixel may be rounded the other way
                assert seen == expected


def test_the_whole_selection_of_cifar10(cifar_root, tmp_path):
    from torchvision.datasets import CIFAR10

    images, data = {}, CIFAR10(cifar_root, transform=to_tensor)
    for mode in MODES:
        module = whole_sets.cifar(cifar_root, tmp_path / "cache", mode)
        assert len(trained(module)) == 6250
        images[mode] = delivered(module)[0]
        print(mode, module.info)  # noqa: T201
    # other batches, other roundings: at most one grey level, and seldom
    gap = ((images["prepare"] - images["batch"]) * 255).round().abs()
    assert gap.max() <= 1
    assert (gap > 0).float().mean() < 1e-4
    kept = kept_pixels(module)
    originals = torch.stack([data[i][0] for i in module.selection.index.tolist()])
    for mode in MODES:
        assert torch.equal(images[mode] * kept, originals * kept)
    error = {mode: float(((images[mode] - originals) ** 2 * ~kept).sum() / (3 * (~kept).sum())) for mode in MODES}
    print(error)  # noqa: T201
    assert error["prepare"] < error["off"]
    check_two_processes("cifar", cifar_root, tmp_path / "cache", tmp_path, images)


def test_all_photos_with_the_real_classifier(shared_dir, tmp_path):
    images = {}
    for mode in MODES:
        module = whole_sets.photos(shared_dir, tmp_path / "cache", mode)
        assert len(trained(module)) == module.info.num_samples == 250
        images[mode] = delivered(module)[0]
        print(mode, module.info)  # noqa: T201
    assert module.info.bytes < 0.87 * module.info.unpatched_bytes
    assert ((images["prepare"] - images["batch"]) * 255).round().abs().max() <= 1
    kept = kept_pixels(module, (224, 224), 16)
    for mode in ("prepare", "batch"):
        assert torch.equal(images[mode] * kept, images["off"] * kept)
        assert not torch.equal(images[mode], images["off"])
    check_two_processes("photos", shared_dir, tmp_path / "cache", tmp_path, images)
