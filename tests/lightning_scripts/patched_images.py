"""Compact sets of patches for the tests; as a script, training on two processes in every mode. Usage: patched_images.py FOLDER

Each process writes the images that it saw, by mode, to FOLDER/report-RANK.json.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from dq_lightning import PatchConfig, QuantizeConfig, QuantizedDataModule
from tests.lightning_scripts.common import Recorder, photos, to_tensor, trainer

MODES = ("prepare", "batch", "off")


def ready(module):
    module.prepare_data()
    module.setup("fit")
    return module


def small_mae(seed=0):
    """A masked autoencoder with random weights, of 32 pixels and patches of 4."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ViTMAEForPreTraining(
            ViTMAEConfig(
                image_size=32,
                patch_size=4,
                hidden_size=24,
                num_hidden_layers=1,
                num_attention_heads=3,
                intermediate_size=48,
                decoder_hidden_size=16,
                decoder_num_hidden_layers=1,
                decoder_num_attention_heads=2,
                decoder_intermediate_size=32,
            )
        )


def as_floats(images):
    """What `to_tensor` does with a Pillow image, for a batch on its device."""
    return images.float() / 255


def drop(mode="prepare", **patches):
    return QuantizeConfig(patches=PatchConfig(reconstruct=mode, **{"drop_ratio": 0.2} | patches))


def quantized(dataset, cache_dir, mode="prepare", patches=None, **settings):
    """A data module of packed patches that delivers floats [3, H, W] in every mode."""
    if mode == "batch":
        settings = {"batch_transform": as_floats} | settings
    defaults = {"keep_ratio": 0.25, "num_bins": 5, "batch_size": 5, "num_workers": 0, "reconstructor": small_mae()}
    config = drop(mode, **patches or {})
    return QuantizedDataModule(dataset, config=config, cache_dir=cache_dir, **defaults | settings)


def stored(path, cache_dir, mode=None, **settings):
    """The same from a store alone."""
    settings = {"batch_size": 5, "num_workers": 0, "reconstructor": small_mae()} | settings
    wanted = {"batch_transform": as_floats} if mode == "batch" else {"transform": to_tensor}
    return QuantizedDataModule.from_store(path, reconstruct=mode, cache_dir=cache_dir, **wanted | settings)


def main(folder):
    report = {}
    for mode in MODES:
        module = quantized(photos(), folder / "cache", mode)
        for name, used in ((mode, module), (f"{mode} from the store", None)):
            model, running = Recorder(), trainer(devices=2, strategy="ddp")
            # what the store needs is made by rank 0, in a cache of its own
            used = used or stored(module.info.path, folder / "another cache", mode)
            running.fit(model, used)
            report[name] = {"seen": model.seen, "hash": used.info.content_hash}
    (folder / f"report-{running.global_rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
