"""Every kind of image file, through the whole flow.

What is shown elsewhere: pixels of each mode, 16 bits, floats, sizes (tests/sources/test_pixels.py); files that are cut, empty
or text, gone, or known to be decoded wrongly (tests/sources/test_files.py); left out and counted (test_on_error.py).
"""

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from dq_lightning import as_source, load_selection
from dq_lightning.pipeline.compact import open_packed
from tests.inputs.broken import compact, picture, settings

MODES = ("L", "LA", "RGBA", "P", "1", "CMYK")
KIND_OF = {"LA": "png", "RGBA": "png", "P": "png", "1": "bmp", "CMYK": "jpg", "L": "tif"}


def save_all(folder):
    """One file of each kind; returns what is doubtful, by name."""
    place = folder / "class"
    place.mkdir(parents=True)
    for mode in MODES:
        picture(1, (20, 16), mode).save(place / f"mode-{mode}.{KIND_OF[mode]}")
    palette = picture(2, (20, 16)).quantize(8)
    palette.save(place / "palette-transparent.png", transparency=bytes([0, 128, 255, 255, 255, 255, 255, 255]))
    deep = np.arange(320, dtype=np.uint16).reshape(16, 20) * 200
    Image.fromarray(deep).save(place / "deep.png")
    Image.fromarray(deep).save(place / "deep.tif")
    Image.fromarray((deep / deep.max()).astype(np.float32)).save(place / "float.tif")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(3, (20, 16)).save(place / "turned.jpg", exif=turned)
    picture(4, (1, 1)).save(place / "tiny.png")
    picture(5, (1, 3000)).save(place / "thin.png")
    picture(6, (3000, 1)).save(place / "flat.bmp")
    return {
        "deep.png": "nearly white",
        "deep.tif": "nearly white",
        "float.tif": "turn black",
        "turned.jpg": "orientation 6",
    }


@pytest.fixture
def kinds(tmp_path):
    doubtful = save_all(tmp_path / "images")
    return ImageFolder(str(tmp_path / "images")), doubtful


def test_every_kind_is_read_as_rgb_and_doubtful_ones_are_named(kinds):
    dataset, doubtful = kinds
    source = as_source(dataset)
    for index in range(len(source)):
        name = source.sample_id(index).split("/")[-1]
        image = source.image(index)
        assert image.mode == "RGB"
        warning = source.decode_warning(index)
        assert (warning is not None) == (name in doubtful), name
        if name in doubtful:
            assert doubtful[name] in warning
            assert name in warning
            assert f"Item {index} " in warning


def test_every_kind_goes_through_the_flow_and_is_delivered_as_it_was(kinds, tmp_path, caplog):
    dataset, _ = kinds
    info = compact(dataset, tmp_path / "cache", settings(1.0, store="packed"))
    assert info.num_samples == len(dataset)
    # only where features are made does it matter what an encoder sees
    compact(dataset, tmp_path / "cache", settings(0.5))
    assert any("may have been decoded wrongly" in message for message in caplog.messages)
    for at, (image, label) in enumerate(open_packed(info.path)):
        wanted, target = dataset[int(load_selection(info.path).index[at])]
        assert (image.mode, image.size, image.tobytes(), label) == (wanted.mode, wanted.size, wanted.tobytes(), target)
