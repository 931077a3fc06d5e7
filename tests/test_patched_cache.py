"""What is made again and what is reused when settings of patches change; budgets; classifiers and reconstructors."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn
from transformers import ViTMAEForPreTraining

from dq_lightning import PackedDataset, PatchConfig, QuantizeConfig, QuantizedDataModule, SelectionConfig, quantize
from dq_lightning.core.errors import ConfigError, PatchError
from dq_lightning.pipeline import extracting, filling, packing, scoring
from dq_lightning.pipeline.patch_plan import PatchPlan
from dq_lightning.pipeline.plan import FILLED, PATCHES, STORE, make_plan, station_parts
from dq_lightning.pipeline.wanted import Wanted
from tests.lightning_scripts.common import photos
from tests.lightning_scripts.patched_images import small_mae

COUNT = 60
WORK = {
    "features": (extracting, "extract_features"),
    "classifier": (PatchPlan, "load_scorer"),
    "saliency": (scoring, "score_selection"),
    "store": (packing, "packed_items"),
    "filling": (filling, "write_filled"),
    "reconstructor": (filling, "Filler"),
}


@pytest.fixture
def work(monkeypatch):
    """Names of what was done since the list was cleared."""
    done = []
    for name, (owner, attribute) in WORK.items():
        real = getattr(owner, attribute)

        def counted(*args, _name=name, _real=real, **settings):
            done.append(_name)
            return _real(*args, **settings)

        monkeypatch.setattr(owner, attribute, counted)
    return done


def config(drop_ratio=0.2, **patches):
    return QuantizeConfig(
        selection=SelectionConfig(keep_ratio=0.25), patches=PatchConfig(drop_ratio=drop_ratio, **patches)
    )


def made(cache_dir, wanted, data=None, **given):
    given = {"reconstructor": small_mae()} | given
    return quantize(data or photos(COUNT, None), wanted, cache_dir=cache_dir, progress=False, **given)


def masks(info):
    packed = PackedDataset(info.path, patches="packed")
    return [packed.patched(i).mask_tensor() for i in range(len(packed))]


def test_only_what_changed_is_made_again(tmp_path, work):
    def told(wanted, **given):
        work.clear()
        return made(tmp_path, wanted, **given), list(work)

    first, done = told(config())
    assert set(done) == set(WORK)
    assert told(config())[1] == []
    assert told(config(0.5))[1] == ["store", "filling", "reconstructor"]
    assert told(config(spread=True))[1] == ["store", "filling", "reconstructor"]
    same, done = told(config(), reconstructor=small_mae(1))
    assert done == ["filling", "reconstructor"]
    assert same.path == first.path
    for mode in ("batch", "off"):
        same, done = told(config(reconstruct=mode))
        assert (same.path, done) == (first.path, [])
    shutil.rmtree(tmp_path / FILLED)
    same, done = told(config())
    assert done == ["filling", "reconstructor"]
    assert same.path == first.path
    assert told(config(saliency="variance"))[1] == ["saliency", "classifier", "store", "filling", "reconstructor"]
    assert told(config(batch_size=3))[1] == []


def test_what_was_filled_is_rebuilt_alike(tmp_path):
    first = made(tmp_path, config())
    folders = list((tmp_path / FILLED).iterdir())
    before = [image.tobytes() for image, _ in PackedDataset(next(f for f in folders if f.is_dir()))]
    shutil.rmtree(tmp_path / FILLED)
    assert made(tmp_path, config()).path == first.path
    after = PackedDataset(next(f for f in (tmp_path / FILLED).iterdir() if f.is_dir()))
    assert [image.tobytes() for image, _ in after] == before


def parts(wanted, **given):
    given = {"reconstructor": small_mae()} | given
    plan = make_plan(photos(COUNT, None), Wanted(wanted, **given))
    return station_parts(plan, "the data", {"encoder": "e"} | {n: n for n in ("classifier", "reconstructor")})


def test_keys_hold_what_changes_the_result():
    base = parts(config(saliency="gradcam"))
    for change in (
        {"saliency": "gradcam++"},
        {"patch_size": 8},
        {"target": "argmax"},
        {"class_map": tuple(range(10))},
        {"target_layer": "layer"},
    ):
        other = parts(config(**change))
        assert other[PATCHES] != base[PATCHES], change
        assert other[STORE] != base[STORE], change
    for change in ({"drop_ratio": 0.3}, {"codec": "png"}, {"spread": True}, {"max_bytes": 100_000}):
        other = parts(config(**change))
        assert other[PATCHES] == base[PATCHES], change
        assert other[STORE] != base[STORE], change
    # what is not used changes nothing
    for change in ({"quality": 50}, {"least_ratio": 0.1}, {"seed": 5}, {"batch_size": 7}, {"reconstruct": "off"}):
        other = parts(config(**change))
        assert {name: other[name] for name in (PATCHES, STORE)} == {name: base[name] for name in (PATCHES, STORE)}
    assert parts(config(codec="jpeg", quality=50))[STORE] != parts(config(codec="jpeg"))[STORE]
    assert parts(config(saliency="random", seed=5))[PATCHES] != parts(config(saliency="random"))[PATCHES]


def test_contradictions_are_told(tmp_path):
    with pytest.raises(ConfigError, match=r'store="indices" stores row numbers'):
        made(tmp_path, QuantizeConfig(store="indices", patches=PatchConfig(drop_ratio=0.2)))
    with pytest.raises(ConfigError, match="drops patches of images, but these samples are text"):
        made(tmp_path, config(), data=[{"prompt": f"ask {i}", "completion": "tell"} for i in range(20)])
    assert QuantizedDataModule(photos(COUNT), drop_ratio=0.3).config.patches.drop_ratio == 0.3
    with pytest.raises(ConfigError, match="drop_ratio"):
        QuantizedDataModule(photos(COUNT), drop_ratio=0.3, config=config(0.4))


def test_a_budget_of_patches_keeps_the_total(tmp_path):
    even = masks(made(tmp_path, config(saliency="variance")))
    spread = masks(made(tmp_path, config(saliency="variance", spread=True, least_ratio=0.5)))
    assert [int(mask.sum()) for mask in even] == [51] * 15
    counts = [int(mask.sum()) for mask in spread]
    assert sum(counts) == 15 * 51
    assert min(counts) < 51 < max(counts)
    assert min(counts) >= 32


@pytest.mark.parametrize("codec", ["raw", "jpeg"])
def test_a_budget_of_bytes_holds(codec, tmp_path):
    plain = made(tmp_path, config(saliency="variance", codec=codec))
    size = stored_bytes(plain)
    budget = int(0.8 * size)
    info = made(tmp_path, config(saliency="variance", codec=codec, max_bytes=budget))
    assert 0.9 * budget < stored_bytes(info) <= budget
    counts = torch.tensor([int(mask.sum()) for mask in masks(info)])
    images = [np.asarray(photos(COUNT, None)[i][0], dtype=float) for i in PackedDataset(info.path).index.tolist()]
    cells = [image.reshape(8, 4, 8, 4, 3).transpose(0, 2, 1, 3, 4).reshape(64, 16, 3) for image in images]
    salience = torch.tensor([float(np.sort(cell.var(1).sum(1))[-51:].sum()) for cell in cells])
    order = salience.argsort()
    # images with little in their patches give up more
    assert counts[order[:5]].float().mean() < counts[order[-5:]].float().mean()
    assert int(counts.min()) >= 16
    with pytest.raises(PatchError, match=r"max_bytes=500 is too little.*Raise it"):
        made(tmp_path, config(saliency="variance", codec=codec, max_bytes=500))


def stored_bytes(info):
    packed = PackedDataset(info.path, patches="packed")
    return sum(len(p.data) + len(p.mask) for p in map(packed.patched, range(len(packed))))


class Small(nn.Module):
    """A classifier with a convolution and a linear head."""

    def __init__(self, seed=0, classes=10):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.fc = nn.Linear(8, classes)

    def forward(self, images):
        return self.fc(self.conv(images).relu().mean((2, 3)))


def prepared(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - 0.5


def test_without_a_classifier_none_is_chosen(tmp_path):
    seen = {}
    for saliency in ("random", "variance"):
        plan = make_plan(photos(COUNT, None), Wanted(config(saliency=saliency), reconstructor=small_mae()))
        assert plan.patches.classifier is None
        seen[saliency] = masks(made(tmp_path, config(saliency=saliency)))
    seen["seed 1"] = masks(made(tmp_path, config(saliency="random", seed=1)))
    assert [int(mask.sum()) for rows in seen.values() for mask in rows] == [51] * 45
    assert len({str([mask.tolist() for mask in rows]) for rows in seen.values()}) == 3


def test_classifiers_of_every_kind(tmp_path):
    own = Small().train()
    own.preprocess = prepared
    before = {name: value.clone() for name, value in own.state_dict().items()}
    seen = {
        "module": masks(made(tmp_path, config(), classifier=own)),
        "pair": masks(made(tmp_path / "pair", config(), classifier=(Small(), prepared))),
        "other weights": masks(made(tmp_path, config(), classifier=(Small(1), prepared))),
        "argmax": masks(made(tmp_path, config(target="argmax"), classifier=(Small(), prepared))),
        "turned": masks(made(tmp_path, config(class_map=tuple(range(9, -1, -1))), classifier=(Small(), prepared))),
        "bundled": masks(made(tmp_path, config(classifier="bundled"))),
        "auto, other classes": masks(made(tmp_path, config(target="auto"), classifier=(Small(0, 7), prepared))),
    }
    listed = {name: [mask.tolist() for mask in rows] for name, rows in seen.items()}
    assert listed["module"] == listed.pop("pair")
    assert len({str(rows) for rows in listed.values()}) == len(listed)
    assert own.training
    assert all(p.grad is None and p.requires_grad for p in own.parameters())
    assert all(torch.equal(before[name], value) for name, value in own.state_dict().items())
    with pytest.raises(PatchError, match=r'target="label" needs labels that the classifier knows: it has 7 outputs'):
        made(tmp_path, config(target="label"), classifier=(Small(0, 7), prepared))


def test_a_class_map_explains_the_named_outputs(tmp_path):
    """A head whose outputs are turned round, with the map that turns them back, explains the same."""
    turned = Small()
    with torch.no_grad():
        turned.fc.weight.copy_(turned.fc.weight.flip(0))
        turned.fc.bias.copy_(turned.fc.bias.flip(0))
    plain = masks(made(tmp_path, config(target="label"), classifier=(Small(), prepared)))
    back = config(target="label", class_map=tuple(range(9, -1, -1)))
    assert all(map(torch.equal, plain, masks(made(tmp_path, back, classifier=(turned, prepared)))))


def test_a_given_reconstructor_stays_as_it_was(tmp_path):
    model = small_mae().train()
    ratio = model.config.mask_ratio
    made(tmp_path, config(), reconstructor=model)
    assert isinstance(model, ViTMAEForPreTraining)
    assert model.training
    assert model.config.mask_ratio == ratio
    assert any(p.requires_grad for p in model.parameters())
