"""Image folders: real files written here, and the real photos."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision import transforms
from torchvision.datasets import DatasetFolder, ImageFolder, VisionDataset
from torchvision.datasets.folder import default_loader

from dq_lightning.core.errors import SourceError
from dq_lightning.identity.values import digest_of
from dq_lightning.sources.adapt import as_source
from dq_lightning.sources.base import relative_paths
from dq_lightning.sources.files import FileSource

AUGMENT = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor()])


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(5):
            image = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8))
            image.save(root / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root


def test_everything_of_a_folder(folder):
    dataset = ImageFolder(folder, transform=AUGMENT, target_transform=str)
    source = as_source(dataset)
    assert type(source) is FileSource
    assert source.labels().names == ("cat", "dog")
    assert source.labels().values.tolist() == [0] * 5 + [1] * 5
    assert source.sample_id(6) == "dog/1.png"
    assert source.plain(6)[1] == 1
    assert np.array_equal(np.asarray(source.image(0)), np.asarray(Image.open(folder / "cat" / "0.jpg")))
    encoded = source.encoded(6)
    assert (encoded.data, encoded.decoder) == ((folder / "dog" / "1.png").read_bytes(), "pil_rgb")
    index = torch.tensor([0, 6, 9])
    finisher, compact = pickle.loads(pickle.dumps(source.finisher(index))), source.subset(index)
    for position, place in enumerate(index.tolist()):
        made = []
        for item in (
            lambda p=place: dataset[p],
            lambda p=position: compact[p],
            lambda p=position, i=place: finisher(p, source.plain(i)),
        ):
            torch.manual_seed(place)
            made.append(digest_of(item()))
        assert len(set(made)) == 1
    source.check_repeatable()


def test_labels_need_no_decoding(folder):
    for path in folder.rglob("*.*"):
        path.write_bytes(b"not an image")
    assert as_source(ImageFolder(folder)).labels().values.tolist() == [0] * 5 + [1] * 5


@pytest.mark.parametrize("content", [b"", b"text", bytes(200)])
def test_an_unreadable_file_is_an_error_with_index_and_path(folder, content):
    (folder / "dog" / "0.jpg").write_bytes(content)
    source = as_source(ImageFolder(folder, transform=AUGMENT))
    with pytest.raises(SourceError, match=r"Item 5 .*dog/0.jpg.*UnidentifiedImageError") as caught:
        source.image(5)
    assert caught.value.__cause__ is not None


def test_a_truncated_file_is_an_error_with_index_and_path(folder):
    path = folder / "dog" / "0.jpg"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SourceError, match=r"Item 5 .*dog/0.jpg.*truncated"):
        as_source(ImageFolder(folder)).image(5)


def test_a_missing_file_is_an_error_of_the_identity_with_index_and_path(folder, memory):
    dataset = ImageFolder(folder)
    (folder / "dog" / "0.jpg").unlink()
    with pytest.raises(SourceError, match=r"Item 5 .*dog/0.jpg.*FileNotFoundError"):
        as_source(dataset).digest(memory)


def test_known_wrong_decodes_are_told_with_index_and_path(folder):
    wide = np.full((8, 9), 30000, np.uint16)
    Image.fromarray(wide).save(folder / "cat" / "1.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (9, 8)).save(folder / "dog" / "0.jpg", exif=turned)
    source = as_source(ImageFolder(folder))
    warnings = [source.decode_warning(i) for i in range(10)]
    assert [i for i, text in enumerate(warnings) if text] == [1, 5]
    assert "Item 1 (" in warnings[1]
    assert "cat/1.png" in warnings[1]
    assert "white" in warnings[1]
    assert "orientation 6" in warnings[5]


def test_digest_is_of_content_not_of_place_or_transform(folder, tmp_path, memory):
    wanted = as_source(ImageFolder(folder)).digest(memory)
    shutil.copytree(folder, tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").rglob("*.*"):
        os.utime(path, (1, 1))
    assert as_source(ImageFolder(tmp_path / "elsewhere", transform=AUGMENT)).digest(memory) == wanted
    assert as_source(ImageFolder(str(folder) + "/")).quick_digest(memory) == wanted


@pytest.mark.parametrize("change", ["content", "name", "class", "missing"])
def test_digest_sees_every_change(folder, memory, change):
    wanted = as_source(ImageFolder(folder)).digest(memory)
    path = folder / "cat" / "4.jpg"
    if change == "content":
        path.write_bytes(path.read_bytes() + b"x")
    elif change == "name":
        path.rename(folder / "cat" / "5.jpg")
    elif change == "class":
        path.rename(folder / "dog" / "5.jpg")
    else:
        path.unlink()
    assert as_source(ImageFolder(folder)).digest(memory) != wanted


def load_array(path):
    return np.load(path)


def test_a_loader_of_the_users(tmp_path, memory):
    for name in "ab":
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", np.full((4, 4), ord(name), np.uint16) * np.uint16(257))
    source = as_source(DatasetFolder(tmp_path, load_array, extensions=(".npy",)))
    assert type(source) is FileSource
    assert np.asarray(source.image(1)).max() == ord("b")
    assert source.encoded(0) is None
    assert source.decode_warning(0) is None
    assert source.labels().values.tolist() == [0, 1]
    other = DatasetFolder(tmp_path, lambda path: np.load(path) // 2, extensions=(".npy",))
    assert as_source(other).digest(memory) != source.digest(memory)


def test_a_subclass_with_more_in_its_items(folder):
    class WithPath(ImageFolder):
        def __getitem__(self, index):
            return *super().__getitem__(index), self.samples[index][0]

    source = as_source(WithPath(folder, transform=AUGMENT))
    assert source.labels().values.tolist() == [0] * 5 + [1] * 5
    assert source.plain(3)[2].endswith("3.png")
    assert source.encoded(3) is None
    index = torch.tensor([3, 8])
    torch.manual_seed(0)
    finished = source.finisher(index)(0, source.plain(3))
    torch.manual_seed(0)
    assert digest_of(finished) == digest_of(source.subset(index)[0])


def test_relative_paths():
    assert relative_paths(["/a/b/c/1.png", "/a/b/2.png"], "/a/b/") == ["c/1.png", "2.png"]
    assert relative_paths(["/a/b/c/1.png", "/a/x/2.png"], "/a/b") == ["b/c/1.png", "x/2.png"]
    assert relative_paths(["/a/b/c/1.png", "/a/b/c/2.png"], None) == ["1.png", "2.png"]


@pytest.mark.parametrize(("kind", "reads"), [("Imagenette", True), ("GTSRB", True), ("Places365", False)])
def test_other_torchvision_classes_that_list_files(folder, memory, kind, reads):
    """Real objects of these classes over our own few files, in place of their downloads."""
    owner = getattr(torchvision.datasets, kind)
    dataset = owner.__new__(owner)
    VisionDataset.__init__(dataset, folder, transform=AUGMENT)
    entries = ImageFolder(folder).samples
    dataset._samples = dataset.imgs = entries
    dataset.targets = [target for _, target in entries]
    if kind != "GTSRB":
        dataset.loader = default_loader if reads else Image.open
    source = as_source(dataset)
    assert type(source) is FileSource
    assert source.labels().values.tolist() == dataset.targets
    assert (source.encoded(3) is not None) is reads
    assert source.sample_id(3) == "cat/3.png"
    assert source.image(3).size == (9, 8)
    assert len(source.digest(memory)) == 64


def test_real_photos(shared_dir, memory):
    root = shared_dir / "data" / "imagenette_224_small" / "val"
    source = as_source(ImageFolder(root, transform=AUGMENT))
    assert len(source) == 500
    assert source.labels().num_classes == 10
    assert source.image(7).size == (224, 224)
    assert not any(source.decode_warning(i) for i in range(0, 500, 25))
    source.digest(memory)
    assert len(memory.read) == 500
