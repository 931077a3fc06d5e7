"""What an image is beside its pixels comes out of a packed store again: info, EXIF tags, frames, class and format."""

import contextlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin
from PIL.TiffImagePlugin import IFDRational

from dq_lightning.core.errors import StoreError
from dq_lightning.core.records import EncodedImage, PatchedImage
from dq_lightning.packed.columns import describe_leaf
from dq_lightning.packed.patch_stream import MAX_PROPERTIES_BYTES
from dq_lightning.packed.patches import mean_filled, pack_image
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.packed.values import decode_value, encode_value, properties_setter
from tests.store.test_packed import pack
from tests.store.trees import equal

ORIENTATION = 0x0112
SMALL, LARGE = (20, 12), (130, 90)


def drawn(size: tuple[int, int], seed: int = 0, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def file(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned() -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = 6
    return tags


def texts() -> PngImagePlugin.PngInfo:
    made = PngImagePlugin.PngInfo()
    made.add_text("Title", "a cat")
    made.add_itxt("Titre", "un chat", "fr", "Titre")
    return made


def files(size: tuple[int, int]) -> dict[str, bytes]:
    image, others = drawn(size), [drawn(size, 1), drawn(size, 2)]
    return {
        "turned jpeg": file(image, "JPEG", exif=turned(), dpi=(300, 300), icc_profile=b"a profile", comment=b"hello"),
        "turned webp": file(image, "WEBP", exif=turned()),
        "texts": file(image, "PNG", pnginfo=texts(), exif=turned(), dpi=(30, 30)),
        "transparent colour": file(image, "PNG", transparency=(1, 2, 3)),
        "transparent palette": file(drawn(size, mode="P"), "PNG", transparency=bytes(range(200))),
        "animated": file(image, "GIF", save_all=True, append_images=others, duration=[10, 20, 30], loop=2),
        "pages": file(image, "TIFF", save_all=True, append_images=others, dpi=(300, 300)),
        "two views": file(image, "MPO", save_all=True, append_images=others[:1]),
        "16 bits": file(Image.fromarray(np.arange(size[0] * size[1], dtype=np.uint16).reshape(size[1], -1)), "PNG"),
        "grey with alpha": file(drawn(size, mode="LA"), "PNG", dpi=(30, 30)),
    }


def opened(data: bytes, how: str, path: Path) -> Any:
    """An image as datasets deliver it."""
    if how == "from a path":
        path.write_bytes(data)
        image = Image.open(path)
        image.load()
        return image
    image = Image.open(io.BytesIO(data))
    if how == "copied":
        return image.copy()
    return image.convert("RGB") if how == "converted" else image


@pytest.mark.parametrize("how", ["open", "from a path", "copied", "converted"])
@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("name", files(SMALL))
def test_the_image_that_comes_out_is_the_one_that_went_in(tmp_path: Path, name: str, size: Any, how: str) -> None:
    data = files(size)[name]
    items = [(opened(data, how, tmp_path / f"file {i}"), i) for i in range(3)]
    stored = list(PackedDataset(pack(tmp_path / "s", items)))
    for (image, _), (seen, _) in zip(items, stored, strict=True):
        assert equal(image, seen)
        assert [type(value) for value in image.info.values()] == [type(value) for value in seen.info.values()]
        assert ImageOps.exif_transpose(seen).size == ImageOps.exif_transpose(image).size
        assert getattr(seen, "n_frames", None) == getattr(image, "n_frames", None)
        if name == "texts":
            assert (seen.info["Titre"].lang, seen.info["Titre"].tkey) == ("fr", "Titre")
        if getattr(seen, "n_frames", 1) > 1:
            seen.seek(1)
            again = Image.open(io.BytesIO(data))
            again.seek(1)
            assert seen.tobytes() == again.tobytes()
    pickle.dumps(stored)


@pytest.mark.parametrize("name", ["animated", "pages"])
def test_a_later_frame_is_kept_as_an_image(tmp_path: Path, name: str) -> None:
    image = Image.open(io.BytesIO(files(LARGE)[name]))
    image.seek(1)
    (seen,) = PackedDataset(pack(tmp_path / "s", [image]))
    assert seen.tobytes() == image.tobytes()
    assert (seen.mode, seen.format, seen.info) == (image.mode, image.format, image.info)
    # all but where in the file the pixels are
    places = {273, 279}
    assert {k: v for k, v in seen.getexif().items() if k not in places} == {
        k: v for k, v in image.getexif().items() if k not in places
    }


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_infos_that_differ_from_sample_to_sample(tmp_path: Path, size: Any) -> None:
    """The orientation of each photo is its own, whatever the first ones have."""
    items = []
    for number in range(80):
        image = drawn(size, number)
        if number % 7 == 3 or number >= 70:
            image.info["exif"] = turned().tobytes()
        image.info["number"] = number if number > 68 else 0
        items.append((image, number))
    for (image, _), (seen, _) in zip(items, PackedDataset(pack(tmp_path / "s", items)), strict=True):
        assert equal(image, seen)


def test_an_info_of_its_own(tmp_path: Path) -> None:
    items = [drawn(SMALL, i) for i in range(3)]
    for image in items:
        image.info = {"dpi": (72, 72), "notes": ["a"], "fraction": IFDRational(1, 3), "none": IFDRational(0, 0)}
    store = PackedDataset(pack(tmp_path / "s", items))
    assert (tmp_path / "s" / "column-0.npy").exists()
    store[0].info["notes"].append("b")
    store[0].info["dpi"] = None
    assert store[0].info["notes"] == ["a"]
    assert store[0].info["dpi"] == (72, 72)
    assert store[0].info["fraction"] == IFDRational(1, 3)
    assert repr(store[0].info["none"]) == "nan"


def test_original_bytes_keep_the_pixels_where_the_dataset_dropped_the_info(tmp_path: Path) -> None:
    data = file(drawn(LARGE), "JPEG", exif=turned())
    bare = Image.fromarray(np.asarray(Image.open(io.BytesIO(data))))
    folder = pack(tmp_path / "s", [bare], [EncodedImage(data, "pil_rgb")])
    assert (folder / "values.bin").stat().st_size < len(data) + 200
    (seen,) = PackedDataset(folder)
    assert equal(seen, bare)
    assert not seen.info


def test_exif_tags_that_were_changed_in_memory(tmp_path: Path) -> None:
    for size in (SMALL, LARGE):
        image = drawn(size)
        image.getexif()[ORIENTATION] = 8
        (seen,) = PackedDataset(pack(tmp_path / str(size), [image]))
        assert dict(seen.getexif()) == {ORIENTATION: 8}
        assert ImageOps.exif_transpose(seen).size == size[::-1]


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_what_cannot_be_stored_beside_an_image_is_refused(tmp_path: Path, size: Any) -> None:
    image = drawn(size)
    image.info["where"] = tmp_path
    with pytest.raises(StoreError, match=r"sample 0: .*info.*'where'.*Path.*indices"):
        pack(tmp_path / "info", [image])

    class Mine(Image.Image):
        pass

    mine = Mine()
    mine.__dict__.update(drawn(size).__dict__)
    with pytest.raises(StoreError, match=r"sample 0: .*Mine.*indices"):
        pack(tmp_path / "class", [mine])


@pytest.mark.parametrize("codec", ["raw", "png", "jpeg", "webp"])
@pytest.mark.parametrize("one_size", [True, False])
def test_patched_images_keep_their_info(tmp_path: Path, codec: str, one_size: bool) -> None:
    items: list[Any] = []
    for number in range(70):
        size = (32, 24 if one_size else 24 + number % 3)
        image = drawn(size, number)
        image.format = "JPEG"
        image.info = {"exif": turned().tobytes(), "icc_profile": bytes(range(256)) * 4}
        if number % 9 == 5:
            image.info = {"number": number}
        if number == 66:
            image.info = {"large": np.random.default_rng(0).bytes(MAX_PROPERTIES_BYTES + 1)}
        count = -(-size[1] // 8) * 4
        mask = torch.arange(count) % 4 != 0
        items.append((pack_image(image, mask, 8, codec), image))
    folder = pack(tmp_path / "s", [patched for patched, _ in items])
    packed, filled = PackedDataset(folder, patches="packed"), PackedDataset(folder)
    for number, (patched, image) in enumerate(items):
        assert packed[number] == patched
        seen = filled.__getitems__([number])[0]
        assert (seen.info, seen.format, seen.size) == (image.info, image.format, image.size)
        assert equal(seen, mean_filled(patched))
    if codec != "raw" or not one_size:
        # a profile that all share is not written seventy times
        assert (folder / "values.bin").stat().st_size < sum(
            len(p.data) + 200 for p, _ in items
        ) + MAX_PROPERTIES_BYTES + 1000


def test_hostile_properties(tmp_path: Path) -> None:
    nested = encode_value(("PNG", {"x": drawn(SMALL)}, None))
    for bad in (nested, encode_value(("PNG", {})), encode_value((1, {}, None)), encode_value([]), b"\0", b"\xff" * 9):
        with pytest.raises(StoreError):
            properties_setter(bad)
        patched = pack_image(drawn(SMALL), torch.ones(6, dtype=torch.bool), 8, "raw")
        lying = PatchedImage(**(vars(patched) | {"properties": bad}))
        with pytest.raises(StoreError):
            mean_filled(lying)
    for tags in (b"", b"Exif\0\0", b"no tags at all", b"II*\0\xff\xff\xff\xff", turned().tobytes()[:-9]):
        with contextlib.suppress(StoreError):
            properties_setter(encode_value((None, {}, tags)))(drawn(SMALL))
    broken = encode_value({"a": IFDRational(1, 3)}).replace(b'"0x3"', b'"0xz"')
    with pytest.raises(StoreError):
        decode_value(broken)


def test_plain_images_are_described_as_before() -> None:
    assert describe_leaf(drawn(SMALL)).properties == b""
