"""How many patches are kept and which: exact counts, ties, budgets, the record and its bits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_lightning.core.errors import DQError, PatchError
from dq_lightning.core.records import Grid, PatchChoice, pack_mask, unpack_mask
from dq_lightning.patches.choose import choose_kept, choose_patches, kept_count, make_choice, mask_of, spread_budget
from tests.reference import patch_twin

# few different values, so that ties are common
SCORES = st.lists(st.integers(0, 4), min_size=1, max_size=12)


def test_the_count_is_exact_for_every_ratio_of_two_or_three_digits():
    for length in (*range(0, 70), 196, 256, 1369):
        for thousandths in range(0, 1000, 5):
            text = f"0.{thousandths:03d}"
            assert kept_count(length, float(text)) == patch_twin.kept_count(length, text), (length, text)


def test_binary_rounding_does_not_lose_the_half():
    assert int(15 * (1 - 0.9) + 0.5) == 1  # the trap
    assert kept_count(15, 0.9) == 2


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_ratios_outside_are_refused(ratio):
    with pytest.raises(PatchError, match="drop_ratio"):
        kept_count(64, ratio)


@settings(deadline=None)
@given(scores=SCORES, data=st.data())
def test_the_best_are_kept_and_the_first_of_equal_ones(scores, data):
    count = data.draw(st.integers(0, len(scores)))
    kept = choose_kept(torch.tensor([scores, scores[::-1]], dtype=torch.float32), count)
    assert kept.tolist() == [patch_twin.keep_best(scores, count), patch_twin.keep_best(scores[::-1], count)]


def test_scores_that_are_not_finite_are_refused():
    for bad in (float("nan"), float("inf")):
        with pytest.raises(PatchError, match="not finite"):
            choose_kept(torch.tensor([[1.0, bad]]), 1)
        with pytest.raises(PatchError, match="not finite"):
            spread_budget([torch.tensor([1.0, bad])], 1)


@settings(deadline=None)
@given(scores=st.lists(SCORES, min_size=1, max_size=6), data=st.data())
def test_a_spread_budget_is_met_exactly_and_patch_for_patch_the_twins(scores, data):
    least = [data.draw(st.integers(0, len(row))) for row in scores]
    total = data.draw(st.integers(sum(least), sum(map(len, scores))))
    masks = spread_budget([torch.tensor(row, dtype=torch.float32) for row in scores], total, least)
    assert sum(int(mask.sum()) for mask in masks) == total
    assert [mask.nonzero().flatten().tolist() for mask in masks] == patch_twin.spread(scores, total, least)


def test_a_budget_that_cannot_be_met_is_refused():
    rows = [torch.rand(4), torch.rand(4)]
    for total, least in ((9, None), (3, [2, 2]), (8, [5, 0])):
        with pytest.raises(PatchError, match="cannot keep"):
            spread_budget(rows, total, least)


@settings(deadline=None)
@given(ratio=st.sampled_from([0.0, 0.2, 0.5, 0.75]), seed=st.integers(0, 99))
def test_spreading_keeps_the_total_and_what_every_image_is_owed(ratio, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(32, 32), (17, 40), (8, 8), (32, 32)]
    # an image with little saliency anywhere
    scores = [
        torch.rand(Grid(*size, 4).num_patches, generator=generator) * (0.1 if i == 3 else 1)
        for i, size in enumerate(sizes)
    ]
    even = choose_patches(scores, sizes, 4, ratio)
    spread = choose_patches(scores, sizes, 4, ratio, spread=True, least_ratio=0.1)
    assert even.counts.tolist() == [kept_count(len(row), ratio) for row in scores]
    assert int(spread.counts.sum()) == int(even.counts.sum())
    for row, count in zip(scores, spread.counts.tolist(), strict=True):
        assert count >= min(kept_count(len(row), ratio), kept_count(len(row), 0.9))
    if ratio:
        assert spread.counts[3] < even.counts[3]


@settings(deadline=None)
@given(
    masks=st.integers(1, 19).flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1))
)
def test_packed_bits_come_back(masks):
    length, packed = len(masks[0]), [pack_mask(torch.tensor(mask)) for mask in masks]
    assert [unpack_mask(one, length).tolist() for one in packed] == masks
    together = np.frombuffer(b"".join(packed), np.uint8).reshape(len(masks), -1)
    assert unpack_mask(together, length).tolist() == masks


def test_patch_j_is_bit_j_mod_8_of_byte_j_div_8():
    for patch in range(19):
        packed = pack_mask(torch.arange(19) == patch)
        assert list(packed) == [1 << patch % 8 if byte == patch // 8 else 0 for byte in range(3)]


@settings(deadline=None)
@given(seed=st.integers(0, 999))
def test_the_record_gives_back_the_masks_of_images_of_different_sizes(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(32, 32), (5, 7), (224, 30), (1, 1)]
    masks = [torch.rand(Grid(*size, 4).num_patches, generator=generator) < 0.5 for size in sizes]
    choice = make_choice(masks, sizes, 4)
    for position, mask in enumerate(masks):
        assert torch.equal(choice.mask(position), mask)
        assert torch.equal(mask_of(choice.kept(position)[None], len(mask))[0], mask)
    assert choice.counts.tolist() == [int(mask.sum()) for mask in masks]
    assert choice.keep_ratio == sum(int(mask.sum()) for mask in masks) / sum(map(len, masks))
    changed = [mask.clone() for mask in masks]
    changed[2][5] ^= True
    assert make_choice(changed, sizes, 4).content_hash() != choice.content_hash()
    assert make_choice(masks, sizes, 4).content_hash() == choice.content_hash()


def test_a_record_whose_masks_do_not_fit_its_images_is_refused():
    with pytest.raises(DQError, match="mask bytes"):
        PatchChoice(4, torch.tensor([[32, 32]]), torch.zeros(7, dtype=torch.uint8))
    with pytest.raises(PatchError, match="do not fit"):
        choose_patches([torch.rand(63)], [(32, 32)], 4, 0.2)


def test_nothing_is_chosen_of_nothing():
    choice = choose_patches([], [], 4, 0.2)
    assert len(choice) == 0
    assert choice.keep_ratio == 0
    assert len(choose_patches([], [], 4, 0.2, spread=True)) == 0
