"""Encodes rows of text as token ids: prompt template, labels on the responses alone, truncation. It needs no Lightning.

All rows are encoded when the dataset is opened. This takes seconds for a compact set, since the fast tokenizers use all
cores, and lengths and truncations are known before the first step. Five bytes are held in memory for every token.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dq_lightning.core.config import OnError
from dq_lightning.core.config import Template as TemplateName
from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import ConfigError, SourceError, may_pass
from dq_lightning.sources.prompts import choose_template, columns_of, numbered
from dq_lightning.tokens.chat import ChatTemplate, Segment
from dq_lightning.tokens.tokenizer import load_tokenizer

# Label that the loss of every transformers model ignores.
IGNORED = -100
# One over this is the share of `max_length` that a prompt keeps even if the response is long: without its prompt a
# response would answer nothing.
_PROMPT_SHARE = 4
# Limits of one call of the tokenizer, which holds far more memory for every token than its id.
_ROWS_AT_ONCE, _CHARACTERS_AT_ONCE = 1000, 1 << 20
# Fields of a message that the plain wording of a conversation can write.
_WRITTEN = {"role", "content", "name", "tool_calls", "function_call", "weight"}


@dataclass(frozen=True)
class TokenReport:
    """Statistics of encoding: sizes, and what was cut or left out.

    Attributes:
        rows: number of encoded rows.
        tokens: number of tokens of all rows.
        learned: number of tokens that have a label.
        longest: number of tokens of the longest row.
        prompt_cut: number of rows whose prompt lost its middle.
        response_cut: number of rows that are too long even then: their last response lost its end, and with it the
            end-of-sequence token.
        max_length: maximum number of tokens of a row.
        missed: number of assistant messages that were not found in the output of the chat template; they are not
            learned.
        left_out: number of rows that could not be written, under `on_error="skip"`.
        unwritten: number of rows of which the chat template left out messages, tool calls or tools.
    """

    rows: int
    tokens: int
    learned: int
    longest: int
    prompt_cut: int
    response_cut: int
    max_length: int
    missed: int = 0
    left_out: int = 0
    unwritten: int = 0

    def __str__(self) -> str:
        text = (
            f"{self.rows:,} rows were encoded as {self.tokens:,} tokens, {self.learned:,} of which are learned; the longest "
            f"row has {self.longest:,} tokens"
        )
        if self.prompt_cut or self.response_cut:
            text += (
                f"; {self.prompt_cut:,} prompts lost their middle and {self.response_cut:,} responses their end, because no "
                f"row may be longer than max_length={self.max_length}"
            )
        if self.missed:
            text += f"; {self.missed:,} of the assistant's messages were not found and are not learned"
        if self.unwritten:
            text += f"; the chat template left something out of {self.unwritten:,} rows"
        if self.left_out:
            text += f"; {self.left_out:,} rows were left out"
        return text


class TokenRows(Dataset[dict[str, Tensor]]):
    """Dataset of encoded rows.

    Item i has `input_ids` and `labels`, both int64 [length]; labels are -100 outside the responses.

    Args:
        ids: int32 [T], concatenated token ids of all rows.
        learn: bool [T], whether a token has a label.
        lengths: int64 [N], number of tokens of every row; they add up to T.
        report: statistics of encoding.
        positions: int64 [N], positions of the rows in the data that they were taken from.

    Attributes:
        lengths, report, positions: as they were given.
    """

    def __init__(
        self, ids: NDArray[np.int32], learn: NDArray[np.bool_], lengths: Tensor, report: TokenReport, positions: Tensor
    ) -> None:
        self._ids, self._learn = ids, learn
        self.lengths, self.report, self.positions = lengths, report, positions
        self._offsets = [0, *lengths.cumsum(0).tolist()]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place = range(len(self))[index]
        part = slice(self._offsets[place], self._offsets[place + 1])
        ids = torch.from_numpy(self._ids[part].astype(np.int64))
        return {"input_ids": ids, "labels": ids.where(torch.from_numpy(self._learn[part]), torch.tensor(IGNORED))}


class _Encoded(NamedTuple):
    """Token ids of one row, which of them are learned, and the position in `ids` where the last response begins."""

    ids: list[int]
    learn: list[bool]
    response: int


def encode_rows(
    rows: Any,
    tokenizer: Any,
    *,
    template: TemplateName = "auto",
    columns: Sequence[str] | None = None,
    max_length: int = 512,
    use_chat_template: bool | None = None,
    positions: Sequence[int] | None = None,
    on_error: OnError = "raise",
) -> TokenRows:
    """Encode rows for training.

    A prompt has exactly the ids that it has at inference, and the response follows it. Every row begins with the tokens
    that the tokenizer puts before a text, and ends with the end-of-sequence token, unless the text holds them already.
    A row longer than `max_length` first loses the middle of all that comes before its last response, until a quarter of
    `max_length` is left; only then the response loses its end, of which at least three quarters of `max_length` are
    kept.

    Args:
        rows: map-style dataset of dicts: a list, a Hugging Face dataset, a compact set.
        tokenizer: tokenizer of transformers, or its name or folder.
        template: layout of the columns; `"auto"` decides by the columns of all rows.
        columns: names of the columns to read, if they differ from the usual ones; see `choose_template`.
        max_length: maximum number of tokens of a row, at least 8.
        use_chat_template: True writes all rows with the tokenizer's chat template and learns every assistant message;
            None does so for conversations if the tokenizer has a template. False, or None with a tokenizer without one,
            uses the published wording of `prompts.py`. The template receives all fields of a message, and the row's
            `tools` and `chat_template_kwargs`.
        positions: positions of the rows in the data that they were taken from, for messages; None means 0, 1, 2, ...
        on_error: `"skip"` leaves out rows that cannot be written, logs their number, and counts them in the report;
            `"raise"` raises the error of the first one.

    Returns:
        The encoded rows, in order.

    Raises:
        ConfigError: `max_length` is too small, the tokenizer cannot be used, or `use_chat_template` is True and the
            tokenizer has no chat template.
        SourceError: there are no rows, the columns fit no template, a cell is not text, or the chat template fails; the
            message names the row.
    """
    if max_length < 8:
        raise ConfigError(f"max_length={max_length} is too short for a prompt and a response: pass at least 8")
    writer = RowWriter(rows, load_tokenizer(tokenizer), template, columns, use_chat_template=use_chat_template)
    encoder = _Encoder(writer)
    places, ids, learn = [], [], []
    prompt_cut = response_cut = 0
    for place, row in encoder.encode(writer.written(rows, positions, on_error)):
        cut = truncate(row, max_length)
        response_cut += len(row.ids) - row.response > len(cut.ids) - cut.response
        prompt_cut += row.response > cut.response
        places.append(place)
        ids.append(np.array(cut.ids, dtype=np.int32))
        learn.append(np.array(cut.learn, dtype=np.bool_))
    lengths = torch.tensor([len(row) for row in ids], dtype=torch.int64)
    all_ids, all_learn = np.concatenate([np.empty(0, np.int32), *ids]), np.concatenate([np.empty(0, np.bool_), *learn])
    report = TokenReport(
        rows=len(lengths),
        tokens=len(all_ids),
        learned=int(all_learn.sum()),
        longest=int(lengths.max()),
        prompt_cut=prompt_cut,
        response_cut=response_cut,
        max_length=max_length,
        missed=writer.missed,
        left_out=writer.left_out,
        unwritten=writer.unwritten,
    )
    writer.warn()
    if response_cut:
        get_logger().warning(
            f"{response_cut:,} responses are longer than max_length= allows and lose their end: raise it (in a data module "
            f"config.text.train_length) to keep them whole ({report})"
        )
    return TokenRows(all_ids, all_learn, lengths, report, torch.tensor(places, dtype=torch.int64))


def check_rows(
    rows: Any,
    tokenizer: Any,
    *,
    template: TemplateName = "auto",
    columns: Sequence[str] | None = None,
    use_chat_template: bool | None = None,
    on_error: OnError = "raise",
) -> None:
    """Check that every row can be written as `encode_rows` writes it, without encoding it.

    This is meant to be called before a long computation on the same rows. The arguments are those of `encode_rows`.

    Raises:
        ConfigError: as in `encode_rows`.
        SourceError: as in `encode_rows`; under `on_error="skip"` only if no row can be written.
    """
    writer = RowWriter(rows, load_tokenizer(tokenizer), template, columns, use_chat_template=use_chat_template)
    for _ in writer.written(rows, None, on_error):
        pass  # Writing a row is the check.


def truncate(row: _Encoded, max_length: int) -> _Encoded:
    """Cut a row to `max_length` tokens: first the middle of what precedes the last response, then the response's end.

    A row that is short enough is returned itself.
    """
    if len(row.ids) <= max_length:
        return row
    answer = len(row.ids) - row.response
    kept = max(max_length - answer, min(row.response, max_length // _PROMPT_SHARE))
    first, last = (kept + 1) // 2, row.response - kept // 2
    end = row.response + max_length - kept

    def cut(values: list[Any]) -> list[Any]:
        return values[:first] + values[last:end]

    return _Encoded(cut(row.ids), cut(row.learn), kept)


class RowWriter:
    """Writes rows as text, split into segments that are learned or not learned, and counts what could not be written.

    The columns of `rows` decide how all of them are read. The arguments are those of `encode_rows`.

    Attributes:
        by_chat: whether rows are written with the chat template.
        left_out: number of rows that could not be written, under `on_error="skip"`.
        missed: number of assistant messages that were not found in the output of the chat template.
        unwritten: number of rows of which the chat template left something out.

    Raises:
        ConfigError: `use_chat_template` is True and the tokenizer has no chat template.
        SourceError: there are no rows, or the columns fit no template.
    """

    def __init__(
        self,
        rows: Any,
        tokenizer: Any,
        template: TemplateName,
        columns: Sequence[str] | None,
        *,
        use_chat_template: bool | None,
    ) -> None:
        writes = getattr(tokenizer, "chat_template", None) is not None
        if use_chat_template and not writes:
            raise ConfigError(
                "use_chat_template=True, but the tokenizer has no chat template to write rows with: set "
                "tokenizer.chat_template, or leave use_chat_template out"
            )
        if len(rows) and not isinstance(rows[0], Mapping):
            raise SourceError(
                f"the rows are no dicts of fields, but the first is a {type(rows[0]).__name__}: pass rows such as "
                '{"text": ...} or {"instruction": ..., "output": ...}; a Hugging Face dataset gives them without a format '
                "(dataset.with_format(None))"
            )
        self.tokenizer, self.template = tokenizer, choose_template(columns_of(rows), template, columns)
        self.by_chat = writes and (self.template.name == "chat" if use_chat_template is None else use_chat_template)
        self._chat = ChatTemplate(tokenizer) if self.by_chat else None
        self.left_out = self.missed = self._rows_missed = self.unwritten = 0
        # Number of rows in which the chat template wrote nothing of the messages of a role, or of tools.
        self._left_out_by_chat: dict[str, int] = {}
        self._first_problem = ""
        # Names of the message fields that only a chat template could write, in order of appearance.
        self._unwritten: dict[str, None] = {}

    def written(
        self, rows: Any, positions: Sequence[int] | None, on_error: OnError
    ) -> Iterator[tuple[int, list[Segment]]]:
        """Yield every row that can be written, as its position in the data and its segments.

        `"skip"` counts rows that cannot be written in `left_out`; `"raise"` raises the error of the first one.

        Raises:
            SourceError: a row cannot be written under `on_error="raise"` or for a temporary reason, or no row can be
                written.
        """
        problem = None
        for place, row in numbered(rows):
            index = place if positions is None else int(positions[place])
            try:
                segments = self._segments(row, index)
            except SourceError as error:
                if on_error == "raise" or may_pass(error):
                    raise
                problem = problem or error
                self._first_problem = self._first_problem or str(error)
                self.left_out += 1
                continue
            yield index, segments
        if problem is not None and self.left_out == len(rows):
            raise SourceError(
                f"none of the {len(rows)} rows can be written as text, so there is nothing to train on. Repair the rows, or "
                f"name their layout with template= and columns= (in a data module config.text). The first error is: {problem}"
            ) from problem

    def warn(self) -> None:
        """Log one warning each for rows left out, assistant messages not found, and message fields not written."""
        log = get_logger()
        if self.left_out:
            log.warning(
                f'{self.left_out:,} rows can\'t be written as text and are left out (on_error="skip"). The first error is: '
                f"{self._first_problem}"
            )
        if self.missed:
            log.warning(
                f"{self.missed:,} of the assistant's messages, in {self._rows_missed:,} rows, could not be found in what the "
                "tokenizer's chat template writes, so nothing is learned from them: use a chat template with {% generation %} "
                "marks, which show where they are"
            )
        if self._left_out_by_chat:
            told = ", ".join(f"{name!r} in {count:,} rows" for name, count in self._left_out_by_chat.items())
            log.warning(
                f"the tokenizer's chat template does not write all that the rows hold: {told} (roles of messages, or calls and "
                "schemas of tools), so the model does not see it. Rename the roles to those that the template knows, put the "
                "text elsewhere, or set tokenizer.chat_template to one that writes it"
            )
        if self._unwritten:
            names = ", ".join(map(repr, self._unwritten))
            log.warning(
                f"the messages hold {names}, which only a chat template could write. They are left out, because the tokenizer "
                "has no chat template or use_chat_template=False: set tokenizer.chat_template to keep them"
            )

    def _segments(self, row: Any, index: int) -> list[Segment]:
        if not isinstance(row, Mapping):
            raise SourceError(
                f"row {index} must be a dict of fields, but it is a {type(row).__name__}: leave the row out"
            )
        options = self.template.chat_options(row, index)
        if self._chat is not None:
            found = self._chat.conversation(self.template.messages(row, index), options, index)
            self.missed += found.missed
            self._rows_missed += found.missed > 0
            self.unwritten += bool(found.unwritten)
            for name in found.unwritten:
                self._left_out_by_chat[name] = self._left_out_by_chat.get(name, 0) + 1
            return found.segments
        if "tools" in options:
            raise SourceError(
                f"row {index}, column 'tools': only a chat template can write the tools that a conversation may use, and the "
                "tokenizer has no chat template or use_chat_template=False: set tokenizer.chat_template, or remove the column"
            )
        if self.template.name == "chat":
            for message in self.template.messages(row, index):
                self._unwritten |= dict.fromkeys(message.keys() - _WRITTEN)
        prompt, response = self.template.prompt_and_response(row, index)
        return [Segment(prompt, False), Segment(response, True)]


class _Encoder:
    """Converts written rows to token ids, with many rows in one call of the tokenizer."""

    def __init__(self, writer: RowWriter) -> None:
        self.tokenizer = writer.tokenizer
        # The output of a chat template holds the tokens that begin a text already.
        self.leading = [] if writer.by_chat else _leading_tokens(writer.tokenizer)

    def encode(self, rows: Iterable[tuple[int, list[Segment]]]) -> Iterator[tuple[int, _Encoded]]:
        """Yield the position and the ids of every row.

        One call of the tokenizer gets a bounded number of characters and of rows, but always at least one row.
        """
        waiting: list[tuple[int, list[Segment]]] = []
        characters = 0
        for place, segments in rows:
            waiting.append((place, segments))
            characters += sum(len(segment.text) for segment in segments)
            if characters >= _CHARACTERS_AT_ONCE or len(waiting) >= _ROWS_AT_ONCE:
                yield from self._encode(waiting)
                waiting, characters = [], 0
        yield from self._encode(waiting)

    def _encode(self, rows: list[tuple[int, list[Segment]]]) -> Iterator[tuple[int, _Encoded]]:
        """Encode each segment alone and together with the one before it: in all three times the length of the text."""
        texts: list[str] = []
        for _, segments in rows:
            alone = [segment.text for segment in segments]
            texts += alone + [before + text for before, text in pairwise(alone)]
        ids = iter(self._ids(texts))
        for place, segments in rows:
            alone_ids = [next(ids) for _ in segments]
            yield place, self._join(segments, alone_ids, [[], *(next(ids) for _ in segments[1:])])

    def _join(self, segments: list[Segment], alone: list[list[int]], behind: list[list[int]]) -> _Encoded:
        """Join the ids of the segments of a row; no token spans the boundary between two segments.

        `alone` holds the ids of every segment encoded alone, and `behind` those together with the segment before it.
        """
        ids: list[int] = []
        learn: list[bool] = []
        response = 0
        for number, (_, learned) in enumerate(segments):
            before = alone[number - 1] if number else []
            goes_on = number > 0 and behind[number][: len(before)] == before
            added = behind[number][len(before) :] if goes_on else alone[number]
            response = len(ids) if learned else response
            ids, learn = ids + added, learn + [learned] * len(added)
        end = self.tokenizer.eos_token_id
        if not (end in ids[response:] and segments[-1].text.rstrip().endswith(str(self.tokenizer.eos_token))):
            ids, learn = [*ids, end], [*learn, True]
        leading = [] if self._begins(segments, ids) else self.leading
        return _Encoded(leading + ids, [False] * len(leading) + learn, len(leading) + response)

    def _begins(self, segments: list[Segment], ids: list[int]) -> bool:
        """Whether the text itself holds the tokens that begin a text."""
        if ids[: len(self.leading)] == self.leading:
            return True
        begin, written = self.tokenizer.bos_token_id, str(self.tokenizer.bos_token)
        text = "".join(segment.text for segment in segments).lstrip()
        return self.leading == [begin] and begin in ids and text.startswith(written)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]


def _leading_tokens(tokenizer: Any) -> list[int]:
    """Return the ids of the special tokens that the tokenizer puts before a text."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    with_special = list(tokenizer("a")["input_ids"])
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []
