"""Writes conversations with a tokenizer's chat template and finds the assistant's messages in the written text.

A template is a program: it may write a message differently in the middle of a conversation than at its end (reasoning
is often left out of earlier turns). Therefore messages are searched in the text of the whole conversation. If the
template marks what the assistant writes (`{% generation %}`), these marks are used. Otherwise the other messages are
located by writing the conversation once more with a marker inside each of them, and the assistant's text is what stands
between them, without the headings that the template writes around it. A heading is the same for all messages of a role,
so it is determined once. The number of times that a conversation is written does not grow with its length.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

from dq_lightning.core.errors import SourceError
from dq_lightning.sources.prompts import Message, is_learned, message_text

# How many times the beginning of one conversation may be written to find headings.
_EXTRA_WRITINGS = 8
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_WORD = re.compile(r"\w+")
# Marks of reasoning in front of an answer.
_REASONS, _REASONED = "<think>", "</think>"
# Private characters of Unicode, which ordinary text does not use.
_PRIVATE = range(0xE000, 0xF900)


class Segment(NamedTuple):
    """A part of a row's text, and whether the model learns to write it."""

    text: str
    learn: bool


class Conversation(NamedTuple):
    """The text that the template writes for a conversation, up to the last assistant message that was found.

    Attributes:
        segments: the text, split where learning begins and ends.
        missed: number of assistant messages that could not be found in the text; they are not learned.
        unwritten: what the template did not write: the roles of messages whose text it left out, `"tool_calls"` and
            `"tools"`.
    """

    segments: list[Segment]
    missed: int
    unwritten: tuple[str, ...] = ()


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: tokenizer of transformers that has a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # Headings that were found, by options and role. An opening is what the template writes between the end of a
        # message and the beginning of the assistant's answer; a closing is what it writes between the end of an answer
        # and the beginning of the next message.
        self.openings: dict[tuple[str, str], str] = {}
        self.closings: dict[tuple[str, str], str] = {}

    def conversation(self, messages: Sequence[Message], options: Mapping[str, Any], index: int) -> Conversation:
        """Write a conversation and find the assistant's messages in it.

        Args:
            messages: messages of the conversation, of which the last one is the assistant's.
            options: `tools` and other arguments of `apply_chat_template`.
            index: position of the row, for error messages.

        Returns:
            The conversation; each of its learned segments is an assistant message as the template writes it, with the
            token that ends the assistant's turn. Messages of the weight 0 are not learned.

        Raises:
            SourceError: the template fails, or no assistant message can be found in the text that it wrote.
        """
        row = _Row(self, messages, options, index)
        spans = row.marked_by_template()
        if spans is None:
            spans = row.between_the_others()
        if not spans and row.missed == 0:
            raise SourceError(
                f"row {index}: all of the assistant's messages have the weight 0, so there is nothing to learn: leave the row "
                "out (on_error='skip')"
            )
        if not spans:
            raise SourceError(
                f"row {index}: none of the assistant's messages can be found in what the tokenizer's chat template writes, so "
                "there is nothing to learn: leave the row out (on_error='skip'), or write rows without the chat template "
                "(use_chat_template=False, in a data module config.text.use_chat_template)"
            )
        segments, done = [], 0
        for start, end in spans:
            segments += [Segment(row.whole[done:start], False), Segment(row.whole[start:end], True)]
            done = end
        # The last answer may be empty. Its segment is kept, so that the end of the sequence is learned.
        return Conversation([one for one in segments[:-1] if one.text] + segments[-1:], row.missed, row.unwritten())

    def write(self, messages: Sequence[Message], options: Mapping[str, Any], **arguments: Any) -> str:
        """Return the text that the template writes. It may raise any exception, since templates are programs."""
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **{**options, **arguments}))

    def source(self, options: Mapping[str, Any]) -> str:
        """Return the source of the template that writes conversations with these options."""
        return str(self.tokenizer.get_chat_template(options.get("chat_template"), options.get("tools")))

    @cached_property
    def special(self) -> re.Pattern[str]:
        """Pattern that matches the special tokens of the tokenizer."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        names = {str(token) for token in self.tokenizer.all_special_tokens}
        names |= {token.content for token in added if token.special}
        return re.compile("|".join(re.escape(name) for name in sorted(names - {""}, key=len, reverse=True)) or r"(?!)")


class _Row:
    """One conversation during the search for its messages.

    Positions in the text are numbers of characters; a span is a pair of the first and the end position.

    Attributes:
        whole: text that the template writes for the conversation.
        missed: number of assistant messages that were not found in it.

    Raises:
        SourceError: the template fails.
    """

    def __init__(
        self, template: ChatTemplate, messages: Sequence[Message], options: Mapping[str, Any], index: int
    ) -> None:
        self._template, self._messages, self._options = template, messages, options
        self._answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        self._learned = [n for n in self._answers if is_learned(messages[n])]
        self._kind = json.dumps(
            [bool(options.get("tools")), {k: v for k, v in options.items() if k != "tools"}], default=str
        )
        self._extra = _EXTRA_WRITINGS
        self._found: dict[int, tuple[int, int]] = {}
        self.missed = 0
        try:
            self.whole = template.write(messages, options)
        except Exception as error:  # templates are programs of the model's author and raise what they like
            raise SourceError(
                f"row {index}: the tokenizer's chat template fails ({type(error).__name__}: {error}): repair the row, leave it "
                "out (on_error='skip'), or write rows without the chat template (use_chat_template=False, in a data module "
                "config.text.use_chat_template)"
            ) from error

    def marked_by_template(self) -> list[tuple[int, int]] | None:
        """Spans that the template's own marks enclose; None if it has no marks, or marks that cannot be used."""
        source = self._template.source(self._options)
        if not _GENERATION.search(source):
            return None
        begin, end = _unused(source + self.whole, 2)

        def mark(found: re.Match[str]) -> str:
            # The replacement keeps how the original tag strips the white space before it and behind it.
            left, ends, right = found.groups()
            return f"{{%{left} if true %}}{{{{ '{end if ends else begin}' }}}}{{% endif {right}%}}"

        text = self._written(self._messages, chat_template=_GENERATION.sub(mark, source))
        if text is None or text.replace(begin, "").replace(end, "") != self.whole:
            return None
        spans: list[tuple[int, int]] = []
        length, start = 0, None
        for piece in re.split(f"([{begin}{end}])", text):
            if piece == begin:
                start = length
            elif piece == end and start is not None:
                # A template may mark reasoning and answer one by one: adjacent spans are joined.
                if spans and spans[-1][1] == start:
                    start = spans.pop()[0]
                spans += [(start, length)] if start < length else []
                start = None
            elif piece not in (begin, end):
                length += len(piece)
        if len(self._learned) < len(self._answers):
            if len(spans) != len(self._answers):
                return None  # It is not known which of the spans are those of the messages that are not learned.
            spans = [spans[self._answers.index(n)] for n in self._learned]
        self.missed = max(0, len(self._learned) - len(spans))
        # A template may leave the token that ends a turn outside its marks: it is the token that follows the last
        # answer.
        ending = self._template.special.match(self.whole, spans[-1][1]) if spans else None
        if ending is None:
            return spans
        return [(a, b + len(ending[0]) if self.whole.startswith(ending[0], b) else b) for a, b in spans]

    def between_the_others(self) -> list[tuple[int, int]]:
        """Spans of the assistant's messages, found by the messages around them and the template's headings."""
        found = self._found
        # All messages are tried twice, since a heading that one message does not reveal may become known by a later
        # one.
        for place in self._answers * 2:
            start = None if place in found else self._start(place)
            end = None if start is None else self._end(place, start)
            if start is not None and end is not None:
                found[place] = start, self._without_space(place, start, end)
        spans: list[tuple[int, int]] = []
        for place, (start, end) in sorted(found.items()):
            if place in self._learned and end >= start and (not spans or start >= spans[-1][1]):
                spans.append((start, end))
        self.missed = len(self._learned) - len(spans)
        return spans

    def unwritten(self) -> tuple[str, ...]:
        """What the template did not write: roles of messages whose text it left out, and calls and schemas of tools.

        A template may change a text, so a text counts as written if half of its words are. Reasoning in front of an
        answer may be left out.
        """
        found: dict[str, None] = {}
        for place, message in enumerate(self._messages):
            texts = [self._visible(place)] if place in self._answers else _texts(message)
            if any(text.strip() and not self._is_written(text.strip()) for text in texts):
                found[str(message["role"])] = None
            calls = [*(message.get("tool_calls") or ()), message.get("function_call")]
            if any(name not in self.whole for name in map(_name_of_tool, calls)):
                found["tool_calls"] = None
        if any(name not in self.whole for name in map(_name_of_tool, self._options.get("tools") or ())):
            found["tools"] = None
        return tuple(found)

    def _is_written(self, text: str) -> bool:
        if text in self.whole:
            return True
        words = set(_WORD.findall(text.casefold()))
        return bool(words) and 2 * len(words & self._words) >= len(words)

    @cached_property
    def _words(self) -> set[str]:
        return set(_WORD.findall(self.whole.casefold()))

    def _start(self, place: int) -> int | None:
        """Position where an assistant message begins: the end of what the model is given at inference; or None."""
        if place - 1 in self._answers:
            return self._behind_an_answer(place)
        if place == self._answers[-1] or place == 0:
            exact = self._behind_the_prompt(place)
            if exact is not None:
                return exact
        before = self._anchors.get(place - 1)
        if before is None:
            return self._behind_the_prompt(place) if place not in (0, self._answers[-1]) else None
        kind = (self._kind, self._messages[place - 1]["role"])
        # The heading may follow the white space at the end of the message before, or the template may have removed that
        # space.
        ends = [before.end + before.space_behind, before.end]
        for renewed in (False, True):
            if renewed and (opening := self._opening(place)) is not None:
                self._template.openings[kind] = opening
            heading = self._template.openings.get(kind)
            for end in ends:
                if heading is not None and self.whole.startswith(heading, end):
                    return end + len(heading)
            # A template may write less white space before the heading when it asks.
            bare = (heading or "").lstrip()
            end = _end_of_space(self.whole, before.end)
            if bare and self.whole.startswith(bare, end) and self._may_follow(place, end + len(bare)):
                return end + len(bare)
        heading = self._template.openings.get(kind)
        return None if heading is None else self._behind_part_of(heading, place, ends)

    def _behind_an_answer(self, place: int) -> int | None:
        """Position where an answer behind another answer begins, or None."""
        if place - 1 in self._found and (heading := self._prompt):
            end = self._found[place - 1][1]
            at = self.whole.find(heading, end)
            between = self._template.special.sub("", self.whole[end : max(at, end)])
            if at >= 0 and not between.strip() and self._may_follow(place, at + len(heading)):
                return at + len(heading)
            start = self._behind_part_of(heading, place, self._beginnings(heading, end)[:1])
            if start is not None:
                return start
        # Some templates write no heading there, and some one that they do not ask with.
        exact = self._behind_the_prompt(place)
        return exact if exact is not None and self._may_follow(place, exact) else None

    def _beginnings(self, heading: str, least: int) -> list[int]:
        """Positions, `least` or more, of the special token or else the character that a heading begins with."""
        first = self._template.special.match(heading)
        begins = first[0] if first else heading[:1]
        return [found.start() for found in re.compile(re.escape(begins)).finditer(self.whole, least)] if begins else []

    @cached_property
    def _prompt(self) -> str | None:
        """What the template writes behind a conversation to ask for an answer; None if it fails."""
        asking = self._written(self._messages, add_generation_prompt=True)
        if asking is None:
            return None
        length = len(_shared(asking, self.whole))
        if length < len(self.whole):
            # The template ends a conversation otherwise if it does not ask, and both may begin alike: what it asks with
            # begins with a special token or behind white space.
            begins = [at for token in self._template.special.finditer(asking) for at in token.span()]
            begins += [space.end() for space in re.finditer(r"\s+", asking[:length])]
            length = max((at for at in begins if at <= length), default=0)
        return asking[length:]

    def _behind_the_prompt(self, place: int) -> int | None:
        """Length of the prompt that the template writes for the messages before, or None.

        None means that the whole text does not begin with this prompt. For the first message it is the position behind
        the template's generation prompt in the whole text.
        """
        if place == 0:
            if (heading := self._prompt) is None:
                return None
            at = self.whole.find(heading)
            # The same heading may stand before a later answer alone.
            if at >= 0 and (self._is_rewritten(place) or self._visible(place) in self.whole[at + len(heading) :]):
                return at + len(heading)
            return self._behind_part_of(heading, place, self._beginnings(heading, 0))
        prompt = self._written(self._messages[:place], add_generation_prompt=True, counted=place != self._answers[-1])
        return len(prompt) if prompt is not None and self.whole.startswith(prompt) else None

    def _opening(self, place: int) -> str | None:
        """The text that the template writes between the end of the message before an answer and the answer, or None."""
        marked = self._written(self._marking[0][:place], add_generation_prompt=True, counted=True)
        if marked is None:
            return None
        text, marks = self._without_marks(marked)
        before = self._anchor(place - 1, text, marks)
        if before is None:
            return None
        space = before.space_behind if text.startswith(self._space_behind(place - 1), before.end) else 0
        return text[before.end + space :]

    def _behind_part_of(self, heading: str, place: int, ends: list[int]) -> int | None:
        """Position behind the part of a heading that this message has, or None.

        Such a part occurs with templates that end only the last heading with `<think>`, or write `<think></think>` where
        there is no reasoning.
        """
        for end in ends:
            shared = _shared(heading, self.whole[end : end + len(heading)])
            cuts = [found.end() for found in self._template.special.finditer(shared)]
            cuts += [found.end() for found in re.finditer(r"\s+", shared)]
            start = end + max(cuts, default=0)
            if cuts and self._follows(place, start):
                return start
        return None

    def _follows(self, place: int, start: int) -> bool:
        """Whether an answer begins at a position of the text, perhaps behind white space or reasoning."""
        behind = [_end_of_space(self.whole, start)]
        closes = self.whole.find(_REASONED, start)
        if closes >= 0 and not self._template.special.search(self.whole[start:closes].replace(_REASONS, "")):
            behind.append(_end_of_space(self.whole, closes + len(_REASONED)))
        return any(self.whole.startswith(self._visible(place), end) for end in behind)

    def _may_follow(self, place: int, start: int) -> bool:
        """Whether an answer begins at a position of the text, or is written with other characters than it has."""
        return self._is_rewritten(place) or self._follows(place, start)

    def _is_rewritten(self, place: int) -> bool:
        return self._visible(place) not in self.whole

    def _end(self, place: int, start: int) -> int | None:
        """Position where the template's text of an answer ends; None if unknown."""
        if place == len(self._messages) - 1:
            return len(self.whole)
        following = self._anchors.get(place + 1)
        if following is None:
            return self._closing(place, start, len(self.whole))
        kind = (self._kind, self._messages[place + 1]["role"])
        for renewed in (False, True):
            if renewed and (end := self._closing(place, start, following.start)) is not None:
                self._template.closings[kind] = self.whole[end : following.start]
            heading = self._template.closings.get(kind)
            for limit in (following.start - following.space_before, following.start):
                if heading is not None and self.whole.endswith(heading, start, limit):
                    return limit - len(heading)
        return None

    def _closing(self, place: int, start: int, stop: int) -> int | None:
        """Position of the end of an answer between `start` and the next message, or None.

        It is found by the text that the template also ends with if the answer is the last message. The beginning of
        that text may differ, since a template may write reasoning for the last message alone, and may then leave out
        white space at the beginning of the answer.
        """
        upto = self._written(self._messages[: place + 1], counted=True)
        end = self._end_alike(upto, place, start, stop)
        if end is not None:
            return end
        # What the template ends a conversation with may stand at its end alone, and not before the prompt for an answer.
        prompt = self._prompt or ""
        asking = self._written(self._messages[: place + 1], counted=True, add_generation_prompt=True) or ""
        if not prompt or not asking.endswith(prompt):
            return None
        end = self._end_alike(asking.removesuffix(prompt), place, start, stop)
        if end is None:
            return None
        # Where the prompt itself begins with the token that closes the answer, the other message follows that one, too.
        tokens = list(self._template.special.finditer(_shared(prompt, self.whole[end : end + len(prompt)])))
        return end + (tokens[-1].start() if len(tokens) > 1 else 0)

    def _end_alike(self, upto: str | None, place: int, start: int, stop: int) -> int | None:
        """Position of the end of an answer between `start` and `stop`, given the conversation up to it; or None.

        The whole text begins with that one, or the longest text behind `start` that it ends with, and that holds the end
        of the answer, is taken.
        """
        if not upto:
            return None
        if self.whole.startswith(upto) and start <= len(upto) <= stop:
            return len(upto)
        end, needed = min(stop, start + len(upto) + 1), self._visible(place)[-8:]
        while (end := self.whole.rfind(upto[-1], start, end)) >= 0:
            answer = self.whole[start : end + 1]
            if answer.strip() and needed in answer and upto.endswith(answer.lstrip()):
                return end + 1
        return None

    def _without_space(self, place: int, start: int, end: int) -> int:
        """Position of the end of an answer without the white space that the template writes behind it."""
        text = self.whole[start:end]
        bare = text.rstrip()
        texts = _texts(self._messages[place])
        content, own = (texts[-1].strip(), self._space_behind(place)) if texts else ("", "")
        # White space at the end of the message belongs to it if the template writes nothing but white space behind it.
        tail = content[-16:]
        special = next((found for found in self._template.special.finditer(bare) if found.end() == len(bare)), None)
        closed = special is not None and bare[: special.start()].endswith(tail + own)
        alone = not closed and (bare.endswith(tail) if content else not bare)
        return start + len(bare) + (len(own) if alone and text.startswith(own, len(bare)) else 0)

    def _visible(self, place: int) -> str:
        """Text of an answer without the reasoning before it."""
        content = self._messages[place]["content"]
        return content.rsplit(_REASONED, 1)[-1].strip() if isinstance(content, str) else ""

    def _space_behind(self, place: int) -> str:
        texts = _texts(self._messages[place])
        return texts[-1][len(texts[-1].rstrip()) :] if texts else ""

    # Markers inside the messages of others than the assistant.

    @cached_property
    def _mark(self) -> str:
        return _unused(self.whole + json.dumps(self._messages, ensure_ascii=False, default=str), 1)[0]

    @cached_property
    def _marking(self) -> tuple[list[Message], dict[str, list[int]]]:
        """The messages with markers, and the positions of the markers in the written text.

        Messages of others than the assistant get a marker in the middle of their first and last text. There are no
        positions if the markers change what the template writes. A marker in an empty text is the likeliest to do so:
        in that case empty messages get none.
        """
        marked: list[Message] = []
        for empty in (True, False):
            marked = [
                message
                if message["role"] == "assistant" or not (empty or message_text(message).strip())
                else self._with_marks(n, message)
                for n, message in enumerate(self._messages)
            ]
            text, marks = self._without_marks(self._written(marked) or "")
            if text == self.whole:
                return marked, marks
        return marked, {}

    def _with_marks(self, place: int, message: Message) -> Message:
        content = message["content"]
        if isinstance(content, str):
            return message | {"content": self._with_mark(place, content)}
        parts = [dict(part) for part in content or ()]
        for number in sorted({0, len(parts) - 1} if parts else ()):
            parts[number]["text"] = self._with_mark(f"{place}-{number}", parts[number]["text"])
        return message | {"content": parts or content}

    def _with_mark(self, name: Any, text: str) -> str:
        middle = _middle(text)
        return f"{text[:middle]}{self._mark}{name}{self._mark}{text[middle:]}"

    def _without_marks(self, marked: str) -> tuple[str, dict[str, list[int]]]:
        """Remove the markers from a text, and return it with the positions of each marker by name."""
        pieces = re.split(f"{self._mark}([0-9-]+){self._mark}", marked)
        marks: dict[str, list[int]] = {}
        length = 0
        for piece, name in zip(pieces[::2], [*pieces[1::2], None], strict=True):
            length += len(piece)
            if name is not None:
                marks.setdefault(name, []).append(length)
        return "".join(pieces[::2]), marks

    @cached_property
    def _anchors(self) -> "dict[int, _Anchor]":
        """Positions of the messages of others than the assistant, for those that the template writes unchanged."""
        _, marks = self._marking
        found = {n: self._anchor(n, self.whole, marks) for n in range(len(self._messages)) if n not in self._answers}
        return {n: anchor for n, anchor in found.items() if anchor is not None}

    def _anchor(self, place: int, text: str, marks: dict[str, list[int]]) -> "_Anchor | None":
        texts = _texts(self._messages[place])
        if not texts:
            return None
        one = isinstance(self._messages[place]["content"], str)
        first = marks.get(str(place) if one else f"{place}-0", [])
        last = marks.get(str(place) if one else f"{place}-{len(texts) - 1}", [])
        if len(first) != 1 or len(last) != 1:
            return None
        head = texts[0][: _middle(texts[0])].lstrip()
        tail = texts[-1][_middle(texts[-1]) :].rstrip()
        start, end = first[0] - len(head), last[0] + len(tail)
        if text[max(0, start) : first[0]] != head or text[last[0] : end] != tail:
            return None
        space_before = len(texts[0]) - len(texts[0].lstrip())
        return _Anchor(start, end, space_before, len(self._space_behind(place)))

    def _written(self, messages: Sequence[Message], *, counted: bool = False, **arguments: Any) -> str | None:
        """Write other messages than those of the row.

        Returns None if the template fails, or if `counted` is True and the number of extra writings is used up.
        """
        if counted:
            if self._extra == 0:
                return None
            self._extra -= 1
        try:
            return self._template.write(messages, self._options, **arguments)
        except Exception:  # a part of a conversation may be no conversation
            return None


class _Anchor(NamedTuple):
    """Positions where a message's text begins and ends without the white space around it, and lengths of that space."""

    start: int
    end: int
    space_before: int
    space_behind: int


def _end_of_space(text: str, start: int) -> int:
    """Return the position of the first character from `start` on that is no white space."""
    return next((at for at in range(start, len(text)) if not text[at].isspace()), len(text))


def _shared(one: str, other: str) -> str:
    """Return the characters that two texts both begin with."""
    return one[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))]


def _name_of_tool(tool: Any) -> str:
    """Return the name of a tool from its schema or from a call of it; empty if it has none."""
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else {}
    name = inner.get("name") if isinstance(inner, Mapping) else None
    return name if isinstance(name, str) else ""


def _texts(message: Message) -> list[str]:
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content or ()]


def _middle(text: str) -> int:
    """Position in the middle of a text without the space around it: a text's ends may decide how it is written."""
    return len(text) - len(text.lstrip()) + len(text.strip()) // 2


def _unused(text: str, count: int) -> list[str]:
    """Return `count` private characters that do not occur in a text."""
    seen = set(text)
    return [char for char in map(chr, _PRIVATE) if char not in seen][:count]
