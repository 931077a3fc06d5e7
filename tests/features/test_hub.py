"""Hub names against a cache folder laid out as huggingface_hub lays it out, with the network off."""

import json
import time

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file

from dq_lightning.core.errors import FeatureError
from dq_lightning.features.choose import choose_encoder

NAME = "test_resnet.r160_in1k"
COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, no_network):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def add_commit(cache, repository, commit, seed):
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet").eval()
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    save_file(model.state_dict(), snapshot / "model.safetensors")
    config = {"architecture": "test_resnet", "pretrained_cfg": {"num_classes": 1000, "input_size": [3, 160, 160]}}
    (snapshot / "config.json").write_text(json.dumps(config))
    return model


def assert_same_network(spec, model):
    encoder, batch = spec.load("cpu"), torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(encoder.logits(encoder.embed(batch)), model(batch), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "repository"), [(NAME, f"timm/{NAME}"), ("hf-hub:me/mine", "me/mine")])
def test_a_cached_commit_is_used_remembered_and_kept(hub_cache, memory, name, repository):
    spec = choose_encoder(name, image_size=(224, 224))
    first = add_commit(hub_cache, repository, COMMITS[0], seed=1)
    assert spec.identity(memory) is None
    resolved = spec.resolve(memory)
    assert COMMITS[0] in memory.known.values()
    # another process knows the identity from the memory alone, and the pinned choice has the same one
    assert spec.identity(memory) == resolved.identity(memory) is not None
    assert_same_network(spec, first)
    second = add_commit(hub_cache, repository, COMMITS[1], seed=2)
    assert spec.resolve(memory).identity(memory) == resolved.identity(memory)
    assert_same_network(spec.resolve(memory), first)
    fresh = type(memory)()
    assert spec.resolve(fresh).identity(fresh) != resolved.identity(memory)
    assert_same_network(spec.resolve(fresh), second)


def test_a_revision_in_the_name_is_honoured(hub_cache, memory):
    first = add_commit(hub_cache, "me/mine", COMMITS[0], seed=1)
    add_commit(hub_cache, "me/mine", COMMITS[1], seed=2)
    spec = choose_encoder(f"hf-hub:me/mine@{COMMITS[0]}", image_size=(224, 224))
    assert_same_network(spec.resolve(memory), first)


@pytest.mark.parametrize(
    ("name", "offline"), [(NAME, True), (NAME, False), ("hf-hub:me/mine", True), ("resnet50.a1_in1k", True)]
)
def test_nothing_cached_and_no_network(hub_cache, memory, monkeypatch, name, offline):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    # the hub's client waits between its attempts
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    spec = choose_encoder(name, image_size=(224, 224))
    repository = name.removeprefix("hf-hub:") if ":" in name else f"timm/{name}"
    for attempt in (lambda: spec.resolve(memory), lambda: spec.load("cpu")):
        with pytest.raises(FeatureError) as caught:
            attempt()
        for part in ("model.safetensors", repository, "weights=", 'encoder="bundled"'):
            assert part in str(caught.value)
    assert spec.identity(memory) is None


def test_unknown_names(hub_cache, memory):
    with pytest.raises(FeatureError, match="resnet50"):
        choose_encoder("resnet_50", image_size=(224, 224)).resolve(memory)
    with pytest.raises(FeatureError, match="no weights"):
        choose_encoder("resnet50.nobody", image_size=(224, 224)).resolve(memory)


def test_an_architecture_without_weights_is_no_encoder(hub_cache, memory):
    name = next(n for n in timm.list_models() if not timm.models.is_model_pretrained(n))
    with pytest.raises(FeatureError, match="no weights"):
        choose_encoder(name, image_size=(224, 224)).load("cpu")
