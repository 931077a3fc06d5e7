"""The step on patches and the filling on a CUDA device, against the same on the CPU."""

import gc

import pytest
import torch

from dq_lightning import load_mae
from dq_lightning.patches.choose import choose_kept
from dq_lightning.patches.harmonic import fill_harmonically
from tests.lightning_scripts.common import Recorder, photos, trainer
from tests.lightning_scripts.patched_images import quantized, ready
from tests.test_patched_runs import delivered, kept_pixels

pytestmark = pytest.mark.gpu


def allocated():
    """Bytes of the tensors on the GPU, without the workspaces that cuBLAS keeps for each thread (up to 32 MiB on Hopper)."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def grey_levels(one, other):
    return float(((one - other) * 255).abs().max())


def test_harmonic_filling():
    images = torch.rand(9, 3, 75, 66)
    mask = torch.rand(9, 25) < torch.linspace(0.1, 0.9, 9)[:, None]
    filled = fill_harmonically(images.cuda(), mask.cuda(), 16)
    assert filled.is_cuda
    assert grey_levels(filled.cpu(), fill_harmonically(images, mask, 16)) < 0.2


def test_masked_autoencoder():
    images, kept = torch.rand(9, 3, 32, 32), choose_kept(torch.rand(9, 64), 51)
    filled = load_mae("bundled", device="cuda").reconstruct(images.cuda(), kept.cuda(), 4)
    assert grey_levels(filled.cpu(), load_mae("bundled").reconstruct(images, kept, 4)) < 0.5


def test_every_mode_trains_and_the_memory_is_given_back(tmp_path):
    torch.zeros(1, device="cuda")
    held = allocated()
    images = {}
    for mode in ("prepare", "batch", "off"):
        module = quantized(photos(), tmp_path / "gpu", mode, device="cuda")
        model = Recorder()
        trainer(accelerator="gpu", devices=1).fit(model, module)
        assert len(set(model.seen)) == 50
        images[mode] = delivered(module)[0].cpu()
    kept = kept_pixels(module).expand_as(images["off"])
    assert grey_levels(images["prepare"], images["batch"]) <= 1.01
    assert torch.equal(images["prepare"][kept], images["off"][kept])
    del model, module
    assert allocated() <= held + (1 << 22)


def test_saliency_drops_the_same_patches_as_on_the_cpu(tmp_path):
    # The rows are given: features differ in their last digits between devices, so bins could hold other images.
    given = {"indices": range(0, 200, 4), "keep_ratio": None, "num_bins": None}
    masks = [
        kept_pixels(ready(quantized(photos(), tmp_path / place, "off", device=place, **given)))
        for place in ("cuda", "cpu")
    ]
    # other kernels and TF32: patches of nearly equal saliency may change places
    assert float((masks[0] != masks[1]).float().mean()) < 0.01
