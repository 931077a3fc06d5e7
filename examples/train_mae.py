"""Train the small masked autoencoder that the package bundles, on the CIFAR-10 training split alone.

    python examples/train_mae.py --data DATA_DIR --output dq_lightning/assets/cifar10_mae --minutes 60

Images of 32 pixels, patches of 4, 0.5 million parameters. Masks are a mixture of independent patches and smooth blobs (what a
saliency map drops is connected), at drop ratios between 0.1 and 0.8, and the loss is the squared error of plain pixels on the
dropped patches (He et al. 2022, without per-patch normalisation, because the pixels themselves are wanted here). The network
predicts the difference from the harmonic filling and starts with the prediction 0: what is smooth need not be learned. The
learning rate follows the clock, so the time given is the time taken on any machine; on a GPU pass --batch-size 1024. The last
weights are what is kept; the test split is read once, after training, and chooses nothing: its errors are printed beside those
of the mean colour and of the harmonic filling.
"""

import argparse
import json
import math
import time
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchvision.datasets import CIFAR10
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from dq_lightning import load_mae
from dq_lightning.core.grid import pixel_mask
from dq_lightning.core.records import Grid
from dq_lightning.features.bundled import CIFAR10_MEAN, CIFAR10_STD
from dq_lightning.patches.choose import choose_kept, kept_count, mask_of
from dq_lightning.patches.harmonic import fill_harmonically, fill_with_mean

PATCH = 4
NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1))
DROP_RATIOS = (0.2, 0.5, 0.75)


def small_config() -> ViTMAEConfig:
    return ViTMAEConfig(
        image_size=32,
        patch_size=PATCH,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        intermediate_size=288,
        decoder_hidden_size=96,
        decoder_num_hidden_layers=3,
        decoder_num_attention_heads=8,
        decoder_intermediate_size=288,
    )


def sine_positions(side: int, width: int) -> Tensor:
    """Position embeddings [1, 1 + side^2, width] in two dimensions (He et al. 2022, appendix A.1); 0 for the class token."""
    frequencies = 10_000.0 ** -(torch.arange(width // 4) / (width / 4))
    angles = torch.arange(side)[:, None] * frequencies
    one = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = one[:, None].expand(-1, side, -1), one[None].expand(side, -1, -1)
    grid = torch.cat([columns, rows], dim=2).flatten(0, 1)
    return torch.cat([torch.zeros(1, width), grid])[None]


def look_at_neighbours(attention: torch.nn.Module, heads: int, sharpness: float = 3.0) -> None:
    """Let each head begin by looking at one of the eight neighbours of a patch.

    With sines and cosines of positions a shift is a rotation, so the query can ask for position p + d and the key say p. A
    new network spends most of a short training on finding out where patches lie; this one starts with it.
    """
    width = attention.q_proj.weight.shape[0]
    quarter, size = width // 4, width // heads
    frequencies = 10_000.0 ** -(torch.arange(quarter) / quarter)
    query, key = 0.02 * torch.randn(2, width, width)
    for head, (row, column) in enumerate(NEIGHBOURS[:heads]):
        place = head * size
        for number in range(size // 4):
            for start, shift in ((0, column), (2 * quarter, row)):
                sine, cosine, angle = start + number, start + quarter + number, float(frequencies[number] * shift)
                key[place, sine] += sharpness
                key[place + 1, cosine] += sharpness
                query[place, sine] += sharpness * math.cos(angle)
                query[place, cosine] += sharpness * math.sin(angle)
                query[place + 1, cosine] += sharpness * math.cos(angle)
                query[place + 1, sine] -= sharpness * math.sin(angle)
                place += 2
    attention.q_proj.weight.data.copy_(query)
    attention.k_proj.weight.data.copy_(key)


def make_model() -> ViTMAEForPreTraining:
    """A new network that predicts 0.

    Transformers 5.23 leaves the position embeddings of a new one zero, with which nothing about places can be learned, and
    draws its weights with a deviation of 0.02, too little for so narrow layers; He et al. draw them by Glorot's rule.
    """
    model = ViTMAEForPreTraining(small_config())
    side = model.config.image_size // model.config.patch_size
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        table.data.copy_(sine_positions(side, table.shape[-1]))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
    projection = model.vit.embeddings.patch_embeddings.projection.weight
    torch.nn.init.xavier_uniform_(projection.data.view(len(projection), -1))
    torch.nn.init.normal_(model.decoder.mask_token, std=0.02)
    torch.nn.init.zeros_(model.decoder.decoder_pred.weight)
    look_at_neighbours(model.vit.layers[0].attention, model.config.num_attention_heads)
    look_at_neighbours(model.decoder.decoder_layers[0].attention, model.config.decoder_num_attention_heads)
    return model


def mask_scores(batch: int, side: int, device: torch.device) -> Tensor:
    """Scores [B, L] of which the largest mark the kept patches; smooth to a random degree, image by image."""
    coarse = torch.randn(batch, 1, 3, 3, device=device)
    coarse = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
    share = torch.rand(batch, 1, 1, 1, device=device) * (torch.rand(batch, 1, 1, 1, device=device) < 0.5)
    return (share * coarse + (1 - share) * torch.randn(batch, 1, side, side, device=device)).flatten(1)


class MaskedAutoencoderTraining(L.LightningModule):
    """AdamW with a warm-up and a cosine over the given time."""

    def __init__(self, minutes: float, learning_rate: float) -> None:
        super().__init__()
        self.minutes, self.learning_rate = minutes, learning_rate
        self.model = make_model()
        self.register_buffer("mean", torch.tensor(CIFAR10_MEAN).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(CIFAR10_STD).view(1, 3, 1, 1) * 255)

    def on_train_start(self) -> None:
        self.started = time.monotonic()

    def progress(self) -> float:
        return min(1.0, (time.monotonic() - self.started) / (60 * self.minutes))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images = (batch[0].float() - self.mean) / self.std
        mirrored = torch.rand(len(images), 1, 1, 1, device=self.device) < 0.5
        images = torch.where(mirrored, images.flip(3), images)
        side = images.shape[-1] // PATCH
        count = side * side
        # one number of patches for a batch; the encoder's cost is proportional to it
        kept = int(torch.randint(round(0.2 * count), round(0.9 * count) + 1, ()))
        self.model.config.mask_ratio = 1 - (kept + 0.5) / count
        chosen = choose_kept(mask_scores(len(images), side, self.device), kept)
        mask = mask_of(chosen, count)
        smooth = fill_harmonically(images, mask, PATCH, tolerance=0.01)
        # distinct noise, the kept patches first
        noise = torch.arange(count, device=self.device) + count * ~mask
        predicted = self.model(images, noise=noise.float()).logits
        target = self.model.patchify(images - smooth)
        loss = F.mse_loss(predicted[~mask].float(), target[~mask])
        warm = min(1.0, self.progress() / 0.03)
        for group in self.optimizers().param_groups:
            group["lr"] = self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * self.progress()))
        self.log("loss", loss.detach(), on_step=False, on_epoch=True)
        if self.progress() >= 1:
            self.trainer.should_stop = True
        return loss

    def on_train_epoch_end(self) -> None:
        loss = float(self.trainer.callback_metrics["loss"])
        print(f"epoch {self.current_epoch}: loss {loss:.4f}, {self.progress():.1%} of the time", flush=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, self.learning_rate, betas=(0.9, 0.95), weight_decay=0.05)


def test_errors(folder: Path, images: Tensor, device: torch.device) -> dict[str, list[float]]:
    """Mean squared error of the dropped pixels, in [0, 1]^2, for each way of filling and each of `DROP_RATIOS`."""
    mae = load_mae(folder, device=device)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (mae.mean, mae.std))
    errors: dict[str, list[float]] = {}
    for ratio in DROP_RATIOS:
        generator = torch.Generator().manual_seed(0)
        sums, pixels = dict.fromkeys(("autoencoder", "harmonic", "mean colour"), 0.0), 0
        for batch in images.split(250):
            plain = batch.to(device).float() / 255
            grid = Grid(*plain.shape[2:], PATCH)
            scores = torch.rand(len(plain), grid.num_patches, generator=generator).to(device)
            kept = choose_kept(scores, kept_count(grid.num_patches, ratio))
            mask = mask_of(kept, grid.num_patches)
            stays = pixel_mask(mask, grid)
            filled = {
                "autoencoder": (mae.reconstruct((plain - mean) / std, kept) * std + mean).clamp(0, 1),
                "harmonic": fill_harmonically(plain, mask, PATCH),
                "mean colour": fill_with_mean(plain, stays),
            }
            pixels += 3 * int((~stays).sum())
            for name, image in filled.items():
                sums[name] += float(((image - plain) ** 2 * ~stays).sum())
        for name, total in sums.items():
            errors.setdefault(name, []).append(total / pixels)
    return errors


def save(model: ViTMAEForPreTraining, folder: Path) -> None:
    """The network in half precision and what its output means, as `load_mae` reads them."""
    model.config.mask_ratio = 0.5
    model.cpu().half().save_pretrained(folder)
    preprocessing = {"image_mean": CIFAR10_MEAN, "image_std": CIFAR10_STD, "harmonic": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights and their configuration")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    L.seed_everything(args.seed)
    images = torch.from_numpy(CIFAR10(args.data, train=True).data).permute(0, 3, 1, 2).contiguous()
    if torch.cuda.is_available():
        # 150 MB: there they need no loader
        images = images.cuda()
    dataset = TensorDataset(images)
    # a list of positions for an item: whole batches are cut from the tensor at once
    batches = BatchSampler(RandomSampler(dataset), args.batch_size, drop_last=True)
    module = MaskedAutoencoderTraining(args.minutes, args.learning_rate)
    trainer = L.Trainer(
        max_epochs=-1,
        precision=args.precision,
        logger=False,
        devices=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    )
    trainer.fit(module, DataLoader(dataset, sampler=batches, batch_size=None))
    steps, seconds = module.global_step, time.monotonic() - module.started
    save(module.model, args.output)
    print(
        f"{steps} steps of {args.batch_size}, {steps * args.batch_size / seconds:.0f} images/s, saved in {args.output}"
    )
    test = torch.from_numpy(CIFAR10(args.data, train=False).data[: args.test_images]).permute(0, 3, 1, 2)
    print("squared error of dropped pixels at drop ratios", *DROP_RATIOS)
    for name, values in test_errors(args.output, test, images.device).items():
        print(f"  {name:12}", *(f"{value:.5f}" for value in values))


if __name__ == "__main__":
    main()
