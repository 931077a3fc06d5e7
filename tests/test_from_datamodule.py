"""A user's own data module, of either Lightning package, with its train set quantized."""

import logging
import os
import pickle

import lightning as L
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
    random_split,
)

from dq_lightning import PatchConfig, QuantizeConfig, QuantizedDataModule
from dq_lightning.core.errors import ConfigError, SourceError
from dq_lightning.features import origins
from tests.lightning_scripts.common import Recorder, held_out, name_of, photos, to_tensor, trainer


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    return tmp_path_factory.mktemp("warm")


def quantized(inner, cache_dir, **settings):
    return QuantizedDataModule.from_datamodule(inner, cache_dir=cache_dir, keep_ratio=0.25, num_bins=5, **settings)


def ready(module):
    module.prepare_data()
    module.setup("fit")
    return module


def first_two(batch):
    return torch.stack([image for image, _ in batch]), torch.tensor([label for _, label in batch])


def inner_class(base):
    class Photos(base):
        num_classes = 10

        def __init__(self):
            super().__init__()
            self.calls, self.note = [], "plain"

        def prepare_data(self):
            self.calls.append("prepare_data")

        def setup(self, stage):
            self.calls.append(f"setup {getattr(stage, 'value', stage)}")
            self.train = photos()

        def teardown(self, stage):
            self.calls.append(f"teardown {getattr(stage, 'value', stage)}")

        def train_dataloader(self):
            return DataLoader(self.train, 7, shuffle=True, num_workers=0, drop_last=True, collate_fn=first_two)

        def val_dataloader(self):
            return DataLoader(held_out(), 9)

        def test_dataloader(self):
            return DataLoader(held_out(), 4)

        def state_dict(self):
            return {"note": self.note}

        def load_state_dict(self, state_dict):
            self.note = state_dict["note"]

    return Photos


@pytest.mark.parametrize(
    "base", [L.LightningDataModule, pl.LightningDataModule], ids=["lightning", "pytorch_lightning"]
)
def test_everything_else_passes_through(base, warm, tmp_path):
    inner = inner_class(base)()
    module = quantized(inner, warm)
    model = Recorder()
    running = trainer()
    running.fit(model, module)
    assert running.global_step == 50 // 7
    assert module.batch_size == 7
    assert set(model.seen) <= {name_of(photos()[i][0]) for i in module.selection.index.tolist()}
    assert inner.calls == ["prepare_data", "setup fit", "setup fit", "teardown fit"]
    assert inner.trainer is running
    loader = module.train_dataloader()
    assert (loader.batch_size, loader.drop_last, loader.collate_fn, loader.num_workers) == (7, True, first_two, 0)
    assert module.val_dataloader().batch_size == 9
    running.test(model, datamodule=module, verbose=False)
    with pytest.raises(ConfigError, match="no predict_dataloader"):
        running.predict(model, datamodule=module)
    assert module.num_classes == 10

    inner.note = "changed while training"
    running.save_checkpoint(tmp_path / "end.ckpt")
    other = inner_class(base)()
    trainer(max_epochs=2).fit(Recorder(), quantized(other, warm), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert other.note == "changed while training"


def test_attributes_of_the_inner_module(warm):
    module = quantized(inner_class(L.LightningDataModule)(), warm)
    assert module.note == "plain"
    assert not hasattr(module, "nothing_like_it")
    assert "train_ds" not in dir(module)
    # what a script sets is read by the code of the inner module
    module.note, module.batch_size, module.new = "fold 2", 3, 4
    assert (module._inner.note, module.note, module.batch_size, module.new) == ("fold 2", "fold 2", 3, 4)
    assert not hasattr(module._inner, "batch_size")
    assert not hasattr(module._inner, "new")
    assert pickle.loads(pickle.dumps(QuantizedDataModule.from_datamodule(Folds()))).fold == 0


class Folds(L.LightningDataModule):
    """Photos of which the model sees those of other folds; the batches grow from epoch to epoch."""

    def __init__(self):
        super().__init__()
        self.fold = self.batch_size = 0

    def setup(self, stage):
        self.train = Subset(photos(), [i for i in range(200) if i % 2 != self.fold])

    def train_dataloader(self):
        return DataLoader(self.train, 5 + (self.trainer.current_epoch if self.trainer else 0), shuffle=True)


def test_an_attribute_that_is_set_between_two_fits_makes_another_train_set(warm, caplog):
    features = np.random.default_rng(0).normal(size=(100, 4))
    module = quantized(Folds(), warm, encoder=features)
    for fold in (0, 1):
        module.fold = fold
        trainer(limit_train_batches=1).fit(model := Recorder(), module)
        assert set(model.seen) <= {name_of(photos()[i][0]) for i in range(200) if i % 2 != fold}
    assert "has no effect" not in caplog.text
    running = trainer(max_epochs=2, limit_train_batches=1, reload_dataloaders_every_n_epochs=1)
    with caplog.at_level(logging.WARNING):
        running.fit(Recorder(), quantized(Folds(), warm, encoder=features))
    assert caplog.text.count("Folds.train_dataloader() gave at the start") == 1


def test_settings_given_here_come_first(warm):
    inner = inner_class(L.LightningDataModule)
    loader = ready(quantized(inner(), warm, batch_size=32, drop_last=False, num_workers=1)).train_dataloader()
    assert (loader.batch_size, loader.drop_last, loader.num_workers, loader.collate_fn) == (32, False, 1, first_two)
    # the class itself can't tell its defaults from what was given, and leaves the say to the module
    plain = QuantizedDataModule(inner(), keep_ratio=0.25, num_bins=5, cache_dir=warm)
    assert ready(plain).train_dataloader().batch_size == 7
    other = QuantizedDataModule(inner(), keep_ratio=0.25, num_bins=5, cache_dir=warm, batch_size=3)
    assert ready(other).train_dataloader().batch_size == 3
    with pytest.raises(ConfigError, match="come from the wrapped data module"):
        QuantizedDataModule(inner(), val=held_out())
    with pytest.raises(ConfigError, match="eval_batch_size= come from the wrapped data module"):
        QuantizedDataModule(inner(), eval_batch_size=4)
    with pytest.raises(ConfigError, match="takes a LightningDataModule, got Subset"):
        QuantizedDataModule.from_datamodule(photos())


def test_only_the_given_transfer_hooks_take_over(warm):
    class Halved(inner_class(L.LightningDataModule)):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] / 2, batch[1]

    class Model(Recorder):
        def __init__(self):
            super().__init__()
            self.before, self.after = [], []

        def on_before_batch_transfer(self, batch, dataloader_idx):
            self.before.append(batch[0].max().item())
            return batch

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.after.append(batch[0].max().item())
            return batch

        def training_step(self, batch, index):
            self.halved = batch[0].max().item() <= 0.5
            return self.step(batch)

    model = Model()
    trainer(limit_val_batches=0).fit(model, quantized(Halved(), warm))
    assert model.halved
    assert len(model.before) == 7
    assert model.after == []

    model = Model()
    trainer(limit_val_batches=0).fit(model, quantized(inner_class(L.LightningDataModule)(), warm))
    assert not model.halved
    assert len(model.before) == len(model.after) == 7


def with_loader(make_loader):
    class Inner(L.LightningDataModule):
        def train_dataloader(self):
            return make_loader(photos())

    return Inner()


def test_weighted_sampler_is_cut_down(warm):
    weights = torch.zeros(200)
    weights[100:] = 1.0
    module = quantized(with_loader(lambda d: DataLoader(d, 5, sampler=WeightedRandomSampler(weights, 120))), warm)
    ready(module)
    sampler = module.train_dataloader().sampler
    assert len(sampler) == 30
    drawn = [int(module.selection.index[i]) for i in sampler]
    assert min(drawn) >= 100
    # the same on every rank: two loaders of one epoch draw alike, and the global state has no part in it
    torch.manual_seed(5)
    assert [int(module.selection.index[i]) for i in module.train_dataloader().sampler] == drawn


def test_a_weighted_epoch_does_not_shrink_by_the_patches_that_are_dropped(warm):
    settings = {
        "drop_ratio": 0.5,
        "config": QuantizeConfig(patches=PatchConfig(saliency="variance", reconstruct="off")),
    }
    sampler = WeightedRandomSampler(torch.ones(200), 120)
    module = ready(quantized(with_loader(lambda d: DataLoader(d, 5, sampler=sampler)), warm, **settings))
    assert module.data_keep_ratio == pytest.approx(0.125, abs=0.01)
    assert len(module.train_dataloader().sampler) == 30


def test_a_timeout_of_worker_processes_goes_with_them(warm):
    module = quantized(with_loader(lambda d: DataLoader(d, 5, num_workers=1, timeout=60)), warm, num_workers=0)
    assert ready(module).train_dataloader().timeout == 0


class RemembersPhotos(Dataset):
    """Keeps what was read, and has a logger."""

    def __init__(self):
        self.photos, self.kept, self.log = photos(), {}, logging.getLogger("of.the.test")

    def __len__(self):
        return len(self.photos)

    def __getitem__(self, index):
        if index not in self.kept:
            self.kept[index] = self.photos[index]
        return self.kept[index]


def test_a_dataset_that_remembers_what_was_read_is_found_again(warm):
    data = RemembersPhotos()
    module = quantized(with_loader(lambda d: DataLoader(Subset(data, range(0, 200, 2)), 5)), warm)
    for _ in range(2):
        assert ready(module).info.num_source_samples == 100
        list(module.train_dataloader())


class Marked(Dataset):
    """Photos with a number that a `worker_init_fn` sets in each process, as some do with a random generator."""

    number = 0

    def __init__(self):
        self.photos = photos()

    def __len__(self):
        return len(self.photos)

    def __getitem__(self, index):
        return *self.photos[index], self.number


def number_the_dataset(worker):
    assert isinstance(get_worker_info().dataset, Marked)
    get_worker_info().dataset.number = 100 + worker


@pytest.mark.parametrize("part", [False, True], ids=["whole", "subset sampler"])
def test_a_worker_init_function_sees_the_users_dataset(warm, part):
    class Module(L.LightningDataModule):
        def train_dataloader(self):
            order = {"sampler": SubsetRandomSampler(range(0, 200, 2))} if part else {"shuffle": True}
            return DataLoader(Marked(), 5, num_workers=2, worker_init_fn=number_the_dataset, **order)

    numbers = [set(batch[2].tolist()) for batch in ready(quantized(Module(), warm)).train_dataloader()]
    assert numbers == [{100}, {101}] * (len(numbers) // 2) + [{100}] * (len(numbers) % 2)


def test_subset_sampler_is_a_part_of_the_dataset(warm):
    evens = list(range(0, 200, 2))
    module = ready(quantized(with_loader(lambda d: DataLoader(d, 5, sampler=SubsetRandomSampler(evens))), warm))
    assert module.info.num_source_samples == 100
    names = {name_of(photos()[i][0]) for i in evens}
    assert {name_of(image) for batch in module.train_dataloader() for image in batch[0]} <= names


def test_random_and_sequential_samplers(warm):
    module = ready(quantized(with_loader(lambda d: DataLoader(d, 5)), warm))
    assert type(module.train_dataloader().sampler) is SequentialSampler
    draws = RandomSampler(range(200), replacement=True, num_samples=400)
    module = ready(quantized(with_loader(lambda d: DataLoader(d, 5, sampler=draws)), warm))
    assert len(module.train_dataloader()) == 20


def test_the_loaders_own_generator_is_kept(warm):
    def order(seed):
        own = torch.Generator().manual_seed(seed)
        module = ready(quantized(with_loader(lambda d: DataLoader(d, 50, shuffle=True, generator=own)), warm))
        return [name_of(image) for image in next(iter(module.train_dataloader()))[0]]

    assert order(4) == order(4)
    assert order(4) != order(5)


class Backwards(Sampler):
    def __init__(self, dataset):
        self.length = len(dataset)

    def __iter__(self):
        return iter(range(self.length - 1, -1, -1))

    def __len__(self):
        return self.length


class OwnBatches(BatchSampler):
    pass


class OwnLoader(DataLoader):
    def __iter__(self):
        return iter([1, 2])


@pytest.mark.parametrize(
    ("make_loader", "seen"),
    [
        (lambda d: DataLoader(d, 5, sampler=Backwards(d)), "has a Backwards"),
        (lambda d: DataLoader(d, 5, sampler=DistributedSampler(d, 2, 0)), "use shuffle=True and leave use_distributed"),
        (lambda d: DataLoader(d, batch_size=None), "makes no batches"),
        (lambda d: DataLoader(d, 5, sampler=DistributedSampler(d)), "leave out DistributedSampler"),
        (
            lambda d: DataLoader(d, batch_sampler=OwnBatches(RandomSampler(d), 5, False)),
            "by OwnBatches, and a batch sampler names positions",
        ),
        (lambda d: OwnLoader(d, 5), "OwnLoader, which gives batches in its own way"),
        (lambda d: CombinedLoader({"a": DataLoader(d, 5)}), "is a CombinedLoader, not one DataLoader"),
        (lambda d: {"a": DataLoader(d, 5), "b": DataLoader(d, 5)}, "is a dict, not one DataLoader"),
        (lambda d: [DataLoader(d, 5)], "is a list, not one DataLoader"),
        (lambda d: DataLoader(d, 5, sampler=RandomSampler(d, num_samples=20)), "limit_train_batches"),
        (lambda d: DataLoader(d, 5, sampler=WeightedRandomSampler([1.0] * 9, 9)), "9 weights for 200 samples"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(make_loader, seen, warm):
    with pytest.raises(ConfigError, match=seen):
        trainer().fit(Recorder(), quantized(with_loader(make_loader), warm))


class Split(L.LightningDataModule):
    """Splits anew in every setup."""

    def __init__(self, generator=None):
        super().__init__()
        self.generator = generator

    def setup(self, stage):
        settings = {"generator": self.generator()} if self.generator else {}
        self.train, self.val = random_split(photos(), [0.5, 0.5], **settings)

    def train_dataloader(self):
        return DataLoader(self.train, 5, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, 5)


def test_unseeded_split_is_seeded_by_us(warm):
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        module = quantized(Split(), warm)
        trainer().fit(Recorder(), module)
        runs.append((module.info.content_hash, list(module.train.indices)))
        assert not set(module.train.indices) & set(module.val.indices)
    assert runs[0] == runs[1]
    reseeded = ready(quantized(Split(), warm, seed=5))
    assert list(reseeded.train.indices) != runs[0][1]


def test_split_made_with_the_loader_is_seeded_too(warm):
    class Late(L.LightningDataModule):
        def setup(self, stage):
            torch.rand(3)

        def train_dataloader(self):
            self.train, _ = random_split(photos(), [0.5, 0.5])
            return DataLoader(self.train, 5, shuffle=True)

    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        module = quantized(Late(), warm)
        trainer().fit(Recorder(), module)
        runs.append((module.info.content_hash, list(module.train.indices)))
    assert runs[0] == runs[1]


def test_split_that_cannot_be_repeated_is_refused(warm):
    def from_the_clock():
        return torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "little"))

    with pytest.raises(SourceError, match=r"Split.setup\('fit'\) gave another train set.*seed of its own"):
        trainer().fit(Recorder(), quantized(Split(from_the_clock), warm))


def test_the_encoder_is_identified_once(tmp_path, monkeypatch):
    narrow = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten())
    hashed, real = [], origins.digest_encoder
    monkeypatch.setattr(origins, "digest_encoder", lambda *given: hashed.append(1) or real(*given))
    ready(quantized(inner_class(L.LightningDataModule)(), tmp_path, encoder=(narrow, to_tensor)))
    assert hashed == [1]


def test_inner_setup_sees_the_trainer_and_draws_do_not_leak(warm):
    class Nosy(Split):
        def setup(self, stage):
            assert self.trainer is None or self.trainer.world_size == 1
            torch.rand(100)
            super().setup(stage)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    ready(quantized(Nosy(), warm))
    assert torch.equal(torch.get_rng_state(), before)


class Named(L.LightningDataModule):
    """Has names that Lightning's base class has too, and one that ours has."""

    def __init__(self, width: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.config = {"mine": width}
        self.num_classes = 21
        self.allow_zero_length_dataloader_with_multiple_devices = True

    @property
    def name(self):
        return f"photos {self.hparams.width}"

    def train_dataloader(self):
        return DataLoader([(image, 0.5) for image, _ in photos(20)], 5)


def test_names_that_the_base_class_has_too(tmp_path, caplog):
    """A model that reads them through trainer.datamodule sees what it saw without us; what is hidden is said."""
    inner = Named(width=7)
    module = QuantizedDataModule.from_datamodule(inner, cache_dir=tmp_path, num_bins=2)
    assert module.name == "photos 7"
    assert module.hparams is inner.hparams
    assert module.hparams.width == 7
    assert module.hparams_initial == {"width": 7}
    assert module._log_hyperparams
    assert module.allow_zero_length_dataloader_with_multiple_devices
    module.prepare_data()
    module.setup("fit")
    assert module.num_classes == 21
    assert "Named has config, and so has QuantizedDataModule" in caplog.text
    module.name = "mine"
    assert module.name == "mine"
    plain = QuantizedDataModule(photos(20), keep_ratio=0.5)
    assert plain.name is None
    assert plain.hparams == {"keep_ratio": 0.5, "num_bins": 10, "seed": 0}


def test_a_batch_size_that_is_changed_between_two_fits(warm):
    class Sized(L.LightningDataModule):
        def __init__(self):
            super().__init__()
            self.size = 4

        def train_dataloader(self):
            return DataLoader(photos(), batch_size=self.size)

    module = quantized(inner := Sized(), warm)
    for size in (4, 10):
        inner.size = size
        trainer(limit_train_batches=1).fit(Recorder(), module)
        assert module.batch_size == module.train_dataloader().batch_size == size
    # what is set here stays
    module.batch_size = 6
    inner.size = 3
    trainer(limit_train_batches=1).fit(Recorder(), module)
    assert module.train_dataloader().batch_size == 6
