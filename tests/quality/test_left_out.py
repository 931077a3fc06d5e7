"""Samples of low scores are left out of the set: found, told, stored and listed."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dq_lightning import (
    QualityConfig,
    QuantizeConfig,
    QuantizedDataModule,
    SelectionConfig,
    load_selection,
    make_bins,
    margin_scores,
    quantize,
    select,
)
from dq_lightning.cli import main
from dq_lightning.core.errors import ConfigError, SourceError
from dq_lightning.core.records import Features, Labels
from dq_lightning.exports.results import write_suspects
from dq_lightning.pipeline import suspects
from tests.quality.test_margin import clusters
from tests.quality.test_mislabelled import changed

FEATURES, TRUE = clusters(400, 8, 4, spread=2.0)
GIVEN = changed(TRUE, 0.2, 4)
WRONG = GIVEN != TRUE


class Pictures(torch.utils.data.Dataset):
    targets = GIVEN.tolist()

    def __len__(self):
        return 400

    def __getitem__(self, index):
        return torch.full((3, 8, 8), index % 256, dtype=torch.uint8), self.targets[index]


@pytest.fixture
def config(tmp_path):
    np.save(tmp_path / "features.npy", FEATURES.astype(np.float32))
    return QuantizeConfig.from_dict(
        {"features": {"encoder": str(tmp_path / "features.npy")}, "selection": {"keep_ratio": 0.25}}
    )


def test_wrong_labels_are_left_out_and_listed_with_the_set(tmp_path, config, caplog):
    caplog.set_level("INFO", "dq_lightning")
    info = quantize(Pictures(), config, drop_worst="auto", cache_dir=tmp_path / "cache")
    suspects = info.suspects
    assert "labels seem wrong" in caplog.text
    assert info.num_samples == 100
    assert WRONG[suspects.index].mean() > 0.8
    assert WRONG[load_selection(info.path).index].mean() < 0.05
    assert torch.equal(suspects.score, suspects.score.sort().values)
    assert np.array_equal(suspects.label, GIVEN[suspects.index])
    assert (suspects.suggested.numpy() == TRUE[suspects.index]).mean() > 0.9
    again = quantize(Pictures(), config, drop_worst="auto", cache_dir=tmp_path / "cache")
    assert again.reused
    assert torch.equal(again.suspects.index, suspects.index)
    assert again.to_dict()["suspects"] == len(suspects)
    rows = list(csv.DictReader(write_suspects(suspects, tmp_path / "s.csv").open()))
    assert [int(row["position"]) for row in rows] == suspects.index.tolist()
    assert [int(row["suggested"]) for row in rows] == suspects.suggested.tolist()


def test_too_many_wanted_take_the_best_suspects_too(tmp_path, config, caplog):
    large = QuantizeConfig(config.features, selection=SelectionConfig(keep_ratio=0.95))
    some = quantize(Pictures(), config, drop_worst="auto", cache_dir=tmp_path)
    most = QuantizedDataModule(Pictures(), config=large, drop_worst="auto", cache_dir=tmp_path)
    most.prepare_data()
    most.setup()
    assert len(most.selection) == 380
    assert "suspects with the highest scores may be kept too" in caplog.text
    left_out = set(range(400)) - set(most.selection.index.tolist())
    assert left_out == set(some.suspects.index[:20].tolist())


def test_own_scores_leave_out_the_lowest_of_each_class(tmp_path, config):
    scores = np.random.default_rng(0).normal(size=400)
    info = quantize(Pictures(), config, scores=scores, drop_worst=0.5, cache_dir=tmp_path)
    for label in range(4):
        members = np.flatnonzero(label == GIVEN)
        lowest = members[np.argsort(scores[members])[: int(len(members) * 0.5 + 0.5)]]
        assert set(info.suspects.index[info.suspects.label == label].tolist()) == set(lowest.tolist())
    np.save(tmp_path / "scores.npy", scores)
    same = quantize(Pictures(), config, scores=str(tmp_path / "scores.npy"), drop_worst=0.5, cache_dir=tmp_path)
    assert same.reused
    other = quantize(Pictures(), config, scores=-scores, drop_worst=0.5, cache_dir=tmp_path)
    assert not other.reused


def test_rows_of_text_are_scored_by_a_column(tmp_path, config, caplog):
    rows = [{"text": f"row {number}", "worth": number / 400, "kind": number % 2} for number in range(400)]
    options = {"config": config, "cache_dir": tmp_path, "drop_worst": 0.25}
    info = quantize(rows, scores="worth", **options)
    assert info.suspects.index.tolist() == list(range(100))
    with pytest.raises(SourceError, match="no column 'nothing'"):
        quantize(rows, scores="nothing", **options)
    with pytest.raises(ConfigError, match="has fewer than two classes"):
        quantize(rows, **options)
    assert quantize(rows, config=config, cache_dir=tmp_path, drop_worst="auto").suspects is None
    assert quantize(rows, scores="worth", config=config, cache_dir=tmp_path).suspects is None
    assert "drop_worst= is 0" in caplog.text


class Records(torch.utils.data.Dataset):
    """Dicts of samples that are no images, one of which cannot be read."""

    def __init__(self, broken=()):
        self.broken = broken

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index in self.broken:
            raise ValueError("broken")
        return {"wave": torch.full((5,), float(index)), "worth": torch.tensor(index / 40), "label": index % 2}


def test_a_column_may_be_a_key_of_dicts_and_a_missing_one_is_an_error_before_the_features(tmp_path):
    def features(item):
        raise AssertionError("features were made")

    options = {"cache_dir": tmp_path, "drop_worst": 0.25}
    for samples in (Records(), torch.utils.data.ConcatDataset([Records(), Records()])):
        with pytest.raises(
            SourceError, match=r"no column 'value' for scores=: its columns are 'wave', 'worth', 'label'"
        ):
            quantize(samples, encoder=features, scores="value", **options)
    parts = torch.utils.data.ConcatDataset([Records(), torch.utils.data.Subset(Records(broken=[0]), [5, 3, 39, 0])])
    config = {"on_error": "skip", "bins": {"by_label": False}, "selection": {"keep_ratio": 0.5}}
    info = quantize(parts, config, encoder=lambda item: item["wave"], scores="worth", labels=False, **options)
    assert info.num_unreadable == 1
    assert info.suspects.index.tolist() == [0, 1, 2, 3, 41, 4, 5, 40, 6, 7, 8]
    with pytest.raises(
        SourceError, match=r"the column 'wave' holds tensor.* at sample 0, but scores= are finite numbers"
    ):
        quantize(Records(), encoder=lambda item: item["wave"], scores="wave", **options)


def test_suspects_are_looked_for_where_all_samples_are_kept_and_who_judges_none_is_told(tmp_path, config, caplog):
    every = QuantizeConfig(config.features, selection=SelectionConfig(keep_ratio=1.0))
    info = quantize(Pictures(), every, drop_worst="auto", cache_dir=tmp_path)
    assert info.num_samples == 400
    assert len(info.suspects) > 50
    assert "suspects with the highest scores may be kept too" in caplog.text
    caplog.clear()
    assert quantize(Pictures(), config, drop_worst="auto", labels=False, cache_dir=tmp_path).suspects is None
    assert "no label is judged" in caplog.text
    quantize(Pictures(), config, labels=False, cache_dir=tmp_path)
    assert "has no effect" not in caplog.text
    balanced = QuantizeConfig(config.features, selection=SelectionConfig(keep_ratio=0.25, balance="equal"))
    quantize(Pictures(), balanced, labels=False, cache_dir=tmp_path)
    assert "balance='equal' has no effect" in caplog.text
    assert quantize(Pictures(), config, drop_worst=0.2, scores="none", cache_dir=tmp_path).suspects is None
    assert "drop_worst= has no effect" in caplog.text


def test_what_contradicts_itself_is_refused(tmp_path, config):
    with pytest.raises(ConfigError, match=r"drop_worst=0\.8 leaves 0\.2"):
        quantize(Pictures(), config, drop_worst=0.8, cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="one number a sample"):
        quantize(Pictures(), config, scores=np.zeros(3), drop_worst=0.1, cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="must be finite numbers, but 1 of them"):
        quantize(Pictures(), config, scores=[float("nan"), *range(399)], drop_worst=0.1, cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="pass the share"):
        quantize(Pictures(), config, scores=np.zeros(400), drop_worst="auto", cache_dir=tmp_path)
    for wrong in ({"drop_worst": 1.0}, {"drop_worst": "some"}, {"score": "worth", "drop_worst": "auto"}):
        with pytest.raises(ConfigError):
            QualityConfig(**wrong)


def test_the_command_lists_suspects(tmp_path, config, capsys):
    images = tmp_path / "photos"
    from PIL import Image

    for number in range(40):
        folder = images / ("dark" if number % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number,) * 3).save(folder / f"{number:02}.png")
    # Class folders are read by name: all dark ones come first.
    features = np.concatenate([np.full(20, 0.0), np.full(20, 5.0)])[:, None] + np.linspace(0, 1, 40)[:, None]
    features[3] = 5.5
    np.save(tmp_path / "two.npy", features.astype(np.float32))
    options = ["--data_path", str(images), "--encoder", str(tmp_path / "two.npy"), "--cache_dir", str(tmp_path / "c")]
    main(["suspects", "ImageFolder", *options, "--drop_worst", "0.05", "--output", str(tmp_path / "out.csv")])
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert "2 of 40 samples" in capsys.readouterr().out
    assert (rows[0]["position"], rows[0]["label"], rows[0]["suggested"]) == ("3", "dark", "light")
    assert rows[0]["name"] == "dark/07.png"
    main(
        [
            "quantize",
            "--data_path",
            str(images),
            *options[2:],
            "--drop_worst",
            "0.05",
            "--output",
            str(tmp_path / "out"),
        ]
    )
    assert list(csv.DictReader((tmp_path / "out" / "suspects.csv").open())) == rows


def test_labels_of_tiny_classes_are_not_judged(tmp_path, config, caplog):
    caplog.set_level("INFO", "dq_lightning")
    each_its_own = (np.arange(400) // 2).tolist()
    assert quantize(Pictures(), config, labels=each_its_own, drop_worst="auto", cache_dir=tmp_path).suspects is None
    assert "400 samples of 200 classes are fewer than 5 a class" in caplog.text


def test_wide_features_are_judged_only_where_it_is_asked(monkeypatch, tmp_path, config, caplog):
    caplog.set_level("INFO", "dq_lightning")
    monkeypatch.setattr(suspects, "MAX_WIDTH", FEATURES.shape[1] - 1)
    kept = {}
    for draw in ("auto", "seeded", "scored"):
        drawn = QuantizeConfig(config.features, selection=SelectionConfig(keep_ratio=0.1, draw=draw))
        kept[draw] = load_selection(quantize(Pictures(), drawn, cache_dir=tmp_path).path).index
    assert "the labels are not judged: features of" in caplog.text
    assert torch.equal(kept["auto"], kept["seeded"])
    assert not torch.equal(kept["auto"], kept["scored"])
    with pytest.raises(ConfigError, match='"none" allows none'):
        quantize(Pictures(), drawn, scores="none", cache_dir=tmp_path)


def test_names_of_classes_without_samples_do_not_count(tmp_path, config):
    names = tuple(f"class {number}" for number in range(1000))
    labels = Labels(torch.from_numpy(GIVEN), names)
    source = SimpleNamespace(modality="image", describe=lambda: "pictures")
    features = Features(torch.from_numpy(FEATURES))
    scored = suspects.score_samples(config, None, source, labels, features, device="cpu")
    assert len(scored.score) == 400


def test_classes_are_drawn_from_their_best_margins_unless_told_otherwise(tmp_path, config):
    def drawn(**options):
        module = QuantizedDataModule(Pictures(), config=config, cache_dir=tmp_path, **options)
        module.prepare_data()
        module.setup()
        return module.bins, module.selection.index

    bins, index = drawn()
    margins = margin_scores(FEATURES.astype(np.float32), GIVEN)
    assert torch.equal(bins.score, margins)
    assert torch.equal(index, select(bins, keep_ratio=0.25, draw="scored", scores=margins).index)
    assert WRONG[index].mean() < 0.75 * WRONG.mean()
    plain = make_bins(FEATURES, labels=torch.from_numpy(GIVEN))
    for options in ({"preset": "published"}, {"drop_worst": 0.0, "scores": "none"}):
        bins, index = drawn(**options)
        assert bins.score is None
        assert torch.equal(index, select(plain, keep_ratio=0.25).index)
    own = np.random.default_rng(5).normal(size=400)
    scored = QuantizeConfig(config.features, selection=SelectionConfig(keep_ratio=0.05, draw="scored"))
    info = quantize(Pictures(), scored, scores=own, cache_dir=tmp_path)
    assert torch.equal(load_selection(info.path).index, select(plain, keep_ratio=0.05, draw="scored", scores=own).index)
