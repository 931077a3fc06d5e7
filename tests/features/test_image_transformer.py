"""Image models of transformers against the obvious way: the processor, then the model."""

import numpy as np
import pytest
import torch
from PIL import Image

from dq_lightning import QuantizedDataModule
from dq_lightning.core.errors import FeatureError
from dq_lightning.features.choose import choose_encoder
from dq_lightning.features.extract import extract_features
from tests.lightning_scripts.common import photos

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
PARTS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def dino():
    return transformers.Dinov2Model(transformers.Dinov2Config(**SMALL)), transformers.BitImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}
    )


def clip():
    vision = PARTS | {"image_size": 32, "patch_size": 8}
    settings = transformers.CLIPConfig(text_config=PARTS | {"vocab_size": 50}, vision_config=vision, projection_dim=12)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return transformers.CLIPModel(settings), processor


def siglip():
    vision = PARTS | {"image_size": 32, "patch_size": 8}
    settings = transformers.SiglipConfig(text_config=PARTS | {"vocab_size": 50}, vision_config=vision)
    return transformers.SiglipModel(settings), transformers.SiglipImageProcessor(size={"height": 32, "width": 32})


def dino_of(model, pixels):
    return model(pixel_values=pixels).last_hidden_state[:, 0]


def projected(model, pixels):
    output = model.get_image_features(pixel_values=pixels)
    return output if isinstance(output, torch.Tensor) else output.pooler_output


class Pictures:
    """Images of different sizes."""

    def __len__(self):
        return 5

    def image(self, i):
        drawn = np.random.default_rng(i).integers(0, 256, (20 + 9 * i, 50, 3), dtype=np.uint8)
        return Image.fromarray(drawn)

    def decode_warning(self, i):
        return None


@pytest.mark.parametrize(("make", "slow"), [(dino, dino_of), (clip, projected), (siglip, projected)])
def test_features_are_those_of_processor_and_model(make, slow, tmp_path, memory, no_network):
    torch.manual_seed(0)
    model, processor = make()
    for part in (model.eval(), processor):
        part.save_pretrained(tmp_path)
    spec = choose_encoder(f"transformers:{tmp_path}")
    identity = spec.identity(memory)
    source = Pictures()
    made = extract_features(source, spec, batch_size=2, device="cpu", progress=False).embedding
    read = transformers.AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=False)
    with torch.no_grad():
        wanted = [slow(model, read(images=source.image(i), return_tensors="pt")["pixel_values"]) for i in range(5)]
    torch.testing.assert_close(made, torch.cat(wanted), rtol=1e-4, atol=1e-5)
    assert made.std(dim=0).min() > 0
    settings = (tmp_path / "preprocessor_config.json").read_text()
    (tmp_path / "preprocessor_config.json").write_text(settings.replace("0.5", "0.4").replace("0.48", "0.4"))
    assert spec.identity(type(memory)()) != identity


def test_a_missing_pooling_layer_is_not_made_up(tmp_path, no_network):
    torch.manual_seed(0)
    classifier = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)).eval()
    classifier.save_pretrained(tmp_path)
    with pytest.raises(FeatureError, match="cannot load an image model"):
        choose_encoder(f"transformers:{tmp_path}").load("cpu")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    encoder = choose_encoder(f"transformers:{tmp_path}").load("cpu")
    pixels = encoder.preprocess(Pictures().image(1))[None]
    with torch.no_grad():
        wanted = classifier.vit(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder.embed(pixels), wanted, rtol=1e-4, atol=1e-5)


def test_a_compact_set_by_such_an_encoder(tmp_path, no_network):
    model, processor = dino()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    module = QuantizedDataModule(
        photos(20), encoder=f"transformers:{tmp_path / 'model'}", keep_ratio=0.5, num_bins=2, cache_dir=tmp_path
    )
    module.prepare_data()
    module.setup("fit")
    assert len(module.selection.index) == 10


@pytest.mark.parametrize("name", ["transformers:one", "transformers:/nowhere/model", "transformers:a/b/c"])
def test_names_that_are_no_model(name):
    with pytest.raises(FeatureError, match="not a folder with a transformers model"):
        choose_encoder(name)


def test_a_hub_name_that_is_not_there_says_what_to_pass(memory, no_network, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    spec = choose_encoder("transformers:facebook/dinov2-small@main")
    assert spec.identity(memory) is None
    with pytest.raises(FeatureError, match=r"facebook/dinov2-small.*transformers:FOLDER"):
        spec.resolve(memory)
