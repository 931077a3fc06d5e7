"""Text rows: which columns hold the prompt and the response, and which text of a row is embedded. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from dq_lightning.config import EmbeddedText
from dq_lightning.config import Template as TemplateName
from dq_lightning.errors import ConfigError, SourceError

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
# column sets of each template, the first that fits counts: (required, optional)
COLUMNS: dict[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    "alpaca": ((("instruction", "output"), ("input",)),),
    "prompt": ((("prompt", "completion"), ()), (("prompt", "response"), ())),
    "chat": ((("messages",), ()), (("conversation",), ())),
    "plain": ((("text",), ()), (("content",), ())),
}


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: `"system"`, `"user"`, `"assistant"`, or what the row calls it.
        content: its text.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Template:
    """How a row is read. Made by `choose_template`.

    Attributes:
        name: `"alpaca"`, `"prompt"`, `"chat"` or `"plain"`.
        columns: the columns that it reads, in the order of `COLUMNS`.
    """

    name: str
    columns: tuple[str, ...]

    def messages(self, row: Row, index: int | None = None) -> list[Turn]:
        """The row as a conversation, for a tokenizer's chat template.

        An Alpaca row is one user turn (instruction and input, without the published wording) and the answer; plain text
        is one assistant turn.

        Args:
            row: the fields of one sample.
            index: its position, for messages.

        Raises:
            SourceError: a cell is no text, or a conversation has no answer; names row and column.
        """
        if self.name == "chat":
            return self._conversation(row, index)
        if self.name == "plain":
            return [Turn("assistant", _text(row, self.columns[0], index))]
        question = SEPARATOR.join(self._question(row, index))
        return [Turn("user", question), Turn("assistant", self._response(row, index))]

    def prompt_and_response(self, row: Row, index: int | None = None) -> tuple[str, str]:
        """What the model is given and what it shall answer.

        Alpaca rows get the published wording, with or without input. Of a conversation the last assistant message is the
        response, and the prompt names the role before every message; a tokenizer's own chat template, applied to
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
            return filled, self._response(row, index)
        if self.name == "chat":
            turns = self._conversation(row, index)
            asked = "".join(f"{turn.role}: {turn.content}\n" for turn in turns[:-1])
            return f"{asked}{turns[-1].role}: ", turns[-1].content
        if self.name == "prompt":
            return _text(row, self.columns[0], index), self._response(row, index)
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
        asked, answer = [turn.content for turn in turns[:-1]], turns[-1].content
        chosen = {"instruction": asked, "response": [answer], "both": [*asked, answer]}[part]
        return SEPARATOR.join(text for text in chosen if text)

    def _question(self, row: Row, index: int | None) -> list[str]:
        """Instruction, and the input when there is one; or the prompt."""
        first = [_text(row, self.columns[0], index)]
        context = _text(row, self.columns[2], index, optional=True) if len(self.columns) > 2 else ""
        return [*first, context] if context.strip() else first

    def _response(self, row: Row, index: int | None) -> str:
        return _text(row, self.columns[1] if len(self.columns) > 1 else self.columns[0], index)

    def _conversation(self, row: Row, index: int | None) -> list[Turn]:
        """The messages up to the last one of the assistant."""
        column = self.columns[0]
        seen = row.get(column)
        if not isinstance(seen, Sequence) or isinstance(seen, str | bytes):
            raise SourceError(
                f"{_place(index)}, column {column!r}: expected a list of messages {{role, content}}, got {_shown(seen)}; "
                "repair the row or leave it out"
            )
        turns = [self._turn(message, column, place, index) for place, message in enumerate(seen)]
        answers = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
        if not answers:
            raise SourceError(
                f"{_place(index)}, column {column!r}: none of its {len(turns)} messages is of the role 'assistant', so "
                "there is no response to learn; leave the row out"
            )
        return turns[: answers[-1] + 1]

    def _turn(self, message: Any, column: str, place: int, index: int | None) -> Turn:
        where = f"{_place(index)}, column {column!r}, message {place}"
        if not isinstance(message, Mapping):
            raise SourceError(
                f"{where}: expected {{role, content}}, got {_shown(message)}; repair the row or leave it out"
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise SourceError(
                    f"{where}: its {key!r} must be text, got {_shown(message.get(key))}; repair the row or leave it out"
                )
        return Turn(message["role"], message["content"])


def choose_template(columns: Sequence[str], wanted: TemplateName = "auto") -> Template:
    """Decide which template reads rows of these columns.

    Args:
        columns: names of the columns.
        wanted: a template by name, or `"auto"`: the first of alpaca, prompt, chat, plain whose columns are there.

    Raises:
        ConfigError: `wanted` is no template's name.
        SourceError: the columns that it needs are missing, or fit no template.
    """
    if wanted not in get_args(TemplateName):
        raise ConfigError(f"the template must be one of {', '.join(map(repr, get_args(TemplateName)))}, got {wanted!r}")
    for name in COLUMNS if wanted == "auto" else [wanted]:
        for required, optional in COLUMNS[name]:
            if set(required) <= set(columns):
                return Template(name, (*required, *(column for column in optional if column in columns)))
    needs = "; ".join(
        f"{name}: {' or '.join(' + '.join(required) for required, _ in COLUMNS[name])}"
        for name in (COLUMNS if wanted == "auto" else [wanted])
    )
    seen = ", ".join(map(repr, columns)) or "none"
    raise SourceError(
        f"the columns are {seen}, but the template {wanted!r} needs ({needs}). Rename the columns "
        "(dataset.rename_column), or set config.text.template to one that fits"
    )


def _text(row: Row, column: str, index: int | None, *, optional: bool = False) -> str:
    value = row.get(column)
    if optional and value is None:
        return ""
    if not isinstance(value, str):
        raise SourceError(
            f"{_place(index)}, column {column!r}: expected text, got {_shown(value)}; repair the row or leave it out"
        )
    return value


def _place(index: int | None) -> str:
    return "a row" if index is None else f"row {index}"


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
