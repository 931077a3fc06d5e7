"""Datasets that misbehave, odd labels, odd sizes and ratios, each through the whole flow.

What is shown elsewhere: empty datasets (tests/sources/test_mapped.py::test_unordered_and_empty_datasets_are_refused),
items that differ at each read (test_hidden_randomness_is_noticed_and_does_not_move_the_random_state), open handles and the
identity (test_open_handles_make_the_identity_uncertain), labels that are no classes (tests/sources/test_targets.py), epochs
without a step (tests/test_loaders.py, tests/test_datamodule.py), items that raise at one index (test_on_error.py).
"""

import numpy as np
import pytest
import torch
from PIL import Image

from dq_lightning import FeatureConfig, QuantizedDataModule, as_source, load_selection
from dq_lightning.core.errors import ConfigError, SourceError
from tests.inputs.broken import MeanColour, Pictures, compact, encode, picture, settings


def labelled(targets):
    return Pictures(len(targets), {i: (picture(i), target) for i, target in enumerate(targets)})


def test_a_dataset_that_says_to_be_longer_than_it_is(tmp_path):
    class TooLong(Pictures):
        def __len__(self):
            return self.count + 3

    with pytest.raises(SourceError, match=r"Item 2\d of TooLong.*IndexError"):
        compact(TooLong(), tmp_path)
    info = compact(TooLong(), tmp_path, settings(10 / 23), on_error="skip")
    assert (info.num_source_samples, info.num_samples, info.num_unreadable) == (23, 10, 3)
    assert load_selection(info.path).index.max() < 20


def test_a_dataset_that_says_to_be_shorter_than_it_is_counts_as_it_says(tmp_path):
    class TooShort(Pictures):
        def __len__(self):
            return self.count - 5

    info = compact(TooShort(), tmp_path, settings(1.0))
    assert (info.num_source_samples, info.num_samples) == (15, 15)


def test_items_of_different_sizes(tmp_path):
    sizes = {i: (picture(i, (3 + i, 40 - i)), i % 2) for i in range(20)}
    info = compact(Pictures(broken=sizes), tmp_path, settings(store="packed"))
    assert info.num_samples == 10


class Handle(Pictures):
    """Holds an open file and a lambda, as datasets over HDF5 do: it can't be pickled."""

    def __init__(self, path):
        super().__init__()
        path.write_bytes(bytes(range(256)) * 10)
        self.file = path.open("rb")
        self.transform = lambda image: image

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        self.file.seek(index * 75)
        image = np.frombuffer(self.file.read(75), np.uint8).reshape(5, 5, 3)
        return self.transform(image) if self.transform is not None else image


@pytest.mark.parametrize("workers", [0, 2])
def test_open_handles_and_what_cannot_be_pickled(tmp_path, workers):
    config = settings(features=FeatureConfig(num_workers=workers, batch_size=5))
    info = compact(Handle(tmp_path / "pixels"), tmp_path / f"{workers}", config)
    alone = compact(Handle(tmp_path / "pixels"), tmp_path / "alone", settings())
    assert (info.num_samples, info.content_hash) == (10, alone.content_hash)


LABELS = {
    "none": ([None] * 12, None),
    "minus one": ([-1] * 12, None),
    "floats": ([i / 7 for i in range(12)], None),
    "multi-label": ([torch.tensor([i % 2, 1]) for i in range(12)], None),
    "strings": (["ab"[i % 2] for i in range(12)], 2),
    "tensors": ([torch.tensor(i % 3) for i in range(12)], 3),
    "one element": ([np.array([i % 3]) for i in range(12)], 3),
    "some missing": ([None if i == 5 else i % 2 for i in range(12)], 2),
    "some minus one": ([-1 if i == 5 else i % 2 for i in range(12)], 2),
    "one class": ([0] * 12, 1),
    "a class of one": ([1 if i == 7 else 0 for i in range(12)], 2),
    "numbers among strings": (["a", 1] * 6, None),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels(tmp_path, name):
    targets, classes = LABELS[name]
    data = labelled(targets)
    info = compact(data, tmp_path)
    assert (info.num_samples, info.num_classes) == (6, classes)
    source, index = as_source(data), load_selection(info.path).index
    for place, position in enumerate(index.tolist()):
        delivered, wanted = source.subset(index)[place][1], targets[position]
        assert torch.equal(torch.as_tensor(delivered), wanted) if torch.is_tensor(wanted) else delivered is wanted


def test_a_sample_without_the_label_that_others_have(tmp_path):
    items = {i: {"image": picture(i), "label": i % 2} for i in range(12)}
    del items[4]["label"]
    info = compact(Pictures(12, items), tmp_path)
    assert (info.num_samples, info.num_classes) == (6, 2)


@pytest.mark.parametrize(
    ("count", "bins", "ratio", "kept"), [(3, 10, 1.0, 3), (1, 10, 1.0, 1), (20, 4, 1.0, 20), (7, 7, 0.5, 4)]
)
def test_more_bins_than_samples_one_sample_and_everything_kept(tmp_path, count, bins, ratio, kept):
    info = compact(Pictures(count), tmp_path, settings(ratio, num_bins=bins))
    assert info.num_samples == kept


def test_a_class_that_gets_nothing_is_told(tmp_path, caplog):
    info = compact(labelled([1 if i == 7 else 0 for i in range(20)]), tmp_path, settings(0.1))
    assert info.num_samples == 2
    assert any("no sample is kept of 1 of 2 classes (1)" in message for message in caplog.messages)


def test_a_class_of_which_all_are_kept_is_not_told(tmp_path, caplog):
    compact(Pictures(), tmp_path, settings(1.0))
    assert not any("no sample is kept" in message for message in caplog.messages)


def test_a_ratio_that_keeps_nothing_and_an_empty_dataset(tmp_path):
    with pytest.raises(ConfigError, match=r"keeps none; pass at least 0\.025"):
        compact(Pictures(), tmp_path, settings(0.001))
    with pytest.raises(SourceError, match="empty"):
        compact(Pictures(0), tmp_path)


def test_the_train_loader_gives_what_can_be_read(tmp_path):
    data = Pictures(broken={2: OSError("gone")})
    module = QuantizedDataModule(
        data, keep_ratio=0.5, on_error="skip", encoder=(MeanColour(), encode), cache_dir=tmp_path, device="cpu", num_workers=0,
        collate_fn=list, batch_size=4,
    )  # fmt: skip
    module.prepare_data()
    module.setup("fit")
    seen = [item for batch in module.train_dataloader() for item in batch]
    assert len(seen) == 10
    known = {(picture(i).tobytes(), i % 2) for i in range(20) if i != 2}
    assert {(image.tobytes(), label) for image, label in seen} <= known


class Lazily(Pictures):
    """Opens its files and leaves it to others to decode them, as most datasets do."""

    def __init__(self, folder, broken):
        super().__init__()
        self.folder = folder
        for index in range(20):
            picture(index, (40, 30)).save(folder / f"{index:02}.jpg")
        for index in broken:
            path = folder / f"{index:02}.jpg"
            path.write_bytes(path.read_bytes()[:400])

    def __getitem__(self, index):
        return Image.open(self.folder / f"{index:02}.jpg"), index % 2


@pytest.mark.parametrize("fingerprint", [None, "given"])
@pytest.mark.parametrize("position", [0, 7])
def test_a_damaged_image_that_is_opened_lazily(position, fingerprint, tmp_path):
    data = Lazily(tmp_path, [position])
    with pytest.raises(SourceError, match=rf"Item {position} of Lazily.*[Tt]runcated"):
        compact(data, tmp_path / "cache", fingerprint=fingerprint)
    info = compact(data, tmp_path / "cache", fingerprint=fingerprint, on_error="skip")
    assert (info.num_samples, info.num_unreadable) == (10, 1)


def closed():
    image = picture(7)
    image.close()
    return image


def endless():
    within = []
    within.append(within)
    return within


ODD_ITEMS = {
    "sparse image": lambda: (torch.eye(6).to_sparse(), 1),
    "meta image": lambda: (torch.empty(3, 6, 6, device="meta"), 1),
    "closed image": lambda: (closed(), 1),
    "five channels": lambda: (torch.zeros(5, 8, 8), 1),
    "complex": lambda: (torch.zeros(3, 8, 8, dtype=torch.complex64), 1),
    "endless": lambda: (picture(7), 1, endless()),
}


@pytest.mark.parametrize("name", ODD_ITEMS)
def test_an_odd_item_is_named_or_left_out(name, tmp_path):
    data = Pictures(broken={7: ODD_ITEMS[name]()})
    with pytest.raises(SourceError, match="Item 7 of Pictures"):
        compact(data, tmp_path)
    # what stands beside a good image leaves the sample readable
    beside = len(data[7]) > 2
    assert compact(data, tmp_path, on_error="skip").num_unreadable == (0 if beside else 1)


@pytest.mark.parametrize("value", [2**63, 2**70, np.uint64(2**64 - 1)])
def test_a_class_that_is_no_64_bit_number_is_told(value, tmp_path):
    with pytest.raises(SourceError, match=r"class of sample 3 is \d+, which is no 64-bit integer"):
        compact(labelled([0, 1, 0, value, 1, 0]), tmp_path)
