"""Kept patches come out of a store again: bit by bit where the codec loses nothing, else as from the whole image's file."""

import copy
import io
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dq_lightning.core.arrays import MAX_ELEMENTS
from dq_lightning.core.errors import DQError, StoreError
from dq_lightning.core.grid import pixel_mask
from dq_lightning.core.records import MAX_PIXELS, Grid, PatchedImage, pack_mask
from dq_lightning.packed import values
from dq_lightning.packed.patch_stream import (
    MAX_HEAD_BYTES,
    read_stream,
    read_uvarint,
    shared_heads,
    uvarint,
    write_stream,
)
from dq_lightning.packed.patches import image_leaf, layout_of, pack_image, unpack_image
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.packed.writer import LOOK_AHEAD_SAMPLES, estimate_bytes, write_packed
from tests.store.test_damage import reseal
from tests.store.test_packed import pack, photo
from tests.store.trees import equal

relaxed = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
LAYOUTS = ["pil", "array", "tensor", "array_hw1", "tensor_1hw"]


def leaf_of(pixels: Any, layout: str) -> Any:
    """An image of pixels [H, W, C] as a dataset may deliver it."""
    flat = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    return {
        "pil": lambda: Image.fromarray(flat),
        "array": lambda: flat.copy(),
        "tensor": lambda: torch.from_numpy(flat.copy() if flat.ndim == 2 else flat.transpose(2, 0, 1).copy()),
        "array_hw1": lambda: pixels.copy(),
        "tensor_1hw": lambda: torch.from_numpy(pixels.transpose(2, 0, 1).copy()),
    }[layout]()


def pixels_of(height: int, width: int, channels: int, seed: int = 0) -> Any:
    image = np.asarray(photo(width, height, seed))
    return np.ascontiguousarray(image[..., :channels])


def some_mask(height: int, width: int, patch_size: int, kept: int, seed: int = 0) -> torch.Tensor:
    count = Grid(height, width, patch_size).num_patches
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:kept]] = True
    return mask


def kept_pixels(mask: torch.Tensor, height: int, width: int, patch_size: int) -> Any:
    """Mask bool [H, W] as the grid of the patches draws it."""
    return pixel_mask(mask[None], Grid(height, width, patch_size))[0, 0].numpy()


def mean_of(pixels: Any, kept: Any) -> Any:
    """Slow twin of the mean colour."""
    chosen = pixels[kept].astype(np.float64)
    return np.floor(chosen.mean(0) + 0.5) if len(chosen) else np.zeros(pixels.shape[2])


@pytest.mark.parametrize("codec", ["raw", "png"])
@relaxed
@given(st.data())
def test_lossless_codecs_keep_every_kept_pixel(codec: str, data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    patch_size = data.draw(st.integers(1, 45))
    layout = data.draw(st.sampled_from(LAYOUTS))
    channels = 1 if layout.endswith(("hw1", "1hw")) else data.draw(st.sampled_from([1, 3]))
    count = Grid(height, width, patch_size).num_patches
    mask = some_mask(height, width, patch_size, data.draw(st.sampled_from([0, 1, count // 2, count])), seed=height)
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, channels), dtype=np.uint8)
    patched = pack_image(leaf_of(pixels, layout), mask, patch_size, codec, 90)
    assert (patched.height, patched.width, patched.layout) == (height, width, layout)
    assert (patched.num_patches, patched.num_kept) == (count, int(mask.sum()))
    assert torch.equal(patched.mask_tensor(), mask)
    seen, seen_mask = unpack_image(patched)
    kept = kept_pixels(mask, height, width, patch_size)
    assert np.array_equal(seen_mask, mask.numpy())
    assert np.array_equal(seen[kept], pixels[kept])
    assert (seen[~kept] == mean_of(pixels, kept)).all()
    if bool(mask.all()):
        assert equal(image_leaf(patched, seen), leaf_of(pixels, layout))
    if codec == "raw":
        assert len(patched.data) == int(kept.sum()) * channels


def error(seen: Any, pixels: Any, kept: Any) -> float:
    """Mean absolute difference of the kept pixels."""
    return float(np.abs(seen[kept].astype(int) - pixels[kept]).mean())


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("patch_size", [8, 14, 16, 24, 200])
def test_lossy_codecs_stay_near_and_keep_the_type(codec: str, layout: str, patch_size: int) -> None:
    channels = 3 if layout in ("pil", "array", "tensor") else 1
    pixels = pixels_of(90, 67, channels)
    for kept_count in (0, 1, Grid(90, 67, patch_size).num_patches):
        mask = some_mask(90, 67, patch_size, kept_count)
        patched = pack_image(leaf_of(pixels, layout), mask, patch_size, codec, 95)
        seen, _ = unpack_image(patched)
        kept = kept_pixels(mask, 90, 67, patch_size)
        flat = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
        whole = Image.open(io.BytesIO(file_of(flat, format=codec.upper(), quality=95))).convert(flat.mode)
        if kept_count:
            assert error(seen, pixels, kept) < 4 * error(np.asarray(whole).reshape(pixels.shape), pixels, kept) + 1
        else:
            assert not seen.any()
        assert (seen[~kept] == mean_of(seen, kept)).all()
        leaf, original = image_leaf(patched, seen), leaf_of(pixels, layout)
        assert type(leaf) is type(original)
        assert np.shape(leaf) == np.shape(original)


def file_of(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize(("patch_size", "channels"), [(8, 3), (16, 3), (24, 3), (16, 1)])
@pytest.mark.parametrize("quality", [30, 75, 95])
def test_a_jpeg_of_the_patches_is_the_jpeg_of_the_image(
    patch_size: int, channels: int, quality: int, imagenette: list[Image.Image]
) -> None:
    for seed, photograph in enumerate(imagenette):
        image = photograph.crop((0, 0, 216, 216)) if patch_size == 24 else photograph
        image = image if channels == 3 else image.convert("L")
        side = image.size[0]
        mask = some_mask(side, side, patch_size, Grid(side, side, patch_size).num_patches * 4 // 5, seed)
        seen, _ = unpack_image(pack_image(image, mask, patch_size, "jpeg", quality, subsampling=0))
        whole = decoded(file_of(image, format="JPEG", quality=quality, subsampling=0)).reshape(side, side, channels)
        kept = kept_pixels(mask, side, side, patch_size)
        assert np.array_equal(seen[kept], whole[kept])


def test_partial_patches_repeat_their_last_row_and_column_before_the_codec(imagenette: list[Image.Image]) -> None:
    image = imagenette[0].crop((0, 0, 203, 219))
    pixels = np.asarray(image)
    mask = some_mask(219, 203, 16, 100)
    # libjpeg pads an image in the same way
    whole = decoded(file_of(image, format="JPEG", quality=80, subsampling=0))
    kept = kept_pixels(mask, 219, 203, 16)
    seen, _ = unpack_image(pack_image(pixels, mask, 16, "jpeg", 80, subsampling=0))
    assert np.array_equal(seen[kept], whole[kept])


def test_halved_chroma_bleeds_by_one_pixel_at_most(imagenette: list[Image.Image]) -> None:
    for seed, image in enumerate(imagenette):
        mask = some_mask(224, 224, 16, 157, seed)
        seen, _ = unpack_image(pack_image(image, mask, 16, "jpeg", 85))
        whole = decoded(file_of(image, format="JPEG", quality=85, subsampling=2))
        inner = np.zeros((16, 16), bool)
        inner[1:-1, 1:-1] = True
        inside = kept_pixels(mask, 224, 224, 16) & np.tile(inner, (14, 14))
        assert np.array_equal(seen[inside], whole[inside])


@pytest.fixture(scope="module")
def imagenette(shared_dir: Path) -> list[Image.Image]:
    files = sorted((shared_dir / "data" / "imagenette_224_small" / "val").glob("*/*"))[::100]
    return [Image.open(path).convert("RGB") for path in files]


def squared(seen: list[Any], images: list[Image.Image], kept: list[Any]) -> float:
    """Sum of the squared differences of the kept pixels."""
    each = zip(seen, images, kept, strict=True)
    return sum(float(((one[mask].astype(float) - np.asarray(image)[mask]) ** 2).sum()) for one, image, mask in each)


def test_real_entries_are_small(tmp_path: Path, imagenette: list[Image.Image]) -> None:
    # few samples: what is written once for the store is left out of the comparison
    images = imagenette * 8
    masks = [some_mask(224, 224, 16, 157, seed) for seed in range(len(images))]
    for codec, bound in (("jpeg", 0.80), ("webp", 0.85)):
        items = [(pack_image(image, mask, 16, codec, 90), 3) for image, mask in zip(images, masks, strict=True)]
        folder = pack(tmp_path / codec, items)
        files = [file_of(image, format=codec.upper(), quality=90) for image in images]
        plain = sum(map(len, files))
        ours = [unpack_image(item)[0] for item, _ in items]
        kept = [kept_pixels(mask, 224, 224, 16) for mask in masks]
        assert squared(ours, images, kept) < 1.6 * squared([decoded(data) for data in files], images, kept)
        names = ("values.bin", "value_offsets.npy", "checksums.npy", "column-1.npy", "index.npy", "bin.npy")
        assert sum((folder / name).stat().st_size for name in names) < bound * plain
        assert estimate_bytes([(item, None) for item in items], len(items)) == pytest.approx(
            (folder / "values.bin").stat().st_size, rel=0.05
        )


def test_alike_raw_patches_are_a_column_and_others_a_value(tmp_path: Path) -> None:
    alike = [(pack_image(photo(32, 32, i), some_mask(32, 32, 4, 51, i), 4, "raw"), i) for i in range(9)]
    read = PackedDataset(pack(tmp_path / "alike", alike), patches="packed")
    assert np.load(tmp_path / "alike" / "column-0.npy").shape == (9, 8 + 51 * 48)
    assert (tmp_path / "alike" / "values.bin").stat().st_size == 0
    assert list(read) == alike
    counts = [(pack_image(photo(32, 32, i), some_mask(32, 32, 4, 51 + i, i), 4, "raw"), i) for i in range(9)]
    sizes = [(pack_image(photo(30 + i, 32, i), some_mask(32, 30 + i, 4, 51, i), 4, "raw"), i) for i in range(9)]
    partial = [(pack_image(photo(30, 30, i), some_mask(30, 30, 4, 51, i), 4, "raw"), i) for i in range(9)]
    for name, items in {"counts": counts, "sizes": sizes, "partial": partial}.items():
        folder = pack(tmp_path / name, items)
        assert not (folder / "column-0.npy").exists()
        payload = sum(len(item.mask) + len(item.data) for item, _ in items)
        assert (folder / "values.bin").stat().st_size <= payload + 6 * len(items)
        assert list(PackedDataset(folder, patches="packed")) == items


def test_raw_patches_of_large_photos_come_back(tmp_path: Path) -> None:
    """Height x width x side of a patch x bytes is beyond the number of elements that an array may have."""
    pixels = np.broadcast_to(np.arange(2400, dtype=np.uint8)[:, None, None], (2400, 2000, 3))
    image = pack_image(np.ascontiguousarray(pixels), some_mask(2400, 2000, 100, 300), 100, "raw")
    assert 2400 * 2000 * 100 * len(image.data) > MAX_ELEMENTS
    folder = pack(tmp_path / "s", [image, image])
    assert (folder / "column-0.npy").exists()
    assert list(PackedDataset(folder, patches="packed")) == [image, image]


@pytest.mark.parametrize("codec", ["raw", "png", "jpeg", "webp"])
def test_samples_that_differ_after_the_look_ahead_come_back(tmp_path: Path, codec: str) -> None:
    usual = (pack_image(photo(32, 32), some_mask(32, 32, 8, 9), 8, codec), 1)
    items: list[Any] = [usual] * (LOOK_AHEAD_SAMPLES + 8)
    items[-7] = (pack_image(photo(32, 32), some_mask(32, 32, 8, 4), 8, codec), 2)
    items[-6] = (pack_image(photo(9, 40), some_mask(40, 9, 8, 3), 8, codec), 2)
    items[-5] = (pack_image(photo(32, 32), some_mask(32, 32, 4, 9), 4, "png"), 3)
    items[-4] = (photo(32, 32), 4)
    items[-3] = {"another": [usual[0], None]}
    items[-2] = (None, 1 << 70)
    folder = pack(tmp_path / "s", items)
    assert all(map(equal, items, PackedDataset(folder, patches="packed")))
    whole = PackedDataset(folder)
    for item, seen in zip(items, whole, strict=True):
        images = item["another"][:1] if isinstance(item, dict) else [item[0]]
        shown = seen["another"][:1] if isinstance(seen, dict) else [seen[0]]
        for image, there in zip(images, shown, strict=True):
            expected = image_leaf(image, unpack_image(image)[0]) if isinstance(image, PatchedImage) else image
            assert equal(there, expected)


def test_a_sample_alone_pickled_and_finished(tmp_path: Path) -> None:
    items = [({"x": pack_image(photo(48, 32, i), some_mask(32, 48, 16, 4, i), 16, "jpeg"), "y": i}) for i in range(30)]
    folder = pack(tmp_path / "s", items)
    read = PackedDataset(folder, finisher=lambda at, sample: (at, sample["x"].size))
    assert read[17] == (17, (48, 32))
    assert read.has_patches
    assert read.patched(-13) == items[17]["x"]
    again = pickle.loads(pickle.dumps(PackedDataset(folder, patches="packed")))
    assert again.__getitems__([3, 29]) == [items[3], items[29]]
    plain = PackedDataset(pack(tmp_path / "plain", [1, 2]))
    assert not plain.has_patches
    with pytest.raises(StoreError, match="no image that was stored by patches"):
        plain.patched(1)
    with pytest.raises(DQError, match="patches"):
        PackedDataset(folder, patches="whole")


@pytest.mark.parametrize("codec", ["raw", "jpeg"])
def test_every_flipped_bit_is_noticed(tmp_path: Path, codec: str) -> None:
    items = [(pack_image(photo(32, 32, i), some_mask(32, 32, 8, 12, i), 8, codec), i) for i in range(4)]
    folder = pack(tmp_path / "s", items)
    path = folder / ("column-0.npy" if codec == "raw" else "values.bin")
    original = path.read_bytes()
    draw = np.random.default_rng(0)
    for place in draw.integers(128 if codec == "raw" else 0, len(original), 60):
        changed = bytearray(original)
        changed[place] ^= 1 << int(draw.integers(8))
        path.write_bytes(changed)
        read = PackedDataset(folder)
        with pytest.raises(StoreError, match="checksum"):
            list(read)
        # without checksums a damaged file is an error or other pixels, never a crash
        loose = PackedDataset(folder, verify="off")
        for at in range(len(loose)):
            try:
                assert loose[at][0].size == (32, 32)
            except (StoreError, AssertionError):
                continue


def patched(**changes: Any) -> PatchedImage:
    usual = pack_image(photo(32, 32), some_mask(32, 32, 8, 12), 8, "png")
    facts = {name: getattr(usual, name) for name in PatchedImage.__dataclass_fields__}
    return PatchedImage(**(facts | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"height": 0},
        {"width": -8},
        {"height": 1 << 40},
        {"height": 2.0},
        {"patch_size": 0},
        {"mode": "CMYK"},
        {"layout": "list"},
        {"layout": "array_hw1"},
        {"codec": "gif"},
        {"mask": b"\xff"},
        {"mask": b"\xff\xff\xff"},
        {"height": 24, "mask": b"\xff\xff"},
        {"height": MAX_PIXELS, "patch_size": MAX_PIXELS},
    ],
)
def test_facts_that_do_not_fit_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(StoreError):
        patched(**changes)


def bomb(kind: str) -> bytes:
    """An image of 6,000 x 6,000 pixels in a small file."""
    return file_of(Image.new("RGB", (6000, 6000)), format=kind.upper())


@pytest.mark.parametrize(
    "changes",
    [
        {"data": b""},
        {"data": b"nothing"},
        {"codec": "jpeg"},
        {"codec": "webp"},
        {"codec": "raw"},
        {"mask": b"\0\0"},
        {"mask": b"\x01\0"},
        {"mode": "L"},
        {"bomb": "png"},
        {"bomb": "jpeg", "codec": "jpeg"},
        {"bomb": "webp", "codec": "webp"},
        {"data": file_of(Image.new("RGB", (96, 8)), format="JPEG")[:-200], "codec": "jpeg"},
    ],
)
def test_data_that_do_not_fit_are_refused_in_bounded_memory(changes: dict[str, Any]) -> None:
    if "bomb" in changes:
        changes = changes | {"data": bomb(changes["bomb"])}
        del changes["bomb"]
    hostile = patched(**changes)
    tracemalloc.start()
    try:
        with pytest.raises(StoreError):
            unpack_image(hostile)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_jpeg_with_two_frames_is_not_trusted() -> None:
    usual = pack_image(photo(32, 32), some_mask(32, 32, 8, 12), 8, "jpeg")
    frame = usual.data.index(b"\xff\xc0")
    size = 2 + int.from_bytes(usual.data[frame + 2 : frame + 4], "big")
    larger = bytearray(usual.data[frame : frame + size])
    larger[5:9] = b"\xff\x00\xff\x00"
    for data in (
        usual.data[:frame] + bytes(larger) + usual.data[frame:],
        usual.data[: frame + size] + bytes(larger) + usual.data[frame + size :],
        usual.data[:frame] + bytes(larger) + usual.data[frame + size :],
    ):
        with pytest.raises(StoreError):
            unpack_image(PatchedImage(**(vars_of(usual) | {"data": data})))


def vars_of(image: PatchedImage) -> dict[str, Any]:
    return {name: getattr(image, name) for name in PatchedImage.__dataclass_fields__}


HOSTILE_LEAVES: dict[str, dict[str, Any]] = {
    "huge": {"shape": [1 << 30, 1 << 30, 1, 1]},
    "huge patches": {"shape": [32, 32, 1 << 40, 12]},
    "zero": {"shape": [0, 32, 8, 12]},
    "negative": {"shape": [-32, 32, 8, 12]},
    "short": {"shape": [32]},
    "codec": {"dtype": "RGB/pil/gif"},
    "encoded column": {"dtype": "RGB/pil/png"},
    "facts": {"dtype": "RGB"},
    "many pixels": {"shape": [32, 32, 8, 1 << 30]},
    "stream": {"kind": "stream"},
    "shared": {"shared": "no digits"},
}


@pytest.mark.parametrize("name", HOSTILE_LEAVES)
def test_hostile_descriptions_are_errors(tmp_path: Path, name: str) -> None:
    item = pack_image(photo(32, 32), some_mask(32, 32, 8, 12), 8, "raw")
    folder = pack(tmp_path / "s", [item, item])
    reseal(folder, lambda description: description["columns"][0].update(HOSTILE_LEAVES[name]))
    for verify in ("size", "off"):
        with pytest.raises(StoreError):
            list(PackedDataset(folder, verify=verify))


@relaxed
@given(st.binary(max_size=60))
def test_any_bytes_are_an_image_or_an_error(data: bytes) -> None:
    usual = pack_image(photo(32, 32), some_mask(32, 32, 8, 12), 8, "jpeg")
    shared = shared_heads([usual])
    for codec in ("raw", "jpeg"):
        try:
            read = read_stream(data, ("RGB", "pil", codec, 8), shared)
        except StoreError:
            continue
        assert len(read.data) <= MAX_HEAD_BYTES + len(data)


@relaxed
@given(st.integers(0, (1 << 63) - 1))
def test_counts_come_back(number: int) -> None:
    assert read_uvarint(uvarint(number), 0) == (number, len(uvarint(number)))
    with pytest.raises(StoreError, match="does not end"):
        read_uvarint(uvarint(number)[:-1], 0)


def test_heads_are_squeezed_and_come_back() -> None:
    images = [pack_image(photo(64, 64, i), some_mask(64, 64, 16, 9, i), 16, "jpeg", 80) for i in range(6)]
    shared = shared_heads(images[:2])
    for image in images:
        stream = write_stream(image, shared)
        assert read_stream(stream, ("RGB", "pil", "jpeg", 16), shared) == image
        assert len(stream) < len(image.mask) + len(image.data) - 150


def test_values_hold_patched_images() -> None:
    value = [pack_image(photo(20, 30), some_mask(30, 20, 8, 5), 8, "png"), {1: "x"}]
    assert values.decode_value(values.encode_value(value)) == value
    node = values.encode_value(value[0]).replace(b'"RGB"', b'["R"]')
    with pytest.raises(StoreError):
        values.decode_value(node)


@pytest.mark.parametrize(
    "leaf",
    [
        Image.new("CMYK", (8, 8)),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((3, 8, 8), np.uint8),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
        torch.zeros(3, 8, 8),
        np.zeros((0, 8, 3), np.uint8),
        "image.png",
    ],
)
def test_other_images_are_refused_with_advice(leaf: Any) -> None:
    with pytest.raises(StoreError, match="deliver a Pillow image of mode RGB or L"):
        pack_image(leaf, torch.ones(1, dtype=torch.bool), 8, "raw")


def test_masks_and_sizes_that_do_not_fit_are_refused() -> None:
    for mask in (torch.ones(3, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)):
        with pytest.raises(StoreError, match="mask"):
            pack_image(photo(16, 16), mask, 8, "png")
    wide = Image.new("L", (1 << 14, 4))
    with pytest.raises(StoreError, match="jpeg"):
        pack_image(wide, some_mask(4, 1 << 14, 16, 9), 16, "webp")


@pytest.mark.parametrize("codec", ["png", "jpeg"])
def test_long_strips_are_broken(codec: str) -> None:
    pixels = pixels_of(136, 8400, 1)
    mask = some_mask(136, 8400, 8, 17000)
    seen, _ = unpack_image(pack_image(pixels, mask, 8, codec, 90))
    kept = kept_pixels(mask, 136, 8400, 8)
    whole = (
        pixels
        if codec == "png"
        else decoded(file_of(Image.fromarray(pixels[..., 0]), format="JPEG", quality=90))[..., None]
    )
    patched_image = PatchedImage(136, 8400, "L", "array_hw1", 8, pack_mask(mask), codec, b"")
    assert layout_of(patched_image).strip_cells[0] == 3
    assert np.array_equal(seen[kept], whole[kept])


def test_records_are_values() -> None:
    one = patched()
    assert one == copy.deepcopy(one)
    assert hash(one) == hash(pickle.loads(pickle.dumps(one)))


def test_raw_images_of_any_size_are_columns_when_wanted(tmp_path: Path) -> None:
    images = [photo(300, 200, i) for i in range(3)]
    write_packed(
        tmp_path / "s",
        [((image, 0), None) for image in images],
        ids=list("abc"),
        index=torch.arange(3),
        bins=torch.zeros(3, dtype=torch.int16),
        attributes={},
        raw_images=True,
    )
    assert np.load(tmp_path / "s" / "column-0.npy").shape == (3, 200, 300, 3)
    assert all(equal(seen, image) for (seen, _), image in zip(PackedDataset(tmp_path / "s"), images, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_is_what_its_samples_are(tmp_path: Path, layout: str) -> None:
    channels = 3 if layout in ("pil", "array", "tensor") else 1
    items: list[Any] = [
        (pack_image(leaf_of(pixels_of(24, 40, channels, i), layout), some_mask(24, 40, 8, 11, i), 8, "raw"), i)
        for i in range(LOOK_AHEAD_SAMPLES + 5)
    ]
    items[-2] = (pack_image(leaf_of(pixels_of(24, 40, channels), layout), some_mask(24, 40, 8, 2), 8, "raw"), 0)
    items[-1] = "another"
    folder = pack(tmp_path / "s", items)
    read = PackedDataset(folder)
    positions = [3, -1, 0, len(items) - 2, 3, 50]
    batch = read.__getitems__(positions)
    assert all(equal(seen, read[position]) for seen, position in zip(batch, positions, strict=True))
    assert PackedDataset(folder, patches="packed").__getitems__(positions) == [items[i] for i in positions]
    path = folder / "column-0.npy"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="checksum"):
        PackedDataset(folder).__getitems__([0, 1])


def test_columns_of_whole_and_of_partial_patches_side_by_side(tmp_path: Path) -> None:
    whole = pack_image(photo(32, 32), some_mask(32, 32, 8, 9), 8, "raw")
    partial = pack_image(photo(30, 30), some_mask(30, 30, 8, 9), 8, "raw")
    read = PackedDataset(pack(tmp_path / "s", [(whole, partial, whole)] * 3))
    assert equal(read.__getitems__([0, -1]), [read[0], read[2]])
    assert [image.size for image in read[1]] == [(32, 32), (30, 30), (32, 32)]
    assert read.__getitems__([]) == []
    with pytest.raises(IndexError):
        read.__getitems__([0, 3])
    empty = PackedDataset(pack(tmp_path / "empty", []))
    assert empty.__getitems__([]) == []
