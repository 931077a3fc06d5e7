"""Every kind of image becomes RGB bytes."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from dq_lightning.core.errors import SourceError
from dq_lightning.sources.adapt import as_source
from dq_lightning.sources.pixels import header_problem, to_rgb

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


def rgb_image():
    return Image.fromarray(np.stack([RAMP, RAMP[::-1], 255 - RAMP], axis=-1))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "YCbCr", "HSV", "RGB", "RGBX"])
def test_pil_modes_give_the_pixels_of_pillows_conversion(mode):
    image = rgb_image().convert(mode)
    seen = to_rgb(image)
    assert seen.mode == "RGB"
    assert seen.size == image.size
    assert np.array_equal(np.asarray(seen), np.asarray(image.convert("RGB")))


def test_palette_with_transparency_bytes_is_read_without_a_warning():
    image = rgb_image().convert("P")
    image.info["transparency"] = bytes(range(256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = to_rgb(image)
    del image.info["transparency"]
    assert np.array_equal(np.asarray(seen), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", [".png", ".tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, kind):
    wide = RAMP.astype(np.uint16) * 257
    Image.fromarray(wide).save(tmp_path / f"wide{kind}")
    with Image.open(tmp_path / f"wide{kind}") as image:
        assert image.mode.startswith("I;16")
        assert np.array_equal(np.asarray(to_rgb(image))[..., 0], RAMP)


def test_sixteen_bits_round_to_the_nearest():
    wide = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(np.asarray(to_rgb(wide))[..., 1], np.rint(wide / 257).astype(np.uint8))


def test_float_tiff_in_unit_range_keeps_its_picture(tmp_path):
    Image.fromarray((RAMP / 255).astype(np.float32)).save(tmp_path / "float.tif")
    with Image.open(tmp_path / "float.tif") as image:
        assert image.mode == "F"
        source = as_source([(image.copy(), 0), (image.copy(), 1)])
    assert np.array_equal(np.asarray(source.image(1))[..., 2], RAMP)


@pytest.mark.parametrize("make", [torch.from_numpy, np.asarray])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays_of_either_layout(make, channels):
    last = np.stack([RAMP, 255 - RAMP, RAMP[::-1], RAMP][:channels], axis=-1)
    wanted = np.repeat(last, 3, axis=-1) if channels == 1 else last[..., :3]
    assert np.array_equal(np.asarray(to_rgb(make(last.copy()))), wanted)
    assert np.array_equal(np.asarray(to_rgb(make(np.ascontiguousarray(last.transpose(2, 0, 1))))), wanted)
    assert np.array_equal(np.asarray(to_rgb(make(RAMP.copy())))[..., 1], RAMP)


def test_ambiguous_layout_is_channels_first_for_tensors_and_last_for_arrays():
    square = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert np.array_equal(np.asarray(to_rgb(square)), square)
    assert np.array_equal(np.asarray(to_rgb(torch.from_numpy(square))), square.transpose(1, 2, 0))


def test_bool_and_bfloat16_tensors():
    mask = torch.from_numpy(RAMP > 100)
    assert np.array_equal(np.asarray(to_rgb(mask))[..., 0], np.where(RAMP > 100, 255, 0))
    half = torch.tensor([[0.0, 0.5], [1.0, 0.25]], dtype=torch.bfloat16)
    assert np.asarray(to_rgb(half))[..., 0].tolist() == [[0, 128], [255, 64]]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (torch.tensor([0.0, 0.2, 1.0]), [0, 51, 255]),
        (torch.tensor([0.0, 17.0, 255.0]), [0, 17, 255]),
        (torch.tensor([0, 17, 200]), [0, 17, 200]),
        (torch.tensor([0, 257, 65535], dtype=torch.int32), [0, 1, 255]),
    ],
)
def test_the_scale_of_a_source_follows_its_range(values, wanted):
    items = [(torch.full((3, 4, 4), value.item(), dtype=values.dtype), 0) for value in values]
    source = as_source(items)
    assert [np.asarray(source.image(i))[0, 0, 0] for i in range(3)] == wanted


def test_normalised_floats_are_stretched_with_a_warning_and_one_scale_for_all():
    items = [(torch.full((3, 4, 4), value), 0) for value in (-2.0, 0.0, 2.0)]
    source = as_source(items)
    with pytest.warns(UserWarning, match=r"\[-2, 2\]"):
        source.check_repeatable()
    seen = [int(np.asarray(source.image(i))[0, 0, 0]) for i in range(3)]
    assert seen == [0, 128, 255]


def test_not_finite_values_are_an_error_with_the_index():
    items = [(torch.zeros(3, 4, 4), 0), (torch.full((3, 4, 4), float("nan")), 0)]
    with pytest.raises(SourceError, match=r"Item 1 .*finite"):
        as_source(items).image(1)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (5000, 4000)])
def test_tiny_and_huge(size):
    assert to_rgb(Image.new("L", size, 7)).size == size


def test_header_problems(tmp_path):
    def saved(image, name, **options):
        image.save(tmp_path / name, **options)
        return str(tmp_path / name)

    rotated = Image.Exif()
    rotated[0x0112] = 6
    upright = Image.Exif()
    upright[0x0112] = 1
    wide = Image.fromarray(RAMP.astype(np.uint16) * 257)
    assert "white" in header_problem(saved(wide, "wide.png"))
    assert "white" in header_problem(saved(wide, "wide.tif"))
    assert "black" in header_problem(saved(Image.fromarray((RAMP / 255).astype(np.float32)), "float.tif"))
    assert "orientation 6" in header_problem(saved(rgb_image(), "turned.jpg", exif=rotated))
    assert header_problem(saved(rgb_image(), "upright.jpg", exif=upright)) is None
    for name in ("plain.png", "plain.bmp", "plain.webp"):
        assert header_problem(saved(rgb_image(), name)) is None
    (tmp_path / "text.png").write_text("no image")
    assert header_problem(str(tmp_path / "text.png")) is None
