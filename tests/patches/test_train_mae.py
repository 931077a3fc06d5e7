"""The script that trains the bundled masked autoencoder: it runs, and what it saves can be loaded."""

import runpy
from pathlib import Path

import pytest
import torch

from dq_lightning import load_mae
from dq_lightning.patches.choose import choose_kept

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_mae.py"


def test_the_training_script_gives_a_network_that_fills(cifar_root, tmp_path, capsys):
    pytest.importorskip("lightning")
    main = runpy.run_path(str(SCRIPT))["main"]
    options = ["--minutes", "0.02", "--batch-size", "8", "--test-images", "16", "--precision", "32-true"]
    main(["--data", cifar_root, "--output", str(tmp_path), *options])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("autoencoder", "harmonic", "mean colour"))
    mae = load_mae(tmp_path)
    assert (mae.model_grid, mae.model_patch_size, mae.harmonic) == ((8, 8), 4, True)
    images = torch.randn(2, 3, 32, 32)
    kept = choose_kept(torch.rand(2, 64), 51)
    assert torch.isfinite(mae.reconstruct(images, kept)).all()
    assert (tmp_path / "model.safetensors").stat().st_size < 7_000_000


def test_the_masks_of_the_training_are_half_scattered_half_connected():
    mask_scores = runpy.run_path(str(SCRIPT))["mask_scores"]
    scores = mask_scores(400, 8, torch.device("cpu")).view(400, 8, 8)
    kept = scores > scores.flatten(1).median(1).values[:, None, None]
    # share of horizontal neighbours that agree: about a half when scattered, more when connected
    agree = (kept[..., 1:] == kept[..., :-1]).float().mean((1, 2))
    assert float(agree.quantile(0.25)) < 0.55 < 0.65 < float(agree.quantile(0.9))
