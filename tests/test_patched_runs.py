"""Training on packed patches: every mode, one process and two, from the store alone; no image meets another's label."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from dq_lightning import PackedDataset
from dq_lightning.core.grid import grid_of, pixel_mask
from dq_lightning.pipeline import filling, packing
from dq_lightning.pipeline.plan import FILLED
from tests.lightning_scripts import patched_images
from tests.lightning_scripts.common import Recorder, name_of, photos, to_tensor, trainer
from tests.lightning_scripts.patched_images import MODES, quantized, ready, stored
from tests.warm_processes import run_ranks


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    return tmp_path_factory.mktemp("warm")


def delivered(module):
    """The train loader's images and labels in the order of the selection, as a Trainer would hand them to a model."""
    loader = module.train_dataloader()
    batches = []
    for start in range(0, len(loader.dataset), 7):
        positions = range(start, min(start + 7, len(loader.dataset)))
        batch = loader.collate_fn([loader.dataset[i] for i in positions])
        batches.append(module.on_after_batch_transfer(batch, 0))
    return torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches])


def kept_pixels(module, size=(32, 32), patch=4):
    """Which pixels the store holds, bool [M, 1, H, W]."""
    packed = PackedDataset(module.info.path, patches="packed")
    masks = torch.stack([packed.patched(i).mask_tensor() for i in range(len(packed))])
    return pixel_mask(masks, grid_of(torch.empty(1, 3, *size), patch))


def fit(module):
    model = Recorder()
    trainer().fit(model, module)
    return model


def test_every_mode_trains_on_one_process(warm):
    modules = {mode: quantized(photos(), warm, mode) for mode in MODES}
    seen = {mode: fit(module).seen for mode, module in modules.items()}
    images = {mode: delivered(module)[0] for mode, module in modules.items()}
    for mode in MODES:
        assert len(seen[mode]) == 50
        assert set(seen[mode]) == {name_of(image) for image in images[mode]}
    assert torch.equal(images["prepare"], images["batch"])
    module = modules["off"]
    originals = torch.stack([photos()[i][0] for i in module.selection.index.tolist()])
    kept = kept_pixels(module)
    # 51 of 64 patches
    assert kept.sum((1, 2, 3)).tolist() == [51 * 16] * 50
    for mode in MODES:
        same = images[mode] == originals
        assert bool(same[kept.expand_as(same)].all())
        changed = (~same & ~kept).any(1)
        assert changed.sum() > 0.9 * (~kept).sum()
        assert bool(changed.flatten(1).any(1).all())
    assert not torch.equal(images["off"], images["prepare"])
    assert module.data_keep_ratio == pytest.approx(0.25 * 51 / 64)


@pytest.mark.parametrize("codec", ["png", "jpeg", "webp"])
def test_kept_pixels_are_those_of_the_store_in_every_codec(codec, tmp_path):
    modules = {mode: ready(quantized(photos(40), tmp_path, mode, {"codec": codec})) for mode in MODES}
    images = {mode: delivered(module)[0] for mode, module in modules.items()}
    kept = kept_pixels(modules["off"]).expand_as(images["off"])
    decoded = torch.stack([to_tensor(image) for image, _ in PackedDataset(modules["off"].info.path)])
    assert torch.equal(decoded, images["off"])
    assert torch.equal(images["prepare"], images["batch"])
    assert torch.equal(images["prepare"][kept], decoded[kept])
    assert not torch.equal(images["prepare"], decoded)
    originals = torch.stack([photos(40)[i][0] for i in modules["off"].selection.index.tolist()])
    error = (decoded - originals)[kept].abs()
    assert error.max() == 0 if codec == "png" else 0 < error.mean() < 0.1


def test_from_the_store_alone(tmp_path):
    built = {mode: ready(quantized(photos(), tmp_path / "cache", mode)) for mode in MODES}
    expected = {mode: delivered(module)[0] for mode, module in built.items()}
    labels = delivered(built["off"])[1]
    info = built["off"].info
    copied = Path(shutil.copytree(info.path, tmp_path / "stick"))
    shutil.rmtree(tmp_path / "cache")
    for mode in (None, *MODES):
        module = stored(copied, tmp_path / "elsewhere", mode)
        assert len(set(fit(module).seen)) == 50
        images, seen_labels = delivered(module)
        # without a wish it is what the store was made with
        assert torch.equal(images, expected[mode or "prepare"])
        assert torch.equal(seen_labels, labels)
        assert module.info.content_hash == info.content_hash
        assert module.info.unpatched_bytes == info.unpatched_bytes
    # what was filled is in the cache, and nothing else is
    made = {path.parts[-3] for path in (tmp_path / "elsewhere").glob("*/*/manifest.json")}
    assert made == {FILLED}


def test_transforms_from_the_store(tmp_path):
    info = ready(quantized(photos(40), tmp_path, "off")).info
    given = {"transform": lambda image: 1 - to_tensor(image), "target_transform": lambda label: label + 100}
    for mode in ("prepare", "off"):
        plain = delivered(ready(stored(info.path, tmp_path, mode)))
        images, labels = delivered(ready(stored(info.path, tmp_path, mode, **given)))
        assert torch.equal(images, 1 - plain[0])
        assert torch.equal(labels, plain[1] + 100)
    given = {"batch_transform": lambda images: 255 - images, "target_transform": lambda label: label + 100}
    plain = delivered(ready(stored(info.path, tmp_path, "batch", batch_transform=lambda images: images)))
    images, labels = delivered(ready(stored(info.path, tmp_path, "batch", **given)))
    assert images.dtype == torch.uint8
    assert torch.equal(images, 255 - plain[0])
    assert torch.equal(labels, plain[1] + 100)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks([patched_images.__file__, folder])
    return [json.loads((folder / f"report-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_share_the_images(two_processes, mode, warm):
    expected = {name_of(image) for image in delivered(ready(quantized(photos(), warm, mode)))[0]}
    assert len(expected) == 50
    for name in (mode, f"{mode} from the store"):
        first, second = (report[name] for report in two_processes)
        assert first["hash"] == second["hash"]
        assert len(first["seen"]) == len(second["seen"]) == 25
        assert {*first["seen"], *second["seen"]} == expected


class Numbered(Dataset):
    """Images whose colour tells their position, in base 6, and whose noise tells which patches vary least."""

    LEVELS = 6
    COUNT = 72

    def __len__(self):
        return self.COUNT

    def pixels(self, i):
        colour = np.array([i // self.LEVELS**place % self.LEVELS for place in range(3)]) * 40 + 25
        random = np.random.default_rng(i)
        strength = random.permutation(np.arange(64)).reshape(8, 8).repeat(4, 0).repeat(4, 1) / 8
        noise = random.standard_normal((32, 32, 1)) * strength[..., None]
        return (colour + noise.round()).clip(0, 255).astype(np.uint8)

    def __getitem__(self, i):
        if not 0 <= i < self.COUNT:
            raise IndexError(i)
        return Image.fromarray(self.pixels(i)), self.label(i)

    @staticmethod
    def label(i):
        return i * 7 % 10

    @classmethod
    def number(cls, image, kept):
        """The position that an image [3, H, W] in 0 ... 255 tells by its kept pixels."""
        colour = torch.stack([channel[kept].float().median() for channel in image])
        digits = ((colour - 25) / 40).round().long()
        return int(sum(digit * cls.LEVELS**place for place, digit in enumerate(digits.tolist())))

    def dropped(self, i):
        """Patches of least variance, by whole numbers in numpy; of equal ones the first are kept."""
        patches = self.pixels(i).astype(np.int64).reshape(8, 4, 8, 4, 3).transpose(0, 2, 1, 3, 4).reshape(64, 16, 3)
        variance = (16 * (patches**2).sum(1) - patches.sum(1) ** 2).sum(1)
        return set(np.argsort(-variance, kind="stable")[51:].tolist())


def assert_identity(module):
    """Every image is with its own label, id, position in the selection and mask, also in shuffled batches."""
    data = Numbered()
    packed = PackedDataset(module.info.path, patches="packed")
    kept = kept_pixels(module)[:, 0]
    images, labels = delivered(module)
    masks = {}
    for i, position in enumerate(module.selection.index.tolist()):
        assert data.number(images[i], kept[i]) == position, "another image"
        assert int(labels[i]) == data.label(position)
        assert packed.ids[i] == str(position)
        mask = packed.patched(i).mask_tensor()
        assert set((~mask).nonzero().flatten().tolist()) == data.dropped(position)
        masks[position] = kept[i]
    seen = []
    for batch in module.train_dataloader():
        for image, label in zip(*module.on_after_batch_transfer(batch, 0), strict=True):
            # the median over all pixels is that over the kept ones: four of five are kept
            number = data.number(image, torch.ones(32, 32, dtype=torch.bool))
            assert int(label) == data.label(number)
            assert torch.equal(image[:, masks[number]], images[list(masks).index(number)][:, masks[number]])
            seen.append(number)
    assert sorted(seen) == module.selection.index.tolist()
    assert seen != sorted(seen)


def numbered(cache_dir, mode, codec="raw"):
    settings = {"transform": pixels_of} if mode != "batch" else {"batch_transform": lambda images: images}
    patches = {"codec": codec, "saliency": "variance"}
    return ready(quantized(Numbered(), cache_dir, mode, patches, keep_ratio=0.5, **settings))


def pixels_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("codec", ["raw", "png", "jpeg", "webp"])
def test_every_image_meets_its_own_label_id_and_patches(codec, tmp_path):
    for mode in MODES:
        assert_identity(numbered(tmp_path, mode, codec))


def two_swapped(items):
    """The third and the fourth sample have each other's image."""
    items = list(items)
    third, fourth = items[2][0], items[3][0]
    items[2], items[3] = ((fourth[0], third[1]), None), ((third[0], fourth[1]), None)
    return iter(items)


@pytest.mark.parametrize("mode", MODES)
def test_a_swap_would_be_noticed(mode, tmp_path, monkeypatch):
    real = packing.packed_items
    monkeypatch.setattr(packing, "packed_items", lambda *given: two_swapped(real(*given)))
    module = numbered(tmp_path, mode)
    with pytest.raises(AssertionError, match="another image"):
        assert_identity(module)


def test_a_swap_while_filling_would_be_noticed(tmp_path, monkeypatch):
    real = filling.filled_items
    monkeypatch.setattr(filling, "filled_items", lambda *given, **more: two_swapped(real(*given, **more)))
    module = numbered(tmp_path, "prepare")
    with pytest.raises(AssertionError, match="another image"):
        assert_identity(module)
