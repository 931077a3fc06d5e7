"""Text rows: which columns hold the prompt and the response, and which text of a row is embedded. Pure."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, get_args

from dq_lightning.core.config import EmbeddedText
from dq_lightning.core.config import Template as TemplateName
from dq_lightning.core.errors import ConfigError, SourceError

Row = Mapping[str, Any]

# the wording that Alpaca (Taori et al. 2023) was published with
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
# what an assistant asks of tools, beside or in place of its content
_CALLS = ("tool_calls", "function_call")
# how the columns of a data set may be called: (template, required, optional). The first layout whose required columns are
# there is taken; a row may lack the optional ones, whatever other rows have.
LAYOUTS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("alpaca", ("instruction", "output"), ("input",)),
    ("prompt", ("prompt", "completion"), ()),
    ("prompt", ("prompt", "response"), ()),
    ("chat", ("messages",), ("system",)),
    ("chat", ("conversation",), ("system",)),
    ("plain", ("text",), ()),
    ("plain", ("content",), ()),
    # ShareGPT, Dolly, questions with answers, and the sentences and pairs of GLUE and its like
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
# columns that rows of a template may have besides, always under these names: what stands before the question, and what a chat
# template is given beside the messages
_BESIDE: dict[str, tuple[str, ...]] = {
    "alpaca": ("system", "history"),
    "prompt": ("system", "history"),
    "chat": ("tools", "chat_template_kwargs"),
    "plain": (),
}
# how many columns `config.text.columns` may name for each template, and what they hold
_NAMED: dict[str, tuple[int, int, str]] = {
    "alpaca": (2, 3, "instruction, output and perhaps input"),
    "prompt": (2, 3, "prompt, response and perhaps a context"),
    "chat": (1, 2, "the messages and perhaps the system's text"),
    "plain": (1, 1000, "one or more texts"),
}
# ShareGPT's names of the speakers, and those of its successors
_SPEAKERS = {
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
"""One message of a conversation: `role`, `content` (text, parts that hold text, or None beside tool calls), and whatever else
the row says of it (`name`, `tool_calls`, `tool_call_id`, ...), unchanged. Fields that are None are left out, also inside tool
calls: tables fill them in where other messages have some."""


@dataclass(frozen=True)
class Template:
    """How a row is read. Made by `choose_template`.

    Attributes:
        name: `"alpaca"`, `"prompt"`, `"chat"` or `"plain"`.
        columns: the columns that it reads: instruction, output, input; prompt, response, context; messages, system; or all
            texts of plain rows. Those after the required ones may be missing in a row.
    """

    name: str
    columns: tuple[str, ...]

    @property
    def all_columns(self) -> tuple[str, ...]:
        """Every column that is looked at: `columns`, and those that a row may have besides under a fixed name."""
        return tuple(dict.fromkeys((*self.columns, *_BESIDE[self.name])))

    def messages(self, row: Row, index: int | None = None) -> list[Message]:
        """The row as a conversation, for a tokenizer's chat template.

        An Alpaca row is one user turn (instruction and input, without the published wording) and the answer, after the text
        of its column `system` and the earlier questions and answers of its column `history`; plain text is one assistant
        turn. ShareGPT's `from` and `value` become `role` and `content`. A conversation ends with the assistant's last
        message; its column `system` comes first, unless it begins with a system message of its own.

        Args:
            row: the fields of one sample.
            index: its position, for messages.

        Raises:
            SourceError: a cell is no text, or a conversation has no answer; names row and column.
        """
        if self.name == "chat":
            return self._conversation(row, index)
        if self.name == "plain":
            return [_turn("assistant", self._response(row, index))]
        question = SEPARATOR.join(self._question(row, index))
        return [*self._before(row, index), _turn("user", question), _turn("assistant", self._response(row, index))]

    def chat_options(self, row: Row, index: int | None = None) -> dict[str, Any]:
        """What `apply_chat_template` is given beside the messages: the row's `tools` and `chat_template_kwargs`, if any.

        Both may also be JSON in a string, since tables hold no lists of differing objects. Fields of tools that are None are
        left out, because tables fill them in.

        Raises:
            SourceError: the column holds something else; names row and column.
        """
        if self.name != "chat":
            return {}
        options: dict[str, Any] = {}
        tools = _parsed(row.get("tools"))
        if tools:
            if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
                raise SourceError(
                    f"{_place(index)}, column 'tools': expected a list of JSON schemas of tools, got {_shown(tools)}; repair "
                    "the row or remove the column"
                )
            options["tools"] = [_without_nulls(tool) for tool in tools]
        given = _parsed(row.get("chat_template_kwargs"))
        if given:
            if not isinstance(given, Mapping):
                raise SourceError(
                    f"{_place(index)}, column 'chat_template_kwargs': expected {{name: value}}, got {_shown(given)}; repair "
                    "the row or remove the column"
                )
            options |= {name: value for name, value in given.items() if value is not None}
        return options

    def prompt_and_response(self, row: Row, index: int | None = None) -> tuple[str, str]:
        """What the model is given and what it shall answer.

        Alpaca rows get the published wording, with or without input; a `system` text stands before it, and the questions and
        answers of `history` before the instruction, in the same wording. Of a conversation the last assistant message is
        the response, and the prompt names the role before every message; a tokenizer's own chat template, applied to
        `messages`, is to be preferred. Plain text is a response to nothing.

        Args:
            row: the fields of one sample.
            index: its position, for messages.

        Returns:
            prompt (empty for plain text) and response.

        Raises:
            SourceError: as `messages`.
        """
        if self.name == "alpaca":
            instruction, *context = self._question(row, index)
            wording = WITH_INPUT if context else WITHOUT_INPUT
            # one pass of format: braces inside the cells stay as they are
            filled = wording.format(instruction=instruction, input=context[0] if context else "")
            return _after_earlier(self._before(row, index), filled), self._response(row, index)
        if self.name == "chat":
            turns = self._conversation(row, index)
            asked = "".join(f"{_speaker(turn)}: {message_text(turn)}\n" for turn in turns[:-1])
            return f"{asked}{_speaker(turns[-1])}: ", message_text(turns[-1])
        if self.name == "prompt":
            earlier = [message_text(turn) for turn in self._before(row, index)]
            return SEPARATOR.join([*earlier, *self._question(row, index)]), self._response(row, index)
        return "", self._response(row, index)

    def embedded_text(self, row: Row, part: EmbeddedText = "both", index: int | None = None) -> str:
        """The text of a row that is embedded: the parts that are not empty, one a line, without any wording around them.

        Args:
            row: the fields of one sample.
            part: `"instruction"` is everything before the response (instruction and input, or all earlier messages),
                `"response"` the response, `"both"` the two, as published for Alpaca.
            index: its position, for messages.

        Raises:
            SourceError: as `messages`.
        """
        turns = self.messages(row, index)
        asked, answer = [message_text(turn) for turn in turns[:-1]], message_text(turns[-1])
        chosen = {"instruction": asked, "response": [answer], "both": [*asked, answer]}[part]
        return SEPARATOR.join(text for text in chosen if text)

    def _before(self, row: Row, index: int | None) -> list[Message]:
        """What stands before the question of an Alpaca or prompt row: its system text, and earlier questions and answers."""
        # a column that is named as one of the texts is no second time something else
        row = {name: row.get(name) for name in _BESIDE[self.name] if name not in self.columns}
        system = _text(row, "system", index, optional=True)
        turns = [_turn("system", system)] if system.strip() else []
        where = f"{_place(index)}, column 'history'"
        earlier = row.get("history")
        if earlier is None or earlier == "":
            return turns
        if not isinstance(earlier, Sequence) or isinstance(earlier, str | bytes):
            raise SourceError(f"{where}: expected a list of [question, answer], got {_shown(earlier)}; repair the row")
        for number, entry in enumerate(earlier):
            if isinstance(entry, Mapping):
                turns.append(_message(entry, f"{where}, message {number}"))
            elif isinstance(entry, list | tuple) and [type(text) for text in entry] == [str, str]:
                turns += [_turn("user", entry[0]), _turn("assistant", entry[1])]
            else:
                raise SourceError(
                    f"{where}, entry {number}: expected [question, answer], got {_shown(entry)}; repair the row"
                )
        return turns

    def _question(self, row: Row, index: int | None) -> list[str]:
        """Instruction, and the input when there is one; or the prompt."""
        first = [_text(row, self.columns[0], index)]
        context = _text(row, self.columns[2], index, optional=True) if len(self.columns) > 2 else ""
        return [*first, context] if context.strip() else first

    def _response(self, row: Row, index: int | None) -> str:
        if self.name == "plain":
            texts = [_text(row, column, index) for column in self.columns]
            return texts[0] if len(texts) == 1 else SEPARATOR.join(text for text in texts if text)
        return _text(row, self.columns[1], index)

    def _conversation(self, row: Row, index: int | None) -> list[Message]:
        """The messages up to the last one of the assistant."""
        column = self.columns[0]
        seen = row.get(column)
        if isinstance(seen, Mapping) and len({len(cells) for cells in seen.values() if isinstance(cells, list)}) == 1:
            # a Sequence of dicts comes out of a Hugging Face dataset as a dict of lists
            fields = {key: cells for key, cells in seen.items() if isinstance(cells, list)}
            seen = [dict(zip(fields, cells, strict=True)) for cells in zip(*fields.values(), strict=True)]
        if not isinstance(seen, Sequence) or isinstance(seen, str | bytes):
            raise SourceError(
                f"{_place(index)}, column {column!r}: expected a list of messages {{role, content}} or {{from, value}}, got "
                f"{_shown(seen)}; repair the row or leave it out"
            )
        turns = [
            _message(message, f"{_place(index)}, column {column!r}, message {n}") for n, message in enumerate(seen)
        ]
        answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not answers:
            roles = ", ".join(dict.fromkeys(repr(turn["role"]) for turn in turns)) or "none"
            raise SourceError(
                f"{_place(index)}, column {column!r}: none of its {len(turns)} messages is of the role 'assistant' (the roles "
                f"are {roles}), so there is no response to learn; leave the row out"
            )
        turns = turns[: answers[-1] + 1]
        system = _text(row, self.columns[1], index, optional=True) if len(self.columns) > 1 else ""
        return [_turn("system", system), *turns] if system.strip() and turns[0]["role"] != "system" else turns


def message_text(message: Message) -> str:
    """The text of a message: its content, and what it asks of tools as JSON."""
    content = message["content"]
    parts = [content] if isinstance(content, str) else [part["text"] for part in content or ()]
    parts += [json.dumps(message[key], ensure_ascii=False, default=str) for key in _CALLS if message.get(key)]
    return SEPARATOR.join(part for part in parts if part) if len(parts) > 1 else "".join(parts)


def columns_of(rows: Any) -> list[str]:
    """The names of the columns of rows: of all of them, since any row may lack an optional one.

    Args:
        rows: map-style, of dicts. Items that are none have no columns; where the first rows hold no text, as in a dataset of
            images, the others are not read.
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
    """Every row with its position, read many at a time where the dataset can do so."""
    together = getattr(rows, "__getitems__", None)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        places = range(start, min(start + _ROWS_AT_ONCE, len(rows)))
        yield from zip(
            places, map(rows.__getitem__, places) if together is None else together(list(places)), strict=True
        )


def choose_template(
    columns: Sequence[str], wanted: TemplateName = "auto", named: Sequence[str] | None = None
) -> Template:
    """Decide which template reads rows of these columns.

    Args:
        columns: names of the columns.
        wanted: a template by name, or `"auto"`: that of the first of `LAYOUTS` whose columns are there; with `named`, plain.
        named: the columns to read, in place of the usual ones, in the order of `Template.columns`
            (`config.text.columns`).

    Raises:
        ConfigError: `wanted` is no template's name.
        SourceError: the columns that it needs are missing, or fit no template.
    """
    if wanted not in get_args(TemplateName):
        raise ConfigError(f"the template must be one of {', '.join(map(repr, get_args(TemplateName)))}, got {wanted!r}")
    if named is not None:
        return _named_template("plain" if wanted == "auto" else wanted, tuple(named), columns)
    layouts = [layout for layout in LAYOUTS if wanted in ("auto", layout[0])]
    for name, required, optional in layouts:
        if set(required) <= set(columns):
            return Template(name, (*required, *optional))
    needs = "; ".join(f"{name}: {' + '.join(required)}" for name, required, _ in layouts)
    raise SourceError(
        f"the columns are {_listed(columns)}, which is no layout of the template {wanted!r} ({needs}). Name the columns that "
        "hold the text with config.text.columns, "
        'for instance TextConfig(columns=("review",)) or TextConfig(template="prompt", columns=("question", "reply"))'
    )


def _named_template(name: TemplateName, named: tuple[str, ...], columns: Sequence[str]) -> Template:
    least, most, what = _NAMED[name]
    if not least <= len(named) <= most:
        raise ConfigError(f"config.text.columns names {_listed(named)}, but the template {name!r} reads {what}")
    missing = [column for column in named[: len(named) if name == "plain" else least] if column not in columns]
    if missing:
        raise SourceError(
            f"config.text.columns names {_listed(missing)}, but the columns are {_listed(columns)}; pass some of these"
        )
    return Template(name, named)


def _after_earlier(earlier: Sequence[Message], wording: str) -> str:
    """Alpaca's wording of a question with what was said before: the system's text first, each earlier turn under a heading."""
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
    """A value that may be JSON in a string; text that is none stays as it is."""
    if isinstance(value, str):
        with suppress(ValueError):
            return json.loads(value)
    return value


def _without_nulls(value: Any) -> Any:
    """A nest of dicts and lists without the fields that are None."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(field) for key, field in value.items() if field is not None}
    return [_without_nulls(field) for field in value] if isinstance(value, list | tuple) else value


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _message(given: Any, where: str) -> Message:
    """A message of a row in its one form."""
    if not isinstance(given, Mapping):
        raise SourceError(f"{where}: expected {{role, content}}, got {_shown(given)}; repair the row or leave it out")
    rest = {key: value for key, value in given.items() if value is not None}
    rest |= {key: _without_nulls(rest[key]) for key in _CALLS if key in rest}
    shared = "role" not in rest and "from" in rest
    role_key, content_key = ("from", "value") if shared else ("role", "content")
    role, content = rest.pop(role_key, None), rest.pop(content_key, None)
    if not isinstance(role, str):
        raise SourceError(f"{where}: its {role_key!r} must be text, got {_shown(role)}; repair the row or leave it out")
    if shared:
        role = _SPEAKERS.get(role.lower(), role)
    calls = content is None and any(rest.get(key) for key in _CALLS)
    if not (isinstance(content, str) or calls or _is_text_parts(content)):
        raise SourceError(
            f"{where}: its {content_key!r} must be text, got {_shown(content)}; repair the row or leave it out"
        )
    made = {"role": role, "content": content, **rest}
    _check_characters(content if isinstance(content, str) else "", where)
    if rest or not isinstance(content, str):
        _check_characters(json.dumps(made, ensure_ascii=False, default=str), where)
    return made


def _is_text_parts(content: Any) -> bool:
    """Whether a content is a list of parts {type, text} that all hold text."""
    parts = isinstance(content, Sequence) and not isinstance(content, str | bytes) and len(content) > 0
    return parts and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content)


def _text(row: Row, column: str, index: int | None, *, optional: bool = False) -> str:
    value = row.get(column)
    if optional and value is None:
        return ""
    if not isinstance(value, str):
        raise SourceError(
            f"{_place(index)}, column {column!r}: expected text, got {_shown(value)}; repair the row or leave it out"
        )
    _check_characters(value, f"{_place(index)}, column {column!r}")
    return value


def _check_characters(text: str, where: str) -> None:
    """JSON can hold half of a character (a lone surrogate), which no tokenizer and no server takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{where}: the text holds {error.object[error.start : error.start + 1]!r} at position {error.start}, which "
            "is half of a character (a lone surrogate); repair the row or leave it out"
        ) from error


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _place(index: int | None) -> str:
    return "a row" if index is None else f"row {index}"


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
