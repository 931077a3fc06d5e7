"""Rows to token ids and labels: exact ids, masks, truncation, odd rows."""

import logging

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from dq_lightning.core.errors import ConfigError, SourceError
from dq_lightning.tokens.rows import IGNORED, _Encoded, encode_rows, truncate
from dq_lightning.tokens.tokenizer import load_tokenizer, padding_id
from tests.small_tokenizers import CHAT, byte_tokenizer, word_tokenizer


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def lists(rows, index=0):
    item = rows[index]
    assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
    return item["input_ids"].tolist(), item["labels"].tolist()


def test_exact_ids_and_labels():
    rows = encode_rows([pair("ask one ", "say two three")], word_tokenizer())
    ids, labels = lists(rows)
    assert ids == [2, 4, 7, 6, 8, 9, 3]  # <s> ask one | say two three </s>
    assert labels == [IGNORED] * 3 + [6, 8, 9, 3]
    assert rows.lengths.tolist() == [7]
    assert (rows.report.tokens, rows.report.learned, rows.report.longest) == (7, 4, 7)


def test_no_beginning_token_is_invented():
    ids, labels = lists(encode_rows([pair("ask ", "say")], word_tokenizer(begins=False)))
    assert (ids, labels) == ([4, 6, 3], [IGNORED, 6, 3])


def test_plain_text_is_learned_from_its_first_word():
    ids, labels = lists(encode_rows([{"text": "one two"}], word_tokenizer()))
    assert (ids, labels) == ([2, 7, 8, 3], [IGNORED, 7, 8, 3])


def test_alpaca_wording_with_and_without_input():
    tokenizer = byte_tokenizer()
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Hi", "input": "", "output": "Hello"},
    ]
    encoded = encode_rows(rows, tokenizer)
    for place, (row, wording) in enumerate(zip(rows, ("paired with an input", "describes a task. Write"), strict=True)):
        ids, labels = lists(encoded, place)
        learned = [i for i, label in zip(ids, labels, strict=True) if label != IGNORED]
        asked = ids[: len(ids) - len(learned)]
        assert tokenizer.decode(learned) == row["output"] + "</s>"
        assert wording in tokenizer.decode(asked)
        assert tokenizer.decode(asked).endswith("### Response:")


def test_a_token_never_spans_the_end_of_the_prompt():
    tokenizer = byte_tokenizer()
    prompt, response = "The question", ":The"
    joined = tokenizer(prompt + response)["input_ids"]
    alone = tokenizer(prompt)["input_ids"]
    assert joined[: len(alone)] != alone  # byte pairs join ":" to what precedes it
    ids, labels = lists(encode_rows([pair(prompt, response)], tokenizer))
    # what the model is given at inference is what it was trained on
    assert ids[: len(alone)] == alone
    assert labels[: len(alone)] == [IGNORED] * len(alone)
    assert tokenizer.decode(ids) == prompt + response + "</s>"


@given(prompt=st.text(max_size=30), response=st.text(max_size=30))
def test_any_text_comes_back(prompt, response):
    tokenizer = byte_tokenizer()
    ids, labels = lists(encode_rows([pair(prompt, response)], tokenizer))
    given_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    assert ids[: len(given_ids)] == given_ids
    assert ids[-1] == tokenizer.eos_token_id
    start = len(given_ids)
    assert labels == [IGNORED] * start + ids[start:]
    decoded = tokenizer.decode(ids[start:-1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert decoded == tokenizer.decode(
        tokenizer(response, add_special_tokens=False)["input_ids"], clean_up_tokenization_spaces=False
    )


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt():
    tokenizer = byte_tokenizer(ends=True)
    ids, _ = lists(encode_rows([pair("ask", "The")], tokenizer))
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("text", ["<s> ask say </s>", " <s> ask say </s> ", "ask say </s>", "<s> ask say", "ask say"])
def test_tokens_that_begin_and_end_a_text_are_not_doubled(text):
    ids, labels = lists(encode_rows([{"text": text}], word_tokenizer()))
    assert ids == [2, 4, 6, 3]
    assert labels[-3:] == ids[-3:]
    begun, ended = text.split("say")[0], "say" + text.split("say")[1]
    assert lists(encode_rows([pair(begun, ended)], word_tokenizer())) == (ids, [IGNORED, IGNORED, 6, 3])


def test_an_end_within_a_text_or_in_the_prompt_ends_no_response():
    assert lists(encode_rows([{"text": "ask </s> say"}], word_tokenizer()))[0] == [2, 4, 3, 6, 3]
    assert lists(encode_rows([pair("ask </s>", "")], word_tokenizer())) == ([2, 4, 3, 3], [-100, -100, -100, 3])


def test_begin_and_end_written_out_for_a_real_tokenizer(shared_dir):
    tokenizer = load_tokenizer(shared_dir / "weights" / "stories260K")
    for text in ("<s>[INST] Who? [/INST] Lily.</s>", "Lily and Tom."):
        ids, labels = lists(encode_rows([{"text": text}], tokenizer))
        assert (ids[0], ids[-1], labels[-1]) == (1, 2, 2)
        assert (ids.count(1), ids.count(2)) == (1, 1)


CONVERSATION = {
    "messages": [
        {"role": "user", "content": " ask "},
        {"role": "assistant", "content": " one "},
        {"role": "user", "content": " context "},
        {"role": "assistant", "content": " two "},
    ]
}


def test_chat_template_learns_every_answer():
    ids, labels = lists(encode_rows([CONVERSATION], word_tokenizer(chat_template=CHAT)))
    assert ids == [2, 12, 4, 13, 7, 3, 12, 5, 13, 8, 3]
    assert labels == [-100, -100, -100, -100, 7, 3, -100, -100, -100, 8, 3]


def test_conversation_without_chat_template_learns_the_last_answer():
    tokenizer = byte_tokenizer()
    ids, labels = lists(encode_rows([CONVERSATION], tokenizer))
    assert tokenizer.decode([i for i in labels if i != IGNORED]).strip() == "two </s>"
    assert "user:  ask " in tokenizer.decode(ids)


def test_alpaca_rows_by_chat_template_on_request():
    row = {"instruction": "ask", "input": "", "output": " one"}
    tokenizer = word_tokenizer(chat_template=CHAT)
    ids, labels = lists(encode_rows([row], tokenizer, use_chat_template=True))
    assert ids == [2, 12, 4, 13, 7, 3]
    assert labels == [-100, -100, -100, -100, 7, 3]
    assert 12 not in lists(encode_rows([row], tokenizer))[0]


def test_chat_template_that_adds_no_end_gets_one():
    bare = CHAT.replace("'</s>' if m['role'] == 'assistant' else ''", "''")
    ids, labels = lists(encode_rows([CONVERSATION], word_tokenizer(chat_template=bare)))
    assert ids[-2:] == labels[-2:] == [8, 3]
    assert ids.count(3) == 1


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('system message please') }}", "system message please"),
        ("{{ messages | length }} messages", "none of the assistant's messages can be found"),
    ],
)
def test_chat_templates_that_cannot_be_followed_are_told(template, said):
    with pytest.raises(SourceError, match=f"row 0: .*{said}.*use_chat_template=False"):
        encode_rows([CONVERSATION], word_tokenizer(chat_template=template))


def test_a_chat_template_that_does_not_go_on_from_its_beginning():
    template = "{{ messages | length }} {% for m in messages %}{{ m['content'] }}{% endfor %}"
    ids, labels = lists(encode_rows([CONVERSATION], word_tokenizer(chat_template=template)))
    assert ids == [1, 4, 7, 5, 8, 3]
    assert labels == [-100, -100, 7, -100, 8, 3]


def test_chat_template_asked_for_but_missing():
    with pytest.raises(ConfigError, match="has no chat template"):
        encode_rows([pair("ask", "say")], word_tokenizer(), use_chat_template=True)


# truncation


def test_the_prompt_loses_its_middle_first():
    prompt = "ask one two three four one two three "
    rows = encode_rows([pair(prompt, "say four")], word_tokenizer(), max_length=8)
    ids, labels = lists(rows)
    # 9 of the prompt, with <s>, give way to the 3 of the response
    assert ids == [2, 4, 7, 8, 9, 6, 10, 3]
    assert labels == [-100] * 5 + [6, 10, 3]
    assert (rows.report.prompt_cut, rows.report.response_cut) == (1, 0)


def test_a_long_response_loses_its_end_and_the_prompt_keeps_a_quarter(caplog):
    with caplog.at_level(logging.WARNING):
        rows = encode_rows([pair("ask one two ", "say " * 30), pair("ask ", "say")], word_tokenizer(), max_length=8)
    ids, labels = lists(rows)
    assert ids == [2, 8] + [6] * 6
    assert labels == [-100, -100] + [6] * 6
    assert (rows.report.prompt_cut, rows.report.response_cut) == (1, 1)
    assert (
        "1 prompts lost their middle and 1 responses their end, because no row may be longer than max_length=8"
        in caplog.text
    )


@given(
    prompt=st.integers(0, 200), answer=st.integers(1, 200), max_length=st.integers(8, 100)
)  # fmt: skip
def test_truncation_always_leaves_both(prompt, answer, max_length):
    row = _Encoded(list(range(prompt + answer)), [False] * prompt + [True] * answer, prompt)
    cut = truncate(row, max_length)
    assert len(cut.ids) == len(cut.learn) == min(prompt + answer, max_length)
    kept = sum(cut.learn)
    assert kept >= min(answer, max_length - max_length // 4)
    assert cut.learn == [False] * cut.response + [True] * kept
    assert cut.ids == sorted(set(cut.ids))
    assert cut.ids[cut.response :] == list(range(prompt, prompt + kept))
    if prompt:
        assert cut.response >= min(prompt, max_length // 4)
        assert cut.ids[0] == 0
    # the response gives way only when the prompt has come down to its quarter
    assert kept == answer or cut.response <= max_length // 4


def test_max_length_that_holds_nothing():
    with pytest.raises(ConfigError, match="at least 8"):
        encode_rows([pair("ask", "say")], word_tokenizer(), max_length=7)


# odd rows


def test_empty_texts_leave_only_the_end_to_learn():
    ids, labels = lists(encode_rows([pair("", "")], word_tokenizer()))
    assert (ids, labels) == ([2, 3], [-100, 3])


def test_duplicates_stay_and_order_is_kept():
    rows = encode_rows([pair("ask ", "one"), pair("ask ", "two"), pair("ask ", "one")], word_tokenizer())
    assert [lists(rows, i)[0] for i in range(3)] == [[2, 4, 7, 3], [2, 4, 8, 3], [2, 4, 7, 3]]
    assert lists(rows, -1) == lists(rows, 0)
    with pytest.raises(IndexError):
        rows[3]


def test_more_rows_than_are_encoded_at_once():
    words = ["one", "two", "three", "four"]
    rows = encode_rows([pair("ask ", words[i % 4] + " say" * (i % 3)) for i in range(2500)], word_tokenizer())
    for i in (0, 999, 1000, 1001, 2499):
        assert lists(rows, i)[0] == [2, 4, 7 + i % 4] + [6] * (i % 3) + [3]


def test_very_long_and_foreign_rows():
    tokenizer = byte_tokenizer()
    rows = encode_rows(
        [pair("x" * 100_000, "y" * 100_000), pair("これは何ですか", "Ünïcödé 🙂 ответ\x00")], tokenizer, max_length=64
    )
    assert rows.lengths.tolist()[0] == 64
    ids, labels = lists(rows, 1)
    assert tokenizer.decode([i for i in labels if i != IGNORED]) == "Ünïcödé 🙂 ответ\x00</s>"
    assert tokenizer.decode([i for i, x in zip(ids, labels, strict=True) if x == IGNORED]) == "これは何ですか"


@pytest.mark.parametrize("value", [None, 7, float("nan"), ["a"]])
def test_cells_that_are_no_text_name_their_row(value):
    with pytest.raises(SourceError, match="row 1, column 'completion'"):
        encode_rows([pair("ask", "say"), pair("ask", value)], word_tokenizer())


def test_no_rows():
    with pytest.raises(SourceError, match="the columns are none"):
        encode_rows([], word_tokenizer())


def test_hugging_face_rows():
    from datasets import Dataset

    rows = [
        {"instruction": "ask", "input": "", "output": "say"},
        {"instruction": "one", "input": "two", "output": "four"},
    ]
    ours, theirs = (encode_rows(data, byte_tokenizer()) for data in (rows, Dataset.from_list(rows)))
    assert [lists(ours, i) for i in range(2)] == [lists(theirs, i) for i in range(2)]


class Listed:
    """A dataset of a user's class."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize("kind", ["list", "class", "subset", "concat", "table", "store"])
def test_rows_may_lack_an_optional_column_whatever_the_first_one_has(kind, tmp_path):
    from datasets import Dataset
    from torch.utils.data import ConcatDataset, Subset

    bare, full = {"instruction": "ask", "output": "say"}, {"instruction": "ask", "input": "context", "output": "say"}
    tokenizer = byte_tokenizer()
    for rows in ([bare, full, bare], [full, bare, full]):
        data = {
            "list": lambda rows=rows: rows,
            "class": lambda rows=rows: Listed(rows),
            "subset": lambda rows=rows: Subset([*rows, *rows], [0, 1, 5]),
            "concat": lambda rows=rows: ConcatDataset([rows[:1], rows[1:]]),
            "table": lambda rows=rows: Dataset.from_dict({name: [row.get(name) for row in rows] for name in full}),
            "store": lambda rows=rows: stored(rows, tmp_path),
        }[kind]()
        encoded = encode_rows(data, tokenizer)
        for place, row in enumerate(rows):
            text = tokenizer.decode(lists(encoded, place)[0])
            assert ("### Input:\ncontext" in text) == ("input" in row)
            assert ("paired with an input" in text) == ("input" in row)
        assert encoded.positions.tolist() == [0, 1, 2]


def stored(rows, folder):
    """The rows out of a packed compact set."""
    import numpy as np

    from dq_lightning.core.config import QuantizeConfig, SelectionConfig
    from dq_lightning.pipeline.compact import open_packed
    from dq_lightning.pipeline.quantize import quantize

    config = QuantizeConfig(store="packed", selection=SelectionConfig(keep_ratio=1.0))
    vectors = np.random.default_rng(0).normal(size=(len(rows), 4)).astype(np.float32)
    return open_packed(quantize(rows, config, encoder=vectors, cache_dir=folder, progress=False).path)


def test_the_columns_of_all_rows_choose_the_layout():
    rows = [{"text": "one"}, {"text": "two", "prompt": "ask ", "completion": "say"}]
    with pytest.raises(SourceError, match="row 0, column 'prompt'"):
        encode_rows(rows, word_tokenizer())


# tokenizers


def test_tokenizers_that_cannot_be_used_are_told(tmp_path):
    with pytest.raises(ConfigError, match=r"takes a tokenizer of transformers.*got Tokenizer"):
        load_tokenizer(word_tokenizer().backend_tokenizer)
    endless = word_tokenizer()
    endless.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        load_tokenizer(endless)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_tokenizer_by_folder(tmp_path):
    word_tokenizer().save_pretrained(tmp_path)
    for given_as in (tmp_path, str(tmp_path)):
        assert lists(encode_rows([pair("ask ", "say")], given_as))[0] == [2, 4, 6, 3]


def test_padding_falls_back_to_the_end():
    tokenizer = word_tokenizer()
    assert padding_id(tokenizer) == 0
    tokenizer.pad_token = None
    assert padding_id(tokenizer) == 3


# the real tokenizer


def test_real_rows_with_a_real_tokenizer(shared_dir):
    import json
    import lzma

    tokenizer = load_tokenizer(shared_dir / "weights" / "stories260K")
    with lzma.open(shared_dir / "data" / "alpaca" / "alpaca_data.json.xz") as file:
        real = json.load(file)[:300]
    rows = encode_rows(real, tokenizer, max_length=256)
    assert int(rows.lengths.max()) <= 256
    whole = encode_rows(real, tokenizer, max_length=10**6)
    assert rows.report.prompt_cut == int((whole.lengths > 256).sum())
    for i in (0, 5, 299):
        ids, labels = lists(whole, i)
        learned = [x for x in labels if x != IGNORED]
        assert ids[0] == tokenizer.bos_token_id
        assert learned[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(learned[:-1]).strip() == real[i]["output"].strip()
        asked = ids[: len(ids) - len(learned)]
        assert asked == tokenizer(tokenizer.decode(asked, skip_special_tokens=True))["input_ids"]


@pytest.mark.parametrize("rows", [["a text"], [("a", "b")], Dataset.from_list([{"text": "a"}]).with_format("pandas")])
def test_rows_that_are_no_dicts_are_told(rows):
    with pytest.raises(SourceError, match=r"the rows are no dicts of fields, but the first is a .*with_format"):
        encode_rows(rows, word_tokenizer())
