"""Which columns hold what, the published wording, and what is embedded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dq_lightning.errors import ConfigError, SourceError
from dq_lightning.prompts import Template, Turn, choose_template

ALPACA = ("instruction", "input", "output")


def row(instruction="Add.", context="2 and 3", output="5"):
    return {"instruction": instruction, "input": context, "output": output}


@pytest.mark.parametrize(
    ("columns", "name", "read"),
    [
        (ALPACA, "alpaca", ("instruction", "output", "input")),
        (("output", "id", "instruction"), "alpaca", ("instruction", "output")),
        (("prompt", "completion", "text"), "prompt", ("prompt", "completion")),
        (("response", "prompt"), "prompt", ("prompt", "response")),
        (("messages", "source"), "chat", ("messages",)),
        (("text", "label"), "plain", ("text",)),
        ((*ALPACA, "text"), "alpaca", ("instruction", "output", "input")),
    ],
)
def test_the_columns_choose_the_template(columns, name, read):
    assert choose_template(columns) == Template(name, read)


def test_a_name_overrides_the_columns():
    assert choose_template((*ALPACA, "text"), "plain").name == "plain"


def test_columns_that_do_not_fit_are_named_with_the_way_out():
    with pytest.raises(SourceError, match=r"'question', 'answer'.*instruction \+ output.*template"):
        choose_template(("question", "answer"))
    with pytest.raises(SourceError, match="'chat' needs"):
        choose_template(ALPACA, "chat")
    with pytest.raises(ConfigError, match="'vicuna'"):
        choose_template(ALPACA, "vicuna")


def test_alpaca_wording_with_and_without_input():
    template = choose_template(ALPACA)
    prompt, response = template.prompt_and_response(row())
    assert prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n"
        "### Response:"
    )
    assert response == "5"
    for empty in ("", "  ", None):
        assert template.prompt_and_response(row(context=empty))[0] == (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nAdd.\n\n### Response:"
        )
    without_column = choose_template(("instruction", "output"))
    assert without_column.prompt_and_response({"instruction": "Add.", "output": "5"}) == (
        template.prompt_and_response(row(context=""))
    )


@given(st.text(), st.text(), st.text())
def test_cells_arrive_unchanged_whatever_they_hold(instruction, context, output):
    template = choose_template(ALPACA)
    prompt, response = template.prompt_and_response(row(instruction, context, output))
    assert instruction in prompt
    assert not context.strip() or f"### Input:\n{context}\n" in prompt
    assert response == output


def test_embedded_text_is_the_parts_that_are_there_one_a_line():
    template = choose_template(ALPACA)
    assert template.embedded_text(row()) == "Add.\n2 and 3\n5"
    assert template.embedded_text(row(context="")) == "Add.\n5"
    assert template.embedded_text(row(output="")) == "Add.\n2 and 3"
    assert template.embedded_text(row(), "instruction") == "Add.\n2 and 3"
    assert template.embedded_text(row(), "response") == "5"
    chat = choose_template(("messages",))
    turns = [("system", "Be short."), ("user", "2 + 3?"), ("assistant", "5"), ("user", "Thanks")]
    asked = {"messages": [{"role": role, "content": content} for role, content in turns]}
    assert chat.embedded_text(asked) == "Be short.\n2 + 3?\n5"
    assert chat.embedded_text(asked, "instruction") == "Be short.\n2 + 3?"
    assert chat.embedded_text(asked, "response") == "5"
    assert choose_template(("text",)).embedded_text({"text": "один"}) == "один"


def test_messages_of_every_kind_of_row():
    assert choose_template(ALPACA).messages(row()) == [Turn("user", "Add.\n2 and 3"), Turn("assistant", "5")]
    prompt = choose_template(("prompt", "completion"))
    assert prompt.messages({"prompt": "a", "completion": "b"}) == [Turn("user", "a"), Turn("assistant", "b")]
    assert prompt.prompt_and_response({"prompt": "a", "completion": "b"}) == ("a", "b")
    assert choose_template(("text",)).prompt_and_response({"text": "a"}) == ("", "a")


def test_the_last_assistant_message_is_the_response():
    template = choose_template(("messages",))
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    given_row = {"messages": [{"role": role, "content": content, "id": 3} for role, content in turns]}
    assert template.messages(given_row) == [Turn(*turn) for turn in turns[:4]]
    assert template.prompt_and_response(given_row) == ("user: a\nassistant: b\nuser: c\nassistant: ", "d")


@pytest.mark.parametrize("cell", [None, 3, 2.5, ["a"], {"a": 1}, b"a"])
@pytest.mark.parametrize("column", ["instruction", "output"])
def test_cells_that_are_no_text_name_row_and_column(cell, column):
    template = choose_template(ALPACA)
    for read in (template.prompt_and_response, template.messages):
        with pytest.raises(SourceError, match=f"row 7, column '{column}'.*{type(cell).__name__}"):
            read(row() | {column: cell}, 7)


def test_an_input_that_is_no_text_is_an_error_too():
    with pytest.raises(SourceError, match=r"row 0, column 'input'.*int 3"):
        choose_template(ALPACA).embedded_text(row(context=3), index=0)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "list of messages"),
        ("hello", "list of messages"),
        (["hello"], "message 0.*str 'hello'"),
        ([{"role": "user", "content": None}], "message 0: its 'content'"),
        ([{"content": "a"}], "message 0: its 'role'"),
        ([{"role": "user", "content": "a"}], "no response"),
        ([], "no response"),
    ],
)
def test_conversations_that_cannot_be_read_say_where(messages, message):
    with pytest.raises(SourceError, match=message):
        choose_template(("messages",)).messages({"messages": messages}, 4)
