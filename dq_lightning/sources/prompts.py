"""Rows of text: which columns hold the prompt and the response, and which text of a row is embedded.

The functions of this file read nothing but their arguments.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, get_args

from dq_lightning.core.config import EmbeddedText
from dq_lightning.core.config import Template as TemplateName
from dq_lightning.core.errors import ConfigError, SourceError
from dq_lightning.sources.items import quoted, short_repr

Row = Mapping[str, Any]

# The prompt texts that Alpaca (Taori et al. 2023) was published with.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
SEPARATOR = "\n"
_ROWS_AT_ONCE = 256
# Fields of a message that hold the assistant's tool calls, in addition to its content or in place of it.
_CALLS = ("tool_calls", "function_call")
# The known sets of columns: (template, required columns, optional columns). The first layout whose required columns are
# all present is used. A row may lack the optional columns even where other rows have them.
LAYOUTS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("alpaca", ("instruction", "output"), ("input",)),
    ("prompt", ("prompt", "completion"), ()),
    ("prompt", ("prompt", "response"), ()),
    ("chat", ("messages",), ("system",)),
    ("chat", ("conversation",), ("system",)),
    ("plain", ("text",), ()),
    ("plain", ("content",), ()),
    # ShareGPT, Dolly, questions with answers, and the sentences and sentence pairs of GLUE and similar data sets.
    ("chat", ("conversations",), ("system",)),
    ("alpaca", ("instruction", "response"), ("context",)),
    ("prompt", ("question", "answer"), ("context",)),
    ("prompt", ("query", "response"), ()),
    ("plain", ("sentence1", "sentence2"), ()),
    ("plain", ("premise", "hypothesis"), ()),
    ("plain", ("question1", "question2"), ()),
    ("plain", ("question", "sentence"), ()),
    ("plain", ("sentence",), ()),
)
# The first of these that is there holds the system's text.
_SYSTEM = ("system", "system_prompt")
# Further columns that the rows of each template may have, always under these names: texts that precede the question,
# and values that a chat template receives in addition to the messages.
_BESIDE: dict[str, tuple[str, ...]] = {
    "alpaca": ("system", "history"),
    "prompt": ("system", "history"),
    "chat": ("tools", "chat_template_kwargs"),
    "plain": (),
}
# The smallest and largest number of columns that `config.text.columns` may name for each template, and their content.
_NAMED: dict[str, tuple[int, int, str]] = {
    "alpaca": (2, 3, "instruction, output and perhaps input"),
    "prompt": (2, 3, "prompt, response and perhaps a context"),
    "chat": (1, 2, "the messages and perhaps the system's text"),
    "plain": (1, 1000, "one or more texts"),
}
# The role that each name of a speaker stands for in ShareGPT and in data sets that follow its format, in any case.
_SPEAKERS = {role: role for role in ("user", "assistant", "system", "tool")} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
Message = dict[str, Any]
"""One message of a conversation: a dict with `role`, `content` (text, a list of parts that hold text, or None beside
tool calls) and, unchanged, all other fields of the message in the row (`name`, `tool_calls`, `tool_call_id`, ...).
Fields that are None are left out, also inside tool calls, because tables fill them in wherever other messages have a
value."""


@dataclass(frozen=True)
class Template:
    """How a row of text is read. Made by `choose_template`.

    Attributes:
        name: `"alpaca"`, `"prompt"`, `"chat"` or `"plain"`.
        columns: names of the columns that the template reads, in this order: instruction, output and input (alpaca);
            prompt, response and context (prompt); messages and system (chat); all texts (plain). A row may lack the
            input, the context and the system column.
        system: name of the column that holds the system's text of an Alpaca or prompt row.
    """

    name: str
    columns: tuple[str, ...]
    system: str = _SYSTEM[0]

    @property
    def all_columns(self) -> tuple[str, ...]:
        """All columns that are read: `columns`, and the further ones that a row may have under a fixed name."""
        return tuple(dict.fromkeys((*self.columns, *self._beside)))

    @property
    def _beside(self) -> tuple[str, ...]:
        return tuple(self.system if name == _SYSTEM[0] else name for name in _BESIDE[self.name])

    def messages(self, row: Row, index: int | None = None) -> list[Message]:
        """The row as a conversation, for a tokenizer's chat template.

        `index` is the position of the row, for error messages here and below. An Alpaca or prompt row becomes one user
        message (instruction and input, without the published wording) and the answer; the text of its column `system`
        and the earlier questions and answers of its column `history` precede them. Plain text becomes one assistant
        message. ShareGPT's `from` and `value` become `role` and `content`. A conversation ends with the assistant's
        last message. Its system column comes first, unless the conversation begins with a system message of its own.

        Raises:
            SourceError: a cell holds no text, or a conversation has no answer. The message names row and column.
        """
        if self.name == "chat":
            return self._conversation(row, index)
        if self.name == "plain":
            return [_turn("assistant", self._response(row, index))]
        question = SEPARATOR.join(self._question(row, index))
        return [*self._before(row, index), _turn("user", question), _turn("assistant", self._response(row, index))]

    def chat_options(self, row: Row, index: int | None = None) -> dict[str, Any]:
        """Keyword arguments for `apply_chat_template`: the row's `tools` and the content of its `chat_template_kwargs`.

        There are none when the row has no such columns or the template is not `"chat"`. Both columns may also hold JSON
        in a string, since a table cannot hold a list of differing objects. Fields of tools that are None are left out,
        because tables fill them in.

        Raises:
            SourceError: `tools` is no list of dicts, or `chat_template_kwargs` is no dict. The message names row and
                column.
        """
        if self.name != "chat":
            return {}
        options: dict[str, Any] = {}
        tools = _parsed(row.get("tools"))
        if tools:
            if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
                raise _wrong(_place(index, "tools"), "a list of JSON schemas of tools", tools, "remove the column")
            options["tools"] = [_without_nulls(tool) for tool in tools]
        given = _parsed(row.get("chat_template_kwargs"))
        if given:
            if not isinstance(given, Mapping):
                raise _wrong(_place(index, "chat_template_kwargs"), "{name: value}", given, "remove the column")
            options |= {name: value for name, value in given.items() if value is not None}
        return options

    def prompt_and_response(self, row: Row, index: int | None = None) -> tuple[str, str]:
        """The text that the model is given (empty for plain text), and the text that it should answer with.

        An Alpaca row gets the published wording, with or without input. A `system` text is put before it, and the
        questions and answers of `history` are put before the instruction, in the same wording. In a conversation the
        last assistant message whose weight is not 0 is the response, and the prompt names the role before every message;
        prefer a tokenizer's own chat template, applied to `messages`. Plain text is a response with an empty prompt.

        Raises:
            SourceError: a cell holds no text, or a conversation has no answer. The message names row and column.
        """
        if self.name == "alpaca":
            instruction, *context = self._question(row, index)
            wording = WITH_INPUT if context else WITHOUT_INPUT
            # `format` is called once, so that braces inside the cells stay as they are.
            filled = wording.format(instruction=instruction, input=context[0] if context else "")
            return _after_earlier(self._before(row, index), filled), self._response(row, index)
        if self.name == "chat":
            turns = _to_last_learned(self._conversation(row, index), _place(index, self.columns[0]))
            asked = "".join(f"{_speaker(turn)}: {message_text(turn)}\n" for turn in turns[:-1])
            return f"{asked}{_speaker(turns[-1])}: ", message_text(turns[-1])
        if self.name == "prompt":
            earlier = [message_text(turn) for turn in self._before(row, index)]
            return SEPARATOR.join([*earlier, *self._question(row, index)]), self._response(row, index)
        return "", self._response(row, index)

    def embedded_text(self, row: Row, part: EmbeddedText = "both", index: int | None = None) -> str:
        """The text of a row that is embedded: its parts that are not empty, joined by newlines, without any wording.

        The part is `"instruction"` for everything before the response (instruction and input, or all earlier messages),
        `"response"` for the response, or `"both"` for the two, as published for Alpaca.

        Raises:
            SourceError: a cell holds no text, or a conversation has no answer. The message names row and column.
        """
        turns = self.messages(row, index)
        asked, answer = [message_text(turn) for turn in turns[:-1]], message_text(turns[-1])
        chosen = {"instruction": asked, "response": [answer], "both": [*asked, answer]}[part]
        return SEPARATOR.join(text for text in chosen if text)

    def _before(self, row: Row, index: int | None) -> list[Message]:
        """The messages before the question of an Alpaca or prompt row: system text, earlier questions and answers."""
        # A column that the template already reads under another meaning is not read again here.
        row = {name: row.get(name) for name in self._beside if name not in self.columns}
        system = _text(row, self.system, index, optional=True)
        turns = [_turn("system", system)] if system.strip() else []
        where = _place(index, "history")
        earlier = row.get("history")
        if earlier is None or earlier == "":
            return turns
        if not isinstance(earlier, Sequence) or isinstance(earlier, str | bytes):
            raise _wrong(where, "a list of [question, answer]", earlier)
        for number, entry in enumerate(earlier):
            if isinstance(entry, Mapping):
                turns.append(_message(entry, f"{where}, message {number}"))
            elif isinstance(entry, list | tuple) and [type(text) for text in entry] == [str, str]:
                turns += [_turn("user", entry[0]), _turn("assistant", entry[1])]
            else:
                raise _wrong(f"{where}, entry {number}", "[question, answer]", entry)
        return turns

    def _question(self, row: Row, index: int | None) -> list[str]:
        """The instruction or prompt, and the input or context when there is one."""
        first = [_text(row, self.columns[0], index)]
        context = _text(row, self.columns[2], index, optional=True) if len(self.columns) > 2 else ""
        return [*first, context] if context.strip() else first

    def _response(self, row: Row, index: int | None) -> str:
        if self.name == "plain":
            texts = [_text(row, column, index) for column in self.columns]
            return texts[0] if len(texts) == 1 else SEPARATOR.join(text for text in texts if text)
        return _text(row, self.columns[1], index)

    def _conversation(self, row: Row, index: int | None) -> list[Message]:
        """The messages of a chat row, up to the last one of the assistant."""
        column = self.columns[0]
        seen = row.get(column)
        if isinstance(seen, Mapping) and len({len(cells) for cells in seen.values() if isinstance(cells, list)}) == 1:
            # A Hugging Face dataset returns a `Sequence` of dicts as a dict of lists.
            fields = {key: cells for key, cells in seen.items() if isinstance(cells, list)}
            seen = [dict(zip(fields, cells, strict=True)) for cells in zip(*fields.values(), strict=True)]
        if not isinstance(seen, Sequence) or isinstance(seen, str | bytes):
            raise _wrong(_place(index, column), "a list of messages {role, content} or {from, value}", seen)
        turns = [_message(message, f"{_place(index, column)}, message {n}") for n, message in enumerate(seen)]
        answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not answers:
            roles = ", ".join(dict.fromkeys(repr(turn["role"]) for turn in turns)) or "none"
            raise SourceError(
                f"{_place(index, column)}: none of its {len(turns)} messages is of the role 'assistant' (the roles "
                f"are {roles}), so there is no response to learn; leave the row out"
            )
        turns = turns[: answers[-1] + 1]
        system = _text(row, self.columns[1], index, optional=True) if len(self.columns) > 1 else ""
        return [_turn("system", system), *turns] if system.strip() and turns[0]["role"] != "system" else turns


def is_learned(message: Message) -> bool:
    """Whether a message is to be learned: fine-tuning files say by `weight: 0` which answers are not."""
    return bool(message.get("weight") != 0)


def _to_last_learned(turns: list[Message], where: str) -> list[Message]:
    """Return the turns of a conversation up to the last answer that is to be learned."""
    learned = [place for place, turn in enumerate(turns) if turn["role"] == "assistant" and is_learned(turn)]
    if not learned:
        raise SourceError(
            f"{where}: all of the assistant's messages have the weight 0, so there is nothing to learn; leave the row out"
        )
    return turns[: learned[-1] + 1]


def message_text(message: Message) -> str:
    """The text of a message: its content, followed by its tool calls as JSON.

    Example:
        >>> message_text({"role": "user", "content": "Hello."})
        'Hello.'
    """
    content = message["content"]
    parts = [content] if isinstance(content, str) else [part["text"] for part in content or ()]
    parts += [json.dumps(message[key], ensure_ascii=False, default=str) for key in _CALLS if message.get(key)]
    return SEPARATOR.join(part for part in parts if part) if len(parts) > 1 else "".join(parts)


def columns_of(rows: Any) -> list[str]:
    """Names of the columns that occur in any row of a map-style dataset of dicts, in the order in which they occur.

    All rows are read, since a row may lack an optional column; but when the first 257 rows hold no text, as in a
    dataset of images, the others are not. There are none when the first item is no dict.
    """
    found: dict[str, None] = {}
    holds_text = False
    if len(rows) == 0 or not isinstance(rows[0], Mapping):
        return []
    for index, row in numbered(rows):
        found |= dict.fromkeys(row)
        holds_text = holds_text or any(isinstance(value, str | list | tuple) for value in row.values())
        if index == _ROWS_AT_ONCE and not holds_text:
            break
    return list(found)


def numbered(rows: Any) -> Iterator[tuple[int, Any]]:
    """Iterate over (position, row) for all rows; a dataset with `__getitems__` is asked for 256 rows at a time."""
    together = getattr(rows, "__getitems__", None)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        places = range(start, min(start + _ROWS_AT_ONCE, len(rows)))
        yield from zip(
            places, map(rows.__getitem__, places) if together is None else together(list(places)), strict=True
        )


def choose_template(
    columns: Sequence[str], wanted: TemplateName = "auto", named: Sequence[str] | None = None
) -> Template:
    """Choose the template that reads rows with the given columns.

    The template `wanted` is named, or `"auto"` for that of the first of `LAYOUTS` whose required columns are all
    present. `named` are the columns to read instead of the usual ones, in the order of `Template.columns`
    (`config.text.columns`); with them, `"auto"` means `"plain"`.

    Example:
        >>> choose_template(["question", "answer"]).name
        'prompt'

    Raises:
        ConfigError: `wanted` is not the name of a template, or `named` has too few or too many columns for it.
        SourceError: columns that are needed are missing, or the columns fit no template.
    """
    if wanted not in get_args(TemplateName):
        raise ConfigError(f"the template must be one of {', '.join(map(repr, get_args(TemplateName)))}, got {wanted!r}")
    if named is not None:
        return _named_template("plain" if wanted == "auto" else wanted, tuple(named), columns)
    layouts = [layout for layout in LAYOUTS if wanted in ("auto", layout[0])]
    system = _system_column(columns)
    for name, required, optional in layouts:
        if set(required) <= set(columns):
            others = (system if column == _SYSTEM[0] else column for column in optional)
            return Template(name, (*required, *others), system)
    needs = "; ".join(f"{name}: {' + '.join(required)}" for name, required, _ in layouts)
    raise SourceError(
        f"the columns are {quoted(columns)}, which is no layout of the template {wanted!r} ({needs}). Name the columns that "
        "hold the text with config.text.columns, "
        'for instance TextConfig(columns=("review",)) or TextConfig(template="prompt", columns=("question", "reply"))'
    )


def _named_template(name: TemplateName, named: tuple[str, ...], columns: Sequence[str]) -> Template:
    least, most, what = _NAMED[name]
    if not least <= len(named) <= most:
        raise ConfigError(f"config.text.columns names {quoted(named)}, but the template {name!r} reads {what}")
    missing = [column for column in named[: len(named) if name == "plain" else least] if column not in columns]
    if missing:
        raise SourceError(
            f"config.text.columns names {quoted(missing)}, but the columns are {quoted(columns)}; pass some of these"
        )
    return Template(name, named, _system_column(columns))


def _system_column(columns: Sequence[str]) -> str:
    """Return the name of the column that holds the system's text, whether the rows have it or not."""
    return next((name for name in _SYSTEM if name in columns), _SYSTEM[0])


def _after_earlier(earlier: Sequence[Message], wording: str) -> str:
    """Insert earlier messages into Alpaca's wording of a question.

    The system text comes first; each other message stands under a heading of its own before the question.
    """
    if not earlier:
        return wording
    first = [message_text(turn) for turn in earlier if turn["role"] == "system"]
    headings = {"user": "### Instruction:\n", "assistant": "### Response:"}
    turns = [
        headings.get(turn["role"], f"### {turn['role']}:\n") + message_text(turn)
        for turn in earlier
        if turn["role"] != "system"
    ]
    beginning, question = wording.split("\n\n", 1)
    return "\n\n".join([*first, beginning, *turns, question])


def _speaker(message: Message) -> str:
    return f"{message['role']} ({message['name']})" if message.get("name") else str(message["role"])


def _parsed(value: Any) -> Any:
    """Parse a string as JSON. Other values, and strings that are not valid JSON, are returned as they are."""
    if isinstance(value, str):
        with suppress(ValueError):
            return json.loads(value)
    return value


def _without_nulls(value: Any) -> Any:
    """Copy nested dicts and lists without the fields of dicts that are None."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(field) for key, field in value.items() if field is not None}
    return [_without_nulls(field) for field in value] if isinstance(value, list | tuple) else value


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _message(given: Any, where: str) -> Message:
    """Convert a message of a row, which may use ShareGPT's `from` and `value`, to a `Message`."""
    if not isinstance(given, Mapping):
        raise _wrong(where, "{role, content}", given)
    rest = {key: value for key, value in given.items() if value is not None}
    rest |= {key: _without_nulls(rest[key]) for key in _CALLS if key in rest}
    shared = "role" not in rest and "from" in rest
    role_key, content_key = ("from", "value") if shared else ("role", "content")
    role, content = rest.pop(role_key, None), rest.pop(content_key, None)
    if not isinstance(role, str):
        raise SourceError(
            f"{where}: its {role_key!r} must be text, got {short_repr(role)}; repair the row or leave it out"
        )
    if shared:
        role = _SPEAKERS.get(role.lower(), role)
    calls = content is None and any(rest.get(key) for key in _CALLS)
    if not (isinstance(content, str) or calls or _is_text_parts(content)):
        raise SourceError(
            f"{where}: its {content_key!r} must be text, got {short_repr(content)}; repair the row or leave it out"
        )
    made = {"role": role, "content": content, **rest}
    _check_characters(content if isinstance(content, str) else "", where)
    if rest or not isinstance(content, str):
        _check_characters(json.dumps(made, ensure_ascii=False, default=str), where)
    return made


def _is_text_parts(content: Any) -> bool:
    """Whether the content of a message is a list of parts {type, text} that all hold text."""
    parts = isinstance(content, Sequence) and not isinstance(content, str | bytes) and len(content) > 0
    return parts and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content)


def _text(row: Row, column: str, index: int | None, *, optional: bool = False) -> str:
    value = row.get(column)
    if optional and value is None:
        return ""
    if not isinstance(value, str):
        raise _wrong(_place(index, column), "text", value)
    _check_characters(value, _place(index, column))
    return value


def _check_characters(text: str, where: str) -> None:
    """Raise a SourceError if a text holds half of a character (a lone surrogate).

    JSON can hold it, but tokenizers and servers do not accept it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{where}: the text holds {error.object[error.start : error.start + 1]!r} at position {error.start}, which "
            "is half of a character (a lone surrogate); repair the row or leave it out"
        ) from error


def _place(index: int | None, column: str) -> str:
    return f"{'a row' if index is None else f'row {index}'}, column {column!r}"


def _wrong(where: str, expected: str, seen: object, instead: str = "leave it out") -> SourceError:
    return SourceError(f"{where}: expected {expected}, got {short_repr(seen)}; repair the row or {instead}")
