"""What people get wrong at first is said at once, before any work, in words that say what to pass."""

import logging
import re

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

from dq_lightning import QuantizedDataModule, cli, make_bins, quantize
from dq_lightning.cache.entries import Cache
from dq_lightning.commands.opening import open_dataset
from dq_lightning.core.config import QuantizeConfig, SelectionConfig, TextConfig
from dq_lightning.core.errors import CacheError, ConfigError, SourceError
from dq_lightning.pipeline import extracting
from dq_lightning.sources.adapt import as_source
from tests import warm_processes
from tests.lightning_scripts.common import Recorder, held_out, photos, trainer

GIVEN = {"keep_ratio": 0.25, "num_bins": 2, "batch_size": 5, "num_workers": 0}


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr(extracting, "extract_features", lambda *a, **k: pytest.fail("work was done"))


@pytest.fixture
def images(tmp_path):
    for split in ("train", "val"):
        for i, (image, label) in enumerate(photos(40, transform=None)):
            place = tmp_path / "photos" / split / f"class {label}"
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{i}.png")
    return tmp_path / "photos"


# names of columns


def test_a_mistyped_column_is_told_before_the_work(images, tmp_path):
    rows = [{"instruction": f"name {i}", "output": "a", "task": "b"} for i in range(40)]
    for data, seen in ((ImageFolder(images / "train"), '"quantiles"'), (rows, "'task'")):
        with pytest.raises(SourceError, match=seen):
            quantize(data, encoder=np.zeros((40, 2)), labels="quantile", cache_dir=tmp_path / "cache")
    assert not list(Cache(tmp_path / "cache").entries())


def test_a_mistyped_keyword_names_the_class_that_was_called():
    with pytest.raises(
        TypeError, match=r"^QuantizedDataModule\.__init__\(\) got an unexpected keyword argument 'keep_ration'"
    ):
        QuantizedDataModule([1], keep_ration=0.1)


# paths


def test_a_path_may_stand_where_commands_take_the_kind_of_a_dataset(images):
    assert len(open_dataset(str(images / "train"))) == len(ImageFolder(images / "train"))


def test_a_folder_of_images_is_opened(images, tmp_path):
    module = QuantizedDataModule(
        str(images / "train"),
        val=images / "val",
        transform=ToTensor(),
        cache_dir=tmp_path / "cache",
        collate_fn=first,
        **GIVEN,
    )
    module.prepare_data()
    module.setup("fit")
    assert module.info.num_source_samples == 40
    assert isinstance(module.val_dataloader().dataset, ImageFolder)


def first(samples):
    return samples[0]


@pytest.mark.parametrize("name", ["train", "val", "test", "predict"])
@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nowhere", "does not exist"),
        ("photos", "pass that"),
        ("table.csv", r"load_dataset\('csv'"),
        (".", "is a folder without class folders of images"),
    ],
)
def test_paths_that_are_no_dataset(images, tmp_path, name, place, said, no_work):
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty").mkdir()
    path = tmp_path / "empty" if place == "." else tmp_path / place
    given = {"train": photos(40)} | {name: path}
    with pytest.raises(ConfigError, match=said) as told:
        QuantizedDataModule(given.pop("train"), cache_dir=tmp_path / "cache", **given)
    assert f"{name}=" in str(told.value)


@pytest.mark.parametrize(
    "address", ["s3://bucket/cache", "gs://b", "hf://datasets/a", "https://x.org/c", "file:///tmp/c"]
)
def test_addresses_make_no_folders(address, tmp_path, monkeypatch, no_work, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is an address"):
        QuantizedDataModule(photos(40), cache_dir=address)
    with pytest.raises(ConfigError, match="is an address"):
        quantize(photos(40), cache_dir=address)
    with pytest.raises(SystemExit):
        cli.main(["quantize", "--dataset", "dq_lightning.demo.sample_data.SampleCIFAR10", "--output", address])
    assert "is an address" in capsys.readouterr().err
    monkeypatch.setenv("DQ_LIGHTNING_CACHE", address)
    with pytest.raises(ConfigError, match="is an address"):
        QuantizedDataModule(photos(40)).prepare_data()
    assert not list(tmp_path.iterdir())
    Cache(tmp_path / "odd: name" / "a:b")


# samples and loaders


@pytest.mark.parametrize("where", ["train", "val"])
def test_samples_without_a_transform(where, tmp_path, no_work):
    """Said before the features are made; torch's own words come after them."""
    given = {"train": photos(40), "val": held_out()}
    given[where] = photos(40, transform=None) if where == "train" else held_out(transform=None)
    module = QuantizedDataModule(given["train"], val=given["val"], cache_dir=tmp_path, **GIVEN)
    with pytest.raises(ConfigError, match=r"no batch can be made .* give the dataset a transform") as raised:
        trainer().fit(Recorder(), module)
    assert ("transform= is for the train set alone" in str(raised.value)) == (where == "val")
    assert not (tmp_path / "1-features").exists()


@pytest.mark.parametrize("given", [{}, {"transform": ToTensor()}], ids=["none", "of the image"])
def test_a_transform_for_rows_of_hugging_face(tmp_path, given):
    """The advice can be followed: the code in it is a transform that works."""
    data = Dataset.from_dict({"picture": [image for image, _ in photos(40, transform=None)], "label": [0, 1] * 20})

    def module(**transform):
        return QuantizedDataModule(data, cache_dir=tmp_path, encoder=np.eye(40), **GIVEN, **transform)

    with pytest.raises((ConfigError, SourceError), match=r"rows\['picture'\]") as raised:
        trainer().fit(Recorder(), module(**given))
    assert not (tmp_path / "1-features").exists()
    code = re.search(r"transform=(lambda rows: .*?\]\})", str(raised.value))[1]
    advised = module(transform=eval(code, {"to_tensor": ToTensor()}))
    advised.prepare_data()
    advised.setup("fit")
    batch = next(iter(advised.train_dataloader()))
    assert batch["picture"].shape == (5, 3, 32, 32)
    assert set(batch) == {"picture", "label"}


def test_samples_that_only_a_collate_function_takes(tmp_path):
    module = QuantizedDataModule(photos(40, transform=None), cache_dir=tmp_path, collate_fn=tensors, **GIVEN)
    trainer().fit(Recorder(), module)
    # by hand nothing is refused: perhaps no batches are wanted
    module = QuantizedDataModule(photos(40, transform=None), cache_dir=tmp_path, **GIVEN)
    module.prepare_data()
    module.setup("fit")
    assert len(module.train_dataloader().dataset) == 10


def tensors(samples):
    images, labels = zip(*samples, strict=True)
    return torch.stack([ToTensor()(image) for image in images]), torch.tensor(labels)


@pytest.mark.parametrize("columns", [dict, pandas.DataFrame], ids=["dict", "DataFrame"])
def test_columns_are_no_samples(columns):
    with pytest.raises(SourceError, match=rf"a {columns.__name__} holds columns.*Dataset\.from_"):
        as_source(columns({"text": ["a", "b"], "label": [0, 1]}))
    assert len(as_source(dict(enumerate(photos(10))))) == 10


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_classes_of_rows_of_text_are_told(kind, caplog):
    rows = kind([{"sentence": "a", "label": 0}, {"sentence": "b", "label": 1}])
    with caplog.at_level(logging.INFO):
        source = as_source(rows)
        assert source.labels() is source.labels() is None
        assert as_source(rows, label_column="label").labels().num_classes == 2
        assert as_source(kind([{"sentence": "a"}, {"sentence": "b"}])).labels() is None
        assert (
            as_source(kind([{"prompt": "a", "target": "b"}]), text=TextConfig(columns=("prompt", "target"))).labels()
            is None
        )
    assert caplog.text.count("labels='label' makes them inside each class") == 1
    assert "labels='target'" not in caplog.text


def test_setup_without_prepare_data_says_so(images, tmp_path):
    with pytest.raises(CacheError, match="call it before setup"):
        QuantizedDataModule(images / "train", cache_dir=tmp_path, **GIVEN).setup("fit")


def test_loaders_and_mixed_streams_are_named():
    with pytest.raises(SourceError, match=r"DataLoader is a loader.*loader\.dataset"):
        as_source(DataLoader(photos(40)))
    litdata = pytest.importorskip("litdata")
    for kind, said in ((litdata.CombinedStreamingDataset, "is shuffled"), (litdata.StreamingDataLoader, "is a loader")):
        with pytest.raises(SourceError, match=f"{kind.__name__} .*{said}"):
            as_source(kind.__new__(kind))


def table(count):
    images = [np.full((8, 8, 3), i, np.uint8).tolist() for i in range(count)]
    return Dataset.from_dict({"x": list(range(count)), "image": images})


def test_other_splits_of_a_dataset_dict(caplog):
    caplog.set_level(logging.INFO, "dq_lightning")
    whole = DatasetDict(train=table(8), validation=table(3), test=table(2))
    module = QuantizedDataModule(whole)
    assert (len(module._eval["val"]), len(module._eval["test"])) == (3, 2)
    assert "split 'validation' of the DatasetDict is taken" in caplog.text
    own = QuantizedDataModule(whole, val=table(1))
    assert (len(own._eval["val"]), len(own._eval["test"])) == (1, 2)
    caplog.clear()
    changed = QuantizedDataModule(whole, transform=None)
    assert changed._eval == {"val": None, "test": None, "predict": None}
    assert "'validation' of the DatasetDict is not used" in caplog.text
    assert QuantizedDataModule(DatasetDict(train=table(8)))._eval["val"] is None


# bins


def test_names_of_classes():
    features, names = np.random.default_rng(0).normal(size=(60, 5)), np.array(["cat", "ant", "bee"])
    numbers = np.arange(60) % 3
    by_name = make_bins(features, num_bins=3, labels=list(names[numbers]))
    same = make_bins(features, num_bins=3, labels=names[numbers])
    order = np.array([2, 0, 1])  # the names in their sorted order
    by_number = make_bins(features, num_bins=3, labels=order[numbers])
    for name in ("assignment", "rank", "group"):
        assert torch.equal(getattr(by_name, name), getattr(by_number, name))
        assert torch.equal(getattr(same, name), getattr(by_number, name))


def test_more_bins_than_samples_are_said(caplog):
    features, labels = np.random.default_rng(0).normal(size=(56, 5)), np.arange(56) % 2
    make_bins(features, num_bins=28, labels=labels)
    assert not caplog.text
    made = make_bins(features, num_bins=100, labels=labels)
    assert int(made.assignment.max()) == 27
    assert "2 of 2 groups have fewer samples" in caplog.text
    assert "72 of the 100 bins stay empty" in caplog.text
    assert len(caplog.records) == 1


# messages of a run


def test_parts_of_the_time_are_no_more_than_the_whole(tmp_path, caplog, monkeypatch):
    """Also where finding the identity takes long."""
    import time

    from dq_lightning.pipeline import quantize as pipeline

    real = pipeline.source_identity
    monkeypatch.setattr(pipeline, "source_identity", lambda *a, **k: (time.sleep(0.5), real(*a, **k))[1])
    caplog.set_level(logging.INFO, "dq_lightning")
    info = quantize(photos(40, None), QuantizeConfig(selection=SelectionConfig(keep_ratio=0.5)), cache_dir=tmp_path)
    said = next(record.getMessage() for record in caplog.records if record.getMessage().startswith("kept"))
    whole, *parts = (float(number) for number in re.findall(r"([\d.]+) s\b", said))
    assert len(parts) == len(info.seconds) >= 4
    assert whole >= 0.5
    assert sum(parts) <= whole + 1e-6


# the command line


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    assert stopped.value.code not in (0, None)
    return capsys.readouterr().err.strip()


def test_dashes_and_underscores(tmp_path, images):
    command = [
        "quantize",
        "--data-path",
        str(images / "train"),
        "--cache-dir",
        str(tmp_path / "cache"),
        "--progress",
        "false",
    ]
    cli.main([*command, "--keep-ratio", "0.5", "--num-bins=2", "--features.batch-size", "8"])
    (entry,) = [e for e in Cache(tmp_path / "cache").entries() if e.station == "5-store"]
    assert (entry.path / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize", "--keep_rato", "0.1"], "did you mean --keep_ratio?"),
        (["quantize", "--keep-ratio", "many"], "keep_ratio takes a number; got many"),
        (["quantize", "--keep-ratio"], "--keep_ratio: expected one argument (see"),
        (["quantize", "--drop_worst", "autos"], "drop_worst takes a number or auto; got autos"),
        (["quantize", "--balance", "eq"], "balance takes proportional, sqrt or equal; got eq"),
        (["quantize", "photos", "--keep_ratio", "0.1"], "photos; a folder or file of data is named by --data_path"),
        (["quantise"], "quantize"),
        (["info"], "are required: path"),
    ],
)
def test_a_mistyped_option_costs_a_line(capsys, arguments, said):
    told = run(capsys, *arguments)
    assert said in told
    assert len(told.splitlines()) <= 8
    assert "--help" in told


@pytest.mark.parametrize("name", ["cifar10", "CIFAR_10", "Cifar10", "torchvision.datasets.cifar10"])
def test_names_of_datasets_are_guessed(capsys, name, tmp_path):
    assert "did you mean CIFAR10?" in run(capsys, "quantize", "--dataset", name, "--data_path", str(tmp_path))


def test_a_closed_pipe_is_no_error(tmp_path, images):
    info = quantize(ImageFolder(images / "train"), indices=[1, 2], cache_dir=tmp_path / "cache")
    script = (
        "import os, sys\n"
        "from dq_lightning import cli\n"
        "reading, writing = os.pipe()\n"
        "os.close(reading)\n"
        "os.dup2(writing, 1)\n"
        "cli.main(sys.argv[1:])\n"
    )
    (tmp_path / "script.py").write_text(script)
    done = warm_processes.run([tmp_path / "script.py", "info", info.path], warm_processes.environment())
    assert done.stderr == ""
    assert done.returncode == 141
