"""The masked autoencoder: the original's forward pass, exact masks, any image size, identity, and what is refused."""

import argparse
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from dq_lightning import load_mae
from dq_lightning.core.errors import PatchError
from dq_lightning.core.grid import pixel_mask
from dq_lightning.core.records import Grid
from dq_lightning.patches.choose import choose_kept, mask_of
from dq_lightning.patches.fill import fill_by_mask
from dq_lightning.patches.harmonic import fill_harmonically
from dq_lightning.patches.original_checkpoint import convert_keys, read_sizes
from dq_lightning.patches.reconstructors import choose_reconstructor
from tests.memories import DictMemory


def tiny_model(**changes):
    torch.manual_seed(0)
    values = {
        "image_size": 16, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
        "intermediate_size": 48, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32,
    }  # fmt: skip
    return ViTMAEForPreTraining(ViTMAEConfig(**values | changes))


@pytest.fixture(scope="module")
def tiny():
    return load_mae(tiny_model())


@pytest.fixture(scope="module")
def golden(shared_dir):
    return np.load(shared_dir / "golden" / "mae_facebook_format_tiny.npz")


@pytest.fixture(scope="module")
def original_state(golden):
    return {key[6:]: torch.from_numpy(golden[key]) for key in golden.files if key.startswith("model/")}


def stays_of(images, kept, size):
    grid = Grid(images.shape[2], images.shape[3], size)
    return pixel_mask(mask_of(kept, grid.num_patches), grid).expand_as(images)


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_original_checkpoint_gives_the_original_reconstruction(golden, original_state, tmp_path, wrapped):
    path = tmp_path / "mae_visualize_tiny.pth"
    saved = {"model": original_state, "args": argparse.Namespace(lr=0.1), "epoch": 3} if wrapped else original_state
    torch.save(saved, path)
    mae = load_mae(path, num_heads=3, decoder_num_heads=4)
    kept = choose_kept(torch.from_numpy(golden["importance"]), int(golden["kept"]))
    np.testing.assert_array_equal(mask_of(kept, 64).numpy(), golden["mask"] == 0)
    images = torch.from_numpy(golden["images"])
    filled = mae.reconstruct(images, kept)
    np.testing.assert_allclose(filled.numpy(), golden["reconstruction"], atol=1e-4)
    stays = stays_of(images, kept, 4)
    assert torch.equal(filled[stays], images[stays])


def test_no_weight_of_an_original_checkpoint_is_lost(original_state, tmp_path):
    renamed = convert_keys(original_state)
    assert sum(value.numel() for value in renamed.values()) == sum(value.numel() for value in original_state.values())
    torch.save(original_state | {"blocks.0.ls1.gamma": torch.ones(48)}, tmp_path / "more.pth")
    with pytest.raises(PatchError, match="another architecture"):
        load_mae(tmp_path / "more.pth", num_heads=3, decoder_num_heads=4)


@pytest.mark.parametrize(("width", "depth", "heads"), [(768, 12, 12), (1024, 24, 16), (1280, 32, 16)])
def test_official_sizes_know_their_heads(width, depth, heads):
    state = {
        "patch_embed.proj.weight": torch.empty(width, 3, 16, 16, device="meta"),
        "pos_embed": torch.empty(1, 197, width, device="meta"),
        "decoder_embed.weight": torch.empty(512, width, device="meta"),
        "blocks.0.mlp.fc1.weight": torch.empty(4 * width, width, device="meta"),
        "decoder_blocks.0.mlp.fc1.weight": torch.empty(2048, 512, device="meta"),
        "blocks.0.attn.qkv.bias": torch.empty(3 * width, device="meta"),
    }
    state |= {f"blocks.{i}.norm1.weight": torch.empty(1) for i in range(depth)}
    state |= {f"decoder_blocks.{i}.norm1.weight": torch.empty(1) for i in range(8)}
    values = read_sizes(state, None, None)
    assert (values["num_attention_heads"], values["decoder_num_attention_heads"]) == (heads, 16)
    assert (values["image_size"], values["patch_size"], values["hidden_size"]) == (224, 16, width)


def test_checkpoints_that_do_not_tell_enough_are_refused(original_state, tmp_path):
    path = tmp_path / "tiny.pth"
    torch.save({"model": original_state}, path)
    with pytest.raises(PatchError, match="pass num_heads="):
        load_mae(path)
    with pytest.raises(PatchError, match="pass decoder_num_heads="):
        load_mae(path, num_heads=3)
    with pytest.raises(PatchError, match="does not divide"):
        load_mae(path, num_heads=5, decoder_num_heads=4)
    torch.save({k: v for k, v in original_state.items() if not k.startswith("decoder")}, path)
    with pytest.raises(PatchError, match="no decoder"):
        load_mae(path, num_heads=3, decoder_num_heads=4)
    torch.save({k: v for k, v in original_state.items() if k != "blocks.1.norm2.bias"}, path)
    with pytest.raises(PatchError, match="lacks"):
        load_mae(path, num_heads=3, decoder_num_heads=4)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(PatchError, match="original format"):
        load_mae(path)


class Bomb:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_in_a_checkpoint_is_executed(tmp_path, capsys):
    path = tmp_path / "bomb.pth"
    torch.save({"model": Bomb()}, path)
    with pytest.raises(PatchError, match=r"bomb\.pth"):
        load_mae(path)
    assert "executed" not in capsys.readouterr().out


def test_a_folder_brings_weights_and_normalisation(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    images, kept = torch.randn(2, 3, 16, 16), choose_kept(torch.rand(2, 16), 9)
    state = torch.get_rng_state()
    plain = load_mae(str(tmp_path))
    assert torch.equal(torch.get_rng_state(), state)
    assert plain.mean == (0.485, 0.456, 0.406)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]})
    )
    own = load_mae(tmp_path)
    assert (own.mean, own.std, own.harmonic) == ((0.1, 0.2, 0.3), (1, 2, 3), False)
    torch.testing.assert_close(own.reconstruct(images, kept), load_mae(model).reconstruct(images, kept))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(PatchError, match="cannot load"):
        load_mae(tmp_path)


def test_a_hub_name_without_network_says_what_to_pass():
    with pytest.raises(PatchError, match="a folder with"):
        load_mae("facebook/vit-mae-base")
    spec = choose_reconstructor("facebook/vit-mae-base", image_size=(224, 224))
    with pytest.raises(PatchError, match="connect to the internet once"):
        spec.resolve(DictMemory())


@settings(deadline=None, max_examples=25)
@given(count=st.integers(0, 16), seed=st.integers(0, 999))
def test_every_count_keeps_exactly_the_chosen_patches(tiny, count, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, 16, 16, generator=generator)
    kept = choose_kept(torch.rand(2, 16, generator=generator), count)
    stays = stays_of(images, kept, 4)
    filled = tiny.reconstruct(images, kept)
    assert torch.equal(filled[stays], images[stays])
    assert torch.isfinite(filled).all()
    # nothing of the dropped patches is seen, and the order of the kept ones does not matter
    spoiled = torch.where(stays, images, torch.nan)
    assert torch.equal(tiny.reconstruct(spoiled, kept.flip(1)), filled)


def test_it_is_the_models_own_forward_pass(tiny):
    model = tiny_model().eval()
    images = torch.randn(3, 3, 16, 16)
    noise = torch.rand(3, 16)
    model.config.mask_ratio = 0.5
    with torch.no_grad():
        output = model(images, noise=noise)
    pasted = model.unpatchify(torch.where(output.mask.bool()[..., None], output.logits, model.patchify(images)))
    torch.testing.assert_close(tiny.reconstruct(images, choose_kept(-noise, 8)), pasted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [
        (32, 32, None, 8),  # the model's grid, resized in and out
        (8, 8, None, 2),
        (4, 4, None, 1),
        (24, 40, None, 4),  # the model's patches, interpolated positions
        (23, 37, None, 4),  # and partial patches
        (224, 224, 32, 32),  # both
        (13, 50, 7, 7),
    ],
)
def test_images_of_any_size_keep_their_kept_pixels(tiny, height, width, size, expected):
    images = torch.randn(2, 3, height, width)
    assert (size or tiny.patch_size_for(height, width)) == expected
    count = Grid(height, width, expected).num_patches
    kept = choose_kept(torch.rand(2, count), count // 2)
    filled = tiny.reconstruct(images, kept, size)
    stays = stays_of(images, kept, expected)
    assert filled.shape == images.shape
    assert torch.equal(filled[stays], images[stays])
    assert torch.isfinite(filled).all()
    assert not torch.equal(filled[~stays], images[~stays])
    torch.testing.assert_close(tiny.reconstruct(torch.where(stays, images, torch.inf), kept, size), filled)


def test_an_enlarged_image_is_filled_like_the_small_one(tiny):
    small = torch.randn(2, 3, 16, 16).cumsum(3).cumsum(2) / 16
    kept = choose_kept(torch.rand(2, 16), 10)
    # every pixel four times: shrinking gives the small image back
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    filled = tiny.reconstruct(large, kept)
    back = torch.nn.functional.avg_pool2d(filled, 4)
    difference = (back - tiny.reconstruct(small, kept)).abs()
    assert float(difference.mean()) < 0.1 * float(small.std())


def test_positions_of_another_grid_are_interpolated_in_two_dimensions(tiny):
    # of a grid with the same rows and twice the columns every second average is the old position
    spread = tiny._decoder_positions(Grid(16, 32, 4))
    own = tiny._model.decoder.decoder_pos_embed
    assert torch.equal(spread[:, 0], own[:, 0])
    rows = spread[0, 1:].view(4, 8, -1)
    inner = rows.view(4, 4, 2, -1).mean(2)
    torch.testing.assert_close(inner[:, 1:3], own[0, 1:].view(4, 4, -1)[:, 1:3], atol=0.1, rtol=0)
    assert torch.equal(tiny._decoder_positions(Grid(16, 16, 4)), own)


def test_a_model_of_the_difference_adds_the_harmonic_filling(tiny, tmp_path):
    model = tiny_model()
    torch.nn.init.zeros_(model.decoder.decoder_pred.weight)
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"harmonic": True}))
    images, kept = torch.randn(2, 3, 16, 16), choose_kept(torch.rand(2, 16), 8)
    filled = load_mae(tmp_path).reconstruct(images, kept)
    torch.testing.assert_close(filled, fill_harmonically(images, mask_of(kept, 16), 4))
    stays = stays_of(images, kept, 4)
    assert torch.equal(filled[stays], images[stays])


def test_half_precision_gives_nearly_the_same_and_leaves_the_kept(tiny):
    images, kept = torch.randn(2, 3, 16, 16), choose_kept(torch.rand(2, 16), 8)
    half = load_mae(tiny_model()).to("cpu", torch.bfloat16)
    filled = half.reconstruct(images, kept)
    stays = stays_of(images, kept, 4)
    assert filled.dtype == torch.float32
    assert torch.equal(filled[stays], images[stays])
    torch.testing.assert_close(filled, tiny.reconstruct(images, kept), atol=0.05, rtol=0)


def test_images_with_unequal_counts(tiny):
    images = torch.randn(4, 3, 16, 16)
    mask = torch.rand(4, 16) < torch.tensor([0.1, 0.5, 0.5, 1.0])[:, None]
    filled = fill_by_mask(tiny, images, mask, 4)
    for position in range(4):
        alone = tiny.reconstruct(images[position][None], mask[position].nonzero().T)
        torch.testing.assert_close(filled[position], alone[0], atol=1e-5, rtol=0)


def test_choices_that_do_not_fit_are_refused(tiny):
    images = torch.randn(2, 3, 16, 16)
    for kept, message in (
        (torch.tensor([[0, 16], [0, 1]]), "0 ... 15"),
        (torch.tensor([[3, 3], [0, 1]]), "twice"),
        (torch.tensor([[0, 1]]), r"\[2, k\]"),
        (torch.rand(2, 3), r"\[2, k\]"),
    ):
        with pytest.raises(PatchError, match=message):
            tiny.reconstruct(images, kept)
    with pytest.raises(PatchError, match="norm_pix_loss"):
        load_mae(tiny_model(norm_pix_loss=True))
    with pytest.raises(PatchError, match="only for checkpoint files"):
        load_mae("facebook/vit-mae-base", num_heads=12)


def test_identity_is_content_and_needs_no_loading(tmp_path, original_state):
    memory, size = DictMemory(), {"image_size": (32, 32)}
    path = tmp_path / "tiny.pth"
    torch.save(original_state, path)

    def identity(name, **heads):
        return choose_reconstructor(name, **size, **heads).identity(memory)

    first = identity(path, num_heads=3)
    moved = tmp_path / "moved.pth"
    path.rename(moved)
    assert identity(moved, num_heads=3) == first
    assert identity(moved, num_heads=6) != first
    original_state = original_state | {"mask_token": original_state["mask_token"] + 1e-3}
    torch.save(original_state, moved)
    assert identity(moved, num_heads=3) != first
    model = tiny_model()
    model.save_pretrained(tmp_path / "folder")
    folder, module = identity(tmp_path / "folder"), identity(model)
    with torch.no_grad():
        model.decoder.mask_token[0, 0, 0] += 1e-3
    model.save_pretrained(tmp_path / "folder")
    assert identity(tmp_path / "folder") != folder
    assert identity(model) != module
    hub = choose_reconstructor("facebook/vit-mae-large@main", **size)
    assert hub.identity(memory) is None
    memory.remember("hub:facebook/vit-mae-large@main", "0123abc")
    assert hub.identity(memory) == hub.resolve(memory).identity(DictMemory())


def test_what_a_name_stands_for():
    assert choose_reconstructor("auto", image_size=(65, 20)).name == "facebook/vit-mae-base"
    for name in ("/no/such/file.pth", "missing.pth", "vit-mae", "a/b/c", 7):
        with pytest.raises(PatchError):
            choose_reconstructor(name, image_size=(32, 32))
