"""Features of a stream, made in its first pass, whose length is known when it ends.

The rows go to a file that is mapped into memory, so that the memory of the process does not grow with the stream.
"""

import logging
import math
from collections.abc import Callable, Iterator
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
from dq_lightning.core.isolation import isolated, release_memory
from dq_lightning.core.replicas import run_in_order
from dq_lightning.core.resuming import Shards
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

    Returns:
        Embeddings, float32 [N, D] on the CPU, mapped from the file; None for an encoder that reads the samples itself,
        such as an API, which has to know their number.

    Raises:
        FeatureError: the encoder cannot be loaded, or a feature is not finite.
        SourceError: a sample cannot be read.
    """
    devices, kept = resolve_devices(device), shards or Shards()
    try:
        with isolated():
            encoder = spec.load(str(devices[0]), precision)
            if isinstance(encoder, RowEncoder):
                return None
            rows = _GrowingRows(folder, check_space)
            start = _restored(source, rows, kept)
            if isinstance(encoder, SampleEncoder):
                made = _image_rows(encoder, source, RawSamples(source), batch_size, devices[:1], start)
            elif isinstance(encoder, TextEncoder):
                made = _text_rows(encoder, source, batch_size, devices, start)
            else:
                made = _image_rows(encoder, source, source, batch_size, devices, start)
            with progress_bar(progress, total=None, unit="sample", description="features") as bar:
                bar.update(start)
                count = _collect(made, rows, kept, source, start, bar.update)
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
) -> int:
    """Put the rows that an encoder makes at their places, and return the number of all rows."""
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
            arrays: dict[str, NDArray[Any]] = {
                "embedding": rows.copy(saved, count),
                "digests": source.digests(saved, count),
            }
            shards.keep(count - saved, arrays)
            saved = count
    put()
    check_finite(not_finite, count, LOOK_AT_SAMPLES)
    return count


def _image_rows(
    encoder: Encoder | SampleEncoder,
    source: OrderedSource,
    images: Any,
    batch_size: int,
    devices: list[torch.device],
    start: int,
) -> Iterator[Rows]:
    """Yield the rows of the samples from a position on, batch by batch in order."""
    batches = ImageBatches(images, encoder.preprocess, [])

    def read() -> Iterator[tuple[Tensor, ImageBatch]]:
        first = start
        while members := _prepared(source, batches, first, batch_size - first % batch_size):
            indices = list(range(first, first + len(members)))
            yield torch.tensor(indices), batch_of(members, indices)
            first += len(indices)

    encoders = [encoder, *(encoder.replica(device) for device in devices[1:])]
    rows_on = [ImageRows(one, None) for one in encoders]
    warnings: list[tuple[int, str]] = []
    count = 0
    for rows, told in run_in_order(list(zip(devices, rows_on, strict=True)), read()):
        warnings += told
        count += len(rows.positions)
        yield rows
    warn_of_decoding(warnings, count)


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
