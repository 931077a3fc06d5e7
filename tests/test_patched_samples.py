"""Kinds of images whose patches are packed, and the transfer hook that fills them batch by batch."""

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from dq_lightning import PackedDataset, QuantizedDataModule
from dq_lightning.core.errors import ConfigError, DQError, PatchError
from dq_lightning.core.grid import grid_of, pixel_mask
from dq_lightning.demo.sample_data import SampleCIFAR10
from tests.lightning_scripts.common import Recorder, held_out, name_of, photos, to_tensor, trainer
from tests.lightning_scripts.patched_images import MODES, as_floats, quantized, ready, small_mae

COUNT = 24


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    return tmp_path_factory.mktemp("warm")


def pictures(size=(32, 32), mode="RGB"):
    """Real images of one size and mode with their labels."""
    return [(image.resize(size).convert(mode), label) for image, label in photos(COUNT, transform=None)]


def as_array(image):
    return np.asarray(image)


def as_uint8_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def hub_rows():
    datasets = pytest.importorskip("datasets")
    rows = pictures()
    columns = {
        "photo": [image for image, _ in rows],
        "kind": [label for _, label in rows],
        "name": list("abcdefgh" * 3),
    }
    names = SampleCIFAR10().classes
    features = {"photo": datasets.Image(), "kind": datasets.ClassLabel(names=names), "name": datasets.Value("string")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


KINDS = {
    "colour": pictures,
    "grey": lambda: pictures((28, 28), "L"),
    "arrays": lambda: [(as_array(image), label) for image, label in pictures()],
    "grey arrays": lambda: [(as_array(image)[..., None], label) for image, label in pictures((28, 28), "L")],
    "tensors": lambda: [(as_uint8_tensor(image), label) for image, label in pictures()],
    "odd sizes": lambda: pictures((37, 30)),
    "dicts": lambda: [{"id": f"n{label}", "image": image, "label": label} for image, label in pictures()],
}


def pixels(image):
    """uint8 [C, H, W] of an image of any kind, in a form of its own."""
    if isinstance(image, torch.Tensor):
        return image
    array = np.asarray(image)
    return torch.from_numpy(array.copy())[None] if array.ndim == 2 else torch.from_numpy(array.copy()).permute(2, 0, 1)


def image_of(sample, name="image"):
    return sample[name] if isinstance(sample, dict) else sample[0]


def rest_of(sample, name="image"):
    return {key: value for key, value in sample.items() if key != name} if isinstance(sample, dict) else sample[1:]


def kept(module, i):
    patched = PackedDataset(module.info.path, patches="packed").patched(i)
    grid = grid_of(torch.empty(1, 1, patched.height, patched.width), patched.patch_size)
    return pixel_mask(patched.mask_tensor()[None], grid)[0, 0]


def check_image(image, original, keeps):
    """Kept pixels as they were; the others differ somewhere."""
    ours, theirs = pixels(image), pixels(original)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == torch.uint8
    assert torch.equal(ours[:, keeps], theirs[:, keeps])
    assert not torch.equal(ours[:, ~keeps], theirs[:, ~keeps])


def patched(dataset, cache_dir, mode, **settings):
    if mode == "batch":
        settings = {"batch_transform": lambda images: images} | settings
    settings = {"keep_ratio": 0.5, "num_bins": 2, "collate_fn": None if mode == "batch" else list} | settings
    return ready(quantized(dataset, cache_dir, mode, {"saliency": "variance"}, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_samples_keep_their_type(kind, tmp_path):
    data = KINDS[kind]()
    for mode in ("prepare", "off"):
        module = patched(data, tmp_path, mode)
        for i, position in enumerate(module.selection.index.tolist()):
            sample, original = module.train_dataloader().dataset[i], data[position]
            assert type(sample) is type(original)
            assert type(image_of(sample)) is type(image_of(original))
            check_image(image_of(sample), image_of(original), kept(module, i))
            assert rest_of(sample) == rest_of(original)
    filled = patched(data, tmp_path, "prepare").train_dataloader().dataset
    late = patched(data, tmp_path, "batch")
    loader = late.train_dataloader()
    batch = late.on_after_batch_transfer(loader.collate_fn([loader.dataset[i] for i in range(COUNT // 2)]), 0)
    assert torch.equal(image_of(batch), torch.stack([pixels(image_of(sample)) for sample in filled]))
    labels = batch["label"] if isinstance(batch, dict) else batch[1]
    assert labels.tolist() == [s["label"] if isinstance(s, dict) else s[1] for s in filled]


def test_hub_rows_keep_their_columns(tmp_path):
    data = hub_rows()
    for mode in MODES:
        module = patched(data, tmp_path, mode)
        assert module.num_classes == 10
        loader = module.train_dataloader()
        for i, position in enumerate(module.selection.index.tolist()):
            original = data[position]
            if mode == "batch":
                batch = module.on_after_batch_transfer(loader.collate_fn([loader.dataset[i]]), 0)
                sample = {name: batch[name][0] for name in batch}
            else:
                sample = loader.dataset[i]
            assert sample.keys() == original.keys()
            assert rest_of(sample, "photo") == rest_of(original, "photo")
            check_image(sample["photo"], original["photo"], kept(module, i))


def test_images_of_many_sizes(tmp_path):
    data = [(image.resize((24 + i, 40 - i)), label) for i, (image, label) in enumerate(pictures())]
    for mode in ("prepare", "off"):
        module = patched(data, tmp_path, mode)
        for i, position in enumerate(module.selection.index.tolist()):
            check_image(module.train_dataloader().dataset[i][0], data[position][0], kept(module, i))
    with pytest.raises(PatchError, match=r'images of one size.*reconstruct="prepare"'):
        patched(data, tmp_path, "batch")


def test_floats_have_no_patches_to_store(tmp_path):
    data = [(to_tensor(image), label) for image, label in pictures()]
    with pytest.raises(DQError, match="before it is normalised"):
        patched(data, tmp_path, "prepare")
    assert not list(tmp_path.glob("*-features/*"))


class Model(Recorder):
    """Remembers what its own hook got, and its validation images."""

    def __init__(self):
        super().__init__()
        self.after, self.validated = [], []

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training:
            self.after.append(batch)
        return batch

    def validation_step(self, batch, index):
        self.validated += [name_of(image) for image in batch[0]]
        super().validation_step(batch, index)


def test_the_model_has_its_own_hook_after_the_filling(warm):
    model, module = Model(), quantized(photos(), warm, "batch", val=held_out(9))
    trainer().fit(model, module)
    assert len(model.after) == 10
    assert all(isinstance(batch, list) and batch[0].dtype == torch.float32 for batch in model.after)
    assert model.seen == [name_of(image) for batch in model.after for image in batch[0]]
    assert model.validated[-9:] == [name_of(image) for image, _ in held_out(9)]


class Wrapped(L.LightningDataModule):
    """A user's module with a hook of its own, which replaces the model's as Lightning has it."""

    def __init__(self):
        super().__init__()
        self.after = []

    def train_dataloader(self):
        return DataLoader(photos(), 5, shuffle=True, collate_fn=as_dict)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.after.append(batch)
        return batch["x"], batch["y"]


def as_dict(items):
    images, labels = default_collate(items)
    return {"y": labels, "x": images}


def test_a_wrapped_module_has_its_own_hook_after_the_filling(warm):
    inner, model = Wrapped(), Model()
    module = QuantizedDataModule.from_datamodule(
        inner,
        config=quantized(photos(), warm, "batch").config,
        reconstructor=small_mae(),
        batch_transform=as_floats,
        cache_dir=warm,
    )
    trainer().fit(model, module)
    assert len(inner.after) == len(model.seen) // 5 == 10
    assert model.after == []
    assert all(batch.keys() == {"x", "y"} and batch["x"].dtype == torch.float32 for batch in inner.after)
    filled = ready(quantized(photos(), warm, "prepare")).train_dataloader().dataset
    assert set(model.seen) == {name_of(image) for image, _ in filled}


def test_a_collate_function_that_hides_the_images_is_told(warm):
    module = ready(quantized(photos(), warm, "batch", collate_fn=list))
    with pytest.raises(PatchError, match=r"0 tensors uint8.*stack the images"):
        module.on_after_batch_transfer(next(iter(module.train_dataloader())), 0)


def test_misplaced_transforms_are_told(warm):
    with pytest.raises(ConfigError, match=r"pass batch_transform=.*or use reconstruct=\"prepare\""):
        quantized(photos(), warm, "batch", batch_transform=None)
    with pytest.raises(ConfigError, match="batch_transform= is used only where dropped patches are filled"):
        quantized(photos(), warm, "prepare", batch_transform=as_floats)
    with pytest.raises(ConfigError, match="batch_transform= is used only where dropped patches are filled"):
        QuantizedDataModule(photos(), batch_transform=as_floats)
    with pytest.raises(ConfigError, match=r"transform= would run before that.*batch_transform="):
        quantized(photos(), warm, "batch", transform=to_tensor)


def test_a_collate_function_that_moves_or_changes_images_is_refused_where_masks_come_after_it(tmp_path):
    def stacked(samples):
        images, labels = default_collate(samples)
        return {"pictures": images, "classes": labels}

    def reversed_in_place(samples):
        samples.reverse()
        return default_collate(samples)

    def mirrored(samples):
        images, labels = default_collate(samples)
        return images.flip(-1), labels

    data = KINDS["arrays"]()
    for collate, fits in ((stacked, True), (reversed_in_place, False), (mirrored, False)):
        module = patched(data, tmp_path, "batch", collate_fn=collate)
        loader = module.train_dataloader()
        items = [loader.dataset[i] for i in range(COUNT // 2)]
        if fits:
            batch = module.on_after_batch_transfer(loader.collate_fn(items), 0)
            assert len(batch["pictures"]) == COUNT // 2
        else:
            with pytest.raises(PatchError, match=r"changes the images or their order.*reconstruct=\"prepare\""):
                loader.collate_fn(items)
