"""Whole runs: data that change meanwhile, ranks that are told, and processes that only waited."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from dq_lightning import BinConfig, FeatureConfig, QuantizeConfig, SelectionConfig, quantize
from dq_lightning.cache.digests import DigestMemory
from dq_lightning.cache.entries import Cache
from dq_lightning.core.errors import CacheError, ChangedError
from dq_lightning.loading.train_set import BuildOptions, DatasetTrainSet
from dq_lightning.pipeline import extracting
from dq_lightning.pipeline import quantize as pipeline
from dq_lightning.pipeline.wanted import Wanted
from tests.lightning_scripts.common import photos, to_tensor

COUNT = 40


class Mean(torch.nn.Module):
    def forward(self, images):
        return images.mean(dim=(2, 3))


def settings(**more):
    features = FeatureConfig(num_workers=0)
    return QuantizeConfig(features=features, bins=BinConfig(2), selection=SelectionConfig(keep_ratio=0.25), **more)


def write(folder, value):
    for index in range(COUNT):
        np.save(folder / f"{index:02}.npy", np.full((4, 4, 3), index + value, np.uint8))


class Listed(Dataset):
    """All is seen: the items are not read again."""

    def __init__(self, folder):
        self.paths = [str(folder / f"{index:02}.npy") for index in range(COUNT)]

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return Image.fromarray(np.load(self.paths[index])), index % 2


class Named(Listed):
    """The names of the files are made up."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __getitem__(self, index):
        return Image.fromarray(np.load(f"{self.folder}/{index:02}.npy")), index % 2


@pytest.mark.parametrize("kind", [Listed, Named])
@pytest.mark.parametrize("store", ["indices", "packed"])
def test_data_that_change_and_change_back_while_a_run_reads_them(kind, store, tmp_path, monkeypatch):
    monkeypatch.setattr("dq_lightning.identity.datasets._RACY_NANOSECONDS", 0)
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder, 0)
    data = kind(folder)

    def run(cache):
        return quantize(
            data, settings(store=store), encoder=(Mean(), to_tensor), cache_dir=tmp_path / cache, progress=False
        )

    run("known")  # the identity of the data is remembered, where it can be
    for path in (tmp_path / "known").glob("[1-6]-*"):
        path.rename(tmp_path / path.name)
    real = extracting.extract_features

    def disturbed(*args, **options):
        write(folder, 100)
        try:
            return real(*args, **options)
        finally:
            write(folder, 0)

    monkeypatch.setattr(extracting, "extract_features", disturbed)
    with pytest.raises(ChangedError, match="changed while it was read"):
        run("known")
    monkeypatch.setattr(extracting, "extract_features", real)
    assert run("known").content_hash == run("other").content_hash


def test_another_rank_gets_the_identity_and_reads_no_list_of_files(tmp_path, monkeypatch):
    for index in range(COUNT):
        place = tmp_path / "images" / str(index % 2)
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5), (index, 7, 0)).save(place / f"{index:02}.png")

    def train_set(folder):
        return DatasetTrainSet(ImageFolder(folder), Wanted(settings(), encoder=(Mean(), to_tensor)))

    cache = Cache(tmp_path / "cache")
    first, second = train_set(tmp_path / "images"), train_set(tmp_path / "images")
    prepared = first.prepare(cache, BuildOptions("cpu", progress=False))
    assert first.locate(cache, prepared) is prepared
    peer = prepared.peer_identity()
    looked = []
    real = DigestMemory.files
    monkeypatch.setattr(
        DigestMemory, "files", lambda self, paths, **how: looked.append(len(paths)) or real(self, paths, **how)
    )
    located = second.locate(cache, peer=peer)
    assert looked == []
    assert second.open(cache, located).compact.info.path == prepared.compact.info.path
    # without the identity, or where the items are others, it looks by itself
    train_set(tmp_path / "images").locate(cache)
    assert looked == [COUNT]
    Image.new("RGB", (6, 5), (200, 7, 0)).save(tmp_path / "images" / "0" / "00.png")
    with pytest.raises(CacheError, match="no compact set for these data and settings"):
        train_set(tmp_path / "images").locate(cache, peer=peer)
    assert looked == [COUNT, COUNT]


def test_a_process_that_only_waited_says_so(tmp_path, monkeypatch, caplog):
    def run():
        caplog.clear()
        with caplog.at_level("INFO", "dq_lightning"):
            return quantize(photos(40), settings(), encoder=(Mean(), to_tensor), cache_dir=tmp_path, progress=False)

    made = run()
    assert "computing the compact set" in caplog.text
    # the entry was not there yet when it was looked for
    monkeypatch.setattr(pipeline, "find_compact", lambda *args: None)
    waited = run()
    assert waited.reused
    assert waited.path == made.path
    assert "computing" not in caplog.text
    assert "which another process made while this one waited" in caplog.text


def test_the_cost_of_reading_again_is_told_once(tmp_path, caplog):
    write(tmp_path, 0)
    os.utime(tmp_path / "00.npy", (1, 1))
    for _ in range(2):
        caplog.clear()
        with caplog.at_level("INFO", "dq_lightning"):
            quantize(
                Named(tmp_path), settings(), encoder=(Mean(), to_tensor), cache_dir=tmp_path / "cache", progress=False
            )
        said = [text for text in caplog.messages if "fingerprint=" in text]
        assert len(said) == 1
        assert "passes load a name that it computes" in said[0]
