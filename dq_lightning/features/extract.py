"""The loop that runs an encoder over all samples of a source and collects one row of features for each sample."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dq_lightning.core.batching import HalvedBatches
from dq_lightning.core.config import FeatureKind, Precision
from dq_lightning.core.devices import DeviceNames, resolve_devices
from dq_lightning.core.errors import FeatureError
from dq_lightning.core.isolation import isolated, release_memory
from dq_lightning.core.records import Features
from dq_lightning.core.replicas import run_in_order
from dq_lightning.core.resuming import Shards
from dq_lightning.core.sharing import Arrays, Job, Sharing
from dq_lightning.features.collect import NAMED_SAMPLES, Allocate, Rows, allocate_in_memory, collect
from dq_lightning.features.encoders import Encoder, RowEncoder, TextEncoder
from dq_lightning.features.gradient import head_gradient
from dq_lightning.features.loading import (
    ImageBatch,
    ImageBatches,
    explaining_lost_loaders,
    iterate_batches,
    split_at_multiples,
)
from dq_lightning.features.origins import EncoderSpec
from dq_lightning.features.sample_function import RawSamples, SampleEncoder
from dq_lightning.features.samples import SampleSource
from dq_lightning.features.selection_training import TrainedEncoder
from dq_lightning.features.text_loading import TextBatch, iterate_text_batches, num_pieces

logger = logging.getLogger("dq_lightning")

LOOK_AT_SAMPLES = 'Look at the samples; on a GPU, half precision may overflow: pass precision="float32"'


def extract_features(
    source: SampleSource,
    spec: EncoderSpec,
    *,
    kind: FeatureKind = "embedding",
    labels: Tensor | None = None,
    num_classes: int | None = None,
    device: DeviceNames = "auto",
    precision: Precision = "auto",
    batch_size: int = 256,
    num_workers: int | Literal["auto"] = "auto",
    progress: bool = True,
    out: Allocate | None = None,
    api_embeddings: Path | None = None,
    shards: Shards | None = None,
    left_out: Tensor | None = None,
    sharing: Sharing | None = None,
) -> Features:
    """Run every sample of a source through an encoder.

    The result is deterministic on one device. Several devices of the same kind give the same bytes as one of them,
    because each takes whole batches, and the batches stay the same. The global state of the process does not change:
    random state, flags and GPU memory are afterwards as they were before. When GPU memory runs out, the batch is halved
    and the run continues; up to rounding, the features do not depend on the batch size.

    Args:
        source: dataset of N samples. An image encoder calls `image(i)` (RGB) and `decode_warning(i)`, a text encoder
            calls `texts(positions)`; ready-made embeddings call neither.
        spec: encoder chosen by `choose_encoder`.
        kind: `"embedding"` for the embedding alone, or `"gradient"` to add the loss gradient with respect to the
            logits.
        labels: class of each sample, int64 [N]; required for `"gradient"`.
        num_classes: number of classes; None takes the largest label plus one.
        device: device that the encoder runs on; `"auto"` takes the GPU if there is one. With several, such as
            `["cuda:0", "cuda:1"]`, each holds a replica of the encoder; an encoder that is trained first is trained on
            the first of them.
        precision: precision of the network, see `resolve_precision`. The features are always float32.
        batch_size: number of samples in one batch.
        num_workers: number of loader processes, or of concurrent requests to an API; `"auto"` measures how long a few
            samples take to read and chooses the number of loader processes by that.
        progress: whether to show a progress bar; the environment variable `TQDM_DISABLE` switches it off in any case.
        out: function that makes the float32 CPU tensor to fill, given its name (`"embedding"` or `"head_gradient"`) and
            its shape; a memory-mapped tensor keeps large features out of main memory.
        api_embeddings: folder of the embeddings that APIs returned in earlier runs, to which new ones are added; None
            stores nothing.
        shards: store for finished rows, from which a killed run can be resumed; it is not used for ready-made
            embeddings and those of an API. None stores nothing.
        left_out: positions of unreadable samples, int64 [U]; their rows are zero.
        sharing: how batches are shared with other processes, each of which calls `extract_pieces`; ready-made embeddings,
            those of an API, and those of an encoder that is trained first are not shared. None shares nothing.

    Returns:
        Features with `embedding` float32 [N, D] and, for `"gradient"`, `head_gradient` float32 [N, C], both on the CPU
        and in the order of the source.

    Raises:
        FeatureError: the dataset is empty, labels are missing, the encoder cannot be loaded or has no linear head for
            these classes, or a feature is not finite.
        SourceError: a sample cannot be read; the error is passed on as the source raised it.
    """
    if len(source) == 0:
        raise FeatureError("the dataset is empty: there is nothing to make features of")
    if kind == "gradient" and labels is None:
        raise FeatureError('kind="gradient" needs class labels; pass labels=, or use kind="embedding"')
    sharing = sharing or Sharing()
    devices = resolve_devices(device)
    options = _Options(kind, labels, num_classes, batch_size, num_workers, api_embeddings, sharing)
    out = out or allocate_in_memory
    try:
        return _collected(source, spec, options, devices, precision, progress, out, shards, left_out)
    finally:
        release_memory()


def _collected(
    source: SampleSource,
    spec: EncoderSpec,
    options: "_Options",
    devices: list[torch.device],
    precision: Precision,
    progress: bool,
    out: Allocate,
    shards: Shards | None,
    left_out: Tensor | None,
) -> Features:
    with _loaded(source, spec, options, devices, precision) as loop:
        made_from = loop.digest() if shards is not None or options.sharing.num_ranks > 1 else ""
        # A stream is read from its beginning, and an encoder that is trained first would have to be trained by each rank,
        # which takes longer than the features: neither is shared.
        is_shared = loop.is_divisible and not getattr(source, "in_order", False) and not made_from
        sharing = options.sharing if is_shared else Sharing()

        def stream_of(missing: Tensor) -> Iterator[Rows]:
            job = Job("features", {}, {"missing": missing.numpy()}, loop.pieces(missing), len(missing))
            return sharing.share(job, partial(loop.rows, missing), _unpacked, lambda rows: len(rows.positions))

        kept = shards if loop.is_divisible and shards is not None else Shards()
        return collect(stream_of, len(source), progress, out, loop.advice, kept, made_from, left_out)


@contextmanager
def extract_pieces(
    source: SampleSource,
    spec: EncoderSpec,
    job: Job,
    numbers: Iterator[int],
    *,
    kind: FeatureKind,
    labels: Tensor | None,
    num_classes: int | None,
    device: DeviceNames,
    precision: Precision,
    batch_size: int,
    num_workers: int | Literal["auto"],
    sharing: Sharing,
) -> Iterator[Iterator[Arrays]]:
    """Give the rows of some pieces of the job of a process that runs `extract_features` with the same arguments.

    They are an iterator inside the `with` block. Until the block ends, the process has the random state and the flags of
    the computation.
    """
    options = _Options(kind, labels, num_classes, batch_size, num_workers, None, sharing)
    try:
        with _loaded(source, spec, options, resolve_devices(device), precision) as loop:
            yield map(_packed, loop.rows(torch.from_numpy(job.arrays["missing"]), numbers))
            del loop
    finally:
        release_memory()


def _packed(rows: Rows) -> Arrays:
    arrays = {"positions": rows.positions.numpy(), "embedding": rows.embedding.to("cpu", torch.float32).numpy()}
    if rows.head_gradient is not None:
        arrays["head_gradient"] = rows.head_gradient.to("cpu", torch.float32).numpy()
    return arrays


def _unpacked(arrays: Mapping[str, Any]) -> Rows:
    return Rows(**{name: torch.from_numpy(array) for name, array in arrays.items()})


@dataclass(frozen=True)
class _Options:
    """What the loop over the samples is given beside them, see `extract_features`."""

    kind: FeatureKind
    labels: Tensor | None
    num_classes: int | None
    batch_size: int
    num_workers: int | Literal["auto"]
    api_embeddings: Path | None
    sharing: Sharing


@dataclass(frozen=True)
class _Loop:
    """A loaded encoder and the samples that it makes rows of.

    Attributes:
        rows: function that makes the rows of the numbered pieces of the samples at some positions, int64 ascending.
        pieces: function that returns the number of pieces of these samples.
        digest: function that returns a digest of weights that were trained for this work; empty if none were.
        advice: what to do about rows that are not finite.
        is_divisible: whether the pieces can be done one by one, by other processes and after an interruption.
    """

    rows: Callable[[Tensor, Iterator[int]], Iterator[Rows]]
    pieces: Callable[[Tensor], int]
    digest: Callable[[], str]
    advice: str = LOOK_AT_SAMPLES
    is_divisible: bool = True


@contextmanager
def _loaded(
    source: SampleSource, spec: EncoderSpec, options: _Options, devices: list[torch.device], precision: Precision
) -> Iterator[_Loop]:
    """Load the encoder on the first device, in a random state and with flags of its own."""
    size, workers = options.batch_size, options.num_workers
    with isolated(), explaining_lost_loaders():
        encoder = spec.load(str(devices[0]), precision)
        wanted = options.labels if options.kind == "gradient" else None
        if wanted is not None:
            _check_head(encoder, wanted, len(source), options.num_classes)
        digest = encoder.digest if isinstance(encoder, TrainedEncoder) else str
        loop: _Loop

        def num_batches(missing: Tensor) -> int:
            return len(split_at_multiples(missing, size))

        if isinstance(encoder, RowEncoder):
            rows_of = partial(encoder.rows, source, size, workers, options.api_embeddings)
            loop = _Loop(lambda missing, _: rows_of(missing), lambda _: 1, digest, encoder.advice, False)
        elif isinstance(encoder, SampleEncoder):
            # Processes that are forked could not use a GPU that the function has begun to use in this one.
            raw = RawSamples(source)
            rows = partial(_images_to_rows, encoder, raw, size, None, devices[:1], 0, options.sharing)
            loop = _Loop(rows, num_batches, digest)
        elif isinstance(encoder, TextEncoder):
            rows = partial(_text_to_rows, encoder, source, size, devices)
            loop = _Loop(rows, lambda missing: num_pieces(missing, size), digest)
        else:
            rows = partial(_images_to_rows, encoder, source, size, wanted, devices, workers, options.sharing)
            loop = _Loop(rows, num_batches, digest)
        yield loop


def _check_head(
    encoder: Encoder | TextEncoder | RowEncoder, labels: Tensor, num_samples: int, num_classes: int | None
) -> None:
    if len(labels) != num_samples:
        raise FeatureError(f"there are {len(labels)} labels for {num_samples} samples: pass one label for each sample")
    seen = int(labels.max()) + 1
    classes = seen if num_classes is None else num_classes
    advice = (
        'use kind="embedding", selection_epochs=10, which gives it such a head, or an encoder trained on these classes, as '
        "encoder=(network, preprocessing) or a timm name with weights="
    )
    if encoder.num_classes is None:
        raise FeatureError(f'kind="gradient" needs an encoder with a linear head, and this one has none; {advice}')
    if encoder.num_classes != classes or seen > classes or int(labels.min()) < 0:
        raise FeatureError(
            f'kind="gradient" needs an encoder with a head for the {classes} classes of the dataset (labels from '
            f"{int(labels.min())} to {seen - 1}), and this one has {encoder.num_classes} outputs; {advice}"
        )


def _text_to_rows(
    encoder: TextEncoder,
    source: SampleSource,
    batch_size: int,
    devices: list[torch.device],
    missing: Tensor,
    numbers: Iterator[int],
) -> Iterator[Rows]:
    encoders = [encoder, *(encoder.replica(device) for device in devices[1:])]
    batches = iterate_text_batches(source, encoder, batch_size, missing, numbers)
    rows_on = [TextRows(one) for one in encoders]
    yield from run_in_order(list(zip(devices, rows_on, strict=True)), batches)


class TextRows:
    """Makes the rows of a batch of texts with one replica of the encoder."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder, self._halved = encoder, HalvedBatches("features", FeatureError)

    def __call__(self, batch: TextBatch) -> Rows:
        return Rows(batch.positions, self._halved.run(self._encoder.embed, batch.tokens))


def _images_to_rows(
    encoder: Encoder,
    source: SampleSource,
    batch_size: int,
    labels: Tensor | None,
    devices: list[torch.device],
    num_workers: int | Literal["auto"],
    sharing: Sharing,
    missing: Tensor,
    numbers: Iterator[int],
) -> Iterator[Rows]:
    """Yield the rows of the numbered batches of the samples `missing` in order; the tensors stay on their device."""
    batches = ImageBatches(source, encoder.preprocess, split_at_multiples(missing, batch_size))
    # A device for which there is no batch gets no replica.
    devices = devices[: max(1, len(batches.batches))]
    encoders = [encoder, *(encoder.replica(device) for device in devices[1:])]
    asked = deque[int]()

    def remembered() -> Iterator[int]:
        for number in numbers:
            asked.append(number)
            yield number

    read = iterate_batches(batches, num_workers, devices[0], len(devices), remembered(), sharing)
    given = ((batches.batches[asked.popleft()], batch) for batch in read)
    rows_on = [ImageRows(one, labels) for one in encoders]
    warnings: list[tuple[int, str]] = []
    for rows, told in run_in_order(list(zip(devices, rows_on, strict=True)), given):
        warnings += told
        yield rows
    warn_of_decoding(warnings, len(missing))


def warn_of_decoding(warnings: list[tuple[int, str]], count: int) -> None:
    """Log one warning of the images, out of `count`, that may have been decoded wrongly."""
    if warnings:
        first = "; ".join(f"sample {index}: {text}" for index, text in warnings[:NAMED_SAMPLES])
        more = f"; and {len(warnings) - NAMED_SAMPLES} more" if len(warnings) > NAMED_SAMPLES else ""
        logger.warning("%d of %d images may have been decoded wrongly: %s%s", len(warnings), count, first, more)


class ImageRows:
    """Makes the rows of a batch of images with one replica of the encoder, and returns them with its warnings."""

    def __init__(self, encoder: Encoder, labels: Tensor | None) -> None:
        self._encoder, self._labels = encoder, labels
        self._halved = HalvedBatches("features", FeatureError)

    def __call__(self, read: tuple[Tensor, ImageBatch]) -> tuple[Rows, list[tuple[int, str]]]:
        positions, batch = read
        embedding = self._halved.run(self._encoder.embed, batch.images)
        gradient = None
        if self._labels is not None:
            gradient = head_gradient(self._encoder.logits(embedding), self._labels[positions])
        return Rows(positions, embedding, gradient), batch.warnings
