"""Settings: validated when made, JSON both ways, short forms."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dq_lightning import (
    BinConfig,
    FeatureConfig,
    PatchConfig,
    QualityConfig,
    QuantizeConfig,
    QuantizedDataModule,
    SelectionConfig,
)
from dq_lightning.core.config import PRESETS, as_config, with_short_forms
from dq_lightning.core.errors import ConfigError

configs = st.builds(
    QuantizeConfig,
    features=st.builds(
        FeatureConfig,
        encoder=st.sampled_from(["auto", "resnet18"]),
        kind=st.sampled_from(["embedding", "gradient"]),
        batch_size=st.integers(1, 999),
        num_workers=st.one_of(st.just("auto"), st.integers(0, 8)),
    ),
    bins=st.builds(BinConfig, num_bins=st.integers(1, 32767), lam=st.floats(0, 10), by_label=st.booleans()),
    selection=st.builds(
        SelectionConfig,
        keep_ratio=st.floats(1e-6, 1),
        seed=st.integers(0, 2**40),
        bin_weights=st.one_of(st.none(), st.tuples(st.floats(0.1, 1), st.floats(0, 1))),
    ),
    store=st.sampled_from(["auto", "indices", "packed"]),
    label_column=st.one_of(st.none(), st.text()),
)


@given(configs)
def test_json_both_ways(config):
    assert QuantizeConfig.from_json(config.to_json()) == config
    assert QuantizeConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: SelectionConfig(keep_ratio=0), r"keep_ratio must be in \(0, 1\], got 0"),
        (lambda: SelectionConfig(keep_ratio=1.01), "keep_ratio"),
        (lambda: SelectionConfig(keep_ratio=float("nan")), "keep_ratio"),
        (lambda: SelectionConfig(seed=-1), "seed must be at least 0"),
        (lambda: SelectionConfig(draw="best"), "draw must be one of 'auto', 'seeded', 'scored', 'rank', got 'best'"),
        (lambda: BinConfig(num_bins=0), "num_bins must be between 1 and 32767"),
        (lambda: BinConfig(objective="cut"), "objective must be one of"),
        (lambda: FeatureConfig(kind="gradients"), "kind must be one of"),
        (lambda: FeatureConfig(batch_size=0), "batch_size must be at least 1"),
        (lambda: QuantizeConfig(store="zip"), "store must be one of"),
        (lambda: QuantizeConfig.from_dict({"binz": {}}), "QuantizeConfig has no field binz; its fields are features"),
        (lambda: QuantizeConfig.from_dict({"bins": {"k": 3}}), "BinConfig has no field k"),
    ],
)
def test_mistakes_are_named(make, told):
    with pytest.raises(ConfigError, match=told):
        make()


def test_short_forms():
    made = with_short_forms(None, {"selection.keep_ratio": 0.5, "store": "packed"})
    assert made == QuantizeConfig(selection=SelectionConfig(keep_ratio=0.5), store="packed")
    # None is a keyword that was not given; one with the default's value was
    given_there = QuantizeConfig(selection=SelectionConfig(keep_ratio=0.5))
    assert with_short_forms(given_there, {"selection.keep_ratio": None}) == given_there
    with pytest.raises(ConfigError, match=r"keep_ratio=0.125 was passed as a keyword"):
        with_short_forms(given_there, {"selection.keep_ratio": 0.125})
    assert with_short_forms(given_there, {"selection.keep_ratio": 0.5}) == given_there
    with pytest.raises(
        ConfigError, match=r"keep_ratio=0.25 was passed as a keyword, but config.selection.keep_ratio is 0.5"
    ):
        with_short_forms(given_there, {"selection.keep_ratio": 0.25})


def test_the_published_way_is_fixed_whatever_the_defaults_are():
    for made in (
        QuantizeConfig.from_dict({"preset": "published"}),
        QuantizedDataModule([(0, 0)] * 4, preset="published").config,
        with_short_forms({"selection": {"keep_ratio": 0.1}}, {"preset": "published"}),
    ):
        values = {path: getattr(getattr(made, path.split(".")[0]), path.split(".")[1]) for path in PRESETS["published"]}
        assert values == PRESETS["published"]
        assert QuantizeConfig.from_json(made.to_json()) == made
    for other in ({"bins": {"num_bins": 5}}, {"quality": {"drop_worst": 0.2}}, {"patches": {"drop_ratio": 0.2}}):
        with pytest.raises(ConfigError, match="leave one of the two out"):
            QuantizeConfig.from_dict({"preset": "published", **other})
        with pytest.raises(ConfigError, match="leave one of the two out"):
            with_short_forms(other, {"preset": "published"})
    with pytest.raises(ConfigError, match="or None"):
        QuantizeConfig(preset="paper")


def test_equal_numbers_are_the_same_setting():
    whole = QuantizeConfig(selection=SelectionConfig(keep_ratio=1, bin_weights=[1, 2]), bins=BinConfig(lam=1))
    parts = QuantizeConfig(selection=SelectionConfig(keep_ratio=1.0, bin_weights=(1.0, 2.0)), bins=BinConfig(lam=1.0))
    assert whole.to_json() == parts.to_json()
    numpys = SelectionConfig(keep_ratio=np.float32(0.5), seed=np.int64(3))
    assert numpys.to_json() == SelectionConfig(0.5, 3).to_json()


@pytest.mark.parametrize("value", ["0.5", True])
def test_a_ratio_that_is_no_number_is_told(value):
    with pytest.raises(ConfigError, match="keep_ratio must be a number"):
        SelectionConfig(keep_ratio=value)


def test_settings_as_a_dict_or_a_file(tmp_path):
    """Whatever says the settings, they are the same; a field that there is not is told by its name."""
    wanted = QuantizeConfig(bins=BinConfig(num_bins=7), selection=SelectionConfig(keep_ratio=0.5))
    short = {"bins": {"num_bins": 7}, "selection": {"keep_ratio": 0.5}}
    (tmp_path / "c.yaml").write_text("bins: {num_bins: 7}\nselection:\n  keep_ratio: 0.5\n")
    (tmp_path / "c.json").write_text(wanted.to_json())
    for same in (wanted, wanted.to_dict(), short, tmp_path / "c.yaml", str(tmp_path / "c.json")):
        assert as_config(same) == wanted
        assert QuantizedDataModule([(torch.zeros(3, 8, 8), 0)], config=same).config == wanted
    assert as_config(None) == QuantizeConfig()
    (tmp_path / "list.yaml").write_text("- 1\n")
    for bad, said in (
        (3, "got int"),
        ({"num_bins": 7}, "no field num_bins"),
        ({"bins": 7}, "QuantizeConfig.bins must be a mapping"),
        ({"bins": {"k": 7}}, "BinConfig has no field k"),
        (tmp_path / "none.yaml", "cannot be read"),
        (tmp_path / "list.yaml", "holds no settings but a list"),
    ):
        with pytest.raises(ConfigError, match=said):
            as_config(bad)


def test_a_keyword_with_the_value_of_the_default_is_given():
    """Another value in the config is an error, not silently what counts."""
    data = [(torch.zeros(3, 8, 8), 0)]
    for config, keyword in (
        (QuantizeConfig(selection=SelectionConfig(keep_ratio=0.5)), {"keep_ratio": 0.125}),
        (QuantizeConfig(selection=SelectionConfig(seed=3)), {"seed": 0}),
        (QuantizeConfig(bins=BinConfig(num_bins=5)), {"num_bins": 10}),
        (QuantizeConfig(patches=PatchConfig(drop_ratio=0.5)), {"drop_ratio": 0.0}),
        (QuantizeConfig(store="packed"), {"store": "auto"}),
        (QuantizeConfig(on_error="skip"), {"on_error": "raise"}),
        (QuantizeConfig(features=FeatureConfig(encoder="resnet18")), {"encoder": "auto"}),
    ):
        (name,) = keyword
        with pytest.raises(ConfigError, match=f"{name}=.* was passed as a keyword, but config"):
            QuantizedDataModule(data, config=config, **keyword)
        assert QuantizedDataModule(data, config=config).config == config


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"batch_size": -1}, {"eval_batch_size": 0}, {"batch_size": 2.5},
                                   {"batch_size": True}, {"num_workers": -1}, {"num_workers": "many"}])  # fmt: skip
def test_numbers_that_no_loader_takes(settings):
    with pytest.raises(ConfigError, match=f"{next(iter(settings))} must be a whole number"):
        QuantizedDataModule([(torch.zeros(3, 8, 8), 0)], **settings)


@pytest.mark.parametrize(
    ("kind", "value", "wanted"),
    [
        (BinConfig, {"num_bins": 2.0}, "a whole number, got 2.0"),
        (BinConfig, {"num_bins": True}, "a whole number, got True"),
        (BinConfig, {"lam": "1"}, "a number, got '1'"),
        (BinConfig, {"clusters": "4"}, "a whole number or None, got '4'"),
        (BinConfig, {"by_label": "false"}, "True or False, got 'false'"),
        (BinConfig, {"deduplicate": 95}, r"in \(0, 1\], got 95.0; 95 % is 0.95"),
        (FeatureConfig, {"whiten": "no"}, "True or False, got 'no'"),
        (FeatureConfig, {"num_workers": 1.5}, "'auto' or a whole number, got 1.5"),
    ],
)
def test_settings_of_another_type_are_refused(kind, value, wanted):
    """A string such as "false" counts as true otherwise."""
    with pytest.raises(ConfigError, match=f"{next(iter(value))} must be {wanted}"):
        kind(**value)
    assert BinConfig(by_label=np.False_, num_bins=np.int8(3), lam=1).to_dict()["num_bins"] == 3


@pytest.mark.parametrize(
    ("kind", "field", "value", "argument"),
    [
        (FeatureConfig, "encoder", np.zeros((4, 2)), "encoder"),
        (PatchConfig, "classifier", torch.nn.Linear(2, 2), "classifier"),
        (PatchConfig, "reconstructor", lambda images: images, "reconstructor"),
        (QualityConfig, "score", np.array([True, False]), "scores"),
        (QualityConfig, "score", [0.5, 1.0], "scores"),
    ],
)
def test_objects_in_place_of_strings_are_refused(kind, field, value, argument):
    with pytest.raises(ConfigError, match=rf"{kind.__name__}.{field} must be a string, got .*; pass it as {argument}="):
        kind(**{field: value})


def test_a_path_is_a_string():
    assert FeatureConfig(encoder=Path("features.npy")) == FeatureConfig(encoder=np.str_("features.npy"))
    assert type(FeatureConfig(encoder=np.str_("features.npy")).encoder) is str
    with pytest.raises(ConfigError, match=r"FeatureConfig\.weights must be a string or None, got 3$"):
        FeatureConfig(weights=3)
