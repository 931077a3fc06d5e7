"""Parts and sums of datasets."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, random_split
from torchvision import transforms
from torchvision.datasets import FakeData

from dq_lightning.core.errors import SourceError
from dq_lightning.identity.values import digest_of
from dq_lightning.sources.adapt import as_source

AUGMENT = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor()])


class Part(Dataset):
    """Images whose value tells which they are."""

    def __init__(self, start, count, transform=None, broken=()):
        self.start, self.count, self.transform, self.broken = start, count, transform, broken

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError("broken")
        image = Image.new("L", (4, 4), self.start + index)
        return (self.transform(image) if self.transform else image), (self.start + index) % 3


def value(source, index):
    return int(np.asarray(source.image(index))[0, 0, 0])


@given(st.data())
def test_nested_positions(data):
    dataset, truth = Part(0, 20), list(range(20))
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            index = data.draw(st.lists(st.integers(0, len(truth) - 1), min_size=1, max_size=12))
            dataset, truth = Subset(dataset, index), [truth[i] for i in index]
        else:
            count = data.draw(st.integers(0, 5))
            dataset, truth = ConcatDataset([dataset, Part(100, count)]), truth + list(range(100, 100 + count))
    source = as_source(dataset)
    assert [value(source, i) for i in range(len(source))] == truth
    assert source.labels().values.tolist() == [v % 3 for v in truth]
    order = torch.randperm(len(truth))
    finisher, compact = source.finisher(order), source.subset(order)
    for position, place in enumerate(order.tolist()):
        wanted = digest_of(dataset[place])
        assert digest_of(compact[position]) == wanted
        assert digest_of(finisher(position, source.plain(place))) == wanted


def test_transforms_of_the_parts_are_stripped_and_delivered():
    dataset = ConcatDataset([Part(0, 5, AUGMENT), Subset(Part(50, 5, transforms.Pad(1)), [4, 1])])
    source = as_source(dataset)
    assert [value(source, i) for i in (0, 4, 5, 6)] == [0, 4, 54, 51]
    assert source.delivered(0)[0].shape == (1, 4, 4)
    assert source.delivered(6)[0].size == (6, 6)
    index = torch.tensor([1, 6])
    finisher = pickle.loads(pickle.dumps(source.finisher(index)))
    assert digest_of(finisher(1, source.plain(6))) == digest_of(dataset[6])
    replaced = as_source(dataset, transform=transforms.Pad(2))
    assert [replaced.delivered(i)[0].size for i in (0, 6)] == [(8, 8), (8, 8)]
    assert [replaced.subset(index)[i][0].size for i in (0, 1)] == [(8, 8), (8, 8)]


def test_digest_follows_content_and_order(memory):
    arrays = TensorDataset(torch.arange(96, dtype=torch.uint8).reshape(6, 1, 4, 4), torch.arange(6))
    for dataset in (arrays, Part(0, 6)):
        digests = [
            as_source(Subset(dataset, index)).digest(memory) for index in ([0, 1, 2], [0, 2, 1], [0, 1], [0, 1, 2, 3])
        ]
        assert len(set(digests)) == 4
        assert as_source(Subset(dataset, torch.tensor([0, 1, 2]))).digest(memory) == digests[0]
        assert as_source(Subset(dataset, [0, 1, 2])).quick_digest(memory) == digests[0]
    a, b = Part(0, 3), Part(9, 3)
    assert as_source(ConcatDataset([a, b])).digest(memory) != as_source(ConcatDataset([b, a])).digest(memory)
    both = as_source(ConcatDataset([Part(0, 3, AUGMENT), Part(9, 3)]))
    assert both.quick_digest(memory) == as_source(ConcatDataset([a, b])).digest(memory)
    assert both.identity_is_certain


def test_a_broken_item_that_was_left_out_is_never_read(memory):
    dataset = Subset(Part(0, 6, AUGMENT, broken=(0, 3)), [1, 2, 4, 5])
    source = as_source(dataset)
    source.check_repeatable()
    assert source.labels().values.tolist() == [1, 2, 1, 2]
    assert len(source.digest(memory)) == 64
    assert source.finisher(torch.tensor([0, 2]))(0, source.plain(0))[0].shape == (1, 4, 4)
    with pytest.raises(SourceError, match=r"Item 2 of 4 samples of Part"):
        as_source(Subset(Part(0, 6, broken=(3,)), [1, 2, 3, 5])).image(2)


def test_random_split_of_torchvision_keeps_labels():
    whole = FakeData(30, (3, 8, 8), transform=AUGMENT)
    part, _ = random_split(whole, [20, 10], torch.Generator().manual_seed(0))
    source = as_source(part)
    assert source.labels().values.tolist() == [whole[i][1] for i in part.indices]
    assert "20 samples of FakeData" in source.describe()


def test_a_subset_class_of_the_users_is_a_dataset_of_its_own():
    class Doubled(Subset):
        def __init__(self, dataset, indices, transform=None):
            super().__init__(dataset, indices)
            self.transform = transform

        def __getitem__(self, index):
            image, target = self.dataset[self.indices[index]]
            return (self.transform(image) if self.transform else image), target

        def __getitems__(self, indices):
            return [self[i] for i in indices]

    source = as_source(Doubled(Part(0, 9), [3, 4, 5], AUGMENT))
    assert value(source, 1) == 4
    assert source.delivered(1)[0].shape == (1, 4, 4)
    assert source.labels().values.tolist() == [0, 1, 2]


def test_parts_with_and_without_classes_have_none_together():
    bare = [Image.new("L", (4, 4), i) for i in range(3)]
    assert as_source(ConcatDataset([bare, bare])).labels() is None
    with_floats = [(image, 0.5) for image in bare]
    assert as_source(ConcatDataset([Part(0, 3), with_floats])).labels() is None


def test_every_part_has_its_own_range_of_values():
    unit = [(torch.full((3, 4, 4), v), 0) for v in (0.0, 1.0)]
    byte = [(torch.full((3, 4, 4), v), 0) for v in (0.0, 51.0, 200.0)]
    source = as_source(ConcatDataset([unit, byte]))
    assert [value(source, i) for i in range(5)] == [0, 255, 0, 51, 200]


def test_an_empty_subset_is_refused():
    with pytest.raises(SourceError, match="empty"):
        as_source(Subset(Part(0, 3), []))


def test_positions_counted_from_the_end():
    dark, light = ([(Image.new("RGB", (4, 4), (value,) * 3), label)] for value, label in ((0, 0), (255, 1)))
    subset = Subset(ConcatDataset([dark, light]), [0, -1])
    source = as_source(subset)
    assert [source.plain(i)[1] for i in range(2)] == [subset[i][1] for i in range(2)] == [0, 1]
    assert source.image(1).getpixel((0, 0)) == (255, 255, 255)
    assert source.labels().values.tolist() == [0, 1]


@pytest.mark.parametrize(
    "kind",
    [lambda i: i[::-1], lambda i: i.astype(">i4"), lambda i: i.astype(object), lambda i: i.tolist(), torch.tensor],
)
def test_indices_of_any_kind(kind):
    order = np.array([7, 2, -1, 5, 2])
    indices = kind(order)
    source = as_source(Subset(Part(0, 12), indices))
    assert [value(source, i) for i in range(5)] == [int(i) % 12 for i in indices]
