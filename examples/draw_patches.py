"""Draw what the step on patches does: image, saliency, kept patches and reconstruction, a row for each image.

    python examples/draw_patches.py --output docs/patches.png
    python examples/draw_patches.py --output photos.png --photos IMAGE_FOLDER --classifier tf_efficientnet_lite0 \
        --weights FILE --reconstructor facebook/vit-mae-base

Without a folder it takes test images of the bundled CIFAR-10 sample, with the bundled classifier and autoencoder, and enlarges
them. Of a folder with one subfolder a class it takes the first image of each class, cut to squares.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dq_lightning import PatchConfig
from dq_lightning.core.grid import pixel_mask
from dq_lightning.core.records import Grid
from dq_lightning.demo.sample_data import SampleCIFAR10
from dq_lightning.patches.choose import choose_kept, kept_count, mask_of
from dq_lightning.patches.fill import fill_pixels
from dq_lightning.pipeline.patch_plan import PatchPlan, make_patch_plan

GAP, GREY = 6, 128
# low, middle, high
COLOURS = ((20, 20, 90), (200, 60, 60), (255, 230, 90))
CLASSES = (0, 1, 3, 5, 7, 8)


def sample_images(count: int) -> tuple[list[Image.Image], Tensor]:
    """The first test image of some classes, and their labels."""
    data = SampleCIFAR10(train=False)
    chosen = [data.targets.index(label) for label in CLASSES[:count]]
    return [data[i][0] for i in chosen], torch.tensor([data.targets[i] for i in chosen])


def folder_images(folder: Path, count: int, side: int) -> list[Image.Image]:
    """The first image of each class as a square."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())[:count]
    files = [min(path for path in one.iterdir() if path.is_file()) for one in classes]
    return [ImageOps.fit(Image.open(file).convert("RGB"), (side, side)) for file in files]


def heat(scores: Tensor, grid: Grid) -> np.ndarray:
    """Scores [L] as colours uint8 [H, W, 3], a square for each patch, from the least to the most salient."""
    ranks = scores.argsort().argsort().double() / (len(scores) - 1)
    stops = np.array(COLOURS, dtype=float)
    colours = np.stack([np.interp(ranks, (0, 0.5, 1), stops[:, channel]) for channel in range(3)], -1)
    cells = colours.reshape(*(-(-side // grid.patch_size) for side in (grid.height, grid.width)), 3)
    wide = cells.repeat(grid.patch_size, 0).repeat(grid.patch_size, 1)
    return wide[: grid.height, : grid.width].round().astype(np.uint8)


def draw(images: Tensor, labels: Tensor | None, plan: PatchPlan, side: int) -> Image.Image:
    """The picture of images uint8 [B, 3, H, W]; every panel is `side` pixels wide."""
    size = plan.patch_size
    grid = Grid(*images.shape[2:], size)
    scorer = plan.load_scorer("cpu", None if labels is None else 10)
    scores = scorer.scores(images, labels, torch.arange(len(images)), size)
    mask = mask_of(choose_kept(scores, kept_count(grid.num_patches, plan.config.drop_ratio)), grid.num_patches)
    model = plan.reconstructor.load()
    filled = fill_pixels(model, images, mask, size, model.mean, model.std)
    kept = torch.where(pixel_mask(mask, grid), images, GREY)
    rows = []
    for i in range(len(images)):
        panels = [images[i].permute(1, 2, 0).numpy(), heat(scores[i], grid)]
        panels += [kept[i].permute(1, 2, 0).numpy(), filled[i].permute(1, 2, 0).numpy()]
        rows.append([Image.fromarray(np.ascontiguousarray(p)).resize((side, side), Image.NEAREST) for p in panels])
    step = side + GAP
    sheet = Image.new("RGB", (len(rows[0]) * step - GAP, len(rows) * step - GAP), "white")
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            sheet.paste(panel, (j * step, i * step))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--drop-ratio", type=float, default=0.5)
    parser.add_argument("--saliency", default="gradcam")
    parser.add_argument("--classifier", default="auto")
    parser.add_argument("--weights")
    parser.add_argument("--reconstructor", default="auto")
    parser.add_argument("--side", type=int, default=128, help="width and height of a panel in pixels")
    args = parser.parse_args()
    if args.photos is None:
        chosen, labels = sample_images(args.count)
    else:
        chosen, labels = folder_images(args.photos, args.count, 224), None
    config = PatchConfig(
        drop_ratio=args.drop_ratio,
        saliency=args.saliency,
        classifier=args.classifier,
        weights=args.weights,
        reconstructor=args.reconstructor,
    )
    plan = make_patch_plan(config, chosen[0].size[::-1])
    images = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in chosen])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet = draw(images, labels, plan, args.side)
    sheet.save(args.output, optimize=True)
    print(f"{args.output}: {sheet.width} x {sheet.height} pixels, {args.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
