import pickle

import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from dq_lightning.core.errors import FeatureError
from dq_lightning.features.bundled import SmallResNet
from dq_lightning.features.choose import choose_encoder
from dq_lightning.features.encoders import NetworkEncoder, find_head, resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "mobilenetv3_small_050"])
def test_timm_features_are_those_of_a_model_without_classes_on_timms_own_transform(name, make_source):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    encoder = choose_encoder(model, image_size=(300, 300)).load("cpu")
    source = make_source(3, side=300)
    batch = torch.stack([encoder.preprocess(source.image(i)) for i in range(3)])
    assert batch.dtype == torch.uint8
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    wanted = torch.stack([transform(source.image(i)) for i in range(3)])
    embedding = encoder.embed(batch)
    with torch.no_grad():
        assert encoder.num_classes == 7
        torch.testing.assert_close(encoder.logits(embedding), model(wanted), rtol=1e-3, atol=1e-4)
        model.reset_classifier(0)
        torch.testing.assert_close(embedding, model(wanted), rtol=1e-3, atol=1e-4)


def test_head_input_is_the_embedding_of_a_foreign_network(tiny, to_float, make_source):
    source = make_source(4)
    batch = torch.stack([to_float(source.image(i)) for i in range(4)])
    encoder = choose_encoder((tiny, to_float), image_size=(32, 32)).load("cpu")
    embedding = encoder.embed(batch)
    assert embedding.shape == (4, 8)
    tiny.eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder.logits(embedding), tiny(batch))


def test_network_without_head_gives_its_pooled_output():
    body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
    encoder = NetworkEncoder(body, lambda image: image, CPU)
    batch = torch.rand(2, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(encoder.embed(batch), body(batch).mean(dim=(2, 3)))
    assert encoder.num_classes is None
    with pytest.raises(FeatureError, match="no linear head"):
        encoder.logits(torch.zeros(2, 5))


def test_inner_linear_layer_is_no_head():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(3, 3)

        def forward(self, x):
            return self.gate(x.mean(dim=(2, 3))).sigmoid()

    network = Gated()
    encoder = NetworkEncoder(network, lambda image: image, CPU)
    batch = torch.rand(2, 3, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(encoder.embed(batch), network(batch))
    assert encoder.num_classes is None


def test_the_callers_network_is_left_alone(tiny, to_float):
    tiny.train()
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    encoder = choose_encoder((tiny, to_float), image_size=(32, 32)).load("cpu")
    encoder.embed(torch.rand(4, 3, 8, 8))
    assert tiny.training
    assert all(p.requires_grad for p in tiny.parameters())
    assert not tiny.output._forward_hooks
    for name, value in tiny.state_dict().items():
        assert torch.equal(value, before[name])


def test_preprocessing_travels_without_the_weights():
    encoder = NetworkEncoder(SmallResNet(), choose_encoder("bundled", image_size=(32, 32)).load("cpu").preprocess, CPU)
    assert len(pickle.dumps(encoder.preprocess)) < 1000


def test_uint8_without_mean_and_std_is_refused():
    encoder = NetworkEncoder(SmallResNet(), lambda image: image, CPU)
    with pytest.raises(FeatureError, match="Normalize"):
        encoder.embed(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_output_of_odd_shape_is_refused():
    with pytest.raises(FeatureError, match=r"\(2, 3, 8\)"):
        NetworkEncoder(nn.Flatten(2), lambda image: image, CPU).embed(torch.rand(2, 3, 2, 4))


def test_networks_of_transformers_give_what_they_pool_or_the_mean_of_their_tokens(to_float, make_source):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.ViTConfig(image_size=32, patch_size=8, **sizes)
    batch = torch.stack([to_float(make_source(2).image(i)) for i in range(2)])
    for pooled in (True, False):
        network = transformers.ViTModel(config, add_pooling_layer=pooled).eval()
        encoder = choose_encoder((network, to_float), image_size=(32, 32)).load("cpu")
        with torch.no_grad():
            output = network(batch)
            wanted = output.pooler_output if pooled else output.last_hidden_state.mean(dim=1)
            torch.testing.assert_close(encoder.embed(batch), wanted)
    network = transformers.ViTForImageClassification(config).eval()
    encoder = choose_encoder((network, to_float), image_size=(32, 32)).load("cpu")
    with torch.no_grad():
        torch.testing.assert_close(encoder.logits(encoder.embed(batch)), network(batch).logits)


def test_output_that_is_no_tensor_is_refused_by_its_type():
    class Pairs(nn.Module):
        def forward(self, x):
            return {"features": x}

    with pytest.raises(FeatureError, match=r"builtins\.dict"):
        NetworkEncoder(Pairs(), lambda image: image, CPU).embed(torch.rand(2, 3, 4, 4))


def test_half_precision_stays_near_and_features_are_float32():
    torch.manual_seed(0)
    network, batch = SmallResNet(), torch.rand(4, 3, 32, 32)
    exact = NetworkEncoder(network, lambda image: image, CPU).embed(batch)
    rounded = NetworkEncoder(network, lambda image: image, CPU, "bfloat16").embed(batch)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).norm() < 0.05 * exact.norm()
    assert resolve_precision("auto", CPU) == torch.float32


def test_head_of_torchvision_networks():
    from torchvision.models import mobilenet_v3_small, resnet18

    assert find_head(resnet18(num_classes=4)).out_features == 4
    assert find_head(mobilenet_v3_small(num_classes=5)).out_features == 5


@pytest.mark.parametrize(("mode", "size"), [("small", (1, 1)), ("wide", (700, 20)), ("grey", (28, 28))])
def test_bundled_takes_any_size(mode, size, make_source):
    from PIL import Image

    encoder = choose_encoder("bundled", image_size=(32, 32)).load("cpu")
    tensor = encoder.preprocess(Image.new("RGB", size, (10, 20, 30)))
    assert tensor.shape == (3, 32, 32)
    assert tensor.dtype == torch.uint8
    assert tensor.float().mean(dim=(1, 2)).tolist() == [10, 20, 30]
