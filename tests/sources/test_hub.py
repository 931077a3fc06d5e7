"""Hugging Face datasets, built in memory and from disk."""

import io
import pickle

import numpy as np
import pytest
import torch
from datasets import (
    Array3D,
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    List,
    Value,
    concatenate_datasets,
    load_from_disk,
)
from PIL import Image as Pil
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchvision.datasets import ImageFolder

from dq_lightning.core.errors import SourceError
from dq_lightning.identity.values import digest_of
from dq_lightning.sources import arrow
from dq_lightning.sources.adapt import as_source
from dq_lightning.sources.hub import HubSource

NAMES = ["cat", "dog", "owl"]


def encoded(value, kind="PNG", mode="RGB", **options):
    stream = io.BytesIO()
    Pil.fromarray(np.random.default_rng(value).integers(0, 256, (6, 5, 3), dtype=np.uint8)).convert(mode).save(
        stream, kind, **options
    )
    return stream.getvalue()


def make(count=12, image=None, label=None, **more):
    columns = {
        "image": [{"bytes": encoded(i), "path": None} for i in range(count)],
        "label": [i % 3 for i in range(count)],
    }
    features = {"image": image or Image(), "label": label or ClassLabel(names=NAMES)}
    for name, (feature, values) in more.items():
        columns[name], features[name] = values, feature
    return Dataset.from_dict(columns, features=Features(features))


def flip(batch):
    turned = [np.asarray(image)[:, ::-1].copy() for image in batch["image"]]
    return {"pixels": [torch.from_numpy(a) for a in turned], "answer": [label + 1 for label in batch["label"]]}


def shift(batch):
    batch["image"] = [np.roll(np.asarray(image), int(torch.randint(5, ())), 1) for image in batch["image"]]
    return batch


FORMATS = {
    "plain": lambda ds: ds,
    "transform": lambda ds: ds.with_transform(flip),
    "random transform": lambda ds: ds.with_transform(shift),
    "transform of one column": lambda ds: ds.with_transform(shift, columns=["image"], output_all_columns=True),
    "torch": lambda ds: ds.with_format("torch"),
    "numpy": lambda ds: ds.with_format("numpy"),
    "torch of one column": lambda ds: ds.with_format("torch", columns=["label"], output_all_columns=True),
    "columns": lambda ds: ds.with_format(None, columns=["image"]),
    "selected": lambda ds: concatenate_datasets([ds, ds]).select([20, 3, 5, 7, 1, 0, 15, 16]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_plain_delivered_subset_and_finisher_agree_with_the_dataset(name, memory):
    dataset = FORMATS[name](make())
    source = as_source(dataset)
    assert type(source) is HubSource
    assert f"{len(dataset)} samples" in source.describe()
    index = torch.tensor([1, 4, 7])
    finisher, compact = pickle.loads(pickle.dumps(source.finisher(index))), source.subset(index)
    for position, place in enumerate(index.tolist()):
        made = []
        for give in (
            lambda place=place: dataset[place],
            lambda place=place: source.delivered(place),
            lambda position=position: compact[position],
            lambda position=position: compact.__getitems__([position])[0],
            lambda position=position, place=place: finisher(position, source.plain(place)),
        ):
            torch.manual_seed(place)
            made.append(digest_of(give()))
        assert len(set(made)) == 1
    assert isinstance(source.plain(0)["image"], Pil.Image)
    assert source.labels().names == tuple(NAMES)
    assert source.labels().values.tolist() == [source.plain(i)["label"] for i in range(len(source))]
    source.check_repeatable()
    again = pickle.loads(pickle.dumps(source))
    assert again.digest(memory) == source.digest(memory)


def test_images_are_plain_and_their_bytes_are_the_stored_ones():
    source = as_source(make().with_transform(flip).select([5, 2]))
    assert source.encoded(0).data == encoded(5)
    assert source.encoded(0).decoder == "hf"
    assert np.array_equal(np.asarray(source.image(1)), np.asarray(Pil.open(io.BytesIO(encoded(2)))))
    assert as_source(make(image=Image(mode="L"))).encoded(0).decoder == "hf:L"
    assert source.decode_warning(0) is None
    assert source.sample_id(1) == "1"


def test_images_that_are_delivered_undecoded_are_decoded_for_the_encoder_alone():
    dataset = make(image=Image(decode=False))
    source = as_source(dataset)
    assert np.array_equal(np.asarray(source.image(3)), np.asarray(as_source(make()).image(3)))
    assert source.delivered(3) == dataset[3]
    assert source.encoded(3) is None


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_modes(mode):
    rows = [{"bytes": encoded(i, mode=mode), "path": None} for i in range(3)]
    source = as_source(Dataset.from_dict({"image": rows}, features=Features({"image": Image()})))
    assert source.plain(1)["image"].mode == mode
    wanted = Pil.open(io.BytesIO(encoded(1, mode=mode))).convert("RGB")
    assert np.array_equal(np.asarray(source.image(1)), np.asarray(wanted))
    assert source.labels() is None


def test_orientation_and_sixteen_bits_are_right_here():
    turned = Pil.new("RGB", (5, 6)).getexif()
    turned[0x0112] = 6
    wide = io.BytesIO()
    Pil.fromarray(np.full((4, 4), 257 * 9, np.uint16)).save(wide, "PNG")
    rows = [{"bytes": encoded(0, "JPEG", exif=turned), "path": None}, {"bytes": wide.getvalue(), "path": None}]
    source = as_source(Dataset.from_dict({"image": rows}, features=Features({"image": Image()})))
    assert source.image(0).size == (6, 5)
    assert np.asarray(source.image(1)).max() == 9
    assert source.decode_warning(0) is source.decode_warning(1) is None


@pytest.mark.parametrize("stored", ["bytes", "path"])
def test_sixteen_bits_that_a_mode_clips_are_told(tmp_path, stored):
    wide, turned = tmp_path / "wide.png", Pil.new("RGB", (5, 6)).getexif()
    turned[0x0112] = 6
    Pil.fromarray(np.full((4, 4), 257 * 9, np.uint16)).save(wide)
    (tmp_path / "turned.jpg").write_bytes(encoded(0, "JPEG", exif=turned))
    rows = [
        {"bytes": path.read_bytes() if stored == "bytes" else None, "path": str(path) if stored == "path" else None}
        for path in (wide, tmp_path / "turned.jpg")
    ]
    sources = {
        mode: as_source(Dataset.from_dict({"image": rows}, features=Features({"image": Image(mode=mode)})))
        for mode in ("RGB", "I")
    }
    assert np.asarray(sources["RGB"].image(0)).min() == 255
    assert "16 bits" in sources["RGB"].decode_warning(0)
    assert sources["RGB"].decode_warning(1) is sources["I"].decode_warning(0) is None


def test_the_same_images_through_torchvision_and_hugging_face(tmp_path, memory):
    for i in range(10):
        (tmp_path / NAMES[i % 2]).mkdir(exist_ok=True)
        mode = ("RGB", "L", "P", "1", "CMYK")[i // 2]
        kind = "JPEG" if mode == "CMYK" else "PNG"
        (tmp_path / NAMES[i % 2] / f"{i}.{kind.lower()[:4]}").write_bytes(encoded(i, kind, mode))
    folder = ImageFolder(tmp_path)
    columns = {"image": [path for path, _ in folder.samples], "label": folder.targets}
    hub = as_source(
        Dataset.from_dict(columns, features=Features({"image": Image(), "label": ClassLabel(names=folder.classes)}))
    )
    local = as_source(folder)
    assert torch.equal(hub.labels().values, local.labels().values)
    assert hub.labels().names == local.labels().names
    for i in range(10):
        assert np.array_equal(np.asarray(hub.image(i)), np.asarray(local.image(i)))
        assert hub.encoded(i).data == local.encoded(i).data
        assert hub.path(i) == local.path(i)


# columns and labels


def test_columns_are_found_by_type_or_named():
    two = make(mask=(Image(), [{"bytes": encoded(99), "path": None}] * 12))
    assert as_source(two).image_leaf() == ("image",)
    assert as_source(two, image_column="mask").image_leaf() == ("mask",)
    unclear = two.rename_column("image", "left")
    with pytest.raises(SourceError, match=r"'left', 'mask'.*image_column="):
        as_source(unclear)
    with pytest.raises(SourceError, match=r"no column|'picture'.*'image'"):
        as_source(two, image_column="picture")
    with pytest.raises(SourceError, match="No column is of the Image type"):
        as_source(two.select_columns(["label"]))
    coarse = make(coarse=(ClassLabel(num_classes=2), [i % 2 for i in range(12)]))
    assert as_source(coarse).labels().num_classes == 3
    assert as_source(coarse, labels="coarse").labels().num_classes == 2
    fine = coarse.rename_column("label", "fine")
    with pytest.raises(SourceError, match="label_column="):
        as_source(fine).labels()
    assert as_source(fine, labels=False).labels() is None
    assert as_source(fine, label_column="fine").labels().num_classes == 3


def test_arrays_as_images():
    values = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    dataset = Dataset.from_dict({"pixels": values.tolist()}, features=Features({"pixels": Array3D((4, 5, 3), "uint8")}))
    source = as_source(dataset)
    assert np.array_equal(np.asarray(source.image(1)), values[1])
    assert source.encoded(1) is None
    assert source.path(1) is None


@pytest.mark.parametrize(
    ("feature", "values", "wanted"),
    [
        (Value("int64"), [0, 5, 5], [0, 5, 5]),
        (Value("string"), ["b", "a", "b"], [1, 0, 1]),
        (Value("bool"), [True, False, True], [1, 0, 1]),
        (ClassLabel(names=NAMES), [2, None, -1], [2, 3, 3]),
        (Value("float32"), [0.0, 1.0, 2.0], None),
        (List(Value("int64")), [[0, 1], [1], []], None),
        (Value("int64"), [None, None, None], None),
    ],
)
def test_labels(feature, values, wanted):
    dataset = Dataset.from_dict(
        {"image": [{"bytes": encoded(i), "path": None} for i in range(3)], "label": values},
        features=Features({"image": Image(), "label": feature}),
    )
    labels = as_source(dataset).labels()
    assert (labels.values.tolist() if labels else None) == wanted
    picked = as_source(dataset.select([2, 0])).labels()
    assert (picked is None) == (wanted is None) or values[2] in (None, -1)


def test_labels_are_read_without_decoding():
    rows = [{"bytes": b"no image", "path": None}] * 3
    dataset = Dataset.from_dict(
        {"image": rows, "label": [0, 1, 1]}, features=Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    )
    assert as_source(dataset).labels().values.tolist() == [0, 1, 1]
    with pytest.raises(SourceError, match="Item 1 of Hugging Face dataset"):
        as_source(dataset).image(1)


# splits, streams, other transforms


def test_a_dict_of_splits_gives_its_train_split():
    assert len(as_source(DatasetDict(test=make(3), train=make(5)))) == 5
    with pytest.raises(SourceError, match=r"'test', 'dev'"):
        as_source(DatasetDict(test=make(3), dev=make(3)))


def test_empty_datasets_are_refused():
    with pytest.raises(SourceError, match="empty"):
        as_source(make().select([]))


def test_other_transforms():
    dataset = make().with_transform(shift)
    assert set(as_source(dataset, transform=flip).delivered(2)) == {"pixels", "answer"}
    assert digest_of(as_source(dataset, transform=None).delivered(2)) == digest_of(make()[2])
    assert dataset.format["format_kwargs"]["transform"] is shift
    with pytest.raises(SourceError, match="target_transform"):
        as_source(dataset, target_transform=str)


def test_inside_torch_subsets_and_concatenations(memory):
    dataset = make().with_format("torch")
    source = as_source(ConcatDataset([Subset(dataset, [3, 1]), dataset]))
    assert source.labels().values.tolist() == [0, 1] + [i % 3 for i in range(12)]
    assert source.encoded(1).data == encoded(1)
    loader = DataLoader(source.subset(torch.tensor([0, 1, 5])), batch_size=3)
    assert next(iter(loader))["label"].tolist() == [0, 1, 0]
    assert len(source.digest(memory)) == 64


# identity


def test_digest_is_of_content_alone(tmp_path, memory, fresh_memory):
    dataset = make(20)
    wanted = as_source(dataset).digest(memory)
    dataset.save_to_disk(tmp_path / "saved", num_shards=3)
    again = load_from_disk(tmp_path / "saved")
    variants = [
        again,
        make(20).with_format("torch"),
        make(20).with_transform(flip),
        concatenate_datasets([dataset.select(range(7)), dataset.select(range(7, 20))]),
        concatenate_datasets([dataset, dataset]).select([20, *range(1, 20)]),
        dataset.select(range(19, -1, -1)).select(range(19, -1, -1)),
        dataset.select_columns(["label", "image"]),
    ]
    assert [as_source(variant).digest(fresh_memory()) for variant in variants] == [wanted] * len(variants)
    others = [
        make(19),
        dataset.select([1, 0, *range(2, 20)]),
        make(20, label=ClassLabel(names=["cat", "dog", "bat"])),
        make(20, image=Image(mode="L")),
        dataset.remove_columns("label"),
    ]
    assert len({as_source(other).digest(fresh_memory()) for other in others} | {wanted}) == len(others) + 1


def test_a_table_on_disk_is_read_once(tmp_path, memory, monkeypatch):
    make(20).save_to_disk(tmp_path / "saved")
    first = as_source(load_from_disk(tmp_path / "saved")).digest(memory)
    with monkeypatch.context() as patch:
        patch.setattr(arrow, "digest_tables", lambda *_, **__: pytest.fail("the table was read again"))
        assert as_source(load_from_disk(tmp_path / "saved").with_format("torch")).quick_digest(memory) == first
    saved = load_from_disk(tmp_path / "saved")
    others = [
        saved.select([3, 1]),
        saved.select(range(5)),
        saved.cast_column("label", ClassLabel(names=["a", "b", "c"])),
        saved.remove_columns("label").add_column("label", [0] * 20),
        saved.remove_columns("label").add_column("label", [1] * 20),
        saved.rename_column("label", "answer"),
    ]
    assert len({as_source(other).digest(memory) for other in others} | {first}) == len(others) + 1


def test_files_behind_paths_count_by_content_even_when_the_table_is_known(tmp_path, memory):
    paths = []
    for i in range(3):
        paths.append(str(tmp_path / f"{i}.png"))
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
    table = Dataset.from_dict({"image": paths}, features=Features({"image": Image()}))
    table.to_parquet(tmp_path / "paths.parquet")
    dataset = Dataset.from_parquet(str(tmp_path / "paths.parquet"), cache_dir=str(tmp_path / "cache"))
    first = as_source(dataset).digest(memory)
    (tmp_path / "1.png").write_bytes(encoded(9))
    assert as_source(dataset).digest(memory) != first
    (tmp_path / "1.png").write_bytes(encoded(1))
    assert as_source(dataset).digest(memory) == first
    (tmp_path / "1.png").unlink()
    with pytest.raises(SourceError, match=r"Item 1 .*1\.png"):
        as_source(dataset).image(1)
    (tmp_path / "0.png").rename(tmp_path / "1.png")
    with pytest.raises(SourceError, match=r"Item 2 .*0\.png"):
        as_source(dataset.select([1, 2, 0])).digest(memory)


def test_real_photos(shared_dir, tmp_path, memory):
    folder = ImageFolder(shared_dir / "data" / "imagenette_224_small" / "val")
    columns = {"image": [path for path, _ in folder.samples], "label": folder.targets}
    features = Features({"image": Image(), "label": ClassLabel(names=folder.classes)})
    Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "photos")
    hub, local = as_source(load_from_disk(tmp_path / "photos")), as_source(folder)
    assert torch.equal(hub.labels().values, local.labels().values)
    for i in range(0, 500, 50):
        assert np.array_equal(np.asarray(hub.image(i)), np.asarray(local.image(i)))
        assert hub.encoded(i).data == local.encoded(i).data
    assert hub.quick_digest(memory) == hub.digest(memory)
