"""How a dataset calls its transforms: what a packed item becomes is what the dataset delivers, or it is refused."""

import pickle
import random
import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms, tv_tensors
from torchvision.transforms import v2

from dq_lightning import QuantizeConfig, QuantizedDataModule
from dq_lightning.core.errors import SourceError
from dq_lightning.core.isolation import isolated_random_state
from dq_lightning.pipeline.packing import check_storable
from dq_lightning.pipeline.plan import make_plan
from dq_lightning.pipeline.wanted import want
from dq_lightning.sources.adapt import as_source
from dq_lightning.sources.items import plain_parts
from dq_lightning.sources.traced import same

COUNT = 24


class Scenes(Dataset):
    """Images with a mask that is the image's own brightness, so that both fit only when they were changed alike."""

    def __init__(self, transform: Any = None, **attributes: Any) -> None:
        rng = np.random.default_rng(3)
        self.images = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(COUNT)]
        self.masks = [image.convert("L") for image in self.images]
        self.transform = transform
        vars(self).update(attributes)

    def __len__(self) -> int:
        return COUNT

    def pair(self, index):
        return self.images[index].copy(), self.masks[index].copy()


def check(dataset, seeds=24):
    """Packed items become what the dataset delivers, type by type, each under a seed of its own."""
    index = torch.arange(COUNT)
    source = as_source(dataset, image_column=getattr(dataset, "image_column", None))
    finisher = pickle.loads(pickle.dumps(source.finisher(index)))
    for seed in range(seeds):
        position = seed % COUNT
        with isolated_random_state(seed):
            wanted = dataset[position]
        for item in (source.plain(position), plain_parts(source.plain(position))):
            with isolated_random_state(seed):
                assert same(finisher(position, item), wanted), seed
    return finisher


class Joint(Scenes):
    image_column = "0"

    def __getitem__(self, index):
        image, mask = self.pair(index)
        if self.transform is not None:
            image, mask = self.transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return image, mask


class JointAlways(Scenes):
    image_column = "0"

    def __getitem__(self, index):
        image, mask = self.pair(index)
        image, mask = self.transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return {"image": image, "mask": mask, "number": index}


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 1.0])
def test_a_joint_transform_changes_image_and_mask_alike_however_seldom_it_fires(p):
    check(Joint(v2.RandomHorizontalFlip(p)))
    always = JointAlways(v2.RandomHorizontalFlip(p))
    always.image_column = "image"
    check(always)
    finisher = as_source(Joint(v2.RandomHorizontalFlip(p)), image_column="0").finisher(torch.arange(COUNT))
    pairs = [finisher(0, Joint()[0]) for _ in range(30)]
    grey = np.asarray(Joint()[0][1])
    for image, mask in pairs:
        turned = not torch.equal(mask[0], torch.from_numpy(grey.copy()))
        wanted = Joint()[0][0].transpose(Image.Transpose.FLIP_LEFT_RIGHT) if turned else Joint()[0][0]
        assert torch.equal(image, tv_tensors.Image(wanted))


class OwnStream:
    """A transform that draws from a generator of its own."""

    def __init__(self):
        self.rng = np.random.default_rng()

    def __call__(self, image, mask):
        turn = self.rng.random() < 0.5
        return (v2.functional.hflip(image), v2.functional.hflip(mask)) if turn else (image, mask)


def test_a_transform_with_a_generator_of_its_own_keeps_image_and_mask_together():
    dataset = Joint(OwnStream())
    finisher = as_source(dataset, image_column="0").finisher(torch.arange(COUNT))
    plain = Joint()[0]
    flipped = 0
    for _ in range(40):
        image, mask = finisher(0, plain)
        turned = not torch.equal(image, tv_tensors.Image(plain[0]))
        flipped += turned
        assert torch.equal(mask, tv_tensors.Mask(plain[1].transpose(0) if turned else plain[1]))
    assert 0 < flipped < 40


class Shrink:
    def __call__(self, image):
        return image.resize((4, 4))


class Target(Scenes):
    """A label, and beside it a flag that is often equal to it."""

    def __getitem__(self, index):
        image, label = self.images[index], index % 2
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            label = self.target_transform(label)
        return image, label, int(index == 20)


class Two(Scenes):
    def __getitem__(self, index):
        image, mask = self.pair(index)
        return self.transforms["image"](image), self.transforms["mask"](mask)


class Steps(Scenes):
    def __getitem__(self, index):
        image = self.images[index]
        for step in self.transforms or []:
            image = step(image)
        return image, index % 3


class Sample(Scenes):
    def __getitem__(self, index):
        sample = {"image": v2.functional.pil_to_tensor(self.images[index]), "label": torch.tensor(index % 2)}
        return self.transforms(sample) if self.transforms is not None else sample


class Kept(Scenes):
    """Delivers the image before and after."""

    def __getitem__(self, index):
        image = self.images[index]
        return {"image": image, "view": self.transform(image) if self.transform else image, "label": 1}


class Views(Scenes):
    def __getitem__(self, index):
        image = self.images[index]
        views = [self.transform(image), self.transform(image)] if self.transform else [image, image]
        return views[0], views[1], index % 2


class Copied(Scenes):
    def __getitem__(self, index):
        image = self.images[index]
        return (self.transform(image) if self.transform else image).copy(), index % 2


def halve_label(label):
    return label // 2


def to_floats(sample):
    flip = torch.rand(()) < 0.1
    return {"image": (sample["image"].flip(-1) if flip else sample["image"]) / 255, "label": sample["label"]}


WAYS = {
    "image and target": lambda: Target(transforms.RandomHorizontalFlip(), target_transform=halve_label),
    "target alone": lambda: Target(None, target_transform=halve_label),
    "unused": lambda: Target(Shrink(), target_transform=None, transforms=transforms.RandomCrop(2)),
    "a dict": lambda: Two(transforms={"image": transforms.ColorJitter(0.5), "mask": transforms.ToTensor()}),
    "a list": lambda: Steps(transforms=[transforms.RandomHorizontalFlip(0.1), transforms.ToTensor()]),
    "a whole sample": lambda: Sample(transforms=to_floats),
    "beside the original": lambda: Kept(transforms.RandomHorizontalFlip(0.1)),
    "beside the original, seldom": lambda: Kept(transforms.RandomHorizontalFlip(0.001)),
    "two views": lambda: Views(transforms.RandomHorizontalFlip(0.001)),
    "a copy": lambda: Copied(transforms.RandomHorizontalFlip(0.9)),
}


def test_seldom_transforms_stay_where_they_are_called():
    index = torch.arange(COUNT)
    for dataset, calls in ((Kept(), [0]), (Views(), [0, 0])):
        dataset.transform = transforms.RandomHorizontalFlip(0.0)
        finisher = as_source(dataset, image_column="image" if len(calls) == 1 else "0").finisher(index)
        assert [call.given.parts[0].parts[0].call for call in finisher.calls] == calls
    assert (
        as_source(Kept(transforms.RandomHorizontalFlip(0.0)), image_column="image").finisher(index).item.parts[0].call
        == 0
    )


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_calling_transforms(way):
    dataset = WAYS[way]()
    dataset.image_column = {"a dict": "0", "two views": "0"}.get(way, "image" if "original" in way else None)
    check(dataset)


# items of other types than tuple and dict


@dataclass
class Record:
    image: Any
    label: int


class Named(NamedTuple):
    image: Any
    label: int


class AttributeDict(dict):
    __getattr__ = dict.__getitem__


def defaulted(**values):
    return defaultdict(list, values)


def attributed(**values):
    return AttributeDict(values)


class Typed(Scenes):
    def __getitem__(self, index):
        image = self.images[index]
        return self.kind(image=self.transform(image) if self.transform else image, label=index % 3)


@pytest.mark.parametrize("kind", [Record, Named, defaulted, attributed])
def test_items_of_classes_keep_their_type(kind):
    source = as_source(Typed(transforms.RandomHorizontalFlip(), kind=kind))
    assert source.labels().values.tolist() == [i % 3 for i in range(COUNT)]
    assert source.image(3).size == (8, 8)
    check(Typed(transforms.RandomHorizontalFlip(), kind=kind))
    check(Typed(kind=kind))
    items = [Typed(kind=kind)[i] for i in range(COUNT)]
    source = as_source(items, transform=transforms.ToTensor())
    finisher = source.finisher(torch.arange(COUNT))
    assert type(source.delivered(1)) is type(items[1])
    assert same(finisher(1, plain_parts(items[1])), source.delivered(1))


def test_a_packed_set_gives_items_of_classes_back(tmp_path):
    class Fields(Joint):
        def __getitem__(self, index):
            image, mask = (v2.functional.pil_to_tensor(part) for part in self.pair(index))
            image, mask = tv_tensors.Image(image), tv_tensors.Mask(mask)
            if self.transform is not None:
                image, mask = self.transform(image, mask)
            return {"item": Named(image, index % 2), "mask": mask, "more": Record(None, index)}

    data = Fields(v2.RandomHorizontalFlip(1.0))
    rows = np.random.default_rng(0).normal(size=(COUNT, 4)).astype(np.float32)
    options = {
        "encoder": rows,
        "keep_ratio": 0.5,
        "num_bins": 2,
        "store": "packed",
        "cache_dir": tmp_path,
        "labels": False,
    }
    module = QuantizedDataModule(data, config=QuantizeConfig(image_column="mask"), **options)
    module.prepare_data()
    module.setup("fit")
    packed = module.train_dataloader().dataset
    assert all(same(packed[at], data[position]) for at, position in enumerate(module.selection.index.tolist()))


# what can't be shown to be repeated is refused


class SameSeed(Scenes):
    """The old way to change image and mask alike."""

    image_column = "0"

    def __getitem__(self, index):
        image, mask = self.pair(index)
        if self.transform is not None:
            seed = random.randrange(2**31)
            torch.manual_seed(seed)
            image = self.transform(image)
            torch.manual_seed(seed)
            mask = self.transform(mask)
        return image, mask


class Sometimes(Scenes):
    def __getitem__(self, index):
        image = self.images[index]
        if self.transform is not None and self.rng.random() < 0.01:
            image = self.transform(image)
        return image, 0


class Afterwards(Scenes):
    image_column = "0"

    def __getitem__(self, index):
        image, mask = self.pair(index)
        if self.transform is not None:
            image, mask = self.transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
            mask = mask.long() - 1
        return image, mask


class InPlace(Scenes):
    def __getitem__(self, index):
        image = v2.functional.pil_to_tensor(self.images[index])
        if self.transform is not None:
            image = self.transform(image)
            image.add_(1)
        return image, 0


class Applied(Scenes):
    def __getitem__(self, index):
        return self.transform.forward(self.images[index]) if self.transform else self.images[index], 0


@pytest.mark.parametrize(
    ("dataset", "seen"),
    [
        (SameSeed(v2.RandomHorizontalFlip(0.1)), "sets a seed"),
        (Sometimes(Shrink(), rng=np.random.default_rng()), "draws random numbers"),
        (Sometimes(Shrink(), rng=random), "draws random numbers"),
        (Afterwards(v2.RandomHorizontalFlip(0.1)), r"\[1\]: Mask|\[1\]: Tensor"),
        (InPlace(v2.RandomHorizontalFlip(0.1)), r"\[0\]: Tensor"),
        (Copied(v2.RandomHorizontalFlip(0.0)), "changed nothing"),
        (Applied(v2.RandomHorizontalFlip(0.1)), r"\.forward"),
    ],
)
def test_what_can_not_be_repeated_is_refused(dataset, seen):
    source = as_source(dataset, image_column=getattr(dataset, "image_column", None))
    with pytest.raises(SourceError, match=seen) as caught:
        source.finisher(torch.arange(COUNT))
    assert "store='indices'" in str(caught.value)


class Disturbed(Scenes):
    """Another thread draws a number while the given reads take place, counted over all copies of the dataset."""

    image_column = "0"

    def __init__(self, disturbed):
        super().__init__(v2.RandomHorizontalFlip(0.5), disturbed=disturbed, reads=[])

    def __getitem__(self, index):
        image, mask = self.pair(index)
        if self.transform is None:
            return image, mask
        if len(self.reads) in self.disturbed:
            thread = threading.Thread(target=random.random)
            thread.start()
            thread.join()
        self.reads.append(index)
        return self.transform(image, mask)


def test_another_thread_may_draw_random_numbers():
    check(Disturbed(disturbed=(0, 2, 3)))
    with pytest.raises(SourceError, match="draws random numbers"):
        as_source(Disturbed(range(10_000)), image_column="0").finisher(torch.arange(COUNT))


def test_a_transform_called_in_an_unknown_way_is_told_with_what_to_do():
    class Odd(Scenes):
        def __getitem__(self, index):
            return self.transform.apply_to(self.images[index]), 0

    class HasApply:
        def apply_to(self, image):
            return image

    with pytest.raises(SourceError, match=r"Odd can't be read without its `transform`.*if self.transform is not None"):
        as_source(Odd(HasApply()))


def test_albumentations():
    albumentations = pytest.importorskip("albumentations")

    class Always(Scenes):
        def __getitem__(self, index):
            image, mask = map(np.array, self.pair(index))
            made = self.transform(image=image, mask=mask)
            return made["image"], made["mask"]

    class IfThere(Scenes):
        def __getitem__(self, index):
            image = self.images[index]
            if self.transform is not None:
                image = self.transform(image=np.array(image))["image"]
            return image, index % 2

    flip = albumentations.Compose(
        [albumentations.HorizontalFlip(p=0.1), albumentations.RandomBrightnessContrast(p=0.1)]
    )
    for dataset in (Always(flip), IfThere(flip)):
        source = as_source(dataset, image_column="0")
        assert source.image(2).size == (8, 8)
        source.check_repeatable()
        finisher = source.finisher(torch.arange(COUNT))
        for position in range(COUNT):
            flip.set_random_seed(position)
            wanted = dataset[position]
            flip.set_random_seed(position)
            assert same(finisher(position, source.plain(position)), wanted)


MODULES_OWN = np.random.default_rng(0)


class OfTheTransform:
    """Turns an image upside down with a probability, by a random generator that the transform holds."""

    def __init__(self, p):
        self.p, self.draws = p, np.random.default_rng(0)

    def __call__(self, image):
        return np.flipud(image) if self.draws.random() < self.p else np.asarray(image)


class OfTheModule(OfTheTransform):
    """The same with a generator that no copy of the transform has."""

    def __call__(self, image):
        return np.flipud(image) if MODULES_OWN.random() < self.p else np.asarray(image)


@pytest.mark.parametrize("transform", [*map(OfTheTransform, (0.02, 0.5, 0.98)), OfTheModule(0.5)])
def test_transforms_with_random_generators_of_their_own_are_packed(transform):
    class Pictures(Scenes):
        def __getitem__(self, index):
            return self.transform(np.array(self.images[index])), index % 2

    plan = make_plan(Pictures(transform), want(None, store="packed", keep_ratio=0.5))
    for _ in range(8):
        check_storable(plan, plan.source.finisher(plan.candidates))


class WithTransformOfTheClass(Scenes):
    transform = OfTheTransform(0.5)

    def __init__(self):
        self.images = Scenes(None).images

    def __getitem__(self, index):
        return self.transform(np.array(self.images[index])), index % 2


class WithMethod(WithTransformOfTheClass):
    def transform(self, image):
        return np.fliplr(image)


def test_a_transform_that_is_an_attribute_of_the_class_is_taken_off():
    source, method = as_source(WithTransformOfTheClass()), as_source(WithMethod())
    source.check_repeatable()
    finisher, own = source.finisher(torch.arange(COUNT)), WithTransformOfTheClass.transform
    results = set()
    for position in range(COUNT):
        pixels = np.array(source.dataset.images[position])
        assert np.array_equal(source.plain(position)[0], pixels)
        assert np.array_equal(method.plain(position)[0], np.fliplr(pixels))
        own.draws = np.random.default_rng(position)
        delivered = source.delivered(position)
        own.draws = np.random.default_rng(position)
        assert same(finisher(position, source.plain(position)), delivered)
        results.add(np.array_equal(delivered[0], pixels))
    assert results == {True, False}
