"""The batch loop: a source through an encoder, in order, to one row of features a sample."""

import logging
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from dq_lightning.config import FeatureKind, Precision
from dq_lightning.errors import FeatureError
from dq_lightning.features.choose import EncoderSpec
from dq_lightning.features.encoders import Encoder, resolve_device
from dq_lightning.features.gradient import HeadLoss, head_gradient
from dq_lightning.features.isolation import isolated, release_memory
from dq_lightning.features.loading import ImageBatches, ImageSource, iterate_batches
from dq_lightning.progress import progress_bar
from dq_lightning.records import Features

logger = logging.getLogger("dq_lightning")
Allocate = Callable[[str, tuple[int, int]], Tensor]
# rows stay on the device until so many batches are done, because every copy to the host waits for the device
BATCHES_PER_COPY = 16
NAMED_SAMPLES = 5


def extract_features(
    source: ImageSource,
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
) -> Features:
    """Run every sample of a source through an encoder.

    Deterministic on one device. Nothing in the process changes: random state, flags and GPU memory are as before. When the
    GPU's memory is short, the batch is halved and the run goes on; the features do not depend on the batch size, up to
    rounding.

    Args:
        source: N samples with `image(i)` (RGB) and `decode_warning(i)`.
        spec: from `choose_encoder`.
        kind: `"embedding"`, or `"gradient"` to add the gradient with respect to the logits.
        labels: int64 [N], for `"gradient"`.
        num_classes: of the labels; the largest label plus one when None.
        device: `"auto"` is the GPU when there is one.
        precision: see `resolve_precision`. Features are float32 in any case.
        batch_size: images a step.
        num_workers: loader processes; `"auto"` decides by the time a few samples take.
        progress: show a bar (never when `TQDM_DISABLE` is set).
        out: makes the float32 CPU tensor to fill, of a name (`"embedding"`, `"head_gradient"`) and a shape; a
            memory-mapped one keeps large features off the heap.
        loss: see `head_gradient`.

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
        with isolated():
            encoder = spec.load(str(target), precision)
            wanted = None
            if kind == "gradient" and labels is not None:
                _check_head(encoder, labels, len(source), num_classes)
                wanted = labels
            batches = ImageBatches(source, encoder.preprocess, batch_size)
            rows = _run(encoder, batches, wanted, loss, target, num_workers)
            features = _collect(rows, len(source), progress, out or _allocate)
            del encoder, rows, batches
    finally:
        release_memory()
    return features


def _allocate(name: str, shape: tuple[int, int]) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def _check_head(encoder: Encoder, labels: Tensor, num_samples: int, num_classes: int | None) -> None:
    if len(labels) != num_samples:
        raise FeatureError(f"{len(labels)} labels for {num_samples} samples")
    seen = int(labels.max()) + 1
    classes = seen if num_classes is None else num_classes
    advice = (
        'use kind="embedding", or an encoder trained on these classes, as encoder=(network, preprocessing) or a timm name '
        "with weights="
    )
    if encoder.num_classes is None:
        raise FeatureError(f'kind="gradient" needs an encoder with a linear head, and this one has none; {advice}')
    if encoder.num_classes != classes or seen > classes or int(labels.min()) < 0:
        raise FeatureError(
            f'kind="gradient" needs an encoder with a head for the {classes} classes of the dataset (labels from '
            f"{int(labels.min())} to {seen - 1}), and this one has {encoder.num_classes} outputs; {advice}"
        )


class _HalvedBatch:
    """The largest batch that the device's memory has held so far; embeds in pieces of that size."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._limit: int | None = None

    def embed(self, images: Tensor) -> Tensor:
        pieces: list[Tensor] = []
        done = 0
        while done < len(images):
            piece = images[done : done + (self._limit or len(images))]
            embedding = self._try(piece)
            if embedding is None:
                if len(piece) == 1:
                    raise FeatureError('one image alone exceeds the GPU\'s memory; free some, or pass device="cpu"')
                self._limit = len(piece) // 2
                logger.warning("features: GPU memory is short; going on with %d images a step", self._limit)
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


def _run(
    encoder: Encoder,
    batches: ImageBatches,
    labels: Tensor | None,
    loss: HeadLoss,
    device: torch.device,
    num_workers: int | Literal["auto"],
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Rows [B, D] and [B, C] of every batch, in order, still on the device."""
    warnings: list[tuple[int, str]] = []
    embedder = _HalvedBatch(encoder)
    done = 0
    for batch in iterate_batches(batches, num_workers, device):
        if batch.error is not None:
            raise batch.error
        assert batch.images is not None
        warnings += batch.warnings
        embedding = embedder.embed(batch.images)
        gradient = None
        if labels is not None:
            gradient = head_gradient(encoder.logits(embedding), labels[done : done + len(embedding)], loss)
        done += len(embedding)
        yield embedding, gradient
    if warnings:
        first = "; ".join(f"sample {index}: {text}" for index, text in warnings[:NAMED_SAMPLES])
        more = f"; and {len(warnings) - NAMED_SAMPLES} more" if len(warnings) > NAMED_SAMPLES else ""
        logger.warning("%d of %d images were decoded doubtfully: %s%s", len(warnings), done, first, more)


def _collect(
    rows: Iterator[tuple[Tensor, Tensor | None]], num_samples: int, progress: bool, allocate: Allocate
) -> Features:
    """Copy the rows to the host, a block of batches at a time, and check that they are finite."""
    filled: dict[str, Tensor] = {}
    waiting: list[tuple[Tensor, ...]] = []
    not_finite: list[Tensor] = []
    done = 0

    def copy() -> None:
        nonlocal done
        for name, parts in zip(("embedding", "head_gradient"), zip(*waiting, strict=True), strict=False):
            block = torch.cat(parts)
            if name not in filled:
                filled[name] = allocate(name, (num_samples, block.shape[1]))
            filled[name][done : done + len(block)] = block
            not_finite.append(done + (~block.isfinite().all(dim=1)).nonzero()[:, 0].cpu())
        done += sum(len(parts[0]) for parts in waiting)
        waiting.clear()

    with progress_bar(progress, total=num_samples, unit="img", description="features") as bar:
        for embedding, gradient in rows:
            waiting.append((embedding,) if gradient is None else (embedding, gradient))
            if len(waiting) == BATCHES_PER_COPY:
                copy()
            bar.update(len(embedding))
        if waiting:
            copy()
    _check_finite(torch.unique(torch.cat(not_finite)), num_samples)
    return Features(filled["embedding"], filled.get("head_gradient"))


def _check_finite(bad: Tensor, num_samples: int) -> None:
    if len(bad) == 0:
        return
    names = ", ".join(str(int(index)) for index in bad[:NAMED_SAMPLES])
    raise FeatureError(
        f"{len(bad)} of {num_samples} samples have features that are NaN or infinite; the first are samples {names}. Look at "
        'their pixels; on a GPU, half precision may overflow: pass precision="float32"'
    )
