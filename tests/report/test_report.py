"""The report on a compact set: what it says of images, text, sets without classes, and sets whose dataset is not at hand."""

import importlib.util
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dq_lightning import Bins, QuantizedDataModule, as_source, load_selection, make_bins, quantize
from dq_lightning.bins.duplicates import find_duplicates, near_pairs
from dq_lightning.cli import main
from dq_lightning.core.errors import ConfigError, StoreError
from dq_lightning.exports.results import place_beside
from dq_lightning.pipeline.duplicates import read_duplicates_of
from dq_lightning.pipeline.plan import (
    BINS,
    FEATURES,
    PATCHES,
    SELECTION,
    STORE,
    make_plan,
    parts_behind,
    station_parts,
)
from dq_lightning.pipeline.wanted import want
from dq_lightning.report.again import changed_settings
from dq_lightning.report.charts import curve_chart
from dq_lightning.report.gather import gain_by_bin, gain_curve, gather
from dq_lightning.report.make import report_of_set
from dq_lightning.report.material import collect, material_of_set
from dq_lightning.report.samples import PICTURE_BYTES, SPRITE_BYTES, as_address, as_sprite

EVIL = "<script>alert(1)</script>\"'&\u2028"
# elements without an end
EMPTY = {"meta", "link", "img", "circle", "rect", "polyline", "polygon", "br", "input"}


class Page(HTMLParser):
    """The elements of a page, its text by section, and a check that every element is closed where it should be."""

    def __init__(self, path):
        super().__init__()
        self.raw = path.read_bytes()
        self.elements, self.open, self.text, self.section = [], [], {}, "top"
        self.feed(self.raw.decode())
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs)["id"]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text[self.section] = self.text.get(self.section, "") + data + " "

    def images(self, section=None):
        return [attrs for tag, attrs in self.elements if tag == "img"]

    def points(self):
        found = re.search(rb'<script type="application/json" id="map-data">(.*?)</script>', self.raw, re.DOTALL)
        return json.loads(found[1])


def check_self_contained(page):
    """Nothing is asked of any network, and no script runs but the one of the page."""
    addresses = [
        value for _, attrs in page.elements for name, value in attrs.items() if name in ("src", "href", "data")
    ]
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(rb"url\((?!data:)|@import|fetch\(|XMLHttpRequest|//cdn", page.raw)
    policy = next(
        attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; img-src data:")
    assert "script-src 'sha256-" in policy
    assert sum(tag == "script" and attrs.get("type") is None for tag, attrs in page.elements) == 1
    assert all(attrs["alt"] for attrs in page.images())
    identifiers = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))


class Pictures(torch.utils.data.Dataset):
    """Small pictures in three classes, of which one has a name that would be a script; some are copies of others."""

    classes = ("cat", EVIL, "dog")

    def __init__(self, count=90):
        rng = np.random.default_rng(0)
        self.data = rng.integers(0, 256, (count, 16, 12, 3), dtype=np.uint8)
        self.targets = [number % 3 for number in range(count)]

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return Image.fromarray(self.data[index]), self.targets[index]


def features_of(dataset, seed=0):
    """Features that tell the classes apart; sample 5 looks like another class, and 87 is a copy of 84."""
    rows = np.random.default_rng(seed).normal(size=(len(dataset), 8)).astype(np.float32)
    rows[:, :3] += 6 * np.eye(3)[dataset.targets]
    rows[5, :3] = [9, 0, 0]
    rows[87] = rows[84]
    return rows


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """A data module with suspects and near-duplicates, set up."""
    dataset = Pictures()
    data = QuantizedDataModule(
        dataset,
        keep_ratio=0.3,
        num_bins=3,
        encoder=features_of(dataset),
        drop_worst=0.05,
        config={"bins": {"deduplicate": 0.9999}},
        batch_size=10,
        num_workers=0,
        cache_dir=tmp_path_factory.mktemp("cache"),
    )
    data.prepare_data()
    data.setup("fit")
    return data


def test_the_report_of_a_data_module_has_every_part(module, tmp_path):
    written = module.report(tmp_path / "page.html")
    assert written == tmp_path / "page.html"
    page = Page(written)
    check_self_contained(page)
    text = page.text
    assert "27" in text["top"]
    assert "samples kept of 90" in text["top"]
    assert module.info.content_hash in text["settings"]
    assert module.info.encoder in text["settings"]
    assert "3 instead of 9" in text["cost"]
    assert "batch size 10" in text["cost"]
    assert "assumed" not in text["cost"]
    assert "features" in text["cost"]  # its seconds
    assert f"{len(module.info.suspects)} samples were left out" in text["labels"]
    assert "dog" in text["labels"]
    assert "→ cat" in text["labels"]
    assert "1 samples whose cosine" in text["near-duplicates"]
    assert "drop_ratio" in text["patches"]
    assert "--bins.num_bins 3" in text["make-it-again"]
    assert all(f"Bin {number}" in text["bins"] for number in range(3))
    assert text["bins"].count("Left") == 3


def test_names_of_the_data_cannot_run_as_a_script(module, tmp_path):
    page = Page(module.report(tmp_path))
    assert EVIL.encode() not in page.raw
    assert b"<script>alert" not in page.raw
    assert EVIL in page.text["classes"]
    assert page.points()["classes"][1] == EVIL


def test_the_map_shows_every_sample_with_what_became_of_it(module, tmp_path):
    facts = Page(module.report(tmp_path)).points()["points"]
    assert sorted(point[0] for point in facts) == list(range(90))
    states = {point[0]: point[1] for point in facts}
    assert {position for position, state in states.items() if state == "kept"} == set(module.selection.index.tolist())
    assert {position for position, state in states.items() if state == "suspect"} == set(
        module.info.suspects.index.tolist()
    )
    assert [position for position, state in states.items() if state == "duplicate"] == [87]
    for point in facts:
        assert point[3] == point[0] % 3
        assert point[1] in ("suspect", "duplicate") or point[2] == int(module.bins.assignment[point[0]])


def test_near_duplicates_of_a_data_module(module):
    found = module.duplicates
    assert found.pairs.tolist() == [[87, 84]]
    assert found.cosine.tolist() == pytest.approx([1.0])
    assert repr(found) == "Duplicates(1 pair; closest: position 87 like 84, cosine 1.000)"


def test_the_report_of_a_folder_without_its_dataset_says_what_is_missing(module, tmp_path):
    page = Page(module.info.report(tmp_path))
    assert "dataset was not at hand" in page.text["classes"]
    assert "dataset was not at hand" in page.text["bins"]
    assert "pass it as dataset=" in page.text["near-duplicates"]
    assert not page.images()
    assert len(page.points()["points"]) == 90
    assert "What each pick added" in page.text["gain"]


def test_the_report_of_a_folder_with_its_dataset_is_that_of_the_data_module(module, tmp_path):
    whole = Page(module.report(tmp_path))
    again = Page(module.info.report(tmp_path, dataset=Pictures()))
    same = ("map", "bins", "classes", "labels", "near-duplicates", "gain", "patches", "settings")
    assert all(again.text[name] == whole.text[name] for name in same)
    assert again.images() == whole.images()
    assert "assumed" in again.text["cost"]
    with pytest.raises(StoreError, match="60"):
        module.info.report(tmp_path, dataset=Pictures(60))


def test_features_that_left_the_cache_leave_the_rest_of_the_report(tmp_path):
    dataset = Pictures()
    info = quantize(dataset, encoder=features_of(dataset), cache_dir=tmp_path / "cache")
    empty = info.report(tmp_path, dataset=dataset, cache_dir=tmp_path / "other")
    page = Page(empty)
    assert "are not in" in page.text["map"]
    assert "are not in" in page.text["gain"]
    # which samples were kept, and from which bin, is in the set
    assert "Bin 0" in page.text["bins"]
    assert page.images()
    check_self_contained(page)


def test_patches_are_shown_from_original_to_filled(tmp_path):
    dataset = Pictures(24)
    config = {"patches": {"drop_ratio": 0.25, "saliency": "variance", "patch_size": 4}}
    data = QuantizedDataModule(
        dataset,
        keep_ratio=0.5,
        config=config,
        encoder=features_of(Pictures(90))[:24],
        num_workers=0,
        cache_dir=tmp_path,
    )
    data.prepare_data()
    data.setup("fit")
    text = Page(data.report(tmp_path)).text["patches"]
    assert [text.count(word) for word in ("original", "saliency", "filled ")] == [6, 6, 7]
    assert "75% of the patches" in text
    # the filled images are in the cache of the data module; the report of a folder fills some anew
    assert Page(data.info.report(tmp_path, dataset=dataset)).text["patches"] == text
    alone = QuantizedDataModule.from_store(data.info.path, cache_dir=tmp_path / "other", num_workers=0)
    alone.prepare_data()
    alone.setup("fit")
    page = Page(alone.report(tmp_path))
    assert "original images are not shown" in page.text["patches"]
    assert "saliency is not shown" in page.text["patches"]
    assert "Kept" in page.text["bins"]
    assert "Left" not in page.text["bins"]
    # classes of the kept samples are in the set, those of the others are not
    assert "before" not in page.text["classes"]


def test_rows_of_text_are_shown_as_text(tmp_path):
    rows = [{"instruction": f"Question {i} {EVIL}", "input": "", "output": f"answer {i}"} for i in range(40)]
    features = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    info = quantize(rows, encoder=features, cache_dir=tmp_path / "cache")
    page = Page(info.report(tmp_path, dataset=rows))
    check_self_contained(page)
    assert f"Question 1 {EVIL.split(chr(0x2028))[0]}" in page.text["bins"]
    assert not page.images()
    assert "no classes" in page.text["classes"]
    assert any("Question" in point[-1] for point in page.points()["points"])


def test_three_samples_without_features_or_bins(tmp_path):
    dataset = Pictures(3)
    page = Page(quantize(dataset, indices=[2, 0], cache_dir=tmp_path).report(tmp_path, dataset=dataset))
    assert "positions that were given" in page.text["top"]
    assert "no features behind" in page.text["map"]
    assert len(page.images()) == 3
    assert "--indices" in page.text["make-it-again"]


def test_a_large_set_stays_small_and_says_that_it_is_sampled(tmp_path):
    total = 2_500
    features = np.random.default_rng(0).normal(size=(total, 4)).astype(np.float32)
    labels = np.arange(total) % 45
    dataset = [{"text": "x" * 1000}] * total
    config = {"bins": {"num_bins": 30}, "selection": {"keep_ratio": 0.1}}
    info = quantize(dataset, config, encoder=features, labels=labels, cache_dir=tmp_path / "cache")
    page = Page(report_of_set(info.path, tmp_path, dataset=dataset, labels=labels))
    assert len(page.raw) < 2_500_000
    assert "2,000 of 2,500 samples" in page.text["map"]
    assert "of the 30 bins are shown" in page.text["bins"]
    assert "Table of 45 classes" in page.text["classes"]


def test_a_folder_does_not_decide_what_is_imported(tmp_path):
    (tmp_path / "config.yaml").write_text(f"dataset: package.module.Class\ndata_path: {tmp_path}\n")
    assert place_beside(tmp_path) == {}
    (tmp_path / "config.yaml").write_text(f"dataset: CIFAR10\ndata_path: {tmp_path}\n")
    assert place_beside(tmp_path) == {"dataset": "CIFAR10", "data_path": str(tmp_path)}


@pytest.mark.skipif(importlib.util.find_spec("umap") is not None, reason="umap-learn is there")
def test_a_missing_package_is_named(module, tmp_path):
    with pytest.raises(ConfigError, match="umap-learn"):
        module.report(tmp_path, projection="umap")


def test_settings_that_are_not_the_defaults():
    assert changed_settings({"bins": {"num_bins": 10, "lam": 0.5}, "selection": {"keep_ratio": 0.125}}) == {
        "bins.lam": 0.5,
        "selection.keep_ratio": 0.125,
    }


def test_the_parts_behind_a_store_are_those_that_it_was_made_with(tmp_path):
    settings = [
        {},
        {"quality": {"drop_worst": 0.1}, "bins": {"deduplicate": 0.9, "num_bins": 4}, "on_error": "skip"},
        {"features": {"whiten": True}, "bins": {"by_label": False, "clusters": 2}, "selection": {"balance": "equal"}},
        {"patches": {"drop_ratio": 0.5, "saliency": "random"}, "store": "packed"},
        {"max_bytes": "50%"},
        {"selection": {"draw": "scored"}},
        {"features": {"encoder": "bundled", "selection_epochs": 1}},
        {"features": {"encoder": "bundled", "kind": "gradient"}},
    ]
    dataset = Pictures(30)
    for config in settings:
        encoder = None if "encoder" in config.get("features", {}) else features_of(Pictures(90))[:30]
        plan = make_plan(dataset, want(config, encoder=encoder))
        identities = dict.fromkeys(("encoder", "classifier", "reconstructor"), "a digest")
        parts = station_parts(plan, "the data", identities)
        behind = parts_behind(parts[STORE])
        for station in (FEATURES, BINS, STORE, *({SELECTION, PATCHES} & set(parts))):
            assert behind[station] == parts[station], (config, station)


def test_labels_of_samples_with_several_are_counted_one_by_one(tmp_path):
    rows = np.random.default_rng(1).random((60, 4)) < 0.4
    dataset = [{"text": f"row {number}"} for number in range(60)]
    features = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    info = quantize(dataset, {"bins": {"deduplicate": 0.8}}, encoder=features, labels=rows, cache_dir=tmp_path)
    made = gather(collect(*material_of_set(Path(info.path), None), as_source(dataset, labels=rows)))
    kept = load_selection(info.path).index.numpy()
    assert [(one.before, one.after) for one in made.classes.rows[:4]] == list(
        zip(rows.sum(0).tolist(), rows[kept].sum(0).tolist(), strict=True)
    )
    assert "several" in made.classes.note
    # the near-duplicates are those that a search inside each group leaves out
    groups = as_source(dataset, labels=rows).labels().values
    of = find_duplicates(features, 0.8, labels=groups)
    pairs, cosine = near_pairs(features, of)
    found = read_duplicates_of(*material_of_set(Path(info.path), None), as_source(dataset, labels=rows).labels())
    assert len(pairs) > 5
    assert torch.equal(found.pairs, pairs)
    assert torch.equal(found.cosine, cosine)


def test_the_command_finds_the_dataset_that_quantize_named(tmp_path, capsys):
    rows = [{"instruction": f"question {number}", "output": f"answer {number}"} for number in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    np.save(tmp_path / "ready.npy", np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32))
    cache = ["--cache_dir", str(tmp_path / "cache")]
    given = ["--data_path", str(tmp_path / "rows.json"), "--encoder", str(tmp_path / "ready.npy")]
    options = ["--num_bins", "3", "--seed", "5", "--max_bytes", "7kB"]
    main(["quantize", *given, *cache, *options, "--output", str(tmp_path / "out")])
    main(["report", str(tmp_path / "out"), *cache, "--output", str(tmp_path)])
    page = Page(tmp_path / "report.html")
    assert f"wrote the report ({len(page.raw):,} bytes)" in capsys.readouterr().out
    assert "Seconds: bins" in page.text["cost"]
    assert "question 1" in page.text["bins"]
    # the command that the page names makes the same set
    command = re.search(r"dq-lightning quantize.*?(?=In Python)", page.text["make-it-again"], re.DOTALL)[0]
    main([*shlex.split(command.replace("\\\n", ""))[1:], *cache, "--output", str(tmp_path / "again")])
    hashes = [json.loads((tmp_path / name / "info.json").read_text())["content_hash"] for name in ("out", "again")]
    assert hashes[0] == hashes[1]
    assert hashes[0] in page.text["make-it-again"]
    code = re.search(r"from dq_lightning.*\n\)", page.text["make-it-again"], re.DOTALL)[0]
    scope = {"dataset": rows}
    exec(code, scope)
    assert scope["dm"].config.bins.num_bins == 3
    assert scope["dm"].config.max_bytes == "7kB"
    (tmp_path / "rows.json").unlink()
    main(["report", str(tmp_path / "out"), *cache, "--output", str(tmp_path)])
    assert "not at hand" in Page(tmp_path / "report.html").text["bins"]


def test_suspects_that_are_kept_after_all_do_not_hide_the_bins(tmp_path):
    dataset = Pictures()
    features = features_of(dataset)
    dataset.targets[:24] = [(target + 1) % 3 for target in dataset.targets[:24]]
    data = QuantizedDataModule(
        dataset, keep_ratio=0.999, drop_worst="auto", encoder=features, num_workers=0, cache_dir=tmp_path
    )
    data.prepare_data()
    data.setup("fit")
    assert len(data.info.suspects) > 0
    page = Page(data.report(tmp_path))
    assert {point[1] for point in page.points()["points"]} == {"kept"}
    assert "What each pick added" in page.text["gain"]


def test_gain_curve_is_the_mean_over_groups():
    random = np.random.default_rng(3)
    blob = random.permutation(np.repeat(np.arange(5), 40))
    bins = make_bins(np.eye(5)[blob] * 10 + 0.1 * random.standard_normal((200, 5)), num_bins=3, labels=blob)
    curve = gain_curve(bins)
    assert curve.shape == (3, 14)
    for number, rank in [(0, 0), (1, 5), (2, 12)]:
        chosen = (bins.assignment == number) & (bins.rank == rank)
        assert float(curve[number, rank]) == pytest.approx(float(bins.gain[chosen].double().mean()))
    # 40 samples in 3 bins: 14, 13, 13
    assert torch.isnan(curve[2, 13])
    assert bool((curve[0].diff() < 0).all())


def test_pictures_and_curves_have_a_bounded_size():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8))
    assert len(as_address(noise)) < 1.4 * PICTURE_BYTES
    many = [noise.resize((48, 48), Image.Resampling.NEAREST)] * 500
    assert len(as_sprite(many, 48, 50)) < 1.4 * SPRITE_BYTES
    number = torch.arange(6000)
    bins = Bins(number.short() % 3000, (number // 3000).int(), torch.rand(6000), torch.zeros(6000, dtype=torch.int32))
    curve = gain_by_bin(bins)
    assert sum(map(bool, curve.points)) == 200
    assert len(curve_chart(curve)) < 60_000
