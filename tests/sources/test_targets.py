"""Which targets are classes, and which classes they are."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Dataset, Subset

from dq_lightning.cache.digests import DigestMemory
from dq_lightning.core.errors import SourceError
from dq_lightning.sources.adapt import as_source
from dq_lightning.sources.groups import given_labels
from dq_lightning.sources.items import evenly_spaced
from dq_lightning.sources.targets import as_targets, join, to_labels


def labels_of(values, names=None):
    targets = as_targets(values, names)
    return to_labels(targets) if targets is not None else None


@pytest.mark.parametrize(
    "values",
    [
        [2, 0, 1, 2],
        (2, 0, 1, 2),
        np.array([2, 0, 1, 2], np.uint8),
        torch.tensor([2, 0, 1, 2]),
        [torch.tensor(2), torch.tensor(0), torch.tensor(1), torch.tensor(2)],
        [np.int32(2), np.int64(0), 1, np.array(2)],
        np.array([[2], [0], [1], [2]]),
        torch.tensor([[2], [0], [1], [2]]),
        [np.array([2]), torch.tensor([0]), 1, np.array([2], np.uint8)],
    ],
)
def test_integers_of_every_kind(values):
    labels = labels_of(values)
    assert labels.values.dtype == torch.int64
    assert labels.values.tolist() == [2, 0, 1, 2]
    assert labels.num_classes == 3


def test_booleans_are_two_classes():
    assert labels_of([True, False, True]).values.tolist() == [1, 0, 1]


@given(st.lists(st.text(max_size=3), min_size=1))
def test_strings_become_positions_in_their_sorted_list(values):
    values = [value.replace("\0", "") for value in values]
    labels = labels_of(values)
    assert [labels.names[i] for i in labels.values] == values
    assert list(labels.names) == sorted(set(values))


@pytest.mark.parametrize(
    "values",
    [
        [0.5, 1.0],
        torch.tensor([0.5, 1.0]),
        torch.zeros(4, 3, dtype=torch.int64),
        [[0, 1], [1, 0]],
        [np.zeros(4), np.zeros(4)],
        [np.zeros(1), np.zeros(1)],
        torch.zeros(4, 1),
        [None, None],
        [1, "a"],
        [{"boxes": 1}, {"boxes": 2}],
    ],
)
def test_what_is_no_class(values):
    assert labels_of(values) is None


def test_samples_without_a_label_form_a_group_of_their_own_behind_the_classes():
    assert labels_of([0, -1, 2, None]).values.tolist() == [0, 3, 2, 3]
    named = labels_of([0, -1, 1], ["cat", "dog", "owl"])
    assert named.values.tolist() == [0, 3, 1]
    assert named.names[:3] == ("cat", "dog", "owl")
    assert labels_of([-1, -1]) is None
    strings = labels_of(["b", None, "", "a", None])
    assert (strings.values.tolist(), strings.names, strings.unlabeled) == ([2, 3, 0, 1, 3], ("", "a", "b"), True)
    assert strings.num_classes == 3
    # of parts, some of which lack labels, and of a part without any
    joined = join([as_targets(["b", "a"]), as_targets(["c", None])])
    assert to_labels(joined).values.tolist() == [1, 0, 2, 3]
    assert to_labels(joined.take(np.array([1, 3]))).values.tolist() == [0, 1]
    assert to_labels(joined.take(np.array([3]))) is None


def test_identifiers_far_beyond_the_count_become_dense():
    labels = labels_of([10**12, 7, 10**12])
    assert labels.values.tolist() == [1, 0, 1]
    assert labels.names == ("7", str(10**12))


def test_all_listed_names_count_as_classes():
    assert labels_of([0, 0], ["cat", "dog"]).num_classes == 2


def test_join():
    a, b = as_targets([0, 1], ["cat", "dog"]), as_targets([1, 1], ["cat", "dog"])
    assert join([a, b]).values.tolist() == [0, 1, 1, 1]
    assert join([a, b]).names == ("cat", "dog")
    assert join([a, as_targets([2])]).names is None
    assert join([a, None]) is None
    assert join([a, as_targets(["cat"])]) is None
    assert to_labels(join([as_targets(["b"]), as_targets(["c", "a"])])).names == ("a", "b", "c")


def test_given_labels():
    assert given_labels(["x", "y", "x"], 3).values.tolist() == [0, 1, 0]
    assert given_labels(np.array(["x", "y"]), 2).names == ("x", "y")
    with pytest.raises(SourceError, match="2 values but the dataset has 3"):
        given_labels([0, 1], 3)
    with pytest.raises(SourceError, match="whole numbers or strings"):
        given_labels([0.5, 1.5], 2)
    with pytest.raises(SourceError, match="one class per sample"):
        given_labels(7, 2)


class Contradicting(Dataset):
    """A dataset whose list of targets is not what its items hold; `wrong` are the positions where it is not."""

    def __init__(self, total=200, wrong=(), texts=False):
        self.wrong = set(wrong)
        self.targets = [i % 4 for i in range(total)]
        if texts:
            self.targets = [f"class {target}" for target in self.targets]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        target = self.targets[(index + 1) % len(self)] if index in self.wrong else self.targets[index]
        return torch.full((3, 4, 4), index / len(self)), target


@pytest.mark.parametrize("texts", [False, True])
@pytest.mark.parametrize("part", [lambda data: data, lambda data: Subset(data, range(150, 0, -1)),
                                  lambda data: ConcatDataset([data, Contradicting(40)])])  # fmt: skip
def test_items_are_believed_where_the_list_contradicts_them_anywhere(tmp_path, caplog, part, texts):
    hidden = next(
        i for i in range(60, 200) if i not in evenly_spaced(200, 16) and 150 - i not in evenly_spaced(150, 16)
    )
    data = part(Contradicting(wrong=[hidden], texts=texts))
    if texts and isinstance(data, ConcatDataset):
        data = ConcatDataset([data.datasets[0], Contradicting(40, texts=True)])
    wanted = [data[i][1] for i in range(len(data))]
    memory = DigestMemory(tmp_path)

    def classes(source):
        labels = source.labels()
        return [labels.names[i] if texts else int(i) for i in labels.values]

    first = as_source(data)
    assert first.quick_digest(memory) is None
    digest = first.digest(memory)
    assert classes(first) == wanted
    assert "1 of its items hold another target than its list of targets says" in caplog.text
    # a later run recalls them without reading the items
    later = as_source(data)
    assert later.quick_digest(memory) == digest
    assert classes(later) == wanted


def test_a_list_that_its_items_agree_with_is_remembered_as_such(tmp_path):
    memory = DigestMemory(tmp_path)
    data = Contradicting()
    as_source(data).digest(memory)
    later = as_source(data)
    assert later.quick_digest(memory) is not None
    assert later._scan is None
    assert later.labels().values.tolist() == data.targets
    assert later._scan is None


@pytest.mark.parametrize("part", [lambda data: data, lambda data: Subset(data, range(150, 0, -1)),
                                  lambda data: ConcatDataset([Contradicting(40), data])])  # fmt: skip
def test_a_list_that_was_compared_with_a_few_items_is_compared_with_each_that_is_read(part):
    """So it is with data whose identity needs no pass over all items."""
    hidden = next(
        i for i in range(60, 200) if i not in evenly_spaced(200, 16) and 150 - i not in evenly_spaced(150, 16)
    )
    data = part(Contradicting(wrong=[hidden]))

    def read_all(source):
        source.check_repeatable()
        source.labels()
        return [source.image(i) for i in range(len(source))]

    with pytest.raises(SourceError, match=r"its target is \d, but the dataset's list of targets says \d"):
        read_all(as_source(data))
    assert len(read_all(as_source(data, labels=[i % 2 for i in range(len(data))]))) == len(data)
    assert len(read_all(as_source(part(Contradicting())))) == len(data)


@pytest.mark.parametrize("texts", [False, True])
def test_samples_without_a_label_agree_with_a_list_that_has_none_for_them(texts):
    data = Contradicting(texts=texts)
    for position in (3, 60, 117):
        data.targets[position] = None
    source = as_source(data)
    source.check_repeatable()
    assert source.labels().unlabeled
    assert len([source.image(i) for i in range(200)]) == 200
    data.wrong = {60}
    with pytest.raises(SourceError, match="list of targets says"):
        source.image(60)
