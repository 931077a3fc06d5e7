"""Padding, packing without attention across rows, and batches of similar length."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler, RandomSampler

from dq_lightning.core.errors import ConfigError
from dq_lightning.tokens.batches import PackedRows, TokenCollator, block_mask, make_token_loader, pack
from dq_lightning.tokens.rows import IGNORED, encode_rows
from dq_lightning.tokens.sampler import EpochShuffle, LengthBatchSampler
from tests.small_tokenizers import word_tokenizer

PAIRS = [("ask ", "say"), ("ask one two ", "say three four"), ("", "one"), ("context ", "two")]


def rows_of(pairs=PAIRS, **settings):
    return encode_rows([{"prompt": p, "completion": c} for p, c in pairs], word_tokenizer(), **settings)


# padding


def test_padding_on_the_right():
    rows = rows_of(PAIRS[:2])
    batch = TokenCollator(pad_id=0)([rows[0], rows[1]])
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert batch["input_ids"].tolist() == [[2, 4, 6, 3, 0, 0, 0, 0], [2, 4, 7, 8, 6, 9, 10, 3]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 3, -100, -100, -100, -100], [-100] * 4 + [6, 9, 10, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [1] * 8]


def test_lengths_in_multiples():
    rows = rows_of(PAIRS[:1])
    batch = TokenCollator(pad_id=3, multiple_of=6)([rows[0]])
    # an end-of-sequence token that fills is not learned
    assert batch["input_ids"].tolist() == [[2, 4, 6, 3, 3, 3]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 3, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0]]


# packing


@given(lengths=st.lists(st.integers(1, 20), max_size=60), capacity=st.integers(20, 50))
def test_packs_hold_every_row_once_and_fit(lengths, capacity):
    packs = pack(lengths, capacity)
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    fills = [sum(lengths[row] for row in rows) for rows in packs]
    assert all(0 < fill <= capacity for fill in fills)
    # no two sequences would fit into one
    assert len(fills) < 2 or sum(sorted(fills)[:2]) > capacity


def test_best_fit():
    assert pack([3, 7, 5, 5, 2, 8], 10) == [[5, 4], [1, 0], [2, 3]]


def test_a_row_longer_than_a_sequence():
    with pytest.raises(ConfigError, match="row 1 has 9 tokens, but a packed sequence holds 8"):
        pack([3, 9], 8)


def test_packed_items():
    packed = PackedRows(rows_of(max_length=12))
    assert packed.packs == [[1, 0], [3, 2]]
    assert packed.lengths.tolist() == [12, 7]
    item = packed[1]
    assert item["input_ids"].tolist() == [2, 5, 8, 3, 2, 7, 3]
    assert item["labels"].tolist() == [-100, -100, 8, 3, -100, 7, 3]
    assert item["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert item["rows"].tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_no_row_learns_what_follows_the_row_before():
    bare = encode_rows([{"text": "one two"}, {"text": "three"}], word_tokenizer(begins=False), max_length=8)
    assert bare[1]["labels"].tolist() == [9, 3]
    assert PackedRows(bare)[0]["labels"].tolist() == [-100, 8, 3, -100, 3]


def test_packed_batch():
    packed = PackedRows(rows_of(max_length=12))
    batch = TokenCollator(pad_id=0)([packed[0], packed[1]])
    assert batch["position_ids"][1].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]
    assert batch["attention_mask"].shape == (2, 1, 12, 12)
    sees = batch["attention_mask"][1, 0] == 0
    for i in range(12):
        start = 0 if i < 4 else 4 if i < 7 else 7
        assert sees[i].nonzero().flatten().tolist() == list(range(start, i + 1))
    assert "attention_mask" not in TokenCollator(pad_id=0, attention="positions")([packed[0], packed[1]])
    assert set(batch) == {"input_ids", "labels", "attention_mask", "position_ids"}


def test_mask_of_one_row_is_causal():
    mask = block_mask(torch.zeros(1, 3, dtype=torch.int64))
    assert (mask[0, 0] == 0).tolist() == [[True, False, False], [True, True, False], [True, True, True]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_see_only_themselves(shared_dir, attention):
    """Logits, loss and gradients of packed rows are those of the rows alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_dir / "weights" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float64).eval()
    texts = ["Once upon a time", "The cat sat.", "Lily and Tom went to the big park to play with a red ball.", "Hi"]
    rows = encode_rows(
        [{"prompt": "Tell: ", "completion": text} for text in texts],
        AutoTokenizer.from_pretrained(folder),
        max_length=64,
    )
    packed = PackedRows(rows)
    assert len(packed) < len(rows)
    alone = {i: model(input_ids=rows[i]["input_ids"][None]).logits[0] for i in range(len(rows))}
    batch = TokenCollator(pad_id=0)([packed[n] for n in range(len(packed))])
    batch["attention_mask"] = batch["attention_mask"].double()
    together = model(**batch)
    # the softmax of eager attention and the loss are in single precision whatever the model is in
    assert _largest_gap(packed, alone, together.logits) < (1e-5 if attention == "eager" else 1e-9)
    # neighbours do matter when nothing keeps them apart
    assert _largest_gap(packed, alone, model(input_ids=batch["input_ids"]).logits) > 0.1
    padded = model(**TokenCollator(pad_id=0)([rows[i] for i in range(len(rows))]))
    assert together.loss.item() == pytest.approx(padded.loss.item(), abs=1e-5)
    assert _gradient(model, together) == pytest.approx(_gradient(model, padded), abs=1e-5)


def test_packed_rows_in_single_precision(shared_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(shared_dir / "weights" / "stories260K").eval()
    packed = PackedRows(rows_of(max_length=24))
    alone = {i: model(input_ids=packed.rows[i]["input_ids"][None]).logits[0] for i in range(len(packed.rows))}
    together = model(**TokenCollator(pad_id=0)([packed[n] for n in range(len(packed))])).logits
    assert _largest_gap(packed, alone, together) < 1e-5 * max(1.0, together.abs().max().item())


def _largest_gap(packed, alone, logits):
    """Between the logits of packed rows and those of the rows alone."""
    gaps = []
    for n, members in enumerate(packed.packs):
        start = 0
        for row in members:
            stop = start + len(alone[row])
            gaps.append((logits[n, start:stop] - alone[row]).abs().max().item())
            start = stop
    return max(gaps)


def _gradient(model, output):
    model.zero_grad()
    output.loss.backward(retain_graph=True)
    return copy.deepcopy(next(model.parameters()).grad[5:50, 3].tolist())


def test_packed_mask_in_half_precision(shared_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(shared_dir / "weights" / "stories260K").eval()
    batch = TokenCollator(pad_id=0)([PackedRows(rows_of(max_length=24))[0]])
    whole = model(**batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**batch).logits
    half = {name: x.bfloat16() if x.is_floating_point() else x for name, x in batch.items()}
    pure = model.bfloat16()(**half).logits
    for logits in (mixed, pure):
        assert (logits.float() - whole).abs().max() < 0.5
        assert (logits.argmax(-1) == whole.argmax(-1)).float().mean() > 0.8


# order and length

LENGTHS = [(i * 7919) % 193 + 3 for i in range(1000)]


def batches_of(sampler):
    return [tuple(batch) for batch in sampler]


def test_every_row_once_in_batches_of_similar_length():
    sampler = LengthBatchSampler(EpochShuffle(1000), 8, False, LENGTHS)
    batches = batches_of(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
    assert len(batches) == len(sampler) == 125
    padded = sum(max(LENGTHS[i] for i in batch) * len(batch) for batch in batches)
    plain = [list(range(1000))[n : n + 8] for n in range(0, 1000, 8)]
    assert padded < 1.1 * sum(LENGTHS)
    assert sum(max(LENGTHS[i] for i in batch) * len(batch) for batch in plain) > 1.3 * sum(LENGTHS)
    # long and short batches come mixed: the first tenth is not all short
    means = [sum(LENGTHS[i] for i in batch) / len(batch) for batch in batches]
    assert max(means[:12]) > 150
    assert min(means[:12]) < 50


def test_order_depends_on_seed_and_epoch_alone():
    def epochs(seed, count=3):
        sampler = LengthBatchSampler(EpochShuffle(100, seed), 8, False, LENGTHS, seed)
        return [batches_of(sampler) for _ in range(count)]

    torch.manual_seed(1)
    first = epochs(0)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert epochs(0) == first
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    everything = [str(one) for seed in (0, 1, 2) for one in epochs(seed)]
    assert len(set(everything)) == 9


def test_a_set_epoch_is_reproduced():
    sampler = EpochShuffle(50)
    seen = [list(sampler) for _ in range(4)]
    sampler.set_epoch(2)
    assert list(sampler) == seen[2]
    assert list(sampler) == seen[3]


@given(count=st.integers(1, 80), batch=st.integers(1, 9), ranks=st.integers(1, 4), drop_last=st.booleans())
def test_ranks_are_in_step_and_share_the_rows(count, batch, ranks, drop_last):
    shares = []
    for rank in range(ranks):
        inner = DistributedSampler(range(count), ranks, rank, shuffle=True, seed=0)
        inner.set_epoch(3)
        sampler = LengthBatchSampler(inner, batch, drop_last, LENGTHS)
        shares.append(batches_of(sampler))
        assert len(shares[-1]) == len(sampler)
    assert len({tuple(map(len, share)) for share in shares}) == 1
    rows = [i for share in shares for one in share for i in one]
    if not drop_last:
        assert set(rows) == set(range(count))
        assert len(rows) - count < ranks
    if count % ranks == 0:
        assert len(rows) == len(set(rows))


def test_batches_of_one_step_are_about_as_long_on_all_ranks():
    shares = []
    for rank in range(2):
        inner = DistributedSampler(range(1000), 2, rank, shuffle=True, seed=0)
        shares.append(batches_of(LengthBatchSampler(inner, 8, True, LENGTHS)))
    gaps = [
        abs(max(LENGTHS[i] for i in one) - max(LENGTHS[i] for i in other)) for one, other in zip(*shares, strict=True)
    ]
    assert sum(gaps) / len(gaps) < 10


def test_a_sampler_without_epochs():
    generator = torch.Generator().manual_seed(0)
    sampler = LengthBatchSampler(RandomSampler(range(100), generator=generator), 8, False, LENGTHS)
    one, two = batches_of(sampler), batches_of(sampler)
    assert {frozenset(batch) for batch in one} != {frozenset(batch) for batch in two}
    assert sorted(i for batch in one for i in batch) == list(range(100))


# loaders


def test_loader_of_padded_and_of_packed_batches():
    pairs = [("ask " + "one " * (i % 7), "say " * (i % 5 + 1)) for i in range(40)]
    rows = rows_of(pairs, max_length=32)
    for packing in (False, True):
        loader = make_token_loader(rows, pad_id=0, batch_size=3, packing=packing, seed=1)
        first, second = list(loader), list(loader)
        learned = [sum(int((batch["labels"] != IGNORED).sum()) for batch in epoch) for epoch in (first, second)]
        assert learned == [rows.report.learned] * 2
        assert [b["input_ids"].tolist() for b in first] != [b["input_ids"].tolist() for b in second]
    assert len(make_token_loader(rows, pad_id=0, batch_size=3, packing=True)) < len(rows) / 6


def test_loader_in_order_and_loader_with_a_collator_of_ones_own():
    rows = rows_of()
    loader = make_token_loader(rows, pad_id=0, batch_size=1, shuffle=False)
    assert [batch["input_ids"][0].tolist() for batch in loader] == [rows[i]["input_ids"].tolist() for i in range(4)]
    given = make_token_loader(rows, pad_id=0, batch_size=2, shuffle=False, collator=len)
    assert list(given) == [2, 2]
    assert len(make_token_loader(rows_of(PAIRS[:3]), pad_id=0, batch_size=2, drop_last=True)) == 1


def test_one_row():
    (batch,) = make_token_loader(rows_of(PAIRS[:1]), pad_id=0, batch_size=4)
    assert batch["input_ids"].tolist() == [[2, 4, 6, 3]]
