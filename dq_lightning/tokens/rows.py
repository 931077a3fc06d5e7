"""Rows of text to token ids: prompt template, labels over the responses alone, truncation. No Lightning here.

All rows are encoded when they are opened: a compact set takes seconds, the fast tokenizers use all cores, and lengths and
truncations are known before the first step. Five bytes are held for every token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dq_lightning.config import Template as TemplateName
from dq_lightning.errors import ConfigError
from dq_lightning.logs import get_logger
from dq_lightning.prompts import Message, Template, choose_template
from dq_lightning.tokens.tokenizer import load_tokenizer

# what the loss of every transformers model leaves out
IGNORED = -100
# the share of max_length that a prompt keeps however long the response is: without it nothing would say what is answered
_PROMPT_SHARE = 4
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class TokenReport:
    """What encoding did to the rows.

    Attributes:
        rows: encoded.
        tokens: of all rows.
        learned: tokens that have a label.
        longest: tokens of the longest row.
        prompt_cut: rows whose prompt lost its middle.
        response_cut: rows that do not fit even so: their last response lost its end, and the end-of-sequence token with it.
        max_length: the limit.
    """

    rows: int
    tokens: int
    learned: int
    longest: int
    prompt_cut: int
    response_cut: int
    max_length: int

    def __str__(self) -> str:
        text = f"{self.rows:,} rows, {self.tokens:,} tokens, {self.learned:,} of them learned; longest row {self.longest:,}"
        if self.prompt_cut or self.response_cut:
            text += (
                f"; cut to max_length={self.max_length}: {self.prompt_cut:,} prompts in the middle, "
                f"{self.response_cut:,} responses at the end"
            )
        return text


class TokenRows(Dataset[dict[str, Tensor]]):
    """Encoded rows: item i has `input_ids` and `labels`, both int64 [length]; labels are -100 outside the responses.

    Attributes:
        lengths: int64 [N], tokens of every row.
        report: what encoding did.
    """

    def __init__(self, ids: NDArray[np.int32], learn: NDArray[np.bool_], lengths: Tensor, report: TokenReport) -> None:
        self._ids, self._learn = ids, learn
        self.lengths, self.report = lengths, report
        self._offsets = [0, *lengths.cumsum(0).tolist()]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place = range(len(self))[index]
        part = slice(self._offsets[place], self._offsets[place + 1])
        ids = torch.from_numpy(self._ids[part].astype(np.int64))
        return {"input_ids": ids, "labels": ids.where(torch.from_numpy(self._learn[part]), torch.tensor(IGNORED))}


class Segment(NamedTuple):
    """A stretch of a row's text, and whether the model learns to write it."""

    text: str
    learn: bool


class _Encoded(NamedTuple):
    """Token ids of one row, which of them are learned, and where the last response begins."""

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
) -> TokenRows:
    """Encode rows for training.

    A prompt has exactly the ids that it has at inference; the response goes on from there. The end-of-sequence token follows
    every row's last response. A row longer than `max_length` first loses the middle of all that comes before its last
    response, down to a quarter of `max_length`; only then the end of the response, of which three quarters always stay.

    Args:
        rows: map-style, of dicts: a list, a Hugging Face dataset, a compact set.
        tokenizer: of transformers, or its name or folder.
        template: which columns hold what; by the columns when `"auto"`.
        columns: the columns to read, where they have other names; see `choose_template`.
        max_length: tokens of a row at most.
        use_chat_template: write rows by the tokenizer's chat template, and learn every assistant message; None does so for
            conversations when there is one. False, or a tokenizer without one, uses the published wording of `prompts.py`.

    Raises:
        ConfigError: max_length is too small, the tokenizer does not fit, or its chat template cannot be followed.
        SourceError: there are no rows, the columns fit no template, or a cell is no text; names the row.
    """
    if max_length < 8:
        raise ConfigError(f"max_length={max_length} leaves no room for a prompt and a response; pass at least 8")
    tokenizer = load_tokenizer(tokenizer)
    reading = choose_template(_columns(rows), template, columns)
    writes = getattr(tokenizer, "chat_template", None) is not None
    if use_chat_template and not writes:
        raise ConfigError("use_chat_template=True, but the tokenizer has no chat template; set tokenizer.chat_template")
    by_chat = writes and (reading.name == "chat" if use_chat_template is None else use_chat_template)
    encoder = _Encoder(tokenizer, reading, by_chat)
    ids: list[NDArray[np.int32]] = []
    learn: list[NDArray[np.bool_]] = []
    prompt_cut = response_cut = 0
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        for row in encoder.encode(rows, start, min(start + _ROWS_AT_ONCE, len(rows))):
            cut = truncate(row, max_length)
            response_cut += len(row.ids) - row.response > len(cut.ids) - cut.response
            prompt_cut += row.response > cut.response
            ids.append(np.array(cut.ids, dtype=np.int32))
            learn.append(np.array(cut.learn, dtype=np.bool_))
    lengths = torch.tensor([len(row) for row in ids], dtype=torch.int64)
    all_ids, all_learn = np.concatenate([np.empty(0, np.int32), *ids]), np.concatenate([np.empty(0, np.bool_), *learn])
    longest = int(lengths.max()) if len(lengths) else 0
    report = TokenReport(
        len(lengths), len(all_ids), int(all_learn.sum()), longest, prompt_cut, response_cut, max_length
    )
    if response_cut:
        get_logger().warning(f"{report}; raise max_length= to keep them whole")
    return TokenRows(all_ids, all_learn, lengths, report)


def truncate(row: _Encoded, max_length: int) -> _Encoded:
    """Cut a row to `max_length`: the middle of what precedes the last response first, then the end of the response."""
    if len(row.ids) <= max_length:
        return row
    answer = len(row.ids) - row.response
    kept = max(max_length - answer, min(row.response, max_length // _PROMPT_SHARE))
    first, last = (kept + 1) // 2, row.response - kept // 2
    end = row.response + max_length - kept

    def cut(values: list[Any]) -> list[Any]:
        return values[:first] + values[last:end]

    return _Encoded(cut(row.ids), cut(row.learn), kept)


class _Encoder:
    """Rows to token ids, many in one call of the tokenizer."""

    def __init__(self, tokenizer: Any, template: Template, by_chat: bool) -> None:
        self.tokenizer, self.template, self.by_chat = tokenizer, template, by_chat
        # chat templates print the tokens that begin a text themselves
        self.leading = [] if by_chat else _leading_tokens(tokenizer)

    def encode(self, rows: Any, start: int, stop: int) -> Iterator[_Encoded]:
        parts = [self._segments(rows[i], i) for i in range(start, stop)]
        grown = [["".join(s.text for s in row[: n + 1]) for n in range(len(row))] for row in parts]
        flat = iter(self._ids([text for texts in grown for text in texts]))
        for row, texts in zip(parts, grown, strict=True):
            yield self._join(row, [next(flat) for _ in texts])

    def _segments(self, row: Any, index: int) -> list[Segment]:
        if self.by_chat:
            return chat_segments(self.tokenizer, self.template.messages(row, index), index)
        prompt, response = self.template.prompt_and_response(row, index)
        return [Segment(prompt, False), Segment(response, True)]

    def _join(self, row: list[Segment], grown: Sequence[list[int]]) -> _Encoded:
        """Ids of a row from those of its growing beginnings; a token never spans the end of a prompt."""
        ids: list[int] = []
        learn: list[bool] = []
        response, whole = 0, True
        for (text, learned), upto in zip(row, grown, strict=True):
            whole = whole and upto[: len(ids)] == ids
            added = upto[len(ids) :] if whole else self._ids([text])[0]
            response = len(ids) if learned else response
            ids, learn = ids + added, learn + [learned] * len(added)
        end = self.tokenizer.eos_token_id
        if not (self.by_chat and end in ids[response:]):
            ids, learn = [*ids, end], [*learn, True]
        return _Encoded(self.leading + ids, [False] * len(self.leading) + learn, len(self.leading) + response)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]


def chat_segments(tokenizer: Any, messages: Sequence[Message], index: int) -> list[Segment]:
    """A conversation as the tokenizer's chat template writes it, the assistant's messages marked to be learned.

    Raises:
        ConfigError: the template fails, or does not continue what it wrote for the beginning of the conversation.
    """

    def written(count: int, *, asks: bool) -> str:
        if count == 0:
            return ""
        try:
            return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=asks))
        except Exception as error:  # templates are programs of the model's author and raise what they like
            raise ConfigError(
                f"row {index}: the tokenizer's chat template fails ({type(error).__name__}: {error}); repair the row, or pass "
                "use_chat_template=False"
            ) from error

    whole, segments, done = written(len(messages), asks=False), [], 0
    for place in [n for n, message in enumerate(messages) if message["role"] == "assistant"]:
        before, after = written(place, asks=True), written(place + 1, asks=False)
        follows = whole.startswith(before) and whole.startswith(after) and done <= len(before) <= len(after)
        if follows:
            segments += [Segment(whole[done : len(before)], False), Segment(whole[len(before) : len(after)], True)]
            done = len(after)
        elif place == len(messages) - 1:
            raise ConfigError(
                f"row {index}: the tokenizer's chat template does not write a conversation as a continuation of its beginning, "
                "so responses cannot be found in it; pass use_chat_template=False"
            )
    return segments


def _leading_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    dressed = list(tokenizer("a")["input_ids"])
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return dressed[:start]
    return []


def _columns(rows: Any) -> list[str]:
    names = getattr(rows, "column_names", None)
    if names is not None:
        return list(names)
    if len(rows) == 0:
        return []
    first = rows[0]
    return list(first) if hasattr(first, "keys") else []
