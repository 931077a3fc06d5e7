"""QuantizedDataModule in one process, as a script uses it."""

import inspect
import pickle
import time
from datetime import timedelta
from pathlib import Path
from types import MethodType
from typing import get_type_hints

import lightning as L
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, IterableDataset, default_collate
from torchvision.transforms.v2 import MixUp

import dq_lightning
from dq_lightning import BinConfig, QuantizeConfig, QuantizedDataModule, SelectionConfig, make_bins
from dq_lightning.core.errors import CacheError, ConfigError
from dq_lightning.loading.loaders import is_sample_stream
from dq_lightning.loading.options import DataModuleOptions, StoreOptions
from dq_lightning.pipeline import binning, extracting, selecting
from tests.lightning_scripts.common import Recorder, held_out, name_of, photos, to_tensor, trainer


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A cache that holds the compact set of `make`."""
    folder = tmp_path_factory.mktemp("warm")
    ready(make(folder))
    return folder


def make(cache_dir, **settings):
    return QuantizedDataModule(
        photos(), **({"keep_ratio": 0.25, "num_bins": 5, "num_workers": 0, "cache_dir": cache_dir} | settings)
    )


def ready(module):
    module.prepare_data()
    module.setup("fit")
    return module


@pytest.fixture
def builds(monkeypatch):
    """Names of the stations that computed something, in order."""
    ran = []
    for place, name in ((extracting, "extract_features"), (binning, "make_shared_bins"), (selecting, "select")):
        real = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a, _name=name, _real=real, **k: (ran.append(_name), _real(*a, **k))[1])
    return ran


def kept_names(module):
    return {name_of(photos()[i][0]) for i in module.selection.index.tolist()}


def test_first_run_builds_and_second_run_trains_at_once(tmp_path, builds):
    first = make(tmp_path, val=held_out(), batch_size=8)
    model = Recorder()
    trainer(max_epochs=2).fit(model, first)
    assert builds == ["extract_features", "make_shared_bins", "select"]
    assert len(first.selection) == first.info.num_samples == 50
    assert not first.info.reused
    assert set(first.info.seconds) == {"identity", "features", "bins", "selection", "store"}
    assert first.data_keep_ratio == 0.25
    assert first.num_classes == 10
    assert torch.equal(first.bins.assignment[first.selection.index], first.selection.bin)
    # an epoch is the compact set, each sample once, in another order each time
    assert all(sorted(epoch) == sorted(kept_names(first)) for epoch in model.epochs)
    assert model.epochs[0] != model.epochs[1]

    second = make(tmp_path)
    trainer(max_epochs=1).fit(Recorder(), second)
    assert len(builds) == 3
    assert second.info.reused
    assert second.info.content_hash == first.info.content_hash
    assert second.num_classes == 10


def test_another_ratio_or_seed_reuses_features_and_bins(warm, builds):
    other = ready(make(warm, keep_ratio=0.5))
    assert builds == ["select"]
    assert len(other.selection) == 100
    reseeded = ready(make(warm, seed=7))
    assert builds == ["select", "select"]
    assert not torch.equal(reseeded.selection.index, ready(make(warm)).selection.index)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_without_training_nothing_is_quantized(tmp_path, builds, verb):
    module = make(tmp_path, val=held_out(), test=held_out(), predict=held_out())
    getattr(trainer(), verb)(Recorder(), datamodule=module)
    assert builds == []
    assert not list(tmp_path.glob("5-store/*"))


def test_cache_hit_and_miss_train_alike(tmp_path, warm, builds):
    orders = []
    for cache_dir in (tmp_path, warm, warm):
        L.seed_everything(3, verbose=False)
        model = Recorder()
        trainer(max_epochs=2).fit(model, make(cache_dir))
        orders.append(model.epochs)
    assert len(builds) == 3
    assert orders[0] == orders[1] == orders[2]


def test_what_prepare_data_leaves_is_not_needed(warm):
    """Other ranks never run prepare_data: the key must be found from the constructor's arguments alone."""
    prepared, other = make(warm), make(warm)
    prepared.prepare_data()
    other.setup("fit")
    prepared.setup("fit")
    assert other.info.content_hash == prepared.info.content_hash
    assert other.info.path == prepared.info.path


def test_data_changed_between_two_fits_are_seen(warm):
    dataset = photos()
    module = QuantizedDataModule(dataset, keep_ratio=0.25, num_bins=5, cache_dir=warm)
    before = ready(module).info.path
    dataset.dataset.data = 255 - dataset.dataset.data
    assert ready(module).info.path != before
    assert not module.info.reused


def test_force_recompute_builds_once_in_a_process(warm, builds):
    module = make(warm, force_recompute=True)
    ready(module)
    ready(module)
    assert builds == ["extract_features", "make_shared_bins", "select"]


def test_fingerprint_replaces_the_content(tmp_path, builds):
    ready(make(tmp_path, fingerprint="photos of Monday"))
    ready(
        QuantizedDataModule(
            photos(transform=None), keep_ratio=0.25, num_bins=5, cache_dir=tmp_path, fingerprint="photos of Monday"
        )
    )
    assert len(builds) == 3
    ready(make(tmp_path, fingerprint="photos of Tuesday"))
    assert len(builds) == 6


def test_loaders_deliver_what_the_dataset_delivers(warm):
    module = ready(make(warm, num_workers=2, batch_size=10, transform=None, collate_fn=list))
    batches = list(module.train_dataloader())
    assert [len(batch) for batch in batches] == [10] * 5
    image, label = batches[0][0]
    assert image.size == (32, 32)
    assert isinstance(label, int)
    kept = {name_of(photos(transform=None)[i][0]) for i in module.selection.index.tolist()}
    assert {name_of(image) for batch in batches for image, _ in batch} == kept


def test_evaluation_loaders_are_ordered_whole_and_only_where_given(warm):
    module = make(warm, val=[held_out(5), DataLoader(held_out(4), 3)], test={"a": held_out(5)}, drop_last=True)
    first, second = module.val_dataloader()
    expected = torch.stack([held_out(5)[i][0] for i in range(5)])
    assert torch.equal(next(iter(first))[0], expected)
    assert second.batch_size == 3
    assert len(next(iter(module.test_dataloader()["a"]))[0]) == 5
    assert make(warm, val=held_out(5), eval_batch_size=2, batch_size=4).val_dataloader().batch_size == 2


def test_a_list_of_samples_is_one_dataset(warm):
    samples = [held_out(transform=None)[i] for i in range(5)]
    dicts = [{"image": image, "label": label} for image, label in samples]
    images = [image for image, _ in samples]
    for given in (samples, dicts, images, list(torch.rand(5, 3))):
        loader = make(warm, val=given, collate_fn=list, num_workers=0).val_dataloader()
        assert isinstance(loader, DataLoader)
        assert len(next(iter(loader))) == 5
    several = make(warm, val=[samples, held_out(3), DataLoader(held_out(4))]).val_dataloader()
    assert [len(loader.dataset) for loader in several] == [5, 3, 4]


def test_a_dataset_dict_is_no_validation_set(warm):
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_dict({"x": [1, 2, 3]})
    both = datasets.DatasetDict(train=part, validation=part)
    for given in (both, [both]):
        with pytest.raises(ConfigError, match=r"a DatasetDict holds several splits \('train', 'validation'\)"):
            make(warm, val=given).val_dataloader()
    assert len(make(warm, val={"a": part, "b": part}).val_dataloader()) == 2


@pytest.mark.parametrize("validates", [True, False])
def test_without_validation_data_lightning_says_what_it_says_of_any_data_module(warm, recwarn, validates):
    model = Recorder()
    if not validates:
        model.validation_step = MethodType(L.LightningModule.validation_step, model)
    trainer().fit(model, pickle.loads(pickle.dumps(make(warm))))
    said = [str(one.message) for one in recwarn if "val" in str(one.message) or "zero" in str(one.message)]
    assert len(said) == validates
    assert all("have no `val_dataloader`" in one for one in said)


def flip(image):
    return to_tensor(image).flip(-1)


def test_the_dataset_of_the_train_loader_stands_for_the_users(warm):
    parts, whole = photos(), photos().dataset
    for given, base in ((parts, parts.dataset), (whole, whole)):
        module = ready(QuantizedDataModule(given, keep_ratio=0.25, num_bins=5, num_workers=0, cache_dir=warm))
        loader = module.train_dataloader()
        kept, before = loader.dataset, loader.dataset[3][0]
        (kept.dataset if given is parts else kept).transform = flip  # what a script does with its own loader
        assert base.transform is flip
        assert torch.equal(kept[3][0], before.flip(-1))
        assert {name_of(image) for batch in loader for image in batch[0]} == {name_of(image) for image, _ in kept}
        assert [base[i][1] for i in kept.indices] == [label for _, label in kept]
        kept.note = 1
        assert not hasattr(base, "note")
        copied = pickle.loads(pickle.dumps(kept))
        assert torch.equal(copied[3][0], kept[3][0])
    assert kept.classes == whole.classes
    assert kept.transform is flip
    with pytest.raises(
        AttributeError, match="50 of the 200 samples of a SampleCIFAR10, and its 'targets' may describe all"
    ):
        kept.targets  # noqa: B018
    assert not hasattr(kept, "nothing_like_it")
    # the kept samples are a part of the dataset, which can be quantized again
    again = ready(QuantizedDataModule(kept, keep_ratio=0.5, num_bins=2, num_workers=0, cache_dir=warm))
    assert again.info.num_source_samples == 50
    packed = ready(make(warm, store="packed")).train_dataloader().dataset
    with pytest.raises(AttributeError, match="a packed store has no transform"):
        packed.transform = flip


def test_a_collate_function_for_training_alone_is_told(warm, caplog):
    """Else validation would be on mixed images."""
    mix = MixUp(num_classes=10)

    def told(**given):
        caplog.clear()
        state = torch.get_rng_state()
        make(warm, **given).prepare_data()
        assert torch.equal(torch.get_rng_state(), state)
        return "pass val=DataLoader" in caplog.text

    assert told(collate_fn=lambda batch: mix(*default_collate(batch)), val=held_out())
    assert not told(collate_fn=lambda batch: mix(*default_collate(batch)), val=DataLoader(held_out()))
    assert not told(collate_fn=default_collate, val=held_out())
    assert not told(collate_fn=lambda batch: 1 / 0, val=held_out())


def test_a_validation_loader_of_a_subclass_is_used(warm):
    class WithValidation(QuantizedDataModule):
        def val_dataloader(self):
            return DataLoader(held_out(5), 5)

    running = trainer()
    running.fit(Recorder(), WithValidation(photos(), keep_ratio=0.25, num_bins=5, num_workers=0, cache_dir=warm))
    assert running.num_val_batches == [1]


@pytest.mark.parametrize(("verb", "name"), [("validate", "val"), ("test", "test"), ("predict", "predict")])
def test_evaluation_without_data_is_an_error(warm, verb, name):
    with pytest.raises(ConfigError, match=f"no {name}_dataloader: pass {name}="):
        getattr(trainer(), verb)(Recorder(), datamodule=make(warm))


def test_too_small_for_drop_last_is_an_error(warm):
    with pytest.raises(ConfigError, match=r"zero steps.*batch_size"):
        trainer().fit(Recorder(), make(warm, batch_size=64, drop_last=True))
    trainer().fit(Recorder(), make(warm, batch_size=64))


def test_settings_that_no_longer_fit_are_told(warm, caplog, tmp_path):
    with pytest.raises(ConfigError, match=r"val_check_interval=20.*5 steps"):
        trainer(val_check_interval=20).fit(Recorder(), make(warm, val=held_out(), batch_size=10))
    with pytest.raises(ConfigError, match=r"limit_train_batches=0.1 of the 5 steps"):
        trainer(limit_train_batches=0.1).fit(Recorder(), make(warm, batch_size=10))
    trainer(val_check_interval=20, check_val_every_n_epoch=None).fit(
        Recorder(), make(warm, val=held_out(), batch_size=10)
    )
    trainer(limit_train_batches=0).fit(Recorder(), make(warm, batch_size=10))
    caplog.clear()
    with caplog.at_level("INFO", "dq_lightning"), pytest.warns(UserWarning, match="logging interval"):
        trainer(logger=True, default_root_dir=tmp_path, limit_train_batches=9).fit(
            Recorder(), make(warm, batch_size=10)
        )
    assert "50 of 200 samples: 5 steps per epoch instead of 20 (batch size 10, 1 process)" in caplog.text
    assert "limit_train_batches=9 has no effect" in caplog.text
    assert "pass Trainer(log_every_n_steps=2)" in caplog.text


def test_steps_are_told_once(warm, caplog):
    module = make(warm)
    with caplog.at_level("INFO", "dq_lightning"):
        trainer().fit(Recorder(), module)
        trainer().fit(Recorder(), module)
    assert caplog.text.count("steps per epoch instead of") == 1


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"fast_dev_run": True}, 1),
        ({"limit_train_batches": 2}, 2),
        ({"limit_train_batches": 0.5}, 2),
        ({"overfit_batches": 1}, 1),
        ({"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1}, 10),
        ({"val_check_interval": 2}, 5),
        ({"val_check_interval": timedelta(minutes=5)}, 5),
    ],
)
def test_trainer_switches(warm, settings, steps):
    running = trainer(**settings)
    running.fit(Recorder(), make(warm, val=held_out(), batch_size=10, num_workers=0))
    assert running.global_step == steps


def test_a_module_that_was_set_up_is_sent_to_spawned_processes(warm):
    """torch moves the memory of tensors that it sends; positions must not be an array over that memory."""
    module = make(warm)
    module.prepare_data()
    module.setup("fit")
    wanted = [int(i) for i in module.selection.index]
    module.selection.index.share_memory_()
    module.selection.bin.share_memory_()
    assert list(module.train_dataloader().dataset.indices) == wanted


class Unending(IterableDataset):
    """Samples that can be read in their order alone."""

    def __iter__(self):
        return iter(held_out())


def test_streams_of_samples_are_made_into_batches(warm):
    module = make(warm, val=Unending(), test={"one": Unending(), "two": held_out()}, eval_batch_size=7)
    module.prepare_data()
    module.setup("fit")
    images, labels = next(iter(module.val_dataloader()))
    assert images.shape[0] == len(labels) == 7
    loaders = module.test_dataloader()
    assert torch.equal(next(iter(loaders["one"]))[0], next(iter(loaders["two"]))[0])
    total = sum(len(labels) for _, labels in module.val_dataloader())
    assert total == len(held_out())


def test_pipelines_that_make_batches_stay_as_they_are():
    def batched(source):
        return source

    class Pipeline(Unending):
        pipeline = ()

    for pipeline, wanted in (([], True), ([batched], False), ([DataLoader(held_out())], False)):
        stream = Pipeline()
        stream.pipeline = pipeline
        assert is_sample_stream(stream) == wanted
    assert not is_sample_stream(DataLoader(Unending()))
    assert not is_sample_stream(held_out())


def test_batch_size_finder(warm, tmp_path):
    module = make(warm, batch_size=2)
    # The finder writes a checkpoint into this folder, which stays if it is interrupted.
    found = Tuner(trainer(default_root_dir=tmp_path)).scale_batch_size(
        Recorder(), datamodule=module, max_trials=3, init_val=4
    )
    assert module.batch_size == found
    assert found > 4
    assert module.train_dataloader().batch_size == found


def test_checkpoints_are_small_resume_and_know_their_subset(warm, tmp_path):
    running = trainer(max_epochs=1)
    running.fit(Recorder(), make(warm))
    path = tmp_path / "end.ckpt"
    running.save_checkpoint(path)
    assert path.stat().st_size < 20_000
    stored = torch.load(path, weights_only=True)
    assert stored["datamodule_hyper_parameters"] == {"keep_ratio": 0.25, "num_bins": 5, "seed": 0}

    running = trainer(max_epochs=2)
    running.fit(Recorder(), make(warm), ckpt_path=path, weights_only=True)
    assert running.current_epoch == 2
    with pytest.raises(CacheError, match="trained on the compact set"):
        trainer(max_epochs=2).fit(Recorder(), make(warm, seed=9), ckpt_path=path)

    loaded = QuantizedDataModule.load_from_checkpoint(path, train=photos(), cache_dir=warm)
    assert ready(loaded).info.content_hash == ready(make(warm)).info.content_hash
    changed = QuantizedDataModule.load_from_checkpoint(path, train=photos(), cache_dir=warm, keep_ratio=0.5)
    with pytest.raises(CacheError, match="trained on the compact set"):
        ready(changed)
    # testing needs no train set, and so no comparison, whether there was a fit before or comes one later
    other = make(warm, seed=9, test=held_out())
    for fits in (1, 2):
        trainer().test(Recorder(), datamodule=other, ckpt_path=path, verbose=False)
        trainer(max_epochs=fits).fit(Recorder(), other)
    # and after a refusal the advice works
    with pytest.raises(CacheError, match="trained on the compact set"):
        trainer(max_epochs=2).fit(Recorder(), other, ckpt_path=path)
    trainer().fit(Recorder(), other)


def test_notebook_use(warm):
    module = ready(make(warm))
    assert len(next(iter(module.train_dataloader()))[0]) == 32
    running = trainer()
    running.fit(Recorder(), module)
    assert running.global_step == 2


def test_printing_and_pickling(warm):
    module = make(warm, val=held_out(7))
    assert repr(module) == "QuantizedDataModule(keep_ratio=0.25; the compact set is known after setup)"
    assert "Train dataloader: None" in str(module)
    assert "Train dataloader: size=50" in str(ready(module))
    assert str(module).startswith("QuantizedDataModule(StoreInfo(50 of 200 samples, indices, ")
    assert "<td>50 of 200</td>" in module._repr_html_()
    assert "Validation dataloader: size=7" in str(module)
    again = pickle.loads(pickle.dumps(module))
    assert again.info == module.info
    assert [len(batch[0]) for batch in again.train_dataloader()] == [32, 18]
    trainer().fit(Recorder(), pickle.loads(pickle.dumps(make(warm))))


def test_known_only_after_setup(warm):
    for name in ("info", "selection", "bins", "features", "labels", "data_keep_ratio"):
        with pytest.raises(ConfigError, match=r"setup\('fit'\)"):
            getattr(make(warm), name)
    with pytest.raises(ConfigError, match=r"setup\('fit'\)"):
        make(warm).train_dataloader()
    with pytest.raises(CacheError, match=r"no compact set.*prepare_data_per_node"):
        make(warm, seed=12345).setup("fit")
    assert make(warm).num_classes == 10


def test_what_the_choice_was_made_from_can_be_looked_at(warm):
    module = ready(make(warm))
    assert len(module.features) == len(module.labels.values) == 200
    assert module.labels.values.tolist() == [int(label) for _, label in photos()]
    again = make_bins(module.features, num_bins=module.bins.num_bins, labels=module.labels.values)
    assert torch.equal(again.assignment, module.bins.assignment)
    assert (repr(module.bins), len(module.info.encoder_digest)) == ("Bins(200 samples, 5 bins, 10 groups)", 64)
    assert repr(module.selection).startswith("Selection(50 samples, 5 bins, content hash ")
    assert module.info.encoder in repr(module.info)


def test_loggers_get_what_was_chosen_beside_the_hyperparameters_of_the_model(warm, tmp_path):
    class WithHyperparameters(Recorder):
        def __init__(self, keep_ratio=7):
            super().__init__()
            self.save_hyperparameters()

    loggers = [CSVLogger(tmp_path, "runs"), CSVLogger(tmp_path, "others")]
    module = make(warm)
    trainer(logger=loggers).fit(WithHyperparameters(), module)
    for logger in loggers:
        written = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
        assert written.pop("keep_ratio") == 7
        assert {name: value for name, value in written.items() if name.startswith("dq/")} == {"dq/keep_ratio": 0.25} | {
            f"dq/{name}": getattr(module.info, name) for name in ("num_samples", "content_hash", "encoder", "bytes")
        }


def test_keywords_and_config(warm):
    config = QuantizeConfig(bins=BinConfig(num_bins=5), selection=SelectionConfig(keep_ratio=0.25))
    from_config = QuantizedDataModule(photos(), config=config, cache_dir=warm)
    assert ready(from_config).info.content_hash == ready(make(warm)).info.content_hash
    assert ready(make(warm, config=config)).info.reused
    seeded = QuantizeConfig(bins=BinConfig(num_bins=4), selection=SelectionConfig(keep_ratio=0.3, seed=5))
    module = QuantizedDataModule(photos(), config=seeded)
    assert module.hparams == {"keep_ratio": 0.3, "num_bins": 4, "seed": 5}
    assert module._preparation.seed == 5
    assert QuantizedDataModule(photos(), config=seeded, **module.hparams).config == seeded
    # a budget of bytes decides how many samples are kept
    assert QuantizedDataModule(photos(), max_bytes="1MB").hparams == {"keep_ratio": None, "num_bins": 10, "seed": 0}
    with pytest.raises(ConfigError, match=r"keep_ratio=0.5 was passed as a keyword, but config.selection.keep_ratio"):
        QuantizedDataModule(photos(), config=config, keep_ratio=0.5)


def test_grouping_given_by_the_user(tmp_path):
    halves = [i % 2 for i in range(200)]
    module = ready(make(tmp_path, labels=halves))
    assert module.bins.group.tolist() == halves
    assert module.num_classes == 2
    assert isinstance(module.train_dataloader().dataset[0][1], int)
    without = ready(make(tmp_path, labels=False))
    assert without.bins.group.unique().tolist() == [0]
    assert without.num_classes is None
    assert {label for _, label in without.train_dataloader().dataset} <= set(range(10))


class WithTargets(torch.utils.data.Dataset):
    """The photos with targets of any kind."""

    def __init__(self, targets):
        self.photos, self.targets_of = photos(60, transform=None), targets

    def __len__(self):
        return len(self.photos)

    def __getitem__(self, i):
        return self.photos[i][0], self.targets_of[i]


@pytest.mark.parametrize(
    "targets",
    [torch.rand(60), torch.randint(0, 2, (60, 4)), torch.zeros(60, 32, 32, dtype=torch.long)],
    ids=["floats", "multi-hot", "masks"],
)
@pytest.mark.parametrize("store", ["indices", "packed"])
def test_targets_that_are_no_classes_pass_untouched(tmp_path, targets, store):
    module = ready(
        QuantizedDataModule(WithTargets(targets), keep_ratio=0.25, num_bins=3, store=store, cache_dir=tmp_path)
    )
    assert module.num_classes is None
    assert module.bins.group.unique().tolist() == [0]
    dataset = module.train_dataloader().dataset
    for (_, target), position in zip((dataset[i] for i in range(15)), module.selection.index.tolist(), strict=True):
        assert torch.equal(target, targets[position])


def test_missing_labels_are_no_class(tmp_path):
    labels = [-1 if i % 3 == 0 else i % 2 for i in range(60)]
    module = QuantizedDataModule(WithTargets(labels), keep_ratio=0.5, num_bins=3, cache_dir=tmp_path)
    assert module.num_classes == 2
    assert ready(module).num_classes == 2
    assert module.bins.group.unique().tolist() == [0, 1, 2]


def test_an_error_names_its_cause_at_once(tmp_path):
    class Broken(WithTargets):
        def __getitem__(self, i):
            if i == 7:
                raise OSError("truncated")
            return super().__getitem__(i)

    module = QuantizedDataModule(Broken([0] * 60), collate_fn=list, cache_dir=tmp_path)
    with pytest.raises(Exception, match=r"Item 7 of Broken.*truncated"):
        trainer().fit(Recorder(), module)


def test_from_datasets_quantizes(tmp_path, monkeypatch):
    monkeypatch.setenv("DQ_LIGHTNING_CACHE", str(tmp_path))
    module = QuantizedDataModule.from_datasets(photos(80), held_out(5), batch_size=4)
    running = trainer()
    running.fit(Recorder(), module)
    assert running.global_step == 3
    assert module.val_dataloader().batch_size == 4
    with pytest.raises(ConfigError, match="train_dataset"):
        QuantizedDataModule.from_datasets(val_dataset=held_out())


def test_a_hit_loads_no_model_and_is_quick(warm, monkeypatch):
    monkeypatch.setattr("dq_lightning.features.bundled.load_small_resnet", None)
    started = time.process_time()
    ready(make(warm))
    assert time.process_time() - started < 5


def test_every_way_in_takes_the_keywords_of_the_class():
    own = inspect.signature(QuantizedDataModule.__init__).parameters
    hints = get_type_hints(QuantizedDataModule.__init__)
    taken = {}
    for way, options in (("from_datamodule", DataModuleOptions), ("from_store", StoreOptions)):
        typed = get_type_hints(options)
        taken |= typed
        listed = inspect.signature(getattr(QuantizedDataModule, way)).parameters
        assert {name: listed[name].default for name in typed} == {name: own[name].default for name in typed}
        parser = ArgumentParser()
        parser.add_method_arguments(QuantizedDataModule, way, "data")
        assert {f"data.{name}" for name in typed} <= {action.dest for action in parser._actions}
    datasets = {"val", "test", "predict"}
    assert {*taken, "self", "train"} == set(own)
    assert {name: taken[name] for name in taken if name not in datasets} == {
        name: hints[name] for name in taken if name not in datasets
    }


def test_a_keyword_that_a_way_in_does_not_take(tmp_path):
    with pytest.raises(TypeError, match=r"from_store\(\) got an unexpected keyword argument 'keep_ratio'"):
        QuantizedDataModule.from_store(tmp_path, keep_ratio=0.5)
    with pytest.raises(TypeError, match=r"from_datamodule\(\) got an unexpected keyword argument 'val'"):
        QuantizedDataModule.from_datamodule(L.LightningDataModule(), val=photos())


@pytest.mark.parametrize("name", dq_lightning.__all__)
def test_every_public_name_shows_an_example(name):
    """The examples themselves run as doctests."""
    assert ">>> " in getattr(dq_lightning, name).__doc__
