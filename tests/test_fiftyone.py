"""A compact set in FiftyOne's format: every field that its importer reads, and what was chosen."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from dq_lightning import BinConfig, QuantizeConfig, SelectionConfig, quantize
from dq_lightning.cli import main
from dq_lightning.demo.sample_data import SampleCIFAR10
from dq_lightning.exports.command import export_set

CONFIG = QuantizeConfig(bins=BinConfig(num_bins=3), selection=SelectionConfig(keep_ratio=0.25))


class Sixty(torch.utils.data.Dataset):
    """60 real images in memory."""

    def __init__(self):
        sample = SampleCIFAR10()
        self.data, self.targets, self.classes = sample.data[:60], sample.targets[:60], sample.classes

    def __len__(self):
        return 60

    def __getitem__(self, index):
        return Image.fromarray(self.data[index]), int(self.targets[index])


@pytest.fixture
def features():
    return np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)


def imported(folder):
    """What FiftyOne's importer reads: it joins paths to the folder, and takes a label by its `_cls`."""
    metadata = json.loads((folder / "metadata.json").read_text())
    assert "version" not in metadata  # with one, every document would need a database id and a schema of that version
    assert metadata["media_type"] == "image"
    samples = json.loads((folder / "samples.json").read_text())["samples"]
    for sample in samples:
        sample["filepath"] = os.path.join(folder, sample["filepath"])  # noqa: PTH118
        assert isinstance(sample["tags"], list)
        assert "metadata" not in sample
    return metadata["info"], samples


def test_all_samples_with_bin_rank_gain_and_what_was_kept(tmp_path, features):
    data = Sixty()
    info = quantize(data, CONFIG, encoder=features, cache_dir=tmp_path / "cache", progress=False)
    export_set(info.path, "fiftyone", str(tmp_path / "out"), dataset=data, name="sixty")
    facts, samples = imported(tmp_path / "out")
    assert [sample["index"] for sample in samples] == list(range(60))
    for position, sample in enumerate(samples):
        assert np.array_equal(np.asarray(Image.open(sample["filepath"])), data.data[position])
        assert sample["ground_truth"] == {"_cls": "Classification", "label": data.classes[data.targets[position]]}
        assert sample["tags"] == (["kept"] if sample["kept"] else [])
    kept = [sample for sample in samples if sample["kept"]]
    assert len(kept) == info.num_samples == facts["dq_lightning"]["samples"]
    assert facts["dq_lightning"]["content_hash"] == info.content_hash
    assert facts["classes"] == list(data.classes)
    for label in data.classes:
        mine = [(s["bin"], s["rank"], s["gain"]) for s in samples if s["ground_truth"]["label"] == label]
        assert len({pair[:2] for pair in mine}) == len(mine)  # a rank is unique in its bin and class
        assert {pair[1] for pair in mine if pair[0] == 0} == set(range(sum(pair[0] == 0 for pair in mine)))


def test_a_packed_set_alone_shows_what_it_holds(tmp_path, features):
    config = QuantizeConfig(bins=CONFIG.bins, selection=CONFIG.selection, store="packed")
    info = quantize(Sixty(), config, encoder=features, cache_dir=tmp_path / "cache", progress=False)
    for _ in range(2):  # an earlier export is replaced
        export_set(info.path, "fiftyone", str(tmp_path / "out"))
    _, samples = imported(tmp_path / "out")
    assert len(samples) == info.num_samples
    for sample in samples:
        assert np.array_equal(np.asarray(Image.open(sample["filepath"])), Sixty().data[sample["index"]])
        assert sample["kept"]
        assert 0 <= sample["bin"] < 3


def test_samples_with_several_labels(tmp_path, features):
    members = np.random.default_rng(1).random((60, 3)) < 0.4
    info = quantize(Sixty(), CONFIG, encoder=features, labels=members, cache_dir=tmp_path / "cache", progress=False)
    export_set(info.path, "fiftyone", str(tmp_path / "out"), dataset=Sixty(), labels=members)
    facts, samples = imported(tmp_path / "out")
    assert facts["classes"] == ["0", "1", "2"]
    for sample, row in zip(samples, members, strict=True):
        truth = sample["ground_truth"]
        assert truth["_cls"] == "Classifications"
        assert [one["label"] for one in truth["classifications"]] == [str(c) for c in np.flatnonzero(row)]


def test_the_command_opens_the_dataset_that_was_recorded(tmp_path, monkeypatch, capsys):
    for number in range(18):
        place = tmp_path / "photos" / "abc"[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 7, 3), 13 * number, np.uint8)).save(place / f"{number:02}.png")
    np.save(tmp_path / "features.npy", np.random.default_rng(0).normal(size=(18, 4)).astype(np.float32))
    monkeypatch.setenv("DQ_LIGHTNING_CACHE", str(tmp_path / "cache"))
    made = ["--data_path", tmp_path / "photos", "--encoder", tmp_path / "features.npy", "--num_bins", "2"]
    main(
        list(map(str, ["quantize", *made, "--keep_ratio", "0.5", "--output", tmp_path / "out", "--progress", "false"]))
    )
    main(["export", str(tmp_path / "out"), "fiftyone", str(tmp_path / "view")])
    _, samples = imported(tmp_path / "view")
    # files stay where they are, and the bins are found for the copy in out/compact
    assert [sample["filepath"] for sample in samples] == [path for path, _ in ImageFolder(tmp_path / "photos").samples]
    assert not list((tmp_path / "view" / "data").iterdir())
    assert sorted(sample["rank"] for sample in samples if sample["bin"] == 0) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert sum(sample["kept"] for sample in samples) == 9
    main(["export", str(tmp_path / "out" / "compact"), "imagefolder", str(tmp_path / "images")])
    assert len(ImageFolder(tmp_path / "images")) == 9
    capsys.readouterr()
    (tmp_path / "photos").rename(tmp_path / "moved")
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path / "out"), "imagefolder", str(tmp_path / "again")])
    assert ended.value.code == 1
    assert "pass --dataset" in capsys.readouterr().err
