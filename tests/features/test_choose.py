import json
import threading

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import transforms

from dq_lightning.core.errors import FeatureError
from dq_lightning.features.bundled import BUNDLED_ENCODER_FILE, SmallResNet, to_half
from dq_lightning.features.choose import AUTO_PHOTO_ENCODER, choose_encoder

SIZE = (32, 32)


def identity(encoder, memory, **options):
    return choose_encoder(encoder, image_size=SIZE, **options).identity(memory)


@pytest.mark.parametrize(
    ("size", "name"),
    [((1, 1), "bundled"), ((64, 64), "bundled"), ((32, 65), AUTO_PHOTO_ENCODER), ((500, 375), AUTO_PHOTO_ENCODER)],
)
def test_auto_depends_on_the_longer_side_alone(size, name):
    spec = choose_encoder("auto", image_size=size)
    assert spec.name == name
    assert "auto: images" in spec.description


@pytest.mark.parametrize(
    ("encoder", "options", "message"),
    [
        ("owner/model", {}, "hf-hub:owner/model"),
        ("resnet18", {"weights": "/nowhere/file.pth"}, "no such file"),
        (3, {}, "int"),
        (nn.Identity(), {}, "preprocessing"),
        (nn.Identity(), {"weights": "x"}, "weights="),
        (("no network", print), {}, "nn.Module"),
        ("auto", {"modality": "sound"}, "sound"),
        ("bundled", {"modality": "text"}, "'bundled'"),
        ("auto", {"modality": "text", "weights": "x"}, "weights="),
        (nn.Identity(), {"modality": "text"}, "Identity"),
        ("no/such/folder", {"modality": "text"}, "config.json"),
        ("./folder", {"modality": "text"}, "config.json"),
        ("openai:", {"modality": "text"}, "text-embedding-3-small"),
        ("local-dir:/nowhere", {}, "config.json"),
        (str(BUNDLED_ENCODER_FILE), {}, "weights="),
        ("auto", {"weights": str(BUNDLED_ENCODER_FILE)}, "timm name"),
        ("hf-hub:a/b", {"weights": str(BUNDLED_ENCODER_FILE)}, "own weights"),
    ],
)
def test_what_cannot_be_chosen_says_what_to_pass(encoder, options, message):
    with pytest.raises(FeatureError, match=message):
        choose_encoder(encoder, image_size=SIZE, **options)


def test_bundled_identity_follows_the_file(tmp_path, memory):
    facts = {"widths": "[32, 64, 128]", "depths": "[1, 1, 2]", "num_classes": "10"}
    for name in ("a", "b"):
        save_file(to_half(SmallResNet().state_dict()), tmp_path / f"{name}.safetensors", facts)
    first, second = (identity("bundled", memory, weights=tmp_path / f"{name}.safetensors") for name in ("a", "b"))
    moved = (tmp_path / "a.safetensors").rename(tmp_path / "c.safetensors")
    assert identity("bundled", memory, weights=moved) == first
    assert len({first, second, identity("bundled", memory)}) == 3


def test_module_identity_follows_parameters_buffers_and_preprocessing(tiny, to_float, memory):
    def now(preprocess=to_float):
        return identity((tiny, preprocess), memory)

    seen = [now()]
    assert now() == seen[0]
    tiny.train()
    tiny.requires_grad_(False)
    assert now() == seen[0]
    with torch.no_grad():
        tiny.output.bias[0] += 1e-6
    seen.append(now())
    tiny.norm.running_mean += 1
    seen.append(now())
    normalize = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    seen += [now(normalize), now(transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.4,), (0.5,))]))]
    assert len(set(seen)) == len(seen)
    copied = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    assert now(copied) == now(normalize)


def test_function_identity_follows_what_it_refers_to(tiny, memory):
    def scaled(factor):
        return lambda image: torch.zeros(3, 4, 4) * factor

    assert identity((tiny, scaled(2.0)), memory) == identity((tiny, scaled(2.0)), memory)
    assert identity((tiny, scaled(2.0)), memory) != identity((tiny, scaled(3.0)), memory)
    assert identity((tiny, scaled(torch.ones(2))), memory) != identity((tiny, scaled(torch.zeros(2))), memory)


def test_preprocessing_that_cannot_be_looked_into_is_refused(tiny, memory):
    class Locked:
        def __init__(self):
            self.lock = threading.Lock()

        def __call__(self, image):
            return torch.zeros(3, 4, 4)

    with pytest.raises(FeatureError, match="identity"):
        identity((tiny, transforms.Compose([Locked()])), memory)
    named = Locked()
    named.identity = "zeros-1"
    assert identity((tiny, named), memory) == identity((tiny, named), memory)


def test_module_with_a_preprocess_attribute(tiny, to_float):
    tiny.preprocess = to_float
    assert choose_encoder(tiny, image_size=SIZE).load("cpu").preprocess is to_float


@pytest.fixture
def timm_file(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    return model, tmp_path / "weights.safetensors"


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_weights_of_a_timm_name(timm_file, suffix, memory, no_network):
    model, path = timm_file
    spec = choose_encoder("test_resnet.r160_in1k", weights=path.with_suffix(suffix), image_size=SIZE)
    assert spec.identity(memory) == spec.resolve(memory).identity(memory)
    encoder = spec.load("cpu")
    batch = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(encoder.logits(encoder.embed(batch)), model(batch), rtol=1e-3, atol=1e-4)


def test_local_weights_with_a_head_of_their_own(timm_file, tmp_path):
    state = load_file(timm_file[1])
    state["fc.weight"], state["fc.bias"] = state["fc.weight"][:6].clone(), state["fc.bias"][:6].clone()
    save_file(state, tmp_path / "six.safetensors")
    spec = choose_encoder("test_resnet.r160_in1k", weights=tmp_path / "six.safetensors", image_size=SIZE)
    encoder = spec.load("cpu")
    assert encoder.num_classes == 6
    batch = torch.rand(2, 3, 64, 64)
    whole = choose_encoder("test_resnet.r160_in1k", weights=timm_file[1], image_size=SIZE).load("cpu")
    wanted = whole.logits(whole.embed(batch))[:, :6]
    torch.testing.assert_close(encoder.logits(encoder.embed(batch)), wanted)


def test_weights_that_do_not_fit_are_refused_and_never_replaced(timm_file, tmp_path):
    state = load_file(timm_file[1])
    del state["conv1.0.weight"]
    save_file(state, tmp_path / "short.safetensors")
    for name, path in (("test_resnet", tmp_path / "short.safetensors"), ("test_vit", timm_file[1])):
        with pytest.raises(FeatureError, match="weights"):
            choose_encoder(name, weights=path, image_size=SIZE).load("cpu")


def test_weights_are_loaded_without_executing_anything(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"conv1.weight": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(FeatureError, match=r"bomb\.pth"):
        choose_encoder("test_resnet", weights=tmp_path / "bomb.pth", image_size=SIZE).load("cpu")
    assert not (tmp_path / "executed").exists()


def test_folder(timm_file, tmp_path, memory, no_network):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"architecture": "test_resnet", "pretrained_cfg": {"num_classes": 1000}})
    )
    timm_file[1].rename(folder / "model.safetensors")
    plain, prefixed = (choose_encoder(name, image_size=SIZE) for name in (str(folder), f"local-dir:{folder}"))
    assert plain.identity(memory) == prefixed.identity(memory)
    batch = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            plain.load("cpu").embed(batch),
            timm_file[0].forward_head(timm_file[0].forward_features(batch), pre_logits=True),
            rtol=1e-3,
            atol=1e-4,
        )
    before = plain.identity(memory)
    (folder / "config.json").write_text(
        json.dumps({"architecture": "test_resnet", "pretrained_cfg": {"mean": [0, 0, 0]}})
    )
    assert plain.identity(memory) != before


def test_loading_draws_no_random_numbers(timm_file):
    before = torch.get_rng_state()
    choose_encoder("test_resnet", weights=timm_file[1], image_size=SIZE).load("cpu")
    choose_encoder("bundled", image_size=SIZE).load("cpu")
    assert torch.equal(torch.get_rng_state(), before)


class Grey(nn.Module):
    """Takes images of one channel."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3)

    def forward(self, x):
        return self.convolution(x)


class GreyLater(nn.Module):
    """The layer that is listed first sees one channel, made of three."""

    def __init__(self):
        super().__init__()
        self.grey = Grey()

    def forward(self, x):
        return self.grey(x.mean(1, keepdim=True))


def test_a_network_of_grey_images_is_told_at_once_or_given_them():
    from torchvision.transforms import Compose, Grayscale, ToTensor

    with pytest.raises(
        FeatureError, match=r"1 channel, but its preprocessing gives 3: pass \(network, preprocessing\)"
    ):
        choose_encoder((Grey(), ToTensor()))
    with pytest.raises(FeatureError, match=r"1 channel.*Grayscale"):
        choose_encoder(timm.create_model("resnet10t", in_chans=1))
    with pytest.raises(FeatureError, match="4 channels, but its preprocessing gives 3"):
        choose_encoder((nn.Sequential(nn.Conv2d(4, 2, 3)), ToTensor()))
    grey = choose_encoder((Grey(), Compose([Grayscale(), ToTensor()]))).load("cpu")
    assert grey.embed(grey.preprocess(Image.new("RGB", (8, 8)))[None]).shape == (1, 4)
    assert choose_encoder((GreyLater(), ToTensor())).name == "GreyLater"


def test_a_first_layer_that_does_not_fit_is_told_with_what_to_pass():
    from torchvision.transforms import ToTensor

    encoder = choose_encoder((nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), ToTensor())).load("cpu", "float32")
    with pytest.raises(FeatureError, match=r"fails on a batch \(1, 3, 8, 8\).*\(network, preprocessing\)"):
        encoder.embed(torch.zeros(1, 3, 8, 8))
