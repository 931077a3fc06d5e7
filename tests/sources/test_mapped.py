"""torch and torchvision datasets in memory, and any other map-style dataset."""

import logging
import pickle
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, MNIST, FakeData, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from dq_lightning.core.config import QuantizeConfig
from dq_lightning.core.errors import SourceError
from dq_lightning.identity.values import digest_of
from dq_lightning.pipeline.plan import make_plan
from dq_lightning.pipeline.wanted import Wanted
from dq_lightning.sources.adapt import as_source
from dq_lightning.sources.mapped import ArraySource, MapSource

AUGMENT = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor()])


def pictures(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 6, 5, 3), dtype=np.uint8)


class Pictures(Dataset):
    """What users write: data in memory, a transform that may be None."""

    def __init__(self, count=20, transform=None, target_transform=None, seed=0):
        self.rows = pictures(count, seed)
        self.answers = [i % 3 for i in range(count)]
        self.transform = transform
        self.target_transform = target_transform
        self.reads = 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.reads += 1
        image, target = Image.fromarray(self.rows[index]), self.answers[index]
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target


class Calls(Pictures):
    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.rows[index])), self.answers[index]


class Rows(Pictures):
    def __getitem__(self, index):
        row = {"image": Image.fromarray(self.rows[index]), "label": self.answers[index], "id": f"n{index}"}
        return self.transform(row) if self.transform else row


def flip_row(row):
    return {"pixels": transforms.ToTensor()(row["image"]), "answer": row["label"] + 10}


def make_cifar(transform=None, target_transform=None, seed=0, count=30):
    """A real CIFAR10 object without its files."""
    dataset = CIFAR10.__new__(CIFAR10)
    super(CIFAR10, dataset).__init__("nowhere", transform=transform, target_transform=target_transform)
    dataset.data = pictures(count, seed).transpose(0, 2, 1, 3)
    dataset.targets = [i % 10 for i in range(count)]
    dataset.classes = [f"class {i}" for i in range(10)]
    return dataset


def make_mnist():
    dataset = MNIST.__new__(MNIST)
    super(MNIST, dataset).__init__("nowhere", transform=AUGMENT)
    dataset.data = torch.from_numpy(pictures(12)[..., 0].copy())
    dataset.targets = torch.arange(12) % 10
    return dataset


def add_one(target):
    return target + 1


def tensors():
    return TensorDataset(torch.from_numpy(pictures(9).transpose(0, 3, 1, 2).copy()), torch.arange(9) % 2)


EVERY = [
    (lambda: make_cifar(AUGMENT, add_one), ArraySource),
    (make_mnist, ArraySource),
    (tensors, ArraySource),
    (lambda: FakeData(12, (3, 8, 8), transform=AUGMENT), MapSource),
    (lambda: Pictures(transform=AUGMENT, target_transform=add_one), MapSource),
    (lambda: Calls(transform=AUGMENT), MapSource),
    (lambda: Rows(transform=flip_row), MapSource),
    (lambda: [(Image.new("L", (4, 4), i), i % 2) for i in range(6)], MapSource),
]


@pytest.mark.parametrize(("make", "adapter"), EVERY)
def test_plain_delivered_subset_and_finisher_agree_with_the_dataset(make, adapter, memory):
    dataset = make()
    source = as_source(dataset)
    assert type(source) is adapter
    assert len(source) == len(dataset)
    assert f"{len(dataset)} samples" in source.describe()
    index = torch.tensor([1, 3, 5])
    finisher = pickle.loads(pickle.dumps(source.finisher(index)))
    compact = source.subset(index)
    for position, place in enumerate(index.tolist()):
        made = []
        for give in (
            lambda place=place: dataset[place],
            lambda place=place: source.delivered(place),
            lambda position=position: compact[position],
            lambda position=position, place=place: finisher(position, source.plain(place)),
        ):
            torch.manual_seed(place)
            made.append(digest_of(give()))
        assert len(set(made)) == 1
        assert digest_of(source.plain(place)) == digest_of(source.plain(place))
        assert source.image(place).mode == "RGB"
        assert source.encoded(place) is None
        assert source.decode_warning(place) is None
        assert source.sample_id(place) == str(place)
    again = pickle.loads(pickle.dumps(source))
    assert np.array_equal(np.asarray(again.image(2)), np.asarray(source.image(2)))
    assert again.digest(memory) == source.digest(memory)


def test_the_finisher_holds_no_data():
    source = as_source(make_cifar(AUGMENT, count=3000))
    assert len(pickle.dumps(source.finisher(torch.arange(2000)))) < 5000


def test_the_users_dataset_is_never_changed():
    for dataset in (Pictures(transform=AUGMENT), make_cifar(AUGMENT), Calls(transform=AUGMENT)):
        before = dict(vars(dataset))
        source = as_source(dataset, transform=None, target_transform=add_one)
        source.labels()
        source.finisher(torch.arange(3))
        before.pop("reads", None)
        assert all(vars(dataset)[name] is value for name, value in before.items())


def test_images_are_the_arrays_without_the_transform():
    dataset = make_cifar(transforms.RandomCrop(2))
    source = as_source(dataset)
    assert np.array_equal(np.asarray(source.image(4)), dataset.data[4])
    assert np.array_equal(np.asarray(as_source(tensors()).image(4)), pictures(9)[4])


@pytest.mark.parametrize(
    "make", [make_cifar, lambda: Pictures(transform=AUGMENT), lambda: Pictures(target_transform=add_one)]
)
def test_other_transforms_in_place_of_the_datasets_own(make):
    source = as_source(make(), transform=transforms.Pad(2), target_transform=str)
    image, target = source.delivered(3)
    assert image.size == (source.plain(3)[0].width + 4, source.plain(3)[0].height + 4)
    assert target == str(source.plain(3)[1])
    assert digest_of(source.finisher(torch.tensor([3]))(0, source.plain(3))) == digest_of((image, target))
    bare = as_source(make(), transform=None, target_transform=None)
    assert digest_of(bare.delivered(3)) == digest_of(bare.plain(3))


def test_transforms_for_a_dataset_without_a_place_for_them():
    items = [(Image.new("RGB", (4, 4), (i, 0, 0)), i % 2) for i in range(6)]
    source = as_source(items, transform=transforms.ToTensor(), target_transform=add_one)
    assert source.delivered(3)[0].shape == (3, 4, 4)
    assert source.subset(torch.tensor([3]))[0][1] == 2
    assert source.plain(3)[1] == 1
    assert source.finisher(torch.tensor([3]))(0, source.plain(3))[1] == 2


def test_joint_transforms_of_version_two():
    dataset = FakeData(6, (3, 8, 8))
    joint = v2.Compose([v2.RandomHorizontalFlip(), v2.ToImage()])
    dataset.transforms, dataset.transform = joint, joint
    source = as_source(dataset)
    assert isinstance(source.plain(0)[0], Image.Image)
    assert type(source.delivered(0)) is tuple


def test_a_transform_that_cannot_be_reproduced_is_refused_with_advice():
    class Counts(Pictures):
        def __getitem__(self, index):
            image, target = super().__getitem__(index)
            return image, target if self.transform is None else target + 100

    with pytest.raises(SourceError, match="store='indices'"):
        as_source(Counts(transform=AUGMENT)).finisher(torch.arange(3))


def test_loader_with_workers_gives_what_the_dataset_gives():
    source = as_source(make_cifar(transforms.ToTensor()))
    index = torch.tensor([2, 3, 20, 29])
    loader = DataLoader(source.subset(index), batch_size=3, num_workers=1)
    assert torch.cat([targets for _, targets in loader]).tolist() == [2, 3, 0, 9]


# labels


def test_labels_from_the_list_are_read_without_the_items():
    dataset = make_cifar()
    labels = as_source(dataset).labels()
    assert labels.values.tolist() == dataset.targets
    assert labels.names == tuple(dataset.classes)
    assert as_source(make_mnist()).labels().values.tolist() == [*range(10), 0, 1]


def test_labels_of_items_are_read_in_the_same_pass_as_the_digest(memory):
    dataset = Pictures(40)
    source = as_source(dataset)
    source.digest(memory)
    seen = source.plain_dataset.reads
    assert source.labels().values.tolist() == dataset.answers
    assert source.plain_dataset.reads - seen < len(dataset)


def test_a_list_of_targets_that_items_do_not_follow_is_not_believed():
    dataset = Pictures(40)
    dataset.targets = [0] * 40
    assert as_source(dataset).labels().values.tolist() == dataset.answers


@pytest.mark.parametrize(
    "target",
    [0.5, None, Image.new("L", (6, 5)), torch.tensor([0, 1, 1]), torch.zeros(2, 4), {"boxes": torch.zeros(2, 4)}],
)
def test_targets_that_are_no_classes_stay_untouched(target):
    items = [(Image.new("RGB", (4, 4), (i, 0, 0)), target) for i in range(5)]
    source = as_source(items)
    assert source.labels() is None
    assert source.delivered(2)[1] is target


def test_integers_of_shape_one_are_classes():
    items = [(Image.new("RGB", (4, 4), (i, 0, 0)), np.array([i % 3])) for i in range(9)]
    assert as_source(items).labels().values.tolist() == [0, 1, 2] * 3


def test_targets_that_differ_in_most_samples_are_asked_about():
    images = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(40)]
    named = [(image, f"{i}.png", i % 2) for i, image in enumerate(images)]
    with pytest.raises(SourceError, match=r"40 different values.*labels='1'.*labels=False"):
        as_source(named).labels()
    assert as_source(named, labels="2").labels().values.tolist() == [i % 2 for i in range(40)]
    assert as_source(named, labels="1").labels().num_classes == 40
    assert as_source(named, labels=False).labels() is None
    numbered = [{"image": image, "label": i} for i, image in enumerate(images)]
    with pytest.raises(SourceError, match="40 different values"):
        as_source(numbered).labels()
    assert as_source(numbered[:10]).labels().num_classes == 10


@pytest.mark.parametrize("named", ["image", "score"])
def test_a_named_column_that_holds_no_classes_is_an_error(named):
    items = [{"image": Image.new("RGB", (4, 4), (i, 0, 0)), "score": i / 7, "label": i % 2} for i in range(6)]
    with pytest.raises(SourceError, match=rf"labels='{named}'.*no classes.*labels=False"):
        as_source(items, labels=named).labels()


@pytest.mark.parametrize(
    "draw", [random.random, lambda: torch.rand(()), np.random.rand, np.random.default_rng().random]
)
def test_a_change_that_seldom_comes_is_found_where_numbers_are_drawn(draw):
    class Seldom(Pictures):
        def __getitem__(self, index):
            image, target = super().__getitem__(index)
            return image.rotate(90) if self.draw() < 0.03 else image, target

    dataset = Seldom(30)
    # a bound method shows its generator as an attribute does
    dataset.draw, dataset.stream = draw, getattr(draw, "__self__", None)
    with pytest.raises(SourceError, match="something random is hidden"):
        as_source(dataset).check_repeatable()


def test_arrays_of_many_channels_are_refused_before_any_work_unless_features_are_given():
    items = [{"bands": torch.zeros(13, 8, 8), "label": i % 2} for i in range(6)]
    with pytest.raises(SourceError, match=r"no image.*13, 8, 8.*load_selection"):
        as_source(items).image_leaf()
    named = QuantizeConfig(image_column="bands")
    with pytest.raises(SourceError, match=r"image_column='bands'.*load_selection.*encoder=array"):
        make_plan(items, Wanted(named, encoder=(torch.nn.Flatten(), transforms.ToTensor())))
    plan = make_plan(items, Wanted(named, encoder=np.zeros((6, 3), np.float32)))
    assert plan.labels.values.tolist() == [0, 1] * 3
    assert plan.source.delivered(1) is items[1]


def test_that_no_classes_were_found_is_told_once(caplog):
    items = [(Image.new("RGB", (4, 4), (i, 0, 0)), 0.5) for i in range(5)]
    with caplog.at_level(logging.INFO, "dq_lightning"):
        as_source(items, labels=False).labels()
        as_source([(image, 3) for image, _ in items]).labels()
        assert "no classes" not in caplog.text
        source = as_source(items)
        assert source.labels() is source.labels() is None
    assert caplog.text.count("no classes found") == 1


def test_hidden_randomness_is_found_before_the_long_pass(memory):
    class Hidden(Pictures):
        def __getitem__(self, index):
            return transforms.RandomCrop(3)(super().__getitem__(index)[0]), self.answers[index]

    source = as_source(Hidden(500))
    with pytest.raises(SourceError, match="transform"):
        source.digest(memory)
    assert source.plain_dataset.reads < 100


def test_a_long_pass_is_told_and_draws_a_bar_on_a_terminal(memory, caplog, capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with caplog.at_level(logging.INFO, "dq_lightning"):
        as_source(Pictures(1200)).digest(memory)
    assert caplog.text.count("reading every item") == 1
    assert "1200/1200" in capsys.readouterr().err
    quiet = as_source(Pictures(1200, seed=1))
    quiet.shows_progress = False
    quiet.digest(memory)
    assert capsys.readouterr().err == ""


def test_bare_images_have_no_labels():
    source = as_source([Image.new("L", (4, 4), i) for i in range(5)])
    assert source.labels() is None
    assert np.asarray(source.image(3)).max() == 3


def test_given_labels_group_but_are_not_delivered():
    source = as_source(make_cifar(count=4), labels=["b", "a", "b", "c"])
    assert source.labels().names == ("a", "b", "c")
    assert source.delivered(1)[1] == 1
    assert as_source(make_cifar(), labels=False).labels() is None
    with pytest.raises(SourceError, match="2 values but the dataset has 30"):
        as_source(make_cifar(), labels=[0, 1])


# identity


def test_digest_ignores_transforms_and_sees_every_change_of_content(memory):
    same = {as_source(make_cifar(t)).digest(memory) for t in (None, AUGMENT, transforms.Pad(1))}
    assert len(same) == 1
    pixel, label, order = make_cifar(), make_cifar(), make_cifar()
    pixel.data = pixel.data.copy()
    pixel.data[17, 0, 0, 0] ^= 1
    label.targets = [*label.targets[:-1], 5]
    order.data = order.data[::-1]
    changed = {as_source(dataset).digest(memory) for dataset in (pixel, label, order, make_cifar(count=29))}
    assert len(changed | same) == 5


@pytest.mark.parametrize("count", [20, 100])
def test_digest_of_items_sees_a_change_anywhere(count, memory):
    wanted = as_source(Pictures(count, AUGMENT)).digest(memory)
    assert as_source(Pictures(count)).digest(memory) == wanted
    for place in (0, 7, count - 1):
        dataset = Pictures(count)
        dataset.rows[place, 0, 0, 0] ^= 1
        source = as_source(dataset)
        assert source.quick_digest(memory) is None
        assert source.digest(memory) != wanted


def test_quick_digest_recalls_without_reading_everything(memory):
    first = as_source(Pictures(200))
    assert first.quick_digest(memory) is None
    digest = first.digest(memory)
    second = as_source(Pictures(200, AUGMENT))
    assert second.quick_digest(memory) == digest
    assert second.plain_dataset.reads < 60
    assert second.identity_is_certain


def test_open_handles_make_the_identity_uncertain(memory, tmp_path):
    (tmp_path / "data.bin").write_bytes(b"x")
    dataset = Pictures(5)
    with (tmp_path / "data.bin").open("rb") as dataset.handle:
        source = as_source(dataset)
        assert not source.identity_is_certain
        source.digest(memory)
        assert next(iter(memory.known)).startswith("opaque:")
        assert as_source(dataset).quick_digest(memory) == source.digest(memory)


def test_content_that_changes_by_reading_makes_the_identity_uncertain():
    class Caches(Pictures):
        def __init__(self, count):
            super().__init__(count)
            self.log = []

        def __getitem__(self, index):
            self.log.append(index)
            return super().__getitem__(index)

    assert not as_source(Caches(5)).identity_is_certain


def test_a_touched_file_behind_a_dataset_changes_the_state(memory, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("one")
    dataset = Pictures(50)
    dataset.listing = str(path)
    as_source(dataset).digest(memory)
    assert as_source(dataset).quick_digest(memory) is not None
    path.write_text("three")
    assert as_source(dataset).quick_digest(memory) is None


def test_files_below_a_folder_are_read_again_though_some_may_have_changed_unseen(memory, tmp_path):
    class Listed(Dataset):
        def __init__(self):
            self.root, self.names = str(tmp_path), [f"{i}.png" for i in range(40)]

        def __len__(self):
            return len(self.names)

        def __getitem__(self, index):
            return Image.open(f"{self.root}/{self.names[index]}").convert("RGB"), index % 2

    for i, row in enumerate(pictures(40)):
        Image.fromarray(row).save(tmp_path / f"{i}.png")
    first = as_source(Listed())
    digest = first.digest(memory)
    Image.new("RGB", (5, 6)).save(tmp_path / "1.png")  # no spot is looked at there
    second = as_source(Listed())
    assert second.state_key() == first.state_key()
    assert not second.identity_is_certain
    assert second.digest(memory) != digest


# refusals


def test_hidden_randomness_is_noticed_and_does_not_move_the_random_state():
    class Hidden(Pictures):
        def __getitem__(self, index):
            image, target = super().__getitem__(index)
            return transforms.RandomCrop(3)(image), target + random.randint(0, 1) * 0

    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(SourceError, match="transform"):
        as_source(Hidden()).check_repeatable()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    as_source(Pictures(transform=AUGMENT)).check_repeatable()


def test_unordered_and_empty_datasets_are_refused():
    with pytest.raises(SourceError, match="set can't be read by position"):
        as_source({1, 2})
    with pytest.raises(SourceError, match="Pictures is empty"):
        as_source(Pictures(0))


def test_a_wrong_length_and_a_broken_item_are_errors_that_name_the_index(memory):
    class Lies(Pictures):
        def __len__(self):
            return len(self.rows) + 2

    with pytest.raises(SourceError, match=r"Item 20 of Lies with 22 samples.*IndexError") as caught:
        as_source(Lies()).digest(memory)
    assert isinstance(caught.value.__cause__, IndexError)

    class Broken(Pictures):
        def __getitem__(self, index):
            if index == 13:
                raise RuntimeError("disk on fire")
            return super().__getitem__(index)

    with pytest.raises(SourceError, match=r"Item 13 .*disk on fire"):
        as_source(Broken()).image(13)


def test_a_source_passes_through():
    source = as_source(Pictures())
    assert as_source(source) is source


def test_a_torchvision_class_that_reads_its_arrays_in_its_own_way_is_read_item_by_item(memory):
    class Noisy(CIFAR10):
        def __getitem__(self, index):
            image, target = super().__getitem__(index)
            return image, (target + index) % 10

    dataset = make_cifar(AUGMENT)
    dataset.__class__ = Noisy
    source = as_source(dataset)
    assert type(source) is MapSource
    assert source.labels().values.tolist() == [(i % 10 + i) % 10 for i in range(30)]
    assert source.digest(memory) != as_source(make_cifar()).digest(memory)


def test_torchvisions_wrapper_for_version_two(memory):
    dataset = wrap_dataset_for_transforms_v2(make_cifar(v2.Compose([v2.RandomHorizontalFlip(), v2.ToImage()])))
    source = as_source(dataset)
    source.check_repeatable()
    assert np.array_equal(np.asarray(source.image(3)), make_cifar().data[3])
    assert source.labels().values.tolist() == make_cifar().targets
    torch.manual_seed(0)
    wanted = digest_of(dataset[3])
    torch.manual_seed(0)
    assert digest_of(source.finisher(torch.tensor([3]))(0, source.plain(3))) == wanted
    assert as_source(dataset, labels=False).labels() is None
    assert as_source(source, labels=False).labels() is None
    assert source.labels() is not None


# the real thing


def test_cifar10(cifar_root, memory):
    plain, augmented = CIFAR10(cifar_root), CIFAR10(cifar_root, transform=AUGMENT)
    source = as_source(augmented)
    assert source.labels().values.bincount().tolist() == [5000] * 10
    assert source.labels().names[3] == "cat"
    assert source.digest(memory) == as_source(plain).digest(memory)
    assert source.digest(memory) != as_source(CIFAR10(cifar_root, train=False)).digest(memory)
    for index in (0, 31_415, 49_999):
        assert np.array_equal(np.asarray(source.image(index)), plain.data[index])
    source.check_repeatable()


class OneRank(IterableDataset):
    """What MosaicML's StreamingDataset looks like on one of two ranks: it has positions, and `len` is half of them."""

    def __init__(self):
        self.pictures = Pictures(6)

    def __iter__(self):
        return iter(self.pictures)

    def __getitem__(self, index):
        return self.pictures[index]

    def __len__(self):
        return 3

    @property
    def size(self):
        return 6


@pytest.mark.parametrize(
    ("name", "home", "length"), [("StreamingDataset", "streaming.base.dataset", 6), ("Mine", "mine", 3)]
)
def test_what_has_positions_is_read_by_them_whatever_its_base_class(name, home, length):
    source = as_source(type(name, (OneRank,), {"__module__": home})())
    assert len(source) == length
    assert source.labels().values.tolist() == [Pictures(6)[i][1] for i in range(length)]
    kept = source.subset(torch.tensor([0, 2]))
    assert kept[1][1] == Pictures(6)[2][1]
    assert not source.in_order


def test_shards_of_mosaicml_are_read_by_position(tmp_path):
    streaming = pytest.importorskip("streaming", reason="mosaicml-streaming is not installed")
    columns = {"image": "pil", "label": "int"}
    with streaming.MDSWriter(out=str(tmp_path / "shards"), columns=columns, size_limit=1 << 11) as writer:
        for image, label in Pictures(8):
            writer.write({"image": image, "label": label})
    made = as_source(Pictures(8))
    for shuffle in (False, True):
        dataset = streaming.StreamingDataset(local=str(tmp_path / "shards"), shuffle=shuffle, batch_size=1)
        source = as_source(dataset)
        assert len(source) == 8
        assert source.labels().values.tolist() == made.labels().values.tolist()
        for place, index in enumerate((6, 1)):
            assert source.image(index).tobytes() == made.image(index).tobytes()
            assert source.subset(torch.tensor([6, 1]))[place]["label"] == Pictures(8)[index][1]


def test_chunks_of_litdata_are_read_by_position(tmp_path):
    litdata = pytest.importorskip("litdata")
    from litdata.streaming.writer import BinaryWriter

    (tmp_path / "chunks").mkdir()
    writer = BinaryWriter(cache_dir=str(tmp_path / "chunks"), chunk_size=3)
    for index, (image, label) in enumerate(Pictures(8)):
        writer[index] = (image, label)
    writer.done()
    writer.merge()
    made = as_source(Pictures(8))
    for shuffle in (False, True):
        dataset = litdata.StreamingDataset(str(tmp_path / "chunks"), cache_dir=str(tmp_path / "read"), shuffle=shuffle)
        source = as_source(dataset)
        assert len(source) == 8
        assert source.labels().values.tolist() == made.labels().values.tolist()
        for place, index in enumerate((6, 1)):
            assert source.image(index).tobytes() == made.image(index).tobytes()
            assert source.subset(torch.tensor([6, 1]))[place][1] == Pictures(8)[index][1]
