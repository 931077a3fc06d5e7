"""Finding the image and the target, and digesting nested items."""

import collections
import dataclasses
import types
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dq_lightning.core.errors import SourceError
from dq_lightning.identity.values import digest_of
from dq_lightning.sources.items import at, evenly_spaced, find_image, find_target, with_value

IMAGE = Image.new("RGB", (5, 4))
MASK = Image.new("L", (5, 4))
Pair = namedtuple("Pair", "image label")


@pytest.mark.parametrize(
    ("item", "wanted", "image", "target"),
    [
        ((IMAGE, 3), None, (0,), (1,)),
        ([IMAGE, 3], None, (0,), (1,)),
        (Pair(IMAGE, 3), None, (0,), (1,)),
        ((3, IMAGE), None, (1,), (0,)),
        ((IMAGE, 3, "path"), None, (0,), (1,)),
        ((IMAGE, MASK), None, (0,), (1,)),
        ((torch.zeros(3, 4, 4), torch.zeros(2, 4)), None, (0,), (1,)),
        ({"image": IMAGE, "label": 3}, None, ("image",), ("label",)),
        ({"image": IMAGE, "mask": MASK, "y": 1}, None, ("image",), ("y",)),
        ({"left": IMAGE, "right": MASK}, "right", ("right",), None),
        ((IMAGE, MASK, 3), "1", (1,), (2,)),
        ({"data": {"picture": IMAGE}, "label": 3}, None, ("data", "picture"), ("label",)),
        (IMAGE, None, (), None),
        ((IMAGE,), None, (0,), None),
        ((IMAGE, IMAGE, 3), None, (0,), (2,)),  # views of one image, without the transforms that make them differ
        (((IMAGE, IMAGE), 3), None, (0, 0), (1,)),
        ({"views": [IMAGE, IMAGE, IMAGE], "label": 3}, None, ("views", 0), ("label",)),
        ({"views": [IMAGE, IMAGE], "other": MASK, "y": 3}, "views", ("views", 0), ("y",)),
        (((IMAGE, MASK), 3), "0.1", (0, 1), (1,)),
        ({"a": {"b.c": IMAGE, "d": MASK}, "a.b": MASK, "y": 3}, "a.b.c", ("a", "b.c"), ("y",)),
        ({"a": (MASK,), "a.0": IMAGE, "y": 3}, "a.0", ("a.0",), ("y",)),
    ],
)
def test_leaves(item, wanted, image, target):
    assert find_image(item, wanted) == image
    assert find_target(item, image, None) == target


@pytest.mark.parametrize("item", [(IMAGE, MASK, 3), {"left": IMAGE, "right": MASK}])
def test_several_images_are_an_error_that_names_the_option(item):
    with pytest.raises(SourceError, match=r"2 images.*image_column="):
        find_image(item, None)


@pytest.mark.parametrize(
    ("item", "wanted"),
    [(((IMAGE, MASK), 3), None), (((IMAGE, MASK), 3), "0"), ({"a": {"b": IMAGE, "c": [MASK]}}, None)],
)
def test_the_names_that_the_error_offers_can_be_passed(item, wanted):
    with pytest.raises(SourceError, match="Pass image_column=") as raised:
        find_image(item, wanted)
    offered = str(raised.value).rpartition("compared by: ")[2].rstrip(".").replace("'", "").split(", ")
    assert [at(item, find_image(item, name)) for name in offered] == [IMAGE, MASK]


def test_no_image_is_an_error_that_says_what_was_seen():
    with pytest.raises(SourceError, match=r"no image: tuple\(str, int\)"):
        find_image(("text", 3), None)


def test_unknown_names_are_errors():
    with pytest.raises(SourceError, match="'image', 'label'"):
        find_image({"image": IMAGE, "label": 3}, "picture")
    with pytest.raises(SourceError, match="label_column='7'"):
        find_target((IMAGE, 3), (0,), "7")


@pytest.mark.parametrize(
    "item", [(1, 2), [1, 2], Pair(1, 2), {0: 1, 1: 2}, OrderedDict({0: 1, 1: 2}), ({0: 5, 1: 6}, 2), ((7, 8), 2)]
)
def test_replacing_a_leaf_keeps_the_containers_and_the_original(item):
    leaf = (0, 1) if not isinstance(at(item, (0,)), int) else (0,)
    before = digest_of(item)
    changed = with_value(item, leaf, "new")
    assert type(changed) is type(item)
    assert at(changed, leaf) == "new"
    assert digest_of(item) == before
    assert digest_of(with_value(changed, leaf, at(item, leaf))) == before


@given(st.integers(0, 500), st.integers(1, 40))
def test_evenly_spaced(length, count):
    spots = evenly_spaced(length, count)
    assert spots == sorted(set(spots))
    assert len(spots) == min(length, count)
    assert all(0 <= spot < length for spot in spots)
    assert not spots or spots[0] == 0
    assert length < 2 or count < 2 or spots[-1] == length - 1


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=4), st.binary(max_size=4)
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
    max_leaves=8,
)


def same_tree(a, b):
    """Slow twin: equal in structure, types and values (0.0 and -0.0 differ, as their bytes do)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tree(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_tree, a, b))
    return repr(a) == repr(b)


@given(TREES, TREES)
def test_digests_are_equal_exactly_for_equal_trees(a, b):
    assert (digest_of(a) == digest_of(b)) == same_tree(a, b)


def test_arrays_are_told_apart_by_kind_type_shape_and_values_but_not_by_layout():
    base = np.arange(600 * 8, dtype=np.int16).reshape(600, 2, 4)
    variants = [
        base,
        base + 1,
        base.astype(np.int32),
        base.reshape(600, 4, 2),
        torch.from_numpy(base),
        base[:-1],
        base.transpose(0, 2, 1),
        base[0, 0, 0],
        np.zeros((0, 2), np.int16),
        np.zeros((2, 0), np.int16),
    ]
    assert len({digest_of(variant) for variant in variants}) == len(variants)
    assert digest_of(np.asfortranarray(base)) == digest_of(base)
    assert digest_of(base[:, ::-1][:, ::-1]) == digest_of(base)
    assert digest_of(torch.from_numpy(base).transpose(1, 2).contiguous().transpose(1, 2)) == digest_of(
        torch.from_numpy(base)
    )


def test_images_are_told_apart_by_mode_size_pixels_and_palette():
    palette = MASK.convert("P")
    other = palette.copy()
    other.putpalette([9] * 768)
    images = [IMAGE, MASK, IMAGE.resize((4, 5)), Image.new("RGB", (5, 4), 1), palette, other]
    assert len({digest_of(image) for image in images}) == len(images)


def test_what_can_be_neither_read_nor_pickled_is_an_error():
    with pytest.raises(SourceError, match="fingerprint="):
        digest_of((IMAGE, (x for x in range(3))))


# what is taken for an image, and what is said where there is none


@dataclasses.dataclass
class Reading:
    picture: Any
    gt_label: int


def picture(side=8):
    return np.zeros((side, side, 3), np.uint8)


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        (torch.zeros(1, 16000), False),
        (np.zeros((1, 16000), np.int16), False),
        (torch.zeros(2, 16000), False),
        (torch.zeros(4, 4), False),
        (np.zeros((1, 900), np.uint8), False),
        (torch.zeros(1, 1, 16000), False),
        (torch.zeros(8, 8), True),
        (np.zeros((4, 4), np.uint8), True),
        (torch.zeros(3, 4, 4), True),
        (torch.zeros(1, 80, 200), True),
    ],
)
def test_sound_and_small_tables_are_no_images_unless_they_are_named(value, taken):
    item = {"value": value, "label": 1}
    if taken:
        assert find_image(item, None) == ("value",)
    else:
        with pytest.raises(SourceError, match=r"image_column=|sound or a table"):
            find_image(item, None)
    assert find_image(item, "value") == ("value",)


@pytest.mark.parametrize(
    ("item", "advice"),
    [
        ((torch.zeros(13, 64, 64), 1), "load_selection"),
        ({"left": picture(), "right": picture()}, "image_column=.*'left', 'right'"),
        (types.SimpleNamespace(image=picture()), "tuples, lists, dicts and dataclasses"),
        (Reading("a.png", 1), "image_column="),
    ],
)
def test_items_without_one_image_say_what_to_do(item, advice):
    with pytest.raises(SourceError, match=advice):
        find_image(item, None)


def test_fields_of_dataclasses_are_leaves():
    item = Reading(picture(), 3)
    image = find_image(item, None)
    assert image == ("picture",)
    assert find_target(item, image, None) == ("gt_label",)
    assert at(item, image) is item.picture
    changed = with_value(item, image, 7)
    assert (type(changed), changed.picture, changed.gt_label) == (Reading, 7, 3)
    assert item.picture is not changed.picture
    with pytest.raises(SourceError, match="'picture', 'gt_label'"):
        find_image(item, "image")


def test_dicts_of_other_classes_keep_their_class_when_a_value_is_changed():
    item = collections.defaultdict(list, image=picture(), label=1)
    changed = with_value(item, ("image",), 5)
    assert (type(changed), changed["image"], changed["none"]) == (collections.defaultdict, 5, [])
