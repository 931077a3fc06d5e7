"""Texts to batches of tokens, the longest first, so that little is padded."""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dq_lightning.core.errors import FeatureError
from dq_lightning.core.workers import torch_threads
from dq_lightning.features.encoders import TextEncoder
from dq_lightning.features.loading import stretches

logger = logging.getLogger("dq_lightning")
# so many batches are sorted by length together: memory stays bounded, and the padding is that of a full sort within 2 %
BATCHES_PER_WINDOW = 64
TOKENS_PER_BATCH = 131_072
"""Upper bound on rows times longest row: long rows go fewer at a time."""
PADDING = -1


class TextSource(Protocol):
    """What the loader needs of a dataset."""

    def __len__(self) -> int: ...

    def texts(self, positions: Sequence[int], /) -> list[str]:
        """Texts of some samples."""
        ...


class TextBatch(NamedTuple):
    """Samples of about the same length.

    Attributes:
        positions: int64 [B], where they are in the source.
        tokens: int64 [B, T], their token ids; -1 behind the end.
    """

    positions: Tensor
    tokens: Tensor


def iterate_text_batches(
    source: TextSource, encoder: TextEncoder, batch_size: int, positions: Tensor
) -> Iterator[TextBatch]:
    """Batches of some samples, the longest of each window first; the next window is tokenized meanwhile, in a thread.

    Windows are stretches of the whole source, so what has been done before changes no batch of the rest.

    Args:
        source: gives the texts.
        encoder: splits them into tokens.
        batch_size: samples a batch at most.
        positions: int64 [n], ascending.
    """
    size = batch_size * BATCHES_PER_WINDOW
    windows = stretches(positions, size)
    full = 0

    def tokenized(window: Tensor) -> list[list[int]]:
        first, last = int(window[0]), int(window[-1])
        # a source may read consecutive texts at once
        whole = last - first + 1 == len(window)
        return encoder.tokenize(read_texts(source, range(first, last + 1) if whole else window.tolist()))

    with torch_threads(1, "tokenize") as pool:
        ahead = deque(pool.submit(tokenized, window) for window in windows[:1])
        for number, window in enumerate(windows, start=1):
            tokens = ahead.popleft().result()
            ahead.extend(pool.submit(tokenized, following) for following in windows[number : number + 1])
            full += sum(len(row) >= encoder.max_length for row in tokens)
            for places in batches_by_length([len(row) for row in tokens], batch_size):
                yield TextBatch(window[torch.from_numpy(places)], pad([tokens[place] for place in places]))
    if full:
        logger.info(
            "features: %d of %d texts fill the %d tokens that the encoder reads",
            full,
            len(positions),
            encoder.max_length,
        )


def read_texts(source: TextSource, positions: Sequence[int]) -> list[str]:
    """Texts of some samples, all of which have bytes; the sources of this package tell of others with row and column.

    Raises:
        FeatureError: a text holds half of a character (a lone surrogate).
    """
    texts = source.texts(positions)
    for position, text in zip(positions, texts, strict=True):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise FeatureError(
                f"the text of sample {position} holds half of a character ({error}); repair it or leave it out"
            ) from error
    return texts


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Positions in batches, the longest first, equal lengths in their order; `TOKENS_PER_BATCH` bounds each batch."""
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches, first = [], 0
    while first < len(order):
        count = min(batch_size, max(1, TOKENS_PER_BATCH // max(1, lengths[order[first]])))
        batches.append(order[first : first + count])
        first += count
    return batches


def pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of token ids as int64 [B, T], -1 behind the end of each."""
    lengths = np.array([len(row) for row in rows])
    padded = np.full((len(rows), lengths.max()), PADDING, dtype=np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.concatenate([np.asarray(row, np.int64) for row in rows])
    return torch.from_numpy(padded)
