"""Which columns hold what, the published wording, and what is embedded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dq_lightning.core.errors import ConfigError, SourceError
from dq_lightning.sources.prompts import Template, choose_template, message_text

ALPACA = ("instruction", "input", "output")


def turns(*said):
    return [{"role": role, "content": content} for role, content in said]


def row(instruction="Add.", context="2 and 3", output="5"):
    return {"instruction": instruction, "input": context, "output": output}


@pytest.mark.parametrize(
    ("columns", "name", "read"),
    [
        (ALPACA, "alpaca", ("instruction", "output", "input")),
        (("output", "id", "instruction"), "alpaca", ("instruction", "output", "input")),
        (("prompt", "completion", "text"), "prompt", ("prompt", "completion")),
        (("response", "prompt"), "prompt", ("prompt", "response")),
        (("messages", "source"), "chat", ("messages", "system")),
        (("id", "conversations"), "chat", ("conversations", "system")),
        (("context", "instruction", "response"), "alpaca", ("instruction", "response", "context")),
        (("question", "answer"), "prompt", ("question", "answer", "context")),
        (("idx", "label", "sentence"), "plain", ("sentence",)),
        (("idx", "label", "sentence1", "sentence2"), "plain", ("sentence1", "sentence2")),
        (("premise", "hypothesis", "label"), "plain", ("premise", "hypothesis")),
        (("question", "sentence"), "plain", ("question", "sentence")),
        # what was read as plain text before the pairs were known still is
        (("text", "question", "answer"), "plain", ("text",)),
        (("text", "label"), "plain", ("text",)),
        ((*ALPACA, "text"), "alpaca", ("instruction", "output", "input")),
    ],
)
def test_the_columns_choose_the_template(columns, name, read):
    assert choose_template(columns) == Template(name, read)


def test_a_name_overrides_the_columns():
    assert choose_template((*ALPACA, "text"), "plain").name == "plain"


def test_columns_that_do_not_fit_are_named_with_the_way_out():
    with pytest.raises(SourceError, match=r"'review', 'stars'.*instruction \+ output.*config\.text\.columns"):
        choose_template(("review", "stars"))
    with pytest.raises(SourceError, match="template 'chat'"):
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
    asked = {"messages": turns(("system", "Be short."), ("user", "2 + 3?"), ("assistant", "5"), ("user", "Thanks"))}
    assert chat.embedded_text(asked) == "Be short.\n2 + 3?\n5"
    assert chat.embedded_text(asked, "instruction") == "Be short.\n2 + 3?"
    assert chat.embedded_text(asked, "response") == "5"
    assert choose_template(("text",)).embedded_text({"text": "один"}) == "один"


def test_messages_of_every_kind_of_row():
    assert choose_template(ALPACA).messages(row()) == turns(("user", "Add.\n2 and 3"), ("assistant", "5"))
    prompt = choose_template(("prompt", "completion"))
    assert prompt.messages({"prompt": "a", "completion": "b"}) == turns(("user", "a"), ("assistant", "b"))
    assert prompt.prompt_and_response({"prompt": "a", "completion": "b"}) == ("a", "b")
    assert choose_template(("text",)).prompt_and_response({"text": "a"}) == ("", "a")


def test_the_last_assistant_message_is_the_response():
    template = choose_template(("messages",))
    said = turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"))
    given_row = {"messages": [turn | {"id": 3} for turn in said]}
    assert template.messages(given_row) == given_row["messages"][:4]
    assert template.prompt_and_response(given_row) == ("user: a\nassistant: b\nuser: c\nassistant: ", "d")


@pytest.mark.parametrize("cell", [None, 3, 2.5, ["a"], {"a": 1}, b"a"])
@pytest.mark.parametrize("column", ["instruction", "output"])
def test_cells_that_are_no_text_name_row_and_column(cell, column):
    template = choose_template(ALPACA)
    for read in (template.prompt_and_response, template.messages):
        with pytest.raises(SourceError, match=f"row 7, column '{column}'.*{type(cell).__name__}"):
            read(row() | {column: cell}, 7)


def test_half_a_character_names_row_and_column():
    said = {"messages": turns(("user", "a"), ("assistant", "b\ud83d"))}
    called = {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"name": "\udc00"}]}]}
    plain = choose_template(("text",))
    for read in (choose_template(("messages",)).messages, choose_template(("messages",)).embedded_text):
        for given_row, place in ((said, "message 1"), (called, "message 0")):
            with pytest.raises(SourceError, match=f"row 4, column 'messages', {place}.*half of a character"):
                read(given_row, index=4)
    with pytest.raises(SourceError, match=r"row 4, column 'text'.*ud83d.*position 1.*half of a character"):
        plain.embedded_text({"text": "a\ud83d"}, index=4)
    assert plain.embedded_text({"text": "\U0001f600"}) == "\U0001f600"


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


SHAREGPT = [("system", "Be short."), ("human", "2 + 3?"), ("gpt", "5"), ("tool", "ok"), ("gpt", "Done")]
PLAIN = turns(("system", "Be short."), ("user", "2 + 3?"), ("assistant", "5"), ("tool", "ok"), ("assistant", "Done"))


def test_sharegpt_is_the_same_conversation_under_other_names():
    template = choose_template(("id", "conversations"))
    shared = {"conversations": [{"from": speaker, "value": said, "weight": 1} for speaker, said in SHAREGPT]}
    assert template.messages(shared) == [turn | {"weight": 1} for turn in PLAIN]
    assert template.embedded_text(shared) == "Be short.\n2 + 3?\n5\nok\nDone"
    # the system's text may stand in a column of its own
    asked = {"conversations": shared["conversations"][1:], "system": "Be short."}
    assert [turn["content"] for turn in template.messages(asked)] == [turn["content"] for turn in PLAIN]
    assert template.messages(shared | {"system": "Other"}) == template.messages(shared)
    # other conversations with role and content may stand in the same column
    assert template.messages({"conversations": PLAIN}) == PLAIN
    as_lists = {"from": [speaker for speaker, _ in SHAREGPT], "value": [said for _, said in SHAREGPT]}
    assert template.messages({"conversations": as_lists}) == PLAIN
    with pytest.raises(SourceError, match="row 2, column 'conversations', message 0: its 'value' must be text"):
        template.messages({"conversations": [{"from": "human", "value": 3}]}, 2)
    with pytest.raises(SourceError, match="the roles are 'user', 'alien'"):
        template.messages({"conversations": [{"from": "human", "value": "a"}, {"from": "alien", "value": "b"}]})


def test_what_a_message_holds_besides_stays_and_what_a_table_fills_in_goes():
    calls = [{"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}]
    said = [
        {"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "3?"}], "name": "Ada"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "5", "tool_call_id": "7"},
        {"role": "assistant", "content": "It is 5."},
    ]
    template = choose_template(("messages", "tools"))
    assert template.messages({"messages": said}) == said
    filled = [dict.fromkeys(("name", "tool_calls", "tool_call_id")) | message for message in said]
    assert template.messages({"messages": filled}) == said
    assert message_text(said[0]) == "2 + \n3?"
    assert '"name": "add"' in template.embedded_text({"messages": said[:2]}, "response")
    for content in (None, [], [{"type": "image"}], ["a"]):
        with pytest.raises(SourceError, match="message 0: its 'content' must be text"):
            template.messages({"messages": [{"role": "assistant", "content": content}]})


def test_columns_by_name():
    columns = ("review", "stars", "title", "ask", "say", "more")
    assert choose_template(columns, named=("title", "review")) == Template("plain", ("title", "review"))
    both = choose_template(columns, named=("title", "review"))
    assert both.embedded_text({"title": "Good", "review": "Very"}) == "Good\nVery"
    assert both.prompt_and_response({"title": "", "review": "Very"}) == ("", "Very")
    with pytest.raises(SourceError, match="row 3, column 'review'"):
        both.embedded_text({"title": "Good", "review": None}, index=3)
    asked = choose_template(columns, "prompt", ("ask", "say", "more"))
    assert asked.prompt_and_response({"ask": "a", "say": "b"}) == ("a", "b")
    assert asked.prompt_and_response({"ask": "a", "say": "b", "more": "c"}) == ("a\nc", "b")
    with pytest.raises(SourceError, match=r"names 'titel', but the columns are 'review'"):
        choose_template(columns, named=("titel",))
    with pytest.raises(ConfigError, match="reads instruction, output and perhaps input"):
        choose_template(columns, "alpaca", ("ask",))


def test_an_optional_column_is_read_wherever_a_row_has_it():
    # the first row decides nothing for the others
    template = choose_template(["instruction", "output"])
    assert template.embedded_text({"instruction": "a", "output": "b"}) == "a\nb"
    assert template.embedded_text(row()) == "Add.\n2 and 3\n5"


def test_a_column_system_prompt_is_the_systems_text():
    system = {"system_prompt": "Be brief."}
    rows = [
        {"instruction": "a", "output": "b"},
        {"prompt": "a", "response": "b"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ]
    for row in rows:
        template = choose_template([*row, *system])
        assert template.messages(row | system)[0] == {"role": "system", "content": "Be brief."}
        assert "system_prompt" in template.all_columns
        assert "system" not in template.all_columns
        assert "Be brief." in template.prompt_and_response(row | system)[0]
        # a column system comes first
        both = choose_template([*row, *system, "system"])
        assert both.messages(row | system | {"system": "Go on."})[0]["content"] == "Go on."


def test_speakers_are_known_in_any_case():
    row = {"conversations": [{"from": name, "value": "x"} for name in ("System", "User", "GPT", "HUMAN", "Assistant")]}
    roles = [message["role"] for message in choose_template(list(row)).messages(row)]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
