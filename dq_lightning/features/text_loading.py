"""Turn texts into batches of token ids, sorted by length so that little padding is needed."""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dq_lightning.core.errors import FeatureError
from dq_lightning.core.workers import torch_threads
from dq_lightning.features.encoders import TextEncoder
from dq_lightning.features.loading import split_at_multiples
from dq_lightning.features.samples import SampleSource

logger = logging.getLogger("dq_lightning")
# The texts of this many batches (one window) are sorted by length together. This bounds the memory, and the padding is
# within 2 % of that of sorting all texts.
BATCHES_PER_WINDOW = 64
TOKENS_PER_BATCH = 131_072
"""Upper bound on rows times longest row: long rows go fewer at a time."""
PADDING = -1
# A window is cut into so many pieces, which other processes may do.
PIECES_PER_WINDOW = 8


class TextBatch(NamedTuple):
    """Token ids, int64 [B, T], of samples of about the same length, padded with -1 after the end of each text.

    The positions of the samples in the source are int64 [B].
    """

    positions: Tensor
    tokens: Tensor


def num_pieces(positions: Tensor, batch_size: int) -> int:
    """Return the number of pieces of the samples at `positions`, see `iterate_text_batches`."""
    return PIECES_PER_WINDOW * len(split_at_multiples(positions, batch_size * BATCHES_PER_WINDOW))


def iterate_text_batches(
    source: SampleSource, encoder: TextEncoder, batch_size: int, positions: Tensor, numbers: Iterator[int]
) -> Iterator[TextBatch]:
    """Yield batches of the samples at `positions` (int64, ascending), the longest texts of each window first.

    Meanwhile a thread tokenizes the next window. Windows are sections of consecutive samples of the whole source, so
    batches that an earlier run has finished do not change the other batches. A piece is a section of the batches of a
    window; the pieces with the given numbers are done.
    """
    windows = split_at_multiples(positions, batch_size * BATCHES_PER_WINDOW)
    full = seen = 0

    def tokenized(number: int) -> list[list[int]]:
        return encoder.tokenize(read_texts(source, windows[number]))

    with torch_threads(1, "tokenize") as pool:
        ahead: dict[int, Future[list[list[int]]]] = {}
        current = -1
        for piece in numbers:
            number, part = divmod(piece, PIECES_PER_WINDOW)
            if number != current:
                current, window = number, windows[number]
                # The window after this one is most likely the next.
                for wanted in range(number, min(number + 2, len(windows))):
                    if wanted not in ahead:
                        ahead[wanted] = pool.submit(tokenized, wanted)
                tokens = ahead.pop(number).result()
                batches = batches_by_length([len(row) for row in tokens], batch_size)
            start, stop = (len(batches) * one // PIECES_PER_WINDOW for one in (part, part + 1))
            for places in batches[start:stop]:
                rows = [tokens[place] for place in places]
                full += sum(len(row) >= encoder.max_length for row in rows)
                seen += len(rows)
                yield TextBatch(window[torch.from_numpy(places)], pad(rows))
        for future in ahead.values():
            future.cancel()
    _tell_cut(full, seen, encoder)


def batches_of_windows(
    windows: Iterator[tuple[Tensor, Callable[[], list[str]]]], encoder: TextEncoder, batch_size: int
) -> Iterator[TextBatch]:
    """Yield batches of the texts of windows, each its positions and a function that reads its texts.

    The windows are taken by the calling thread, one ahead; their texts are read and tokenized by another.
    """
    full = total = 0

    def tokenized(read: Callable[[], list[str]]) -> list[list[int]]:
        return encoder.tokenize(read())

    with torch_threads(1, "tokenize") as pool:
        ahead = deque((window, pool.submit(tokenized, read)) for window, read in itertools.islice(windows, 1))
        while ahead:
            window, future = ahead.popleft()
            tokens = future.result()
            ahead.extend((after, pool.submit(tokenized, read)) for after, read in itertools.islice(windows, 1))
            total += len(window)
            full += sum(len(row) >= encoder.max_length for row in tokens)
            for places in batches_by_length([len(row) for row in tokens], batch_size):
                yield TextBatch(window[torch.from_numpy(places)], pad([tokens[place] for place in places]))
    _tell_cut(full, total, encoder)


def _tell_cut(full: int, count: int, encoder: TextEncoder) -> None:
    """Log how many texts, out of `count`, have as many tokens as the encoder reads."""
    if full:
        logger.info(
            "features: %d of %d texts have as many tokens as the encoder reads (%d) or more; what goes beyond is not used",
            full,
            count,
            encoder.max_length,
        )


def read_texts(source: SampleSource, positions: Tensor) -> list[str]:
    """Read the texts of the samples at `positions`, int64 ascending, and check that they can be encoded as UTF-8.

    The sources of this package check this themselves and name the row and the column in their error.

    Raises:
        FeatureError: a text holds half of a character (a lone surrogate).
    """
    places = positions.tolist()
    texts = source.texts(places)
    for position, text in zip(places, texts, strict=True):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise FeatureError(
                f"the text of sample {position} holds half of a character ({error}); repair it or leave it out"
            ) from error
    return texts


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Split texts by their numbers of tokens into batches of at most `batch_size`, the longest first, as int64 indices.

    `TOKENS_PER_BATCH` bounds a batch, too. Texts of equal length keep their order.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches, first = [], 0
    while first < len(order):
        count = min(batch_size, max(1, TOKENS_PER_BATCH // max(1, lengths[order[first]])))
        batches.append(order[first : first + count])
        first += count
    return batches


def pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return rows of token ids as one tensor int64 [B, T], padded with -1 after the end of each row.

    >>> pad([[5, 6], [7]]).tolist()
    [[5, 6], [7, -1]]
    """
    lengths = np.array([len(row) for row in rows])
    padded = np.full((len(rows), lengths.max()), PADDING, dtype=np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.concatenate([np.asarray(row, np.int64) for row in rows])
    return torch.from_numpy(padded)
