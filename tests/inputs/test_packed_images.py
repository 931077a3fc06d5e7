"""Images of all sorts through a packed set: what the transform sees is what the dataset gives, with and without patches."""

import io
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import ConcatDataset
from torchvision.datasets import ImageFolder

from dq_lightning import PackedDataset, PatchConfig, QuantizedDataModule, as_source, load_selection
from dq_lightning.core.errors import SourceError, StoreError
from dq_lightning.exports.command import export_set
from dq_lightning.exports.samples import kept_of_store
from dq_lightning.identity.values import digest_of
from tests.inputs.broken import MeanColour, Pictures, compact, encode, encoded, picture, settings
from tests.lightning_scripts.common import to_tensor
from tests.lightning_scripts.patched_images import small_mae
from tests.robustness.worlds import Edges

ORIENTATION = 0x0112


class Looking:
    """A transform that uses the image and says all that it sees."""

    def __call__(self, image):
        turned = ImageOps.exif_transpose(image)
        profile, dpi = image.info.get("icc_profile"), image.info.get("dpi")
        return turned.size, turned.mode, turned.tobytes(), profile, dpi, dict(image.getexif())


def photo(seed, size, orientation):
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    file = io.BytesIO()
    picture(seed, size=size).save(file, "JPEG", exif=tags, dpi=(seed + 1, seed + 1), icc_profile=b"profile")
    return file.getvalue()


@pytest.fixture(params=[(40, 24), (160, 100)], ids=["small", "large"])
def rotated(request, tmp_path):
    """A folder of photos that are turned in eight ways."""
    for index in range(16):
        place = tmp_path / "images" / ("ab"[index // 8]) / f"{index:02}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(photo(index, request.param, 1 + index % 8))
    return tmp_path / "images"


def module_of(data, cache, **more):
    more = {"config": settings()} | more
    if "store" in more:
        more["config"] = replace(more["config"], store=more.pop("store"))
    made = QuantizedDataModule(
        data, encoder=(MeanColour(), encode), cache_dir=cache, device="cpu", num_workers=0, **more
    )
    made.prepare_data()
    made.setup("fit")
    return made


def delivered(module):
    dataset = module.train_dataloader().dataset
    return [dataset[number] for number in range(len(dataset))]


def patches(**more):
    return settings(patches=PatchConfig(**{"drop_ratio": 0.5, "saliency": "variance", "patch_size": 8} | more))


def test_rotated_photos_packed(rotated, tmp_path):
    data = ImageFolder(str(rotated), transform=Looking())
    module = module_of(data, tmp_path / "cache", store="packed")
    assert delivered(module) == [data[index] for index in module.selection.index.tolist()]


@pytest.mark.parametrize("reconstruct", ["off", "prepare"])
def test_rotated_photos_with_dropped_patches(rotated, tmp_path, reconstruct):
    data = ImageFolder(str(rotated), transform=Looking())
    config = PatchConfig(drop_ratio=0.25, saliency="variance", patch_size=4, reconstruct=reconstruct)
    module = module_of(data, tmp_path / "cache", config=settings(patches=config), reconstructor=small_mae())
    for (seen, label), index in zip(delivered(module), module.selection.index.tolist(), strict=True):
        wanted, wanted_label = data[index]
        assert (seen[:2], seen[3:], label) == (wanted[:2], wanted[3:], wanted_label)


def test_exported_photos_are_turned_as_before(rotated, tmp_path):
    data = ImageFolder(str(rotated))
    info = compact(data, tmp_path / "cache", patches(reconstruct="off"))
    for kept in kept_of_store(info.path):
        image = Image.open(io.BytesIO(kept.data))
        original = Image.open(data.samples[kept.position][0])
        assert image.getexif()[ORIENTATION] == original.getexif()[ORIENTATION]
        assert image.info["icc_profile"] == original.info["icc_profile"]


class Files(Pictures):
    """Images as they were opened, not converted."""

    def __init__(self, folder, transform=None, **more):
        super().__init__(**more)
        self.folder, self.transform = folder, transform
        folder.mkdir(exist_ok=True)
        for index in range(self.count):
            (folder / f"{index}.gif").write_bytes(encoded(index, "GIF", size=(20, 20)))

    def __getitem__(self, index):
        image = Image.open(self.folder / f"{index}.gif")
        return image if self.transform is None else self.transform(image), index % 2


def test_a_transform_that_asks_for_what_is_not_kept_is_refused_before_the_work(tmp_path):
    def named(image):
        return image.filename.encode()

    with pytest.raises(SourceError, match=r"does not give the same for sample .*store=\"indices\""):
        module_of(Files(tmp_path / "images", named), tmp_path / "cache", store="packed")
    assert not list((tmp_path / "cache").glob("1-features/*"))
    module = module_of(Files(tmp_path / "images", lambda image: image.n_frames), tmp_path / "cache", store="packed")
    assert {frames for frames, _ in delivered(module)} == {1}


def test_images_that_say_other_things_of_themselves_are_other_data():
    plain, turned, dense = picture(0), picture(0), picture(0)
    turned.info["exif"] = b"Exif"
    dense.info["dpi"] = (300, 300)
    assert len({digest_of(image) for image in (plain, turned, dense)}) == 3


MODES = ["1", "P", "LA", "RGBA", "CMYK", "I", "F", "I;16"]


def of_mode(mode, seed=0):
    if mode == "I;16":
        return Image.fromarray(np.random.default_rng(seed).integers(0, 65535, (24, 24), dtype=np.uint16))
    return picture(seed, size=(24, 24), mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_no_mode_is_changed_when_patches_are_dropped(tmp_path, mode):
    """A dataset of other modes is refused before the work; a few among others stay as they are."""
    data = Pictures(broken={index: (of_mode(mode, index), 0) for index in range(20)})
    with pytest.raises(StoreError, match=rf"mode {mode}, 24 x 24.*convert\(\"RGB\"\)"):
        compact(data, tmp_path / "refused", patches(reconstruct="off"))
    assert not list((tmp_path / "refused").glob("1-features/*"))

    odd = {4: (of_mode(mode, 4), 0), 9: (of_mode(mode, 9), 1)}
    data = Pictures(broken={index: (of_mode("RGB", index), index % 2) for index in range(20)} | odd)
    config = patches(reconstruct="off")
    info = compact(data, tmp_path / "cache", settings(1.0, patches=config.patches))
    assert info.num_samples == 20
    for index, (image, target) in zip(load_selection(info.path).index.tolist(), PackedDataset(info.path), strict=True):
        wanted = data[index]
        assert (image.mode, image.size, target) == (wanted[0].mode, wanted[0].size, wanted[1])
        if index in odd:
            assert image.tobytes() == wanted[0].tobytes()


def test_a_few_images_of_other_modes_are_told_and_filled_around(tmp_path, caplog):
    data = Pictures(
        broken={index: (of_mode("RGB", index), index % 2) for index in range(20)} | {5: (of_mode("RGBA"), 1)}
    )
    config = settings(1.0, patches=PatchConfig(drop_ratio=0.25, saliency="variance", patch_size=4))
    module = module_of(data, tmp_path / "cache", config=config, reconstructor=small_mae())
    assert delivered(module)[5][0].mode == "RGBA"
    (told,) = [message for message in caplog.messages if "are stored whole" in message]
    assert "1 images" in told
    assert "samples 5" in told


def test_undecoded_images_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": encoded(i, size=(24, 24)), "path": None} for i in range(20)], "label": [0, 1] * 10}
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict(rows, features=features)
    with pytest.raises(
        StoreError, match=r"dict \(an image of Hugging Face datasets that is not decoded\).*cast_column"
    ):
        compact(table, tmp_path, patches())
    assert not list(tmp_path.glob("1-features/*"))
    info = compact(table, tmp_path, settings(store="packed"))
    kept = load_selection(info.path).index.tolist()
    assert [row["image"]["bytes"] for row in PackedDataset(info.path)] == [rows["image"][i]["bytes"] for i in kept]


@pytest.mark.parametrize("leaf", [torch.rand(3, 8, 8), np.zeros((8, 8, 4), np.uint8), "text"])
def test_messages_name_kinds_and_shapes(tmp_path, leaf):
    data = Pictures(broken=dict.fromkeys(range(20), (leaf, 0)))
    source = as_source(Pictures())
    assert source.image_leaf() == (0,)
    with pytest.raises((StoreError, SourceError)) as refused:
        compact(data, tmp_path, patches())
    assert "built-in" not in str(refused.value)


# on_error="skip"


@pytest.mark.parametrize("reconstruct", ["off", "prepare"])
@pytest.mark.parametrize("broken", [range(3), [0, 19], [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]], ids=str)
def test_skipping_with_patches(tmp_path, broken, reconstruct):
    broken = {index: OSError("gone") for index in broken}
    data = Pictures(broken={i: (of_mode("RGB", i), i % 2) for i in range(20)} | broken)
    config = settings(
        0.25, patches=PatchConfig(drop_ratio=0.25, saliency="variance", patch_size=4, reconstruct=reconstruct)
    )
    module = module_of(data, tmp_path, config=config, reconstructor=small_mae(), on_error="skip")
    assert (module.info.num_samples, module.info.num_unreadable) == (5, len(broken))
    assert len(delivered(module)) == 5


def test_skipping_files_with_patches(tmp_path):
    for index in range(12):
        place = tmp_path / "images" / ("ab"[index // 6]) / f"{index:02}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded(index, "JPEG", size=(40, 40)))
    data = ImageFolder(str(tmp_path / "images"), transform=to_tensor)
    (tmp_path / "images" / "a" / "00.jpg").unlink()
    (tmp_path / "images" / "b" / "11.jpg").write_bytes(b"text")
    networks = {"classifier": (Edges(), to_tensor), "reconstructor": small_mae()}
    for number, more in enumerate(
        [{"store": "packed"}, {"config": settings(patches=PatchConfig(drop_ratio=0.5)), **networks}]
    ):
        module = module_of(data, tmp_path / f"cache{number}", on_error="skip", **more)
        assert (module.info.num_samples, module.info.num_unreadable) == (6, 2)
        assert [target for _, target in delivered(module)] == [data.targets[i] for i in module.selection.index]


class WithMasks(Pictures):
    """Items (image, mask); a mask is opened and not read, as Pillow does it."""

    def __getitem__(self, index):
        data = encoded(index, size=(24, 24), mode="L")
        return of_mode("RGB", index), Image.open(io.BytesIO(data[: len(data) // 2] if index in (7, 8) else data))


def test_a_damaged_mask_is_left_out_before_the_work(tmp_path):
    info = compact(WithMasks(), tmp_path, settings(store="packed"), on_error="skip", labels=False)
    assert (info.num_samples, info.num_unreadable) == (10, 2)
    assert not {7, 8} & set(load_selection(info.path).index.tolist())


# file names


@pytest.mark.parametrize("format", ["imagefolder", "parquet", "huggingface", "webdataset", "litdata", "indices"])
@pytest.mark.parametrize("store", ["indices", "packed"])
def test_names_that_are_no_utf_8_are_exported(tmp_path, format, store):
    if format == "litdata":
        pytest.importorskip("litdata")
    folder = os.fsencode(tmp_path / "images" / "a")
    os.makedirs(folder)  # noqa: PTH103
    for index in range(8):
        with open(os.path.join(folder, b"bad \xff %d.png" % index), "wb") as file:  # noqa: PTH118, PTH123
            file.write(encoded(index, size=(12, 12)))
    data = ImageFolder(str(tmp_path / "images"))
    info = compact(data, tmp_path / "cache", settings(store=store))
    export_set(info.path, format, str(tmp_path / "out"), dataset=data if store == "indices" else None)
    assert (tmp_path / "out").exists()
    if format == "imagefolder":
        table = (tmp_path / "out" / "metadata.csv").read_text(encoding="utf-8")
        assert "bad \\udcff" in table


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_files_beside_samples_without_files_with_patches(tmp_path, on_error):
    for index in range(6):
        place = tmp_path / "images" / "a" / f"{index:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded(index, size=(24, 24)))
    broken = {3: OSError("gone")} if on_error == "skip" else {}
    others = Pictures(broken={index: (of_mode("RGB", index), 0) for index in range(20)} | broken)
    info = compact(
        ConcatDataset([ImageFolder(str(tmp_path / "images")), others]),
        tmp_path / "cache",
        patches(reconstruct="off"),
        on_error=on_error,
    )
    assert info.num_unreadable == len(broken)
    assert info.source_bytes > 20 * 24 * 24
