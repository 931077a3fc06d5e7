"""The whole path on real data through Trainer.fit: CIFAR-10 and the Imagenette photos."""

import json
import time

import pytest
import torch
from torch.utils.data import Subset
from torchvision.datasets import CIFAR10

from dq_lightning import QuantizedDataModule
from tests.lightning_scripts import real_photos
from tests.lightning_scripts.common import Recorder, to_tensor, trainer
from tests.warm_processes import run_ranks


def ready_in(module):
    started = time.perf_counter()
    module.prepare_data()
    module.setup("fit")
    return time.perf_counter() - started


def test_cifar10_in_part(cifar_root, tmp_path):
    data = CIFAR10(cifar_root, train=False, transform=to_tensor)
    part = Subset(data, range(0, 10000, 25))
    module = QuantizedDataModule(part, keep_ratio=0.125, batch_size=25, cache_dir=tmp_path)
    model = Recorder()
    running = trainer()
    running.fit(model, module)
    assert (module.info.num_samples, running.global_step) == (50, 2)
    groups = module.bins.group[module.selection.index]
    shares = torch.bincount(groups) - 0.125 * torch.bincount(module.bins.group)
    assert shares.abs().max() <= 1
    for i, (image, label) in enumerate(module.train_dataloader().dataset):
        original, expected = part[int(module.selection.index[i])]
        assert torch.equal(image, original)
        assert label == expected


@pytest.mark.slow
def test_cifar10_whole(cifar_root, tmp_path):
    def make():
        return QuantizedDataModule(CIFAR10(cifar_root, transform=to_tensor), batch_size=125, cache_dir=tmp_path)

    first = make()
    built = ready_in(first)
    assert first.info.num_samples == 6250
    assert torch.bincount(first.bins.group[first.selection.index]).tolist() == [625] * 10
    cells = 10 * first.bins.group[first.selection.index].long() + first.selection.bin.long()
    assert set(torch.bincount(cells, minlength=100).tolist()) == {62, 63}
    second = make()
    hit = ready_in(second)
    print(f"CIFAR-10: built in {built:.1f} s {first.info.seconds}, found in {hit:.2f} s")  # noqa: T201
    assert second.info.reused
    running = trainer()
    running.fit(Recorder(), second)
    assert running.global_step == 50


@pytest.fixture(scope="module")
def photo_cache(shared_dir, tmp_path_factory):
    return tmp_path_factory.mktemp("photos")


def check_photos(shared_dir, photo_cache, every):
    folder, hub = (real_photos.quantized(kind, shared_dir, every, photo_cache) for kind in ("folder", "hub"))
    for module in (folder, hub):
        trainer().fit(Recorder(), module)
        assert not module.info.reused
        assert module.info.num_samples == 1000 // every // 4
    assert torch.equal(folder.selection.index, hub.selection.index)
    assert torch.equal(folder.bins.assignment, hub.bins.assignment)
    return folder


def test_photos_as_folder_and_as_hub_dataset(shared_dir, photo_cache):
    check_photos(shared_dir, photo_cache, real_photos.EVERY)


@pytest.mark.slow
def test_all_photos_as_folder_and_as_hub_dataset(shared_dir, tmp_path):
    module = check_photos(shared_dir, tmp_path, every=1)
    again = real_photos.quantized("folder", shared_dir, 1, tmp_path)
    print(f"Imagenette: found in {ready_in(again):.2f} s, {module.info.seconds}")  # noqa: T201


def test_photos_on_two_processes(shared_dir, photo_cache, tmp_path):
    """After the runs above the cache is warm: two processes train at once, each on its half."""
    run_ranks([real_photos.__file__, shared_dir, photo_cache, tmp_path])
    for kind in ("folder", "hub"):
        first, second = (json.loads((tmp_path / f"{kind}-{rank}.json").read_text()) for rank in (0, 1))
        assert len(first["seen"]) == len(second["seen"]) == 5
        assert len({*first["seen"], *second["seen"]}) == 10
        assert first["hash"] == second["hash"]
