"""Squared error of dropped pixels on CIFAR-10 test images: the bundled autoencoder, the harmonic filling, the mean colour.

    python benchmarks/mae_error.py --cifar DATA_DIR [--images 10000] [--mae FOLDER] [--device auto]

Patches of 4 pixels are dropped at random, and by Grad-CAM of the bundled classifier for the true label, at several drop ratios.
The error is the mean over all dropped pixels and channels, in units of [0, 1] squared; the autoencoder's values are clamped to
that range, and nothing is rounded.
"""

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.datasets import CIFAR10

from dq_lightning import PatchConfig, load_mae
from dq_lightning.core.devices import resolve_device
from dq_lightning.core.grid import pixel_mask
from dq_lightning.core.records import Grid
from dq_lightning.features.bundled import CIFAR10_MEAN, CIFAR10_STD, load_small_resnet
from dq_lightning.patches.choose import choose_kept, kept_count, mask_of
from dq_lightning.patches.harmonic import fill_harmonically, fill_with_mean
from dq_lightning.patches.mae import bundled_folder
from dq_lightning.patches.saliency import PatchScorer, make_scorer

PATCH = 4
DROP_RATIOS = (0.2, 0.5, 0.75)
FILLINGS = ("autoencoder", "harmonic", "mean colour")


def scorers(device: torch.device) -> dict[str, PatchScorer]:
    network = load_small_resnet()[0].to(device).eval()
    options = {"mean": CIFAR10_MEAN, "std": CIFAR10_STD, "num_classes": 10}
    return {
        "random": make_scorer(PatchConfig(saliency="random")),
        "Grad-CAM": make_scorer(PatchConfig(saliency="gradcam", target="label"), network, **options),
    }


def errors(mae, images: Tensor, scores: Tensor, ratio: float) -> tuple[list[float], int]:
    """Sum of squared errors of the dropped values for each of `FILLINGS`, and the number of these values."""
    plain = images.float() / 255
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (mae.mean, mae.std))
    grid = Grid(*plain.shape[2:], PATCH)
    kept = choose_kept(scores, kept_count(grid.num_patches, ratio))
    mask = mask_of(kept, grid.num_patches)
    stays = pixel_mask(mask, grid)
    filled = (
        (mae.reconstruct((plain - mean) / std, kept) * std + mean).clamp(0, 1),
        fill_harmonically(plain, mask, PATCH),
        fill_with_mean(plain, stays),
    )
    sums = [float(F.mse_loss(image * ~stays, plain * ~stays, reduction="sum")) for image in filled]
    return sums, 3 * int((~stays).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", required=True)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--mae", default=str(bundled_folder()))
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = resolve_device(args.device)
    test = CIFAR10(args.cifar, train=False)
    images = torch.from_numpy(test.data[: args.images]).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(test.targets[: args.images])
    mae = load_mae(args.mae, device=device)
    print(f"{len(images)} test images, patches of {PATCH} pixels")
    print("| masks | drop ratio |", " | ".join(FILLINGS), "| autoencoder / harmonic |\n|---|---|---|---|---|---|")
    for name, scorer in scorers(device).items():
        totals = {ratio: ([0.0] * len(FILLINGS), 0) for ratio in DROP_RATIOS}
        for start in range(0, len(images), 250):
            chosen = torch.arange(start, min(start + 250, len(images)))
            batch, own = images[chosen].to(device), labels[chosen].to(device)
            scores = scorer.scores(batch, own, chosen, PATCH)
            for ratio, (sums, count) in totals.items():
                more, values = errors(mae, batch, scores, ratio)
                totals[ratio] = [a + b for a, b in zip(sums, more, strict=True)], count + values
        for ratio, (sums, count) in totals.items():
            cells = " | ".join(f"{total / count:.5f}" for total in sums)
            print(f"| {name} | {ratio} | {cells} | {sums[0] / sums[1]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
