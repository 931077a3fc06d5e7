"""The batch loop: a source through an encoder to one row of features a sample."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from dq_lightning.core.config import FeatureKind, Precision
from dq_lightning.core.errors import FeatureError
from dq_lightning.core.isolation import isolated, release_memory
from dq_lightning.core.records import Features
from dq_lightning.core.resuming import NothingKept, NothingPaid, Paid, Shards
from dq_lightning.features.choose import EncoderSpec
from dq_lightning.features.collect import NAMED_SAMPLES, Allocate, Rows, allocate_in_memory, collect
from dq_lightning.features.encoders import Encoder, RowEncoder, TextEncoder, resolve_device
from dq_lightning.features.gradient import HeadLoss, head_gradient
from dq_lightning.features.loading import ImageBatches, iterate_batches, telling_of_lost_loaders
from dq_lightning.features.readable import Blanked
from dq_lightning.features.selection_training import TrainedEncoder
from dq_lightning.features.text_loading import iterate_text_batches

logger = logging.getLogger("dq_lightning")

LOOK_AT_SAMPLES = 'Look at the samples; on a GPU, half precision may overflow: pass precision="float32"'


def extract_features(
    source: Any,
    spec: EncoderSpec,
    *,
    kind: FeatureKind = "embedding",
    labels: Tensor | None = None,
    num_classes: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    batch_size: int = 256,
    num_workers: int | Literal["auto"] = "auto",
    progress: bool = True,
    out: Allocate | None = None,
    loss: HeadLoss = "softmax_cross_entropy",
    paid: Paid | None = None,
    shards: Shards | None = None,
    left_out: Tensor | None = None,
) -> Features:
    """Run every sample of a source through an encoder.

    Deterministic on one device. Nothing in the process changes: random state, flags and GPU memory are as before. When the
    GPU's memory is short, the batch is halved and the run goes on; the features do not depend on the batch size, up to
    rounding.

    Args:
        source: N samples: `image(i)` (RGB) and `decode_warning(i)` for an encoder of images, `texts(positions)` for one of
            text; ready-made embeddings need neither.
        spec: from `choose_encoder`.
        kind: `"embedding"`, or `"gradient"` to add the gradient with respect to the logits.
        labels: int64 [N], for `"gradient"`.
        num_classes: of the labels; the largest label plus one when None.
        device: `"auto"` is the GPU when there is one.
        precision: see `resolve_precision`. Features are float32 in any case.
        batch_size: samples a step.
        num_workers: loader processes, or requests at a time; `"auto"` decides by the time a few samples take.
        progress: show a bar (never when `TQDM_DISABLE` is set).
        out: makes the float32 CPU tensor to fill, of a name (`"embedding"`, `"head_gradient"`) and a shape; a
            memory-mapped one keeps large features off the heap.
        loss: see `head_gradient`.
        paid: where an encoder that is paid for each row records what it has; None keeps nothing.
        shards: where finished rows are kept, so that a killed run goes on with what is missing; not used with ready-made or
            paid rows. None keeps nothing.
        left_out: int64 [U], samples that cannot be read: their rows are zero.

    Returns:
        embedding float32 [N, D], and for `"gradient"` head_gradient float32 [N, C], both on the CPU, in the source's order.

    Raises:
        FeatureError: the encoder cannot be loaded, gives other values than finite ones, or has no head for these classes.
        SourceError: a sample cannot be read; as the source raised it.
    """
    if len(source) == 0:
        raise FeatureError("the dataset is empty: there is nothing to make features of")
    if kind == "gradient" and labels is None:
        raise FeatureError('kind="gradient" needs class labels; pass labels=, or use kind="embedding"')
    target = resolve_device(device)
    try:
        with isolated(), telling_of_lost_loaders():
            encoder = spec.load(str(target), precision)
            wanted = None
            if kind == "gradient" and labels is not None:
                _check_head(encoder, labels, len(source), num_classes)
                wanted = labels
            advice, kept = LOOK_AT_SAMPLES, shards or NothingKept()
            rows_of: Callable[[Tensor], Iterator[Rows]]
            if isinstance(encoder, RowEncoder):
                whole = source if left_out is None or source.modality != "text" else Blanked(source, left_out)
                rows_of = partial(_all_rows, encoder, whole, batch_size, num_workers, paid or NothingPaid())
                advice, kept = encoder.advice, NothingKept()
            elif isinstance(encoder, TextEncoder):
                rows_of = partial(_text_to_rows, encoder, source, batch_size)
            else:
                rows_of = partial(_images_to_rows, encoder, source, batch_size, wanted, loss, target, num_workers)
            made_from = encoder.digest() if isinstance(encoder, TrainedEncoder) and shards is not None else ""
            out = out or allocate_in_memory
            features = collect(rows_of, len(source), progress, out, advice, kept, made_from, left_out)
            del encoder, rows_of
    finally:
        release_memory()
    return features


def _check_head(
    encoder: Encoder | TextEncoder | RowEncoder, labels: Tensor, num_samples: int, num_classes: int | None
) -> None:
    if len(labels) != num_samples:
        raise FeatureError(f"{len(labels)} labels for {num_samples} samples")
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


class _HalvedBatch:
    """The largest batch that the device's memory has held so far; embeds in pieces of that size.

    The size counts elements: short texts still go many at a time after long ones did not fit.
    """

    def __init__(self, encoder: Encoder | TextEncoder) -> None:
        self._encoder = encoder
        self._limit: int | None = None

    def embed(self, batch: Tensor) -> Tensor:
        pieces: list[Tensor] = []
        done = 0
        while done < len(batch):
            at_once = len(batch) if self._limit is None else max(1, self._limit // batch[0].numel())
            piece = batch[done : done + at_once]
            embedding = self._try(piece)
            if embedding is None:
                if len(piece) == 1:
                    raise FeatureError('one sample alone exceeds the GPU\'s memory; free some, or pass device="cpu"')
                self._limit = piece.numel() // 2
                logger.warning("features: GPU memory is short; going on with %d samples a step", len(piece) // 2)
                release_memory()
                continue
            pieces.append(embedding)
            done += len(piece)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _try(self, piece: Tensor) -> Tensor | None:
        # the error's traceback holds the activations, so it must be gone before memory is released
        try:
            return self._encoder.embed(piece)
        except torch.OutOfMemoryError:
            return None


def _all_rows(
    encoder: RowEncoder,
    source: Any,
    batch_size: int,
    num_workers: int | Literal["auto"],
    paid: Paid,
    missing: Tensor,
) -> Iterator[Rows]:
    return encoder.rows(source, batch_size, num_workers, paid)


def _text_to_rows(encoder: TextEncoder, source: Any, batch_size: int, missing: Tensor) -> Iterator[Rows]:
    embedder = _HalvedBatch(encoder)
    for batch in iterate_text_batches(source, encoder, batch_size, missing):
        yield Rows(batch.positions, embedder.embed(batch.tokens))


def _images_to_rows(
    encoder: Encoder,
    source: Any,
    batch_size: int,
    labels: Tensor | None,
    loss: HeadLoss,
    device: torch.device,
    num_workers: int | Literal["auto"],
    missing: Tensor,
) -> Iterator[Rows]:
    """Rows of every batch of the samples `missing`, in order, still on the device."""
    batches = ImageBatches(source, encoder.preprocess, batch_size, missing)
    warnings: list[tuple[int, str]] = []
    embedder = _HalvedBatch(encoder)
    done = 0
    for positions, batch in zip(batches.batches, iterate_batches(batches, num_workers, device), strict=True):
        if batch.error is not None:
            raise batch.error
        assert batch.images is not None
        warnings += batch.warnings
        embedding = embedder.embed(batch.images)
        gradient = None
        if labels is not None:
            gradient = head_gradient(encoder.logits(embedding), labels[positions], loss)
        done += len(positions)
        yield Rows(positions, embedding, gradient)
    if warnings:
        first = "; ".join(f"sample {index}: {text}" for index, text in warnings[:NAMED_SAMPLES])
        more = f"; and {len(warnings) - NAMED_SAMPLES} more" if len(warnings) > NAMED_SAMPLES else ""
        logger.warning("%d of %d images were decoded doubtfully: %s%s", len(warnings), done, first, more)
