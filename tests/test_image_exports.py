"""Compact sets of images in every format: whatever reads them sees the selected images with their labels."""

import csv
import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, load_dataset, load_from_disk
from huggingface_hub import DatasetCard, HfApi
from PIL import Image
from torchvision.datasets import ImageFolder

from dq_lightning import BinConfig, PatchConfig, QuantizeConfig, SelectionConfig, load_selection, quantize
from dq_lightning.core.errors import StoreError
from dq_lightning.core.records import Selection
from dq_lightning.demo.sample_data import SampleCIFAR10
from dq_lightning.exports.command import export_set
from dq_lightning.exports.fiftyone import write_fiftyone
from dq_lightning.exports.hub import push_images, write_repository
from dq_lightning.exports.images import folder_names, write_image_folder, write_parquet
from dq_lightning.exports.samples import kept_of_source, kept_of_store
from dq_lightning.pipeline.compact import open_compact
from dq_lightning.selection.given import read_index
from dq_lightning.sources.adapt import as_source


class TwelveClasses(torch.utils.data.Dataset):
    """60 real images whose labels, 0 to 11, come in no order; names that do not sort like the labels."""

    def __init__(self) -> None:
        self.data = SampleCIFAR10().data[:60]
        self.targets = [(7 * i) % 12 for i in range(60)]
        self.classes = [f"kind {11 - label}" for label in range(12)]

    def __len__(self):
        return 60

    def __getitem__(self, index):
        return Image.fromarray(self.data[index]), self.targets[index]


@pytest.fixture
def selection():
    index = torch.tensor([1, 2, 3, 5, 8, 10, 11, 13, 21, 34, 35, 36, 40, 41, 42, 43, 55, 59])
    return Selection(index, (torch.arange(len(index)) % 4).short())


@pytest.fixture
def images(selection):
    return kept_of_source(as_source(TwelveClasses()), selection, "twelve")


def assert_same(found, selection):
    """Triples (pixels, label, position) are the selected images with their labels, each once."""
    source, seen = TwelveClasses(), []
    for pixels, label, position in found:
        assert np.array_equal(pixels, source.data[position])
        assert label == source.targets[position]
        seen.append(position)
    assert sorted(seen) == selection.index.tolist()


def test_image_folder_gives_the_selected_images(tmp_path, images, selection):
    write_image_folder(images, tmp_path / "out")
    folder = ImageFolder(tmp_path / "out")
    positions = np.load(tmp_path / "out" / "index.npy")
    assert_same(((np.asarray(x), y, p) for (x, y), p in zip(folder, positions, strict=True)), selection)
    with (tmp_path / "out" / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [str(tmp_path / "out" / row["file_name"]) for row in rows] == [path for path, _ in folder.samples]
    by_position = dict(zip(selection.index.tolist(), selection.bin.tolist(), strict=True))
    assert all(by_position[int(row["index"])] == int(row["bin"]) for row in rows)
    # inside a class the names sort in the source's order
    assert all(
        a < b for a, b, same in zip(positions, positions[1:], np.diff(folder.targets) == 0, strict=False) if same
    )


def test_the_published_naming_would_fail(tmp_path, images):
    """LABEL/NUMBER.png, read by `ImageFolder`, with indices of the original order: other images, other labels."""
    source = TwelveClasses()
    for position in range(60):
        place = tmp_path / str(source.targets[position])
        place.mkdir(exist_ok=True)
        source[position][0].save(place / f"{position}.png")
    folder = ImageFolder(tmp_path)
    wrong = [
        position
        for position in range(60)
        if not np.array_equal(np.asarray(folder[position][0]), source.data[position])
        or folder[position][1] != source.targets[position]
    ]
    assert len(wrong) > 50


def test_a_whole_folder_and_the_published_indices_fit_together(tmp_path, selection):
    """All images are exported; `index.npy` finds those of a selection whatever the order of the reader."""
    whole = Selection(torch.arange(60), torch.zeros(60, dtype=torch.int16))
    write_image_folder(kept_of_source(as_source(TwelveClasses()), whole), tmp_path / "out")
    folder, positions = ImageFolder(tmp_path / "out"), np.load(tmp_path / "out" / "index.npy")
    chosen = np.flatnonzero(np.isin(positions, selection.index.numpy()))
    assert_same(((np.asarray(folder[i][0]), folder[i][1], positions[i]) for i in chosen), selection)


def test_class_folders_sort_like_the_labels():
    assert folder_names(("ant", "bee", "cow")) == ["ant", "bee", "cow"]
    assert folder_names(tuple("bac")) == ["0", "1", "2"]
    assert folder_names(("a/b", "c")) == ["0", "1"]
    assert folder_names(tuple(f"{n}" for n in range(12)))[9:] == ["09", "10", "11"]
    assert folder_names(None) == ["unlabeled"]


def test_parquet_and_saved_dataset(tmp_path, images, selection):
    positions = write_parquet(images, tmp_path / "kept.parquet")
    for rows in (
        Dataset.from_parquet(str(positions), cache_dir=str(tmp_path / "cache")),
        load_dataset("parquet", data_files=str(positions), split="train", cache_dir=str(tmp_path / "cache2")),
    ):
        assert rows.features["label"].names == TwelveClasses().classes
        assert_same(((np.asarray(row["image"]), row["label"], row["index"]) for row in rows), selection)
    from dq_lightning.exports.hub import write_image_dataset

    write_image_dataset(images, tmp_path / "saved")
    write_image_dataset(images, tmp_path / "saved")
    saved = load_from_disk(tmp_path / "saved")
    assert_same(((np.asarray(row["image"]), row["label"], row["index"]) for row in saved), selection)
    assert saved["bin"][:] == selection.bin.tolist()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub's end: a folder that takes the one upload."""
    calls = []

    def create(self, repository, **options):
        calls.append((repository, options))

    def upload(self, *, repo_id, folder_path, **options):
        calls.append((repo_id, options))
        shutil.copytree(folder_path, tmp_path / "uploaded")

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return calls


def test_push_to_hub_uploads_the_images(tmp_path, images, selection, hub, monkeypatch):
    monkeypatch.setattr("dq_lightning.exports.hub.SHARD_BYTES", 20_000)
    push_images(images, "somebody/kept")
    (created, how), (uploaded, _) = hub
    assert created == uploaded == "somebody/kept"
    assert how == {"repo_type": "dataset", "private": True, "exist_ok": True}
    assert len(list((tmp_path / "uploaded" / "data").iterdir())) > 1
    # the repository as the library opens it, by the configuration in its card
    rows = load_dataset(str(tmp_path / "uploaded"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.features["label"].names == TwelveClasses().classes
    assert_same(((np.asarray(row["image"]), row["label"], row["index"]) for row in rows), selection)


def test_the_card_says_what_was_kept_of_what_and_how(tmp_path, hub):
    path = make_set(tmp_path, bins=BinConfig(num_bins=5))
    settings = {"dataset": "hub:owner/photos", "split": "train", "data_path": "/home/me/photos", "bins": {"num_bins": 5},
                "features": {"encoder": "/home/me/nets/net.npy"}}  # fmt: skip
    export_set(
        path, "hub", "somebody/kept", dataset=TwelveClasses(), license="cc-by-4.0", private=False, settings=settings
    )
    assert hub[0][1]["private"] is False
    card = DatasetCard.load(tmp_path / "uploaded" / "README.md")
    assert (card.data.license, card.data.size_categories, card.data.source_datasets) == (
        "cc-by-4.0",
        "n<1K",
        ["owner/photos"],
    )
    assert card.data.task_categories == ["image-classification"]
    facts = dict(
        line.strip("| ").split(" | ")
        for line in card.text.split("\n")
        if line.startswith("| ") and line.count(" | ") == 1 and line[2] != " "
    )
    info = open_compact(Path(path)).info
    assert facts["Source"] == "TwelveClasses with 60 samples"
    assert (facts["Keep ratio"], facts["Bins"], facts["Content hash"]) == ("0.5", "5", info.content_hash)
    assert facts["Encoder"] == info.encoder
    table = [line.strip("| ").split(" | ") for line in card.text.split("\n") if line.startswith("| kind ")]
    kept = Counter(TwelveClasses().targets[i] for i in load_selection(path).index.tolist())
    assert table == [[f"kind {11 - c}", str(kept[c]), "5"] for c in range(12)]
    recipe = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert recipe == {
        "dataset": "hub:owner/photos",
        "split": "train",
        "bins": {"num_bins": 5},
        "features": {"encoder": "net.npy"},
    }
    assert "dq-lightning quantize --config settings.yaml --output results" in card.text
    assert "/home/me" not in card.text


class SomeUnlabeled(torch.utils.data.Dataset):
    targets, classes = [0, 1, -1, 0, 1, -1], ["a", "b"]

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.full((3, 8, 8), 9 * index, dtype=torch.uint8), self.targets[index]


@pytest.mark.parametrize("packed", [False, True])
def test_images_without_a_class(tmp_path, packed):
    if packed:
        config = QuantizeConfig(store="packed", selection=SelectionConfig(keep_ratio=1.0))
        info = quantize(SomeUnlabeled(), config, cache_dir=tmp_path / "cache")
        images = kept_of_store(info.path)
    else:
        images = kept_of_source(as_source(SomeUnlabeled()), Selection(torch.arange(6), torch.zeros(6).short()))
    made = write_repository(images, tmp_path / "files", "owner/name", {}, whole=[2, 2])
    (file,) = (made / "data").iterdir()
    data = Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "read"))
    assert (data["label"][:], data.features["label"].names) == (SomeUnlabeled.targets, ["a", "b"])
    assert "| a | 2 | 2 |\n| b | 2 | 2 |" in (made / "README.md").read_text()
    write_fiftyone(images, tmp_path / "view")
    samples = json.loads((tmp_path / "view" / "samples.json").read_text())["samples"]
    assert [one.get("ground_truth", {}).get("label") for one in samples] == ["a", "b", None] * 2
    with pytest.raises(StoreError, match="has no class"):
        write_image_folder(images, tmp_path / "folders")


def test_a_hub_that_cannot_be_reached_is_told(images):
    with pytest.raises(StoreError, match="could not be written"):
        push_images(images, "somebody/kept")


def test_webdataset_shards(tmp_path, images, selection):
    export = tmp_path / "out"
    from dq_lightning.exports.images import write_webdataset

    write_webdataset(images, export, shard_bytes=30_000)
    first = {path.name: path.read_bytes() for path in export.iterdir()}
    write_webdataset(images, export, shard_bytes=30_000)
    assert {path.name: path.read_bytes() for path in export.iterdir()} == first
    described = json.loads(first["shards.json"])
    assert len(described["shards"]) > 1
    assert sum(described["shards"].values()) == len(selection)
    found = []
    for shard in sorted(export.glob("*.tar")):
        with tarfile.open(shard) as file:
            parts = {member.name: file.extractfile(member).read() for member in file}
        for name in (name for name in parts if name.endswith(".png")):
            facts = json.loads(parts[name.replace(".png", ".json")])
            pixels = np.asarray(Image.open(io.BytesIO(parts[name])))
            found.append((pixels, int(parts[name.replace(".png", ".cls")]), facts["index"]))
    assert_same(found, selection)


def test_webdataset_itself_reads_the_shards(tmp_path, images, selection):
    webdataset = pytest.importorskip("webdataset")
    from dq_lightning.exports.images import write_webdataset

    write_webdataset(images, tmp_path / "out")
    shard = str(tmp_path / "out" / "twelve-000000.tar")
    rows = webdataset.WebDataset(shard, shardshuffle=False).decode("pil").to_tuple("png", "cls", "json")
    assert_same(((np.asarray(x), y, facts["index"]) for x, y, facts in rows), selection)


def test_litdata_reads_its_chunks(tmp_path, images, selection):
    litdata = pytest.importorskip("litdata")
    from dq_lightning.exports.images import write_litdata

    write_litdata(images, tmp_path / "out")
    rows = litdata.StreamingDataset(str(tmp_path / "out"))
    found = [rows[i] for i in range(len(rows))]
    assert_same(
        ((np.asarray(Image.open(io.BytesIO(row["image"]))), row["label"], row["index"]) for row in found), selection
    )


def test_litdata_missing_is_told(tmp_path, images, monkeypatch):
    import sys

    from dq_lightning.exports.images import write_litdata

    monkeypatch.setitem(sys.modules, "litdata.streaming.writer", None)
    with pytest.raises(StoreError, match="pip install"):
        write_litdata(images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_foreign_folders_are_left_alone(tmp_path, images):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(StoreError, match="was not written by this export"):
        write_image_folder(images, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_files_keep_their_bytes(tmp_path, shared_dir):
    root = shared_dir / "data" / "imagenette_224_small" / "val"
    source = as_source(ImageFolder(str(root)))
    chosen = Selection(torch.tensor([0, 100, 499]), torch.zeros(3, dtype=torch.int16))
    write_image_folder(kept_of_source(source, chosen), tmp_path / "out")
    exported = ImageFolder(tmp_path / "out", allow_empty=True)
    assert exported.classes == source.dataset.classes
    for (path, label), position in zip(exported.samples, chosen.index.tolist(), strict=True):
        original, expected = source.dataset.samples[position]
        assert Path(path).read_bytes() == Path(original).read_bytes()
        assert label == expected


def make_set(tmp_path, **settings):
    np.save(tmp_path / "ready.npy", np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32))
    config = QuantizeConfig(selection=SelectionConfig(keep_ratio=0.5), store="packed", **settings)
    features = np.load(tmp_path / "ready.npy")
    return quantize(TwelveClasses(), config, encoder=features, progress=False).path


def test_a_packed_set_is_exported_without_its_dataset(tmp_path):
    path = make_set(tmp_path)
    chosen = Selection(torch.from_numpy(np.sort([int(i) for i in kept_of_store(path).selection.index])), None)
    export_set(path, "imagefolder", str(tmp_path / "alone"))
    export_set(path, "imagefolder", str(tmp_path / "with"), dataset=TwelveClasses())
    for name in ("alone", "with"):
        folder, positions = ImageFolder(tmp_path / name), np.load(tmp_path / name / "index.npy")
        assert_same(((np.asarray(x), y, p) for (x, y), p in zip(folder, positions, strict=True)), chosen)
    export_set(path, "indices", str(tmp_path / "kept.npy"))
    assert np.array_equal(read_index(tmp_path / "kept.npy", 60), chosen.index)
    assert (tmp_path / "kept.ids.txt").read_text().split() == [str(i) for i in chosen.index.tolist()]


def test_given_labels_do_not_name_the_targets_of_the_samples(tmp_path):
    names = [f"name {(5 * label) % 12:02}" for _, label in TwelveClasses()]
    np.save(tmp_path / "ready.npy", np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32))
    config = QuantizeConfig(selection=SelectionConfig(keep_ratio=0.5), store="packed")
    features = np.load(tmp_path / "ready.npy")
    path = quantize(TwelveClasses(), config, encoder=features, labels=names, progress=False).path
    with pytest.raises(StoreError, match="made with labels= of your own"):
        export_set(path, "imagefolder", str(tmp_path / "alone"))
    export_set(path, "imagefolder", str(tmp_path / "with"), dataset=TwelveClasses(), labels=names)
    folder, positions = ImageFolder(tmp_path / "with"), np.load(tmp_path / "with" / "index.npy")
    assert [folder.classes[label] for _, label in folder.samples] == [names[position] for position in positions]


def test_classes_that_a_rule_made_of_boxes_are_no_targets(tmp_path):
    images = [image for image, _ in TwelveClasses()]
    boxes = {"boxes": torch.tensor([[1.0, 1.0, 9.0, 9.0]])}
    data = [(image, boxes | {"labels": torch.tensor([i % 3])}) for i, image in enumerate(images)]
    features = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    config = QuantizeConfig(selection=SelectionConfig(keep_ratio=0.5), store="packed")
    path = quantize(data, config, encoder=features, labels="dominant", progress=False).path
    export_set(path, "imagefolder", str(tmp_path / "alone"))
    assert len(list((tmp_path / "alone").rglob("*.png"))) == 30


def test_dropped_patches_are_filled_or_not(tmp_path):
    patches = PatchConfig(drop_ratio=0.25, saliency="variance")
    path = make_set(tmp_path, patches=patches)
    export_set(path, "imagefolder", str(tmp_path / "filled"), progress=False)
    export_set(path, "imagefolder", str(tmp_path / "mean"), fill=False)
    errors = {}
    for name in ("filled", "mean"):
        folder, positions = ImageFolder(tmp_path / name), np.load(tmp_path / name / "index.npy")
        pixels = np.stack([np.asarray(image) for image, _ in folder]).astype(float)
        originals = TwelveClasses().data[positions].astype(float)
        same = (pixels == originals).all(3).reshape(-1, 8, 4, 8, 4).all((2, 4)).sum((1, 2))
        assert (same >= 48).all()
        assert (same < 64).mean() > 0.9
        errors[name] = ((pixels - originals) ** 2).mean()
    assert errors["filled"] < errors["mean"]


def test_sets_and_datasets_that_do_not_belong_together(tmp_path):
    path = make_set(tmp_path)
    with pytest.raises(StoreError, match="was made from a dataset of 60 samples, but the given dataset has 2,000"):
        export_set(path, "imagefolder", str(tmp_path / "out"), dataset=SampleCIFAR10())
    np.save(tmp_path / "rows.npy", np.arange(3))
    with pytest.raises(StoreError, match="pass --dataset"):
        export_set(tmp_path / "rows.npy", "parquet", str(tmp_path / "out"))
    with pytest.raises(StoreError, match="holds images"):
        export_set(tmp_path / "rows.npy", "json", str(tmp_path / "out"), dataset=SampleCIFAR10())


def test_rows_of_text(tmp_path):
    rows = [{"instruction": f"{i}", "output": f"{i}!"} for i in range(9)]
    np.save(tmp_path / "rows.npy", np.array([7, 2]))
    export_set(tmp_path / "rows.npy", "json", str(tmp_path / "out.json"), dataset=rows)
    assert json.loads((tmp_path / "out.json").read_text()) == [rows[2], rows[7]]
    export_set(tmp_path / "rows.npy", "huggingface", str(tmp_path / "out"), dataset=rows)
    assert load_from_disk(tmp_path / "out").to_list() == [rows[2], rows[7]]
