"""Features of a stream, made in its first pass, whose length is known when it ends.

The rows go to a file that is mapped into memory, so that the memory of the process does not grow with the stream.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dq_lightning.core.config import Precision
from dq_lightning.core.console import progress_bar
from dq_lightning.core.devices import DeviceNames, resolve_devices
from dq_lightning.core.errors import ChangedError
from dq_lightning.core.isolation import isolated, release_memory
from dq_lightning.core.replicas import run_in_order
from dq_lightning.core.resuming import Shards
from dq_lightning.core.sharing import Arrays, Job, Sharing, in_order
from dq_lightning.features.collect import BATCHES_PER_COPY, Rows, check_finite
from dq_lightning.features.encoders import Encoder, RowEncoder, TextEncoder
from dq_lightning.features.extract import LOOK_AT_SAMPLES, ImageRows, TextRows, warn_of_decoding
from dq_lightning.features.loading import ImageBatch, ImageBatches, batch_of
from dq_lightning.features.origins import EncoderSpec
from dq_lightning.features.sample_function import RawSamples, SampleEncoder
from dq_lightning.features.samples import OrderedSource
from dq_lightning.features.text_loading import BATCHES_PER_WINDOW, batches_of_windows, read_texts

logger = logging.getLogger("dq_lightning")

FIRST_ROWS = 4096
# Images of so many pixels are read before they are preprocessed.
PIXELS_AT_ONCE = 1 << 16
# A process may make so many batches for each process before those that come earlier are there.
AHEAD = 4


def extract_stream(
    source: OrderedSource,
    spec: EncoderSpec,
    folder: Path,
    *,
    device: DeviceNames = "auto",
    precision: Precision = "auto",
    batch_size: int = 256,
    progress: bool = True,
    shards: Shards | None = None,
    check_space: Callable[[int], object] = id,
    sharing: Sharing | None = None,
) -> Tensor | None:
    """Run every sample of a stream through an encoder in one pass.

    The batches are those of `extract_features`, and so are the features.

    Args:
        source: the stream.
        spec: encoder chosen by `choose_encoder`.
        folder: folder of the file that the features are written to. The file has no name there and is gone when
            the features are.
        device: as in `extract_features`.
        precision: as in `extract_features`.
        batch_size: number of samples in one batch.
        progress: whether to show a progress bar.
        shards: store for finished rows; a killed run goes on where they end, if the stream still begins with the same
            samples.
        check_space: function that is called before the file grows by so many bytes, and raises an error if the disk has
            too little space.
        sharing: how batches are shared with other processes, which call `extract_stream_pieces`. Each reads the whole stream,
            and only decodes and encodes the batches that it takes. Those of texts are not shared.

    Returns:
        Embeddings, float32 [N, D] on the CPU, mapped from the file; None for an encoder that reads the samples itself,
        such as an API, which has to know their number.

    Raises:
        FeatureError: the encoder cannot be loaded, or a feature is not finite.
        SourceError: a sample cannot be read.
        ChangedError: another process read other samples.
    """
    devices, kept = resolve_devices(device), shards or Shards()
    try:
        with isolated():
            encoder = spec.load(str(devices[0]), precision)
            if isinstance(encoder, RowEncoder):
                return None
            rows = _GrowingRows(folder, check_space)
            start = _restored(source, rows, kept)
            check: Callable[[], object] = list
            if isinstance(encoder, TextEncoder):
                made = _text_rows(encoder, source, batch_size, devices, start)
            else:
                batches = _Batches(encoder, source, batch_size, devices, start)
                others = _Others(batches)
                job = Job("features", {"start": start}, {}, None, batches.count, ahead=AHEAD)
                made = in_order((sharing or Sharing()).share(job, batches.rows, others.unpacked, lambda _: 1))
                check = others.check
            with progress_bar(progress, total=None, unit="sample", description="features") as bar:
                bar.update(start)
                count = _collect(made, rows, kept, source, start, bar.update, check)
            del encoder, made
    finally:
        release_memory()
    return rows.finished(count)


def _restored(source: OrderedSource, rows: "_GrowingRows", shards: Shards) -> int:
    """Fill in the rows of an earlier run, if the stream begins with its samples, and return their number."""
    done = 0
    for piece in shards.restore(None):
        embedding, digests = piece["embedding"], piece["digests"]
        stop = done + len(embedding)
        if not source.has(stop - 1) or not np.array_equal(source.digests(done, stop), digests):
            logger.warning(
                "the stream has other samples than before from somewhere between %s and %s on, so the features from there "
                "on are made again",
                f"{done:,}",
                f"{stop:,}",
            )
            break
        rows.put(torch.arange(done, stop), torch.from_numpy(embedding))
        done = stop
    return done


def _collect(
    made: Iterator[Rows],
    rows: "_GrowingRows",
    shards: Shards,
    source: OrderedSource,
    start: int,
    update: Callable[[int], object],
    check: Callable[[], object],
) -> int:
    """Put the rows that an encoder makes at their places, and return the number of all rows.

    `check` compares the samples that were read here with what other processes have read.
    """
    count = saved = start
    waiting: list[Rows] = []
    not_finite: list[Tensor] = []
    end = start  # Behind the last position that was put.

    def put() -> None:
        nonlocal end
        # Batches come from several devices, and every copy waits for its device.
        for one in waiting:
            block = one.embedding.to("cpu", torch.float32)
            not_finite.append(one.positions[~block.isfinite().all(dim=1)])
            rows.put(one.positions, block)
            end = max(end, int(one.positions.max()) + 1)
        waiting.clear()

    for one in made:
        waiting.append(one)
        count += len(one.positions)
        update(len(one.positions))
        due = shards.is_due()
        if due or len(waiting) == BATCHES_PER_COPY:
            put()
        # Texts come in windows that are sorted by length, so only a whole window has no gaps.
        if due and end == count and not any(map(len, not_finite)):
            if len(source.digests(saved, count)) < count - saved:
                source.has(count - 1)  # Another process has read further than this one.
            check()
            arrays: dict[str, NDArray[Any]] = {
                "embedding": rows.copy(saved, count),
                "digests": source.digests(saved, count),
            }
            shards.keep(count - saved, arrays)
            saved = count
    put()
    check()
    check_finite(not_finite, count, LOOK_AT_SAMPLES)
    return count


@contextmanager
def extract_stream_pieces(
    source: OrderedSource,
    spec: EncoderSpec,
    job: Job,
    numbers: Iterator[int],
    *,
    device: DeviceNames,
    precision: Precision,
    batch_size: int,
) -> Iterator[Iterator[Arrays]]:
    """Give the rows of some batches of a process that runs `extract_stream` with the same arguments, in a `with` block."""
    devices = resolve_devices(device)
    try:
        with isolated():
            encoder = spec.load(str(devices[0]), precision)
            assert not isinstance(encoder, RowEncoder | TextEncoder)
            batches = _Batches(encoder, source, batch_size, devices, job.facts["start"])
            yield map(batches.packed, batches.rows(numbers))
            del encoder, batches
    finally:
        release_memory()


class _Batches:
    """The samples of a stream from position `start` on, in batches that begin at multiples of their size.

    Batch 0 is the one that `start` lies in.
    """

    def __init__(
        self,
        encoder: Encoder | SampleEncoder,
        source: OrderedSource,
        size: int,
        devices: list[torch.device],
        start: int,
    ) -> None:
        self.source, self.start, self._size = source, start, size
        images: Any = source
        if isinstance(encoder, SampleEncoder):
            images, devices = RawSamples(source), devices[:1]
        self._read = ImageBatches(images, encoder.preprocess, [])
        encoders = [encoder, *(encoder.replica(device) for device in devices[1:])]
        self._replicas = [
            (on, partial(_numbered, ImageRows(one, None))) for on, one in zip(devices, encoders, strict=True)
        ]

    def first(self, number: int) -> int:
        """The position of the first sample of a batch."""
        return max(self.start, (self.start // self._size + number) * self._size)

    def count(self) -> int:
        """The number of batches, once the stream was read to its end."""
        rest = len(self.source) - self.start
        return -(-len(self.source) // self._size) - self.start // self._size if rest > 0 else 0

    def rows(self, numbers: Iterator[int]) -> Iterator[tuple[int, Rows]]:
        """Yield the rows of the numbered batches, each after its number, up to the first number behind the end."""
        warnings: list[tuple[int, str]] = []
        count = 0
        for number, (rows, told) in run_in_order(self._replicas, self._batches(numbers)):
            warnings += told
            count += len(rows.positions)
            yield number, rows
        warn_of_decoding(warnings, count)

    def _batches(self, numbers: Iterator[int]) -> Iterator[tuple[int, tuple[Tensor, ImageBatch]]]:
        for number in numbers:
            first = self.first(number)
            members = _prepared(self.source, self._read, first, self.first(number + 1) - first)
            if not members:
                return
            indices = list(range(first, first + len(members)))
            yield number, (torch.tensor(indices), batch_of(members, indices))

    def packed(self, numbered: tuple[int, Rows]) -> Arrays:
        """The arrays of a numbered batch, and the digests of its samples as this process has read them."""
        number, rows = numbered
        first, count = self.first(number), len(rows.positions)
        embedding = rows.embedding.to("cpu", torch.float32).numpy()
        digests = self.source.digests(first, first + count)
        return {"piece": np.array(number), "embedding": embedding, "digests": digests}


def _numbered(
    rows_of: ImageRows, numbered: tuple[int, tuple[Tensor, ImageBatch]]
) -> tuple[int, tuple[Rows, list[tuple[int, str]]]]:
    return numbered[0], rows_of(numbered[1])


class _Others:
    """Batches that other processes have made, of samples that this one has to find as well.

    Args:
        batches: the batches of this process.
    """

    def __init__(self, batches: _Batches) -> None:
        self._batches = batches
        self._unchecked: list[tuple[int, NDArray[Any]]] = []

    def unpacked(self, arrays: Arrays) -> tuple[int, Rows]:
        """A numbered batch, of what `_Batches.packed` made arrays of."""
        number = int(arrays["piece"])
        first = self._batches.first(number)
        self._unchecked.append((first, arrays["digests"]))
        positions = torch.arange(first, first + len(arrays["embedding"]))
        return number, Rows(positions, torch.from_numpy(arrays["embedding"]))

    def check(self) -> None:
        """Compare the samples with those that this process has read so far.

        Raises:
            ChangedError: they are other ones.
        """
        kept = []
        for first, digests in self._unchecked:
            own = self._batches.source.digests(first, first + len(digests))
            if len(own) < len(digests):
                kept.append((first, digests))
            elif not np.array_equal(own, digests):
                raise ChangedError(
                    f"another rank has read other samples of the stream, from position {first:,} on. Every rank must read the "
                    'same data in the same order: leave out what gives each rank a part of them, or pass distributed="off"'
                )
        self._unchecked = kept


def _prepared(source: OrderedSource, batches: ImageBatches, first: int, size: int) -> list[tuple[Tensor, str | None]]:
    """The preprocessed samples from `first` on, at most `size` of them, each with a warning or None.

    Small images are read a few at a time before these are preprocessed: a loop over few steps finds its code and data in
    the processor's caches, which saves a twentieth of the time of tiny images.
    """
    found: list[tuple[Tensor, str | None]] = []
    while len(found) < size:
        some: list[tuple[Any, int]] = []
        warnings: list[str | None] = []
        index, room = first + len(found), PIXELS_AT_ONCE
        while room > 0 and index < first + size and source.has(index):
            image = batches.source.image(index)
            some.append((image, index))
            warnings.append(batches.source.decode_warning(index))
            room -= math.prod(image.size) if isinstance(image, Image.Image) else PIXELS_AT_ONCE
            index += 1
        if not some:
            break
        found += zip([batches.preprocessed(*one) for one in some], warnings, strict=True)
    return found


def _present(source: OrderedSource, first: int, size: int, read: Callable[[int], Any]) -> list[Any]:
    """What a function makes of the samples from `first` on, at most `size` of them, fewer where the stream ends."""
    found: list[Any] = []
    while len(found) < size and source.has(first + len(found)):
        found.append(read(first + len(found)))
    return found


def _text_rows(
    encoder: TextEncoder, source: OrderedSource, batch_size: int, devices: list[torch.device], start: int
) -> Iterator[Rows]:
    def read(index: int) -> str:
        return read_texts(source, torch.tensor([index]))[0]

    def windows() -> Iterator[tuple[Tensor, Callable[[], list[str]]]]:
        first = start
        size = batch_size * BATCHES_PER_WINDOW
        # An earlier run may have ended inside a window. The windows after it stay the same.
        while texts := _present(source, first, size - first % size, read):
            positions = torch.arange(first, first + len(texts))
            yield positions, lambda texts=texts: texts  # type: ignore[misc]
            first += len(texts)

    encoders = [encoder, *(encoder.replica(device) for device in devices[1:])]
    rows_on = [TextRows(one) for one in encoders]
    yield from run_in_order(
        list(zip(devices, rows_on, strict=True)), batches_of_windows(windows(), encoder, batch_size)
    )


class _GrowingRows:
    """Rows float32 [N, D] in a file that grows with them, and is mapped into memory."""

    def __init__(self, folder: Path, check_space: Callable[[int], object]) -> None:
        # Another process that makes the same features removes the folder when it has them.
        folder.mkdir(parents=True, exist_ok=True)
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115 (it stays open as long as the rows are in use)
        self._check_space = check_space
        self._rows: NDArray[np.float32] = np.empty((0, 0), np.float32)

    def put(self, positions: Tensor, block: Tensor) -> None:
        """Write rows at their positions."""
        needed = int(positions.max()) + 1
        if needed > len(self._rows):
            size = max(FIRST_ROWS, needed, len(self._rows) * 3 // 2)
            shape = (size, block.shape[1])
            self._check_space(4 * block.shape[1] * (size - len(self._rows)))
            self._file.truncate(4 * size * block.shape[1])
            self._rows = np.memmap(self._file, np.float32, "r+", shape=shape)
        self._rows[positions.numpy()] = block.numpy()

    def copy(self, start: int, stop: int) -> NDArray[np.float32]:
        """A copy of some rows in memory."""
        return np.array(self._rows[start:stop])

    def finished(self, count: int) -> Tensor:
        """The first rows as a tensor over the file."""
        return torch.from_numpy(self._rows[:count])
