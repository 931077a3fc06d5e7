"""Groups beyond one class: several labels a sample, ranges of a number, and what covers most of an image."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pictures
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import VOCDetection, VOCSegmentation
from torchvision.tv_tensors import BoundingBoxes

from dq_lightning import as_source, load_selection, quantize
from dq_lightning.core.errors import SourceError
from dq_lightning.sources.adapt import grouping_id
from dq_lightning.sources.groups import dominant_class, given_labels, listed_sets, quantile_labels


def picture(number=0):
    return Pictures.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def hub(column, feature, values):
    return Dataset.from_dict(
        {"image": [picture(i) for i in range(len(values))], column: values},
        Features({"image": Image(), column: feature}),
    )


TAGS = [[0, 2], [], [1], [0], [0, 1, 2], [0]]
HOT = [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]]
RAREST = [2, 3, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("feature", "values", "names"),
    [
        (List(ClassLabel(names=["a", "b", "c"])), TAGS, ("a", "b", "c")),
        (List(Value("string")), [["abc"[i] for i in row] for row in TAGS], ("a", "b", "c")),
        (List(Value("int64")), TAGS, ("0", "1", "2")),
        (List(Value("float32"), length=3), HOT, ("0", "1", "2")),
    ],
)
def test_a_named_column_that_lists_labels_gives_label_sets(feature, values, names):
    source = as_source(hub("tags", feature, values), labels="tags")
    labels = source.labels()
    assert labels.members.int().tolist() == HOT
    assert (labels.values.tolist(), labels.names) == (RAREST, names)
    assert (labels.unlabeled, labels.are_classes, labels.num_classes) == (True, False, 3)
    part = as_source(Subset(hub("tags", feature, values), [4, 0]), labels="tags").labels()
    assert part.members.int().tolist() == [[1, 1, 1], [1, 0, 1]]
    # nobody asked, so nothing changes
    assert as_source(hub("tags", feature, values)).labels() is None


def test_label_sets_are_given_or_named_by_position_and_leave_the_identity_of_other_groups():
    pairs = [(picture(i), torch.tensor(row)) for i, row in enumerate(HOT)]
    assert as_source(pairs, labels="1").labels().members.int().tolist() == HOT
    for given in (np.array(HOT), torch.tensor(HOT).float(), HOT, [tuple("abc"[i] for i in row) for row in TAGS]):
        labels = given_labels(given, 6)
        assert (labels.members.int().tolist(), labels.values.tolist()) == (HOT, RAREST)
    ids = {
        grouping_id(as_source(pairs, labels=given))
        for given in (HOT, RAREST, "1", "dominant", "quantiles:3", None, False)
    }
    assert len(ids) == 7
    for wrong in (torch.rand(6, 3), [{"a": 1}] * 6, [[[0, 1]]] * 6, [["a", 1]] * 6, [[-1, 2]] * 6):
        with pytest.raises(SourceError, match=r"several labels, \[N, C\]"):
            given_labels(wrong, 6)
    assert listed_sets(["ab", "cd"]) is None


def test_quantiles_are_groups_of_equal_size_by_value():
    draw = np.random.default_rng(0)
    values = draw.integers(0, 40, 103).astype(float)
    values[[5, 50]] = np.nan
    labels = quantile_labels(list(values), 7)
    order = sorted((v, i) for i, v in enumerate(values) if v == v)  # the slow twin: cut the sorted list
    expected = {i: next(g for g in range(7) if place < sum(len(order) // 7 + (k < len(order) % 7) for k in range(g + 1)))
                for place, (_, i) in enumerate(order)}  # fmt: skip
    assert labels.values.tolist() == [expected.get(i, 7) for i in range(103)]
    assert (labels.unlabeled, labels.are_classes, labels.num_classes) == (True, False, 7)
    assert labels.names[0].startswith("0 to ")
    with pytest.raises(SourceError, match="only 2 of 3 samples have a value"):
        quantile_labels([1.0, None, 2.0], 3)


@pytest.mark.parametrize("rule", ["quantiles:1", "quantiles:x", "quantiles:0"])
def test_a_wrong_number_of_quantiles_is_told(rule):
    with pytest.raises(SourceError, match="whole number of at least 2"):
        as_source(TensorDataset(torch.rand(4, 3, 8, 8), torch.rand(4)), labels=rule)


def test_numbers_are_read_from_arrays_columns_rows_and_joined_datasets():
    numbers = [0.5, -3.0, 9.0, 2.0, 2.5, 4.0]
    arrays = TensorDataset(torch.rand(6, 3, 8, 8), torch.tensor(numbers)[:, None])
    expected = [0, 0, 1, 0, 1, 1]
    table = hub("score", Value("float64"), numbers)
    rows = [{"text": f"row {i}", "score": n} for i, n in enumerate(numbers)]
    for data, column in ((arrays, None), (table, "score"), (rows, "score")):
        labels = as_source(data, labels="quantiles:2", label_column=column).labels()
        assert labels.values.tolist() == expected
    joined = ConcatDataset([Subset(arrays, [2]), arrays])
    assert as_source(joined, labels="quantiles:2").labels().values.tolist() == [1, 0, 0, 1, 0, 0, 1]
    with pytest.raises(SourceError, match=r"is str 'row 0'"):
        as_source(rows, labels="quantiles", label_column="text").labels()
    with pytest.raises(SourceError, match="name it with label_column="):
        as_source(rows, labels="quantiles").labels()


class Stream(IterableDataset):
    """Samples that can only be read one after another."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        for i in range(self.count):
            yield {"image": torch.full((3, 8, 8), i / 255), "score": float(i), "tags": torch.tensor(HOT[i % 6])}


@pytest.mark.parametrize("count", [30, 90])  # shorter and longer than what is held of a stream
def test_streams_are_read_once_more_for_their_groups(tmp_path, count):
    features = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    plain = {"bins": {"num_bins": 2}, "selection": {"keep_ratio": 0.2}, "store": "packed"}
    scored = plain | {"label_column": "score"}
    for labels, settings in ((False, plain), ("quantiles:3", scored), ("tags", plain)):
        info = quantize(Stream(count), settings, encoder=features, labels=labels, cache_dir=tmp_path, progress=False)
        kept = load_selection(info.path).index.numpy()
        assert len(kept) == count // 5
        if labels == "quantiles:3":
            assert np.bincount(kept * 3 // count).tolist() == [count // 15] * 3
        if labels == "tags":
            members = np.array(HOT)[np.arange(count) % 6]
            assert np.abs(members[kept].sum(0) - members.sum(0) / 5).max() <= 1


def voc(root, kind, write):
    """The folders of VOC 2011, in which `write` puts the annotations of three images."""
    place = root / "TrainVal" / "VOCdevkit" / "VOC2011"
    folders = {"Detection": ("Main", "Annotations"), "Segmentation": ("Segmentation", "SegmentationClass")}[kind]
    for name in (f"ImageSets/{folders[0]}", "JPEGImages", folders[1]):
        (place / name).mkdir(parents=True)
    (place / f"ImageSets/{folders[0]}/train.txt").write_text("a\nb\nc\n")
    for name in "abc":
        picture().save(place / f"JPEGImages/{name}.jpg")
        write(name, place / folders[1] / name)


def test_the_dominant_class_of_boxes(tmp_path):
    boxes = {"a": [("cat", 0, 9), ("dog", 0, 5)], "b": [("cat", 0, 5), ("dog", 1, 5), ("dog", 0, 4)], "c": []}

    def write(name, path):
        objects = (
            f"<object><name>{kind}</name><bndbox>" + "".join(f"<{side}{axis}>{value}</{side}{axis}>"
            for side, value in (("min", low), ("max", high)) for axis in "xy") + "</bndbox></object>"
            for kind, low, high in boxes[name]
        )  # fmt: skip
        text = f"<annotation><folder>x</folder>{''.join(objects)}</annotation>"
        for axis in "xy":
            text = text.replace(f"min{axis}", f"{axis}min").replace(f"max{axis}", f"{axis}max")
        path.with_suffix(".xml").write_text(text)

    voc(tmp_path, "Detection", write)
    labels = as_source(VOCDetection(tmp_path, year="2011", image_set="train"), labels="dominant").labels()
    # b: a box of 25 pixels against two of 16 each; c: nothing is there
    assert (labels.values.tolist(), labels.names, labels.unlabeled) == ([0, 1, 2], ("cat", "dog"), True)


def test_the_dominant_class_of_masks(tmp_path):
    masks = {"a": [0] * 40 + [3] * 14 + [5] * 10, "b": [255] * 60 + [4] * 4, "c": [0] * 64}

    def write(name, path):
        mask = Pictures.new("P", (8, 8))
        mask.putpalette(bytes(range(256)) * 3)
        mask.putdata(masks[name])
        mask.save(path.with_suffix(".png"))

    voc(tmp_path, "Segmentation", write)
    labels = as_source(VOCSegmentation(tmp_path, year="2011", image_set="train"), labels="dominant").labels()
    assert labels.values.tolist() == [3, 4, 0]
    assert labels.are_classes
    with pytest.raises(SourceError, match="a mask is float32"):
        dominant_class(torch.rand(8, 8))


def test_the_dominant_class_of_hugging_face_objects():
    kind = ClassLabel(names=["cat", "dog"])
    rows = [
        [{"bbox": [0.0, 0.0, 2.0, 2.0], "category": 1}, {"bbox": [0.0, 0.0, 1.0, 1.0], "category": 0}],
        [{"bbox": [0.0, 0.0, 1.0, 1.0], "category": 0}],
    ]
    data = hub("objects", List({"bbox": List(Value("float32")), "category": kind}), rows)
    labels = as_source(data, labels="dominant", label_column="objects").labels()
    assert (labels.values.tolist(), labels.names) == ([1, 0], ("cat", "dog"))


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ({"annotation": {"object": [{"name": "cat", "bndbox": {"xmin": "1", "ymin": "1", "xmax": "9", "ymax": "3"}},
                                    {"name": "dog", "bndbox": {"xmin": "1", "ymin": "1", "xmax": "5", "ymax": "5"}}]}}, "cat"),
        ({"labels": torch.tensor([4, 9]), "boxes": torch.tensor([[0, 0, 2, 9], [5, 5, 9, 9.0]])}, 4),
        ({"labels": torch.tensor([4, 9]),
          "boxes": BoundingBoxes([[0, 0, 9, 9], [5, 5, 4, 30]], format="CXCYWH", canvas_size=(40, 40))}, 9),
        ({"labels": torch.tensor([4, 9]), "masks": torch.stack([torch.eye(4), torch.ones(4, 4)])}, 9),
        ([{"category_id": 4}, {"category_id": 9}, {"category_id": 9}], 9),
        ([{"category_id": 4, "bbox": [0, 0, 9, 9]}, {"category_id": 9}, {"category_id": 9}], 9),
        ([], None),
    ],
)  # fmt: skip
def test_areas_count_and_else_numbers(target, expected):
    assert dominant_class(target) == expected


def test_what_has_no_classes_is_told():
    with pytest.raises(SourceError, match="objects with classes and boxes"):
        dominant_class([{"bbox": [0, 0, 1, 1]}])
    with pytest.raises(SourceError, match="a target is int 3"):
        as_source([(picture(), 3)], labels="dominant").labels()


def test_a_set_is_made_of_samples_with_several_labels(tmp_path, caplog):
    """From the dataset to the selection: groups, shares of labels, and a repeated run that finds the set."""
    draw = np.random.default_rng(2)
    members = draw.random((200, 6)) < [0.6, 0.3, 0.2, 0.1, 0.05, 0.03]
    rows = [{"text": f"row {i}", "tags": [f"t{c}" for c in np.flatnonzero(row)]} for i, row in enumerate(members)]
    features = draw.normal(size=(200, 8)).astype(np.float32)
    settings = {"bins": {"num_bins": 3}, "selection": {"keep_ratio": 0.25}, "text": {"columns": ["text"]}}
    infos = [quantize(rows, settings, encoder=features, labels="tags", cache_dir=tmp_path) for _ in range(2)]
    assert [info.reused for info in infos] == [False, True]
    kept = load_selection(infos[0].path).index.numpy()
    assert len(kept) == 50
    assert np.abs(members[kept].sum(0) - members.sum(0) / 4).max() <= 1
    assert infos[0].num_classes is None
    assert "no sample is kept of" not in caplog.text
    settings["selection"] = {"keep_ratio": 0.02}
    few = load_selection(
        quantize(rows, settings, encoder=features, labels="tags", cache_dir=tmp_path).path
    ).index.numpy()
    lost = ", ".join(f"t{c}" for c in np.flatnonzero(~members[few].any(0)))
    assert lost
    assert f"of 6 classes ({lost})" in caplog.text
