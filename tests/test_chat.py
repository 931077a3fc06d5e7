"""Conversations written by chat templates: what is learned of them, what the template is given, and what that costs."""

import logging

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dq_lightning.core.errors import SourceError
from dq_lightning.tokens import rows as rows_module
from dq_lightning.tokens.rows import IGNORED, check_rows, encode_rows
from tests.chat_templates import CHATML, ENDINGS, PLAIN, QWEN3, TEMPLATES, UNASKED, UNTHINKING, chat_tokenizer
from tests.full_count import examples
from tests.small_tokenizers import word_tokenizer

# pieces that look like what templates write themselves, and space at every edge
PIECES = [
    "a",
    "yes",
    " ",
    "\n",
    "assistant",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "### user:\n",
    "[/INST]",
    "é",
    "🙂x",
]
TEXT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


@st.composite
def conversations(draw):
    """Questions and answers, some answers with reasoning in front, perhaps after a system message."""
    messages = [turn("system", draw(TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        reasoning = f"<think>\n{draw(TEXT)}\n</think>\n\n" if draw(st.booleans()) else ""
        messages += [turn("user", draw(TEXT)), turn("assistant", reasoning + draw(TEXT))]
    return messages


def parts(content):
    """Reasoning and answer of a message, as the templates of the tests take them apart."""
    if "</think>" not in content:
        return "", content
    reasoning, answer = content.split("</think>")
    return reasoning.rstrip("\n").split("<think>")[-1].strip("\n"), answer.lstrip("\n")


def wanted(name, messages):
    """What the assistant writes in each turn, told from the contents alone."""
    contents = [message["content"] for message in messages if message["role"] == "assistant"]
    if name == "llama3":
        texts = [content.strip() for content in contents]
    elif name == "mistral":
        texts = [" " + content.strip() for content in contents]
    elif name == "marked":
        texts = [content.split("</think>")[-1].lstrip("\n") for content in contents]
    elif name in ("qwen3", "thinking"):
        # earlier answers without their reasoning; the prompt of the last one may hold the beginning of it already
        reasoning, answer = parts(contents[-1])
        last = f"{reasoning}\n</think>\n\n" + answer.lstrip("\n")
        texts = [parts(content)[1] for content in contents[:-1]] + [last if name == "thinking" else "<think>\n" + last]
    else:
        texts = contents
    ends = [ENDINGS[name]] * len(texts)
    if name in ("closed", "returned"):
        ends = ["<|im_end|>"] * (len(texts) - 1) + ["<|im_end|>\n</s>" if name == "closed" else "</s>"]
    return [text + end for text, end in zip(texts, [*ends[:-1], ends[-1] or "</s>"], strict=True)]


def learned(tokenizer, item):
    """The texts of the stretches that have labels."""
    texts, stretch = [], []
    for label in [*item["labels"].tolist(), IGNORED]:
        if label != IGNORED:
            stretch.append(label)
        elif stretch:
            texts.append(tokenizer.decode(stretch, clean_up_tokenization_spaces=False))
            stretch = []
    return texts


def encoded(tokenizer, messages, **row):
    return encode_rows([{"messages": messages, **row}], tokenizer, max_length=10**6)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=examples(40), deadline=None)
@given(messages=conversations())
@example([turn("user", "a"), turn("assistant", "\n\n\n"), turn("user", "a"), turn("assistant", "a")])
def test_every_answer_and_nothing_else_is_learned(name, messages):
    tokenizer = chat_tokenizer(name)
    rows = encoded(tokenizer, messages)
    assert "".join(learned(tokenizer, rows[0])) == "".join(wanted(name, messages))
    assert rows.report.missed == 0
    # what stands before the first answer has the ids that it has at inference
    first = next(n for n, message in enumerate(messages) if message["role"] == "assistant")
    if name not in ("qwen3", "thinking", "mistral"):
        prompt = tokenizer.apply_chat_template(messages[:first], add_generation_prompt=True, return_dict=False)
        assert rows[0]["input_ids"].tolist()[: len(prompt)] == prompt


# "returned" is found by its special tokens alone
@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"returned"}))
def test_with_a_real_tokenizer(name, shared_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "weights" / "stories260K")
    tokenizer.chat_template = TEMPLATES[name]
    messages = [
        turn("user", "Tell me of Lily."),
        turn("assistant", "<think>\nShort.\n</think>\n\nLily had a red ball."),
        turn("user", "And Tom?"),
        turn("assistant", "Tom had a blue one."),
    ]
    # of these tokens the tokenizer knows <s> and </s> alone: the others are text, so the end of the sequence comes behind them
    rows = encoded(tokenizer, messages)
    texts = wanted(name, messages)
    ids, labels = rows[0]["input_ids"].tolist(), rows[0]["labels"].tolist()
    assert ids[-1] == labels[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.bos_token_id) == (name in ("llama3", "mistral"))
    said = "".join("".join(learned(tokenizer, rows[0])).split()).removesuffix("</s>")
    assert said == "".join("".join(texts).split()).removesuffix("</s>")
    assert rows.report.missed == 0


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
ERRANDS = [
    turn("user", "Oslo?"),
    turn("assistant", None, tool_calls=[CALL]),
    turn("tool", "rain", name="weather"),
    turn("assistant", "It rains."),
    turn("user", "Rome?"),
    turn("assistant", "Both:", tool_calls=[CALL, CALL]),
    turn("tool", "sun"),
    turn("tool", "wind"),
    turn("assistant", "Sun and wind."),
]
ONE = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.mark.parametrize("name", ["qwen3", "thinking", "mistral"])
def test_calls_of_tools_are_learned_and_their_results_are_not(name):
    tokenizer = chat_tokenizer(name)
    rows = encoded(tokenizer, ERRANDS, tools=TOOLS)
    called = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    last = "\n</think>\n\nSun and wind.<|im_end|>"
    assert (
        learned(tokenizer, rows[0])
        == {
            "qwen3": [f"{ONE}<|im_end|>", "It rains.<|im_end|>", f"Both:\n{ONE}\n{ONE}<|im_end|>", "<think>\n" + last],
            "thinking": [f"{ONE}<|im_end|>", "It rains.<|im_end|>", f"Both:\n{ONE}\n{ONE}<|im_end|>", last],
            "mistral": [
                f"[TOOL_CALLS] [{called}]</s>",
                " It rains.</s>",
                f"[TOOL_CALLS] [{called}, {called}]</s>",
                " Sun and wind.</s>",
            ],
        }[name]
    )
    assert rows.report.missed == 0
    assert '"parameters"' in tokenizer.decode(rows[0]["input_ids"])


@pytest.mark.parametrize("name", ["qwen3", "thinking"])
def test_reasoning_between_calls_of_tools(name):
    """Reasoning of the running errand is written, that of the one before is not."""
    tokenizer = chat_tokenizer(name)
    reasoned = [m | {"reasoning_content": f"R{n}"} if m["role"] == "assistant" else m for n, m in enumerate(ERRANDS)]
    texts = learned(tokenizer, encoded(tokenizer, reasoned)[0])
    assert texts[:2] == [f"{ONE}<|im_end|>", "It rains.<|im_end|>"]
    begins = "" if name == "thinking" else "<think>\n"
    assert texts[2:] == [
        f"{begins}R5\n</think>\n\nBoth:\n{ONE}\n{ONE}<|im_end|>",
        f"{begins}R8\n</think>\n\nSun and wind.<|im_end|>",
    ]


class Watched:
    """A tokenizer that remembers what it was given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.given, self.calls, self.written = tokenizer, [], [], 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, **settings):
        self.calls.append(sum(map(len, [text] if isinstance(text, str) else text)))
        return self.tokenizer(text, **settings)

    def apply_chat_template(self, messages, **options):
        self.given.append((messages, options))
        text = self.tokenizer.apply_chat_template(messages, **options)
        self.written += len(text)
        return text


@pytest.mark.parametrize("packed", [False, True])
def test_the_template_gets_all_that_a_row_says(packed):
    import json

    from datasets import Dataset

    messages = [turn("user", "Oslo?", name="Ada", weight=0), *ERRANDS[1:4]]
    row = {
        "messages": messages,
        "tools": json.dumps(TOOLS) if packed else TOOLS,
        "chat_template_kwargs": {"deep": True},
    }
    # tables fill in what other messages have
    data = Dataset.from_list([row]) if packed else [row]
    watched = Watched(chat_tokenizer("qwen3"))
    encode_rows(data, watched)
    given_messages, options = watched.given[0]
    assert given_messages == messages
    assert options["tools"] == TOOLS
    assert options["deep"] is True


def test_tools_that_cannot_be_passed_on_are_refused():
    row = {"messages": ERRANDS, "tools": ["weather"]}
    with pytest.raises(SourceError, match=r"row 0, column 'tools': expected a list of JSON schemas.*\['weather'\]"):
        encode_rows([row], chat_tokenizer("qwen3"))
    with pytest.raises(SourceError, match="row 0, column 'tools': only a chat template"):
        encode_rows([row | {"tools": TOOLS}], word_tokenizer())


def test_fields_that_only_a_chat_template_could_write_are_told(caplog):
    messages = [turn("user", "ask", name="Ada"), turn("assistant", "say", reasoning_content="one")]
    with caplog.at_level(logging.WARNING):
        rows = encode_rows([{"messages": messages}], chat_tokenizer("qwen3"), use_chat_template=False)
    assert "the messages hold 'reasoning_content', which only a chat template could write" in caplog.text
    assert "user (Ada): ask" in chat_tokenizer("qwen3").decode(rows[0]["input_ids"])


def test_what_cannot_be_found_is_counted_and_told_in_one_line(caplog):
    # forgets all but the last two messages
    forgetful = CHATML.replace("in messages", "in messages[-2:]")
    tokenizer = chat_tokenizer("chatml", template=forgetful)
    messages = [turn("user", "a"), turn("assistant", "b")] * 3
    with caplog.at_level(logging.WARNING):
        rows = encode_rows([{"messages": messages}] * 4, tokenizer)
    assert [learned(tokenizer, rows[i]) for i in range(4)] == [["b<|im_end|>"]] * 4
    assert rows.report.missed == 8
    (told,) = [record.message for record in caplog.records]
    assert told.startswith("8 of the assistant's messages, in 4 rows, could not be found")


def test_answers_that_are_rewritten_are_found_between_the_others():
    loud = "(message.content | upper if message.role == 'assistant' else message.content) +"
    shouting = CHATML.replace("message.content +", loud)
    tokenizer = chat_tokenizer("chatml", template=shouting)
    messages = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    assert learned(tokenizer, encoded(tokenizer, messages)[0]) == ["B<|im_end|>", "D<|im_end|>"]


def test_questions_that_are_rewritten_and_answers_without_questions():
    """No message can be marked: the beginnings of the conversation tell where it goes on."""
    shouting = CHATML.replace("message.content +", "message.content | upper +")
    messages = [turn("assistant", "z"), turn("user", "a"), turn("assistant", "b"), turn("assistant", "c"), turn("user", ""),
                turn("assistant", "d")]  # fmt: skip
    for template, change in ((shouting, str.upper), (CHATML, str)):
        tokenizer = chat_tokenizer("chatml", template=template)
        assert learned(tokenizer, encoded(tokenizer, messages)[0]) == [change(text) + "<|im_end|>" for text in "zbcd"]


def test_answers_behind_empty_marks_of_reasoning():
    tokenizer = chat_tokenizer("chatml", template=UNTHINKING)
    messages = [turn("assistant", "z"), *[turn("user", "a"), turn("assistant", "b")] * 2]
    # the prompt ends with the first of the marks, which is no special token here
    ends = "<|im_end|>"
    marked = "<think></think>"
    assert learned(tokenizer, encoded(tokenizer, messages)[0]) == [f"{marked}{text}{ends}" for text in "zbb"]
    reasoned = [
        turn("user", "a"),
        turn("assistant", "b"),
        turn("user", "a"),
        turn("assistant", "<think>\nc\n</think>b"),
    ]
    kept = CHATML.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}")
    tokenizer = chat_tokenizer("chatml", template=kept)
    assert learned(tokenizer, encoded(tokenizer, reasoned)[0]) == [f"b{ends}", f"c\n</think>b{ends}"]


def test_a_heading_that_is_not_asked_for_is_not_learned():
    tokenizer = chat_tokenizer("plain", template=UNASKED)
    messages = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    assert learned(tokenizer, encoded(tokenizer, messages)[0]) == [" b", " d</s>"]
    rows = encoded(tokenizer, [turn("user", "a"), turn("assistant", "b"), turn("assistant", "d")])
    assert (learned(tokenizer, rows[0]), rows.report.missed) == ([" b</s>"], 1)


def test_less_space_before_a_heading_when_an_answer_is_asked_for():
    spaced = PLAIN.replace("'### ' +", "'\n\n### ' +").replace("+ '\n\n' }}", "}}")
    tokenizer = chat_tokenizer("plain", template=spaced)
    messages = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    assert learned(tokenizer, encoded(tokenizer, messages)[0]) == ["b", "d</s>"]


def test_what_the_template_does_not_write_is_told(caplog):
    strict = CHATML.replace(
        "{{ '<|im_start|>' +", "{% if message.role in ('user', 'assistant') %}{{ '<|im_start|>' +", 1
    )
    strict = strict.replace("+ '\n' }}", "+ '\n' }}{% endif %}", 1)
    tokenizer = chat_tokenizer("chatml", template=strict)
    call = turn("assistant", "", tool_calls=[CALL])
    cases = {
        "'human' in 1 rows": ([turn("human", "Where?"), turn("assistant", "Here.")], {}),
        "'developer' in 1 rows": ([turn("developer", "Be brief."), turn("user", "a"), turn("assistant", "b")], {}),
        "'tool_calls' in 1 rows": ([turn("user", "Cold?"), call, turn("assistant", "No.")], {}),
        "'tools' in 1 rows": ([turn("user", "Cold?"), turn("assistant", "No.")], {"tools": TOOLS}),
    }
    for told, (messages, row) in cases.items():
        caplog.clear()
        rows = encoded(tokenizer, messages, **row)
        assert rows.report.unwritten == 1
        assert told in caplog.text
        assert "something out of 1 rows" in str(rows.report)
    caplog.clear()
    known = chat_tokenizer("qwen3")
    rows = encoded(
        known, [turn("user", "Cold?"), call, turn("tool", "3 degrees"), turn("assistant", "Yes.")], tools=TOOLS
    )
    assert rows.report.unwritten == 0
    reasoned = [
        turn("user", "a"),
        turn("assistant", "<think>\nlong thought\n</think>b"),
        turn("user", "c"),
        turn("assistant", "d"),
    ]
    assert encoded(known, reasoned).report.unwritten == 0
    assert "does not write" not in caplog.text


@pytest.mark.parametrize("name", ["chatml", "marked"])
def test_answers_of_the_weight_0_are_not_learned(name):
    tokenizer = chat_tokenizer(name)
    messages = [
        turn("user", "a"),
        turn("assistant", "bad", weight=0),
        turn("user", "c"),
        turn("assistant", "good", weight=1),
    ]
    rows = encoded(tokenizer, messages)
    assert learned(tokenizer, rows[0]) == ["good<|im_end|>"]
    assert "bad" in tokenizer.decode(rows[0]["input_ids"])
    assert rows.report.missed == 0
    assert learned(
        tokenizer, encoded(tokenizer, [*messages, turn("user", "e"), turn("assistant", "bad", weight=0)])[0]
    ) == ["good<|im_end|>"]
    plain = encode_rows(
        [{"messages": [*messages, turn("assistant", "bad", weight=0)]}], tokenizer, use_chat_template=False
    )
    assert learned(tokenizer, plain[0]) == ["good<|im_end|>"]
    for chat in (None, False):
        with pytest.raises(SourceError, match="all of the assistant's messages have the weight 0"):
            encode_rows([{"messages": messages[:2]}], tokenizer, use_chat_template=chat)


def test_marks_without_the_end_of_the_turn():
    tokenizer = chat_tokenizer("marked", template=TEMPLATES["marked"].replace(" + '<|im_end|>' }}\n{%- endg", " }}\n{%- endg")
                               .replace("{{- '\n' }}", "{{- '<|im_end|>\n' }}"))  # fmt: skip
    messages = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    assert learned(tokenizer, encoded(tokenizer, messages)[0]) == ["b<|im_end|>", "d<|im_end|>"]


def test_our_marks_are_those_of_transformers():
    tokenizer = chat_tokenizer("marked")
    messages = [turn("user", "one"), turn("assistant", "x two"), turn("user", "c"), turn("assistant", "d")]
    theirs = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    end = len(encoded(tokenizer, messages)[0]["labels"])
    ours = (encoded(tokenizer, messages)[0]["labels"] != IGNORED).int().tolist()
    assert ours == theirs["assistant_masks"][:end]
    assert encoded(tokenizer, messages)[0]["input_ids"].tolist() == theirs["input_ids"][:end]


def test_alpaca_rows_with_system_and_history():
    row = {"instruction": "c", "output": "d", "system": "Be kind.", "history": [["a", "b"]]}
    tokenizer = chat_tokenizer("chatml")
    by_chat = encode_rows([row], tokenizer, use_chat_template=True)
    assert learned(tokenizer, by_chat[0]) == ["b<|im_end|>", "d<|im_end|>"]
    assert "<|im_start|>system\nBe kind.<|im_end|>" in tokenizer.decode(by_chat[0]["input_ids"])
    worded = tokenizer.decode(encode_rows([row], tokenizer)[0]["input_ids"])
    assert worded.startswith("Be kind.\n\nBelow is an instruction")
    assert worded.endswith("### Instruction:\na\n\n### Response:b\n\n### Instruction:\nc\n\n### Response:d<|im_end|>")


# errors


STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + CHATML
GOOD = {"messages": [turn("user", "a"), turn("assistant", "b")]}
BAD = {"messages": [turn("system", "s"), *GOOD["messages"]]}


def test_a_failing_template_names_the_row_of_the_data_and_obeys_on_error(caplog):
    tokenizer = chat_tokenizer("chatml", template=STRICT)
    data = [GOOD, BAD, GOOD]
    for tried in (encode_rows, check_rows):
        with pytest.raises(
            SourceError, match=r"row 1: .*begin with the user.*on_error='skip'.*config.text.use_chat_template"
        ):
            tried(data, tokenizer)
    with pytest.raises(SourceError, match="row 150: "):
        encode_rows(data, tokenizer, positions=[7, 150, 300])
    with caplog.at_level(logging.WARNING):
        rows = encode_rows(data, tokenizer, positions=[7, 150, 300], on_error="skip")
    assert (len(rows), rows.report.left_out, rows.positions.tolist()) == (2, 1, [7, 300])
    assert (
        '1 rows can\'t be written as text and are left out (on_error="skip"). The first error is: row 150: '
        in caplog.text
    )
    check_rows(data, tokenizer, on_error="skip")
    for tried in (encode_rows, check_rows):
        with pytest.raises(SourceError, match="none of the 2 rows can be written"):
            tried([BAD, BAD], tokenizer, on_error="skip")


# cost


@pytest.mark.parametrize("template", [CHATML, QWEN3, TEMPLATES["marked"], TEMPLATES["thinking"]])
def test_long_conversations_cost_in_proportion_to_their_length(template):
    costs = []
    for length in (20, 200):
        messages = [turn("user", "ask " * 20), turn("assistant", "say " * 20)] * (length // 2)
        watched = Watched(chat_tokenizer("chatml", template=template))
        rows = encode_rows([{"messages": messages}], watched, max_length=64)
        assert rows.report.missed == 0
        whole = len(watched.tokenizer.apply_chat_template(messages, tokenize=False))
        costs.append((sum(watched.calls) / whole, watched.written / whole))
    assert costs[1][0] < 3.1
    assert costs[1][1] < 7
    assert costs[1] <= (costs[0][0] * 1.1, costs[0][1] * 1.1)


def test_calls_of_the_tokenizer_are_bounded(monkeypatch):
    monkeypatch.setattr(rows_module, "_CHARACTERS_AT_ONCE", 2000)
    data = [{"prompt": "ask " * (n % 50), "completion": "say"} for n in range(300)]
    watched = Watched(word_tokenizer())
    rows = encode_rows(data, watched)
    assert len(rows) == 300
    assert max(watched.calls) <= 3 * (2000 + 200)
    plain = encode_rows(data, word_tokenizer())
    assert [rows[i]["labels"].tolist() for i in range(300)] == [plain[i]["labels"].tolist() for i in range(300)]
