"""Bytes, pixel errors and decoding speed of stored patches against plain files of equal quality, in one run.

    python benchmarks/patch_store.py --images DIR [--weights FILE] [--count 200] [--qualities 75 90] [--layouts]

DIR is an ImageFolder of ten Imagenette classes, 224 x 224; FILE the weights of timm's tf_efficientnet_lite0, which chooses
the patches by Grad-CAM (without it only random patches are measured). All bytes of an entry are counted: pixels, masks, labels,
ids, positions, checksums, JSON. "error" is the mean squared error on the kept pixels over that of the plain file. "--layouts"
tries other orders of the patches. Small images are raw; their time is compared with a plain column, in batches of 50.
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dq_lightning.core.config import PatchConfig
from dq_lightning.core.grid import pixel_mask
from dq_lightning.core.records import Grid
from dq_lightning.packed.patches import pack_image, unpack_image
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.packed.writer import write_packed
from dq_lightning.patches.choose import choose_patches
from dq_lightning.patches.saliency import make_scorer

PATCH, DROP, ROUNDS = 16, 0.2, 15
IMAGENET_CLASSES = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)


def file_of(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def read_images(folder: Path, count: int) -> tuple[list[Image.Image], list[int]]:
    files = sorted(folder.glob("*/*"))
    files = files[:: max(1, len(files) // count)][:count]
    classes = sorted({file.parent.name for file in files})
    return [Image.open(file).convert("RGB") for file in files], [classes.index(file.parent.name) for file in files]


def masks_of(images: list[Image.Image], labels: list[int], saliency: str, weights: str | None) -> list[torch.Tensor]:
    """The patches that are kept of every image, bool [L]."""
    network = None
    if weights:
        import timm

        overlay = {"file": weights}
        network = timm.create_model("tf_efficientnet_lite0", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    half = (0.5, 0.5, 0.5)
    scorer = make_scorer(PatchConfig(saliency=saliency), network, mean=half, std=half, num_classes=1000)
    targets = torch.tensor([IMAGENET_CLASSES[label] for label in labels])
    scores = []
    for start in range(0, len(images), 16):
        chunk = images[start : start + 16]
        pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in chunk])
        positions = torch.arange(start, start + len(chunk))
        scores += list(scorer.scores(pixels, targets[positions], positions, PATCH))
    choice = choose_patches(scores, [image.size[::-1] for image in images], PATCH, DROP)
    return [choice.mask(i) for i in range(len(images))]


def entry_bytes(images, labels, masks, codec: str, quality: int, patch_size: int = PATCH) -> tuple[int, list]:
    """Bytes of the entry on the disk, and its patched images."""
    patched = [pack_image(image, mask, patch_size, codec, quality) for image, mask in zip(images, masks, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), zip(patched, labels, strict=True), len(images))
        return sum(path.stat().st_size for path in Path(folder).iterdir()), patched


def write(folder: Path, samples, count: int) -> None:
    zeros = torch.zeros(count, dtype=torch.int16)
    names = [f"{i:08d}" for i in range(count)]
    items = ((sample, None) for sample in samples)
    write_packed(folder, items, ids=names, index=torch.arange(count), bins=zeros, attributes={})


def kept_error(arrays, images, masks) -> float:
    """Mean squared error over the kept pixels."""
    total = count = 0
    for seen, image, mask in zip(arrays, images, masks, strict=True):
        truth = np.asarray(image)
        kept = pixel_mask(mask[None], Grid(*truth.shape[:2], PATCH))[0, 0].numpy()
        total += ((seen[kept].astype(np.float64) - truth[kept]) ** 2).sum()
        count += 3 * kept.sum()
    return float(total / count)


def decoded(data: bytes, kind: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data), formats=[kind]))


def time_ratio(ours, our_items, theirs, their_items) -> tuple[float, float]:
    """Microseconds of ours, and of theirs over ours: the best of some rounds of every item, in turns."""
    best = np.full((2, len(our_items)), np.inf)
    for _ in range(ROUNDS):
        for row, (call, items) in enumerate(((ours, our_items), (theirs, their_items))):
            for column, item in enumerate(items):
                started = time.perf_counter()
                call(item)
                best[row, column] = min(best[row, column], time.perf_counter() - started)
    mine, other = best.sum(1) / len(our_items) * 1e6
    return mine, other / mine


def compare(images, labels, masks, chosen: str, qualities: list[int]) -> None:
    for codec, kind in (("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")):
        for quality in qualities if codec != "png" else [0]:
            options = {"quality": quality} if quality else {}
            plain = [file_of(image, format=kind, **options) for image in images]
            small = {"method": 6} if codec == "webp" else {"optimize": True}
            squeezed = [file_of(image, format=kind, **options, **small) for image in images]
            size, patched = entry_bytes(images, labels, masks, codec, quality)
            microseconds, faster = time_ratio(unpack_image, patched, lambda data, k=kind: decoded(data, k), plain)
            error = kept_error([unpack_image(item)[0] for item in patched], images, masks)
            other = kept_error([decoded(data, kind) for data in plain], images, masks)
            relative = f"error {error / other:.3f} of {other:.2f}" if other else f"error {error:g}"
            print(
                f"{chosen:8} {codec:4} {quality or '':2}  bytes {size / sum(map(len, plain)):.3f} of plain, "
                f"{size / sum(map(len, squeezed)):.3f} of optimized; {relative}; "
                f"decoding {microseconds:.0f} us, {faster:.2f} times the plain file's speed"
            )


def compare_same_error(images, labels, masks, chosen: str, quality: int) -> None:
    """The JPEG quality at which the kept pixels are at least as near as in the plain file."""
    plain = [file_of(image, format="JPEG", quality=quality) for image in images]
    wanted = kept_error([decoded(data, "JPEG") for data in plain], images, masks)
    for ours in range(quality, min(quality + 6, 101)):
        size, patched = entry_bytes(images, labels, masks, "jpeg", ours)
        if kept_error([unpack_image(item)[0] for item in patched], images, masks) <= wanted:
            print(
                f"{chosen:8} jpeg {quality}  at no larger error: quality {ours}, bytes {size / sum(map(len, plain)):.3f}"
            )
            return
    print(f"{chosen:8} jpeg {quality}  no quality up to {ours} has no larger error")


def try_layouts(images, masks, quality: int) -> None:
    """JPEG and WebP of the kept patches in several orders; bytes of the image files alone."""
    for kind, settings in (
        ("JPEG", [{}, {"optimize": True}, {"progressive": True}, {"optimize": True, "subsampling": 0}]),
        ("WEBP", [{}, {"method": 6}]),
    ):
        base = sum(len(file_of(image, format=kind, quality=quality)) for image in images)
        for options in settings:
            sizes = dict.fromkeys(("row", "serpentine", "column", "reflowed", "in place"), 0)
            for image, mask in zip(images, masks, strict=True):
                for name, laid in layouts(np.asarray(image), mask.numpy()):
                    sizes[name] += len(file_of(Image.fromarray(laid), format=kind, quality=quality, **options))
            print(kind, quality, options, " ".join(f"{name} {size / base:.3f}" for name, size in sizes.items()))


def layouts(pixels: np.ndarray, mask: np.ndarray):
    rows, columns = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
    cells = pixels.reshape(rows, PATCH, columns, PATCH, 3).swapaxes(1, 2).reshape(-1, PATCH, PATCH, 3)
    order = np.arange(rows * columns).reshape(rows, columns)
    turned = np.where(np.arange(rows)[:, None] % 2, order[:, ::-1], order)

    def laid(numbers: np.ndarray, width: int) -> np.ndarray:
        spare = np.repeat(numbers[-1:], -len(numbers) % width)
        grid = cells[np.concatenate([numbers, spare])].reshape(-1, width, PATCH, PATCH, 3).swapaxes(1, 2)
        return np.ascontiguousarray(grid).reshape(-1, width * PATCH, 3)

    kept = np.flatnonzero(mask)
    yield "row", laid(kept, len(kept))
    yield "serpentine", laid(turned.ravel()[mask[turned.ravel()]], len(kept))
    yield "column", laid(order.T.ravel()[mask[order.T.ravel()]], 1)
    yield "reflowed", laid(kept, columns)
    flat = pixels[pixel_mask(torch.from_numpy(mask)[None], Grid(*pixels.shape[:2], PATCH))[0, 0].numpy()].mean(0)
    cells = np.where(mask[:, None, None, None], cells, flat.round().astype(np.uint8))
    yield "in place", laid(order.ravel(), columns)


def compare_small(images, labels) -> None:
    """Raw patches of 32 x 32 images against plain columns, read one by one."""
    small = [image.resize((32, 32)) for image in images]
    masks = [torch.randperm(64, generator=torch.Generator().manual_seed(i)) < 51 for i in range(len(small))]
    with tempfile.TemporaryDirectory() as folder:
        patched = [pack_image(image, mask, 4, "raw") for image, mask in zip(small, masks, strict=True)]
        write(Path(folder, "patched"), zip(patched, labels, strict=True), len(small))
        write(Path(folder, "plain"), zip(small, labels, strict=True), len(small))
        ours, theirs = PackedDataset(Path(folder, "patched")), PackedDataset(Path(folder, "plain"))
        sizes = [sum(path.stat().st_size for path in Path(folder, name).iterdir()) for name in ("patched", "plain")]
        batches = [list(range(start, start + 50)) for start in range(0, len(small) - 49, 50)]
        microseconds, faster = time_ratio(ours.__getitems__, batches, theirs.__getitems__, batches)
        print(
            f"raw, 32 px: bytes {sizes[0] / sizes[1]:.3f} of plain columns; {microseconds / 50:.1f} us a sample, "
            f"{faster:.2f} times their speed"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--qualities", type=int, nargs="+", default=[75, 90])
    parser.add_argument("--layouts", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images, labels = read_images(options.images, options.count)
    print(f"{len(images)} images, {DROP:.0%} of the patches of {PATCH} pixels dropped")
    for chosen in (("gradcam",) if options.weights else ()) + ("random",):
        masks = masks_of(images, labels, chosen, options.weights)
        compare(images, labels, masks, chosen, options.qualities)
        for quality in options.qualities:
            compare_same_error(images, labels, masks, chosen, quality)
        if options.layouts:
            for quality in options.qualities:
                try_layouts(images, masks, quality)
    compare_small(images, labels)


if __name__ == "__main__":
    main()
