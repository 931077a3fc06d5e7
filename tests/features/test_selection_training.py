"""Training before features are made (selection epochs), on the bundled CIFAR-10 images."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset

from dq_lightning.core.config import BinConfig, FeatureConfig, QuantizeConfig
from dq_lightning.core.errors import ConfigError, FeatureError
from dq_lightning.core.records import Labels
from dq_lightning.demo.sample_data import SampleCIFAR10
from dq_lightning.features import selection_training
from dq_lightning.features.bundled import load_small_resnet
from dq_lightning.features.choose import choose_encoder
from dq_lightning.features.extract import extract_features
from dq_lightning.features.selection_training import with_selection_epochs
from dq_lightning.pipeline.plan import FEATURES, make_plan, station_parts
from dq_lightning.pipeline.quantize import quantize
from dq_lightning.pipeline.wanted import Wanted
from dq_lightning.sources.adapt import as_source
from tests.features.conftest import TinyNetwork, to_float_tensor

SIZE = (32, 32)
QUICK = {"num_workers": 0, "selection_batch_size": 32}


class Headless(nn.Module):
    """The bundled network's features and no head."""

    def __init__(self):
        super().__init__()
        self.body = load_small_resnet()[0]
        self.body.head = nn.Identity()

    def forward(self, x):
        return self.body((x - 0.47) / 0.25)


def few(count=200, train=True):
    """Images of all classes in turn."""
    dataset = SampleCIFAR10(train)
    by_class = np.argsort(np.array(dataset.targets), kind="stable").reshape(10, -1)
    return Subset(dataset, by_class.T.flatten()[:count].tolist())


def settings(**values):
    return FeatureConfig(**{"kind": "gradient", "selection_epochs": 2, **QUICK, **values})


def trained(module, values, source=None, labels=None):
    source = source or as_source(few())
    spec = choose_encoder((module, to_float_tensor), image_size=SIZE)
    return with_selection_epochs(spec, source, labels or source.labels(), values, progress=False)


def batch_of(count=8):
    return torch.stack([to_float_tensor(few()[i][0]) for i in range(count)])


def test_a_trained_head_classifies_images_it_has_not_seen():
    encoder = trained(Headless(), settings(selection_train="head", selection_epochs=10)).load("cpu")
    test = few(300, train=False)
    logits = encoder.logits(encoder.embed(torch.stack([to_float_tensor(image) for image, _ in test])))
    accuracy = (logits.argmax(1) == torch.tensor([label for _, label in test])).float().mean().item()
    # chance is 0.1
    assert accuracy > 0.7


def test_the_head_leaves_the_embedding_and_all_changes_it(tiny):
    batch = batch_of()
    plain = choose_encoder((tiny, to_float_tensor), image_size=SIZE).load("cpu").embed(batch)
    assert torch.equal(trained(tiny, settings(selection_train="head")).load("cpu").embed(batch), plain)
    assert (trained(tiny, settings()).load("cpu").embed(batch) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("part", ["head", "all"])
def test_twice_the_same_by_seed_and_the_given_network_untouched(tiny, part):
    tiny.train()
    before = copy.deepcopy(tiny.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = (trained(tiny, settings(selection_train=part)).load("cpu") for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    other = trained(tiny, settings(selection_train=part, selection_seed=1)).load("cpu")
    batch = batch_of()
    logits = [encoder.logits(encoder.embed(batch)) for encoder in (first, second, other)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    assert not logits[0].requires_grad
    assert tiny.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in tiny.parameters())
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())


def test_all_in_eval_mode_afterwards(tiny):
    encoder = trained(tiny, settings()).load("cpu")
    batch = batch_of()
    # batch statistics would depend on the others, dropout on chance
    torch.testing.assert_close(encoder.embed(batch)[:2], encoder.embed(batch[:2]))


def test_a_head_of_the_right_width_is_gone_on_from():
    module = load_small_resnet()[0]
    values = settings(selection_train="head", selection_epochs=1, selection_lr=1e-9)
    batch = (batch_of() - 0.47) / 0.25
    encoder = trained(module, values).load("cpu")
    with torch.no_grad():
        torch.testing.assert_close(encoder.logits(encoder.embed(batch)), module(batch), rtol=1e-4, atol=1e-4)


def test_gradient_kind_with_an_encoder_of_other_classes(tiny):
    source = as_source(few(60))
    plain = choose_encoder((tiny, to_float_tensor), image_size=SIZE)
    options = {"kind": "gradient", "labels": source.labels().values, "num_classes": 10, "device": "cpu"}
    options |= {"num_workers": 0, "progress": False}
    with pytest.raises(FeatureError, match="3 outputs"):
        extract_features(source, plain, **options)
    features = extract_features(source, trained(tiny, settings(selection_train="head"), source), **options)
    assert features.head_gradient.shape == (60, 10)
    assert features.head_gradient.abs().sum(1).min() > 0
    torch.testing.assert_close(features.head_gradient.sum(1), torch.zeros(60), rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [33, 65, 2])
def test_no_batch_of_one(tiny, count):
    # batch norm cannot train on one sample
    sizes = []
    tiny.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])) if module.training else None)
    trained(tiny, settings(selection_epochs=1), as_source(few(count))).load("cpu")
    assert sizes
    assert min(sizes) > 1


def test_samples_without_a_label_take_no_part(tiny):
    """Unlabelled images change nothing, and none of them is looked at."""
    source, labels = as_source(few(40)), as_source(few(40)).labels()
    values = labels.values.clone()
    values[30:] = 10
    seen = []

    class Watched:
        image = staticmethod(lambda index: (seen.append(index), source.image(index))[1])
        decode_warning = staticmethod(source.decode_warning)

        def __len__(self):
            return 40

    encoder = trained(tiny, settings(), Watched(), Labels(values, labels.names, unlabeled=True)).load("cpu")
    alone = trained(tiny, settings(), as_source(few(30))).load("cpu")
    assert torch.equal(encoder.embed(batch_of()), alone.embed(batch_of()))
    # the loader times the first eight
    assert set(seen) == set(range(30))


def test_errors_name_the_sample_and_the_way_out(tiny, make_source, tmp_path):
    ten = Labels(torch.arange(20) % 10, None)
    with pytest.raises(Exception, match=r"sample 17 \(cat.jpg\)"):
        trained(tiny, settings(), make_source(20, broken=[17]), ten).load("cpu")

    class OddNetwork(TinyNetwork):
        preprocess = staticmethod(lambda image: to_float_tensor(image)[:, : 30 + image.getpixel((0, 0))[0] % 2])

    spec = choose_encoder(OddNetwork(), image_size=SIZE)
    with pytest.raises(FeatureError, match=r"different shapes.*add a resize"):
        with_selection_epochs(spec, make_source(20), ten, settings(), False).load("cpu")
    with pytest.raises(FeatureError, match=r"diverged.*smaller"):
        trained(tiny, settings(selection_lr=1e30)).load("cpu")
    with pytest.raises(FeatureError, match="0 labelled samples"):
        trained(tiny, settings(), make_source(20), Labels(torch.full((20,), 2), ("a", "b"), unlabeled=True)).load("cpu")
    with pytest.raises(FeatureError, match="pass labels="):
        with_selection_epochs(spec, make_source(20), None, settings())
    np.save(tmp_path / "ready.npy", np.zeros((40, 4), np.float32))
    config = QuantizeConfig(FeatureConfig(str(tmp_path / "ready.npy"), selection_epochs=1))
    with pytest.raises(ConfigError, match="ready-made"):
        make_plan(few(40), Wanted(config))


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="changes no embedding"):
        FeatureConfig(selection_epochs=1, selection_train="head")
    for wrong in (
        {"selection_epochs": -1},
        {"selection_lr": 0.0},
        {"selection_batch_size": 1},
        {"selection_train": "x"},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            FeatureConfig(**wrong)


def test_keys_change_with_the_training_alone():
    def key(**values):
        plan = make_plan(few(20), Wanted(QuantizeConfig(FeatureConfig("bundled", **values))))
        return station_parts(plan, "source", {"encoder": "e"})[FEATURES]

    plain = key()
    assert not [name for name in plain if "selection" in name]
    assert key(selection_lr=0.5, selection_batch_size=4, selection_seed=3) == plain
    one = key(selection_epochs=1)
    assert one == plain | {
        "selection_epochs": 1, "selection_train": "all", "selection_lr": 0.1, "selection_batch_size": 128,
        "selection_seed": 0, "labels": None,
    }  # fmt: skip
    assert key(selection_epochs=1, batch_size=7, num_workers=1) == one


def test_a_cache_hit_trains_nothing(monkeypatch, tmp_path):
    config = QuantizeConfig(settings(kind="embedding", encoder="bundled", selection_epochs=1), BinConfig(num_bins=2))
    calls = []
    real = selection_training.train_encoder
    monkeypatch.setattr(selection_training, "train_encoder", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    made = [quantize(few(100), config, cache_dir=tmp_path, device="cpu", progress=False) for _ in range(2)]
    assert calls == [1]
    assert made[1].reused
    assert made[0].content_hash == made[1].content_hash
