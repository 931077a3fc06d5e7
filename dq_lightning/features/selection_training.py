"""Train an encoder on the dataset's own classes before it makes features, as in the selection epochs of the paper."""

import copy
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dq_lightning.cache.digests import DigestMemory
from dq_lightning.core.batching import HalvedBatches
from dq_lightning.core.config import FeatureConfig, Precision
from dq_lightning.core.console import progress_bar
from dq_lightning.core.errors import FeatureError
from dq_lightning.core.isolation import isolated
from dq_lightning.core.records import Labels
from dq_lightning.features.encoders import Encoder, NetworkEncoder, RowEncoder, TextEncoder
from dq_lightning.features.loading import ImageBatches, iterate_batches
from dq_lightning.features.origins import EncoderSpec
from dq_lightning.features.preprocessing import Preprocessing
from dq_lightning.features.samples import SampleSource
from dq_lightning.identity.networks import digest_module

logger = logging.getLogger("dq_lightning")

# These are the values of the published code.
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4


@dataclass(frozen=True)
class TrainedSpec(EncoderSpec):
    """A chosen encoder that is trained each time it is loaded; its identity is that of the untrained encoder.

    Attributes:
        untrained: the encoder that is trained.
        source: dataset of N images, without the user's transforms.
        labels: class of each image; images without a class are not trained on.
        settings: `selection_epochs` and the other settings of the training.
        progress: whether to show a progress bar.
    """

    untrained: EncoderSpec
    source: SampleSource
    labels: Labels
    settings: FeatureConfig
    progress: bool

    def identity(self, memory: DigestMemory) -> str | None:
        return self.untrained.identity(memory)

    def _load(self, device: torch.device, precision: Precision) -> "TrainedEncoder":
        encoder = self.untrained.load(str(device), precision)
        return train_encoder(encoder, self.source, self.labels, self.settings, device=device, progress=self.progress)


def with_selection_epochs(
    spec: EncoderSpec, source: SampleSource, labels: Labels | None, settings: FeatureConfig, progress: bool = True
) -> EncoderSpec:
    """Return the encoder choice unchanged, or, if `settings.selection_epochs` is positive, one that is trained first.

    The source gives N images without the user's transforms, and `labels` the class of each.

    Raises:
        FeatureError: the encoder is to be trained, but there are no labels.
    """
    if settings.selection_epochs == 0:
        return spec
    if labels is None:
        raise FeatureError(
            "selection_epochs trains the encoder on the classes of the dataset, but it has none: pass labels=, or leave "
            "selection_epochs out"
        )
    return TrainedSpec(spec.name, spec.description, spec, source, labels, settings, progress)


class TrainedEncoder:
    """An encoder whose head, or head and network, were trained on the dataset; see `encoders.Encoder`.

    `body` makes the features, and `head` maps them to the logits of the trained classes.
    """

    def __init__(self, body: NetworkEncoder, head: nn.Linear) -> None:
        self.preprocess: Preprocessing = body.preprocess
        self.num_classes: int = head.out_features
        self.embed = body.embed
        self._body, self._head = body, head

    def digest(self) -> str:
        """Return a digest of the trained weights."""
        return f"{digest_module(self._body.network)} {digest_module(self._head)}"

    def logits(self, embedding: Tensor) -> Tensor:
        """Return the logits, float32 [B, C], of features [B, D]."""
        with torch.no_grad():
            output: Tensor = self._head(embedding.to(self._head.weight.device).float())
        return output

    def replica(self, device: torch.device) -> "TrainedEncoder":
        """Return a copy of the trained encoder on another device."""
        return TrainedEncoder(self._body.replica(device), copy.deepcopy(self._head).to(device))


def train_encoder(
    encoder: Encoder | TextEncoder | RowEncoder,
    source: SampleSource,
    labels: Labels,
    settings: FeatureConfig,
    *,
    device: torch.device,
    progress: bool = True,
) -> TrainedEncoder:
    """Train an encoder on plain images and their classes (selection epochs; Zhou et al. 2023, section 4.1).

    As in the published code, the cross-entropy is minimized by stochastic gradient descent with Nesterov momentum 0.9,
    weight decay 5e-4 and a learning rate that falls to zero along a cosine. A head with the right number of outputs is
    trained further; any other encoder gets a new head. With `selection_train="head"` the images pass through the
    network once, whatever the number of epochs, and their features are held in memory.

    The encoder's own copy of the network is trained in place. Of the general settings only `batch_size` and
    `num_workers` are used, where they do not change the result.

    Returns:
        The trained encoder, frozen and in eval mode. The same seed gives the same encoder on one device.

    Raises:
        FeatureError: the encoder is not a network of images, there are fewer than two labelled samples or classes, the
            training diverges, or GPU memory runs out.
    """
    if not isinstance(encoder, NetworkEncoder):
        raise FeatureError(
            "selection_epochs trains an encoder of images, which this encoder is not: leave selection_epochs out, or pass a "
            "timm name or a network as the encoder"
        )
    labelled = torch.nonzero((labels.values >= 0) & (labels.values < labels.num_classes)).flatten()
    if len(labelled) < 2 or labels.num_classes < 2:
        raise FeatureError(
            f"selection_epochs needs classes to learn, but there are {len(labelled)} labelled samples of "
            f"{labels.num_classes} classes: leave selection_epochs out, or pass labels="
        )
    with isolated():
        torch.manual_seed(settings.selection_seed)
        try:
            run = _Training(encoder, source, labels, labelled, settings, device, progress)
            run.train_head() if settings.selection_train == "head" else run.train_all()
        except torch.OutOfMemoryError as error:
            raise FeatureError(
                f"the GPU's memory is too short to train the encoder with {settings.selection_batch_size} images a step: "
                'pass a smaller selection_batch_size, selection_train="head" with kind="gradient", or device="cpu"'
            ) from error
    return TrainedEncoder(encoder, run.head)


class _Training:
    """One training run; the batches of all epochs are fixed at the start."""

    def __init__(
        self,
        encoder: NetworkEncoder,
        source: SampleSource,
        labels: Labels,
        labelled: Tensor,
        settings: FeatureConfig,
        device: torch.device,
        progress: bool,
    ) -> None:
        self.encoder, self.source, self.settings, self.device = encoder, source, settings, device
        self.targets = labels.values.to(torch.int64)
        self.labelled, self.progress = labelled, progress
        self.head = self._make_head(labels.num_classes)
        shuffle = torch.Generator().manual_seed(settings.selection_seed)
        self.batches: list[Tensor] = []
        for _ in range(settings.selection_epochs):
            order = labelled[torch.randperm(len(labelled), generator=shuffle)]
            # Batch normalisation needs more than one sample, so a last batch of one sample joins the batch before.
            count = max(1, math.ceil((len(order) - 1) / settings.selection_batch_size))
            self.batches += torch.split(order, settings.selection_batch_size)[: count - 1]
            self.batches.append(order[(count - 1) * settings.selection_batch_size :])

    def _make_head(self, num_classes: int) -> nn.Linear:
        # A trial run shows the number of features, and whether the linear layer that was found is the network's head.
        (probe,) = self._images([self.labelled[:1]], self.device, 0)
        width = self.encoder.embed(probe).shape[1]
        own = self.encoder.head
        if own is not None and own.in_features == width and own.out_features == num_classes:
            return own
        return nn.Linear(width, num_classes).to(self.device)

    def _images(
        self, batches: list[Tensor], device: torch.device, num_workers: int | Literal["auto"]
    ) -> Iterator[Tensor]:
        chosen = ImageBatches(self.source, self.encoder.preprocess, batches)
        for batch in iterate_batches(chosen, num_workers, device):
            yield batch.images

    def train_all(self) -> None:
        """Train the network and its head."""
        network = self.encoder.network
        network.requires_grad_(True).train()
        images = self._images(self.batches, self.device, self.settings.num_workers)
        try:
            features = (self.encoder.features(batch).float() for batch in images)
            self._descend(features, [*network.parameters(), *self.head.parameters()], "selection epochs")
        finally:
            network.requires_grad_(False).eval()

    def train_head(self) -> None:
        """Train only the head, on features that are computed once."""
        place = torch.empty(len(self.targets), dtype=torch.int64)
        place[self.labelled] = torch.arange(len(self.labelled))
        pieces = list(torch.split(self.labelled, self.settings.batch_size))
        made: list[Tensor] = []
        halved = HalvedBatches("selection features", FeatureError)
        with progress_bar(
            self.progress, total=len(self.labelled), unit="sample", description="selection features"
        ) as bar:
            for batch in self._images(pieces, self.device, self.settings.num_workers):
                made.append(halved.run(self.encoder.embed, batch).cpu())
                bar.update(len(batch))
        table = torch.cat(made)
        features = (table[place[batch]].to(self.device) for batch in self.batches)
        self._descend(features, list(self.head.parameters()), "selection epochs (head)")

    def _descend(self, features: Iterator[Tensor], parameters: list[nn.Parameter], description: str) -> None:
        settings, steps = self.settings, len(self.batches)
        self.head.requires_grad_(True)
        unique = list(dict.fromkeys(parameters))
        optimizer = torch.optim.SGD(
            unique, settings.selection_lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
        )
        last_epoch = steps - steps // settings.selection_epochs
        loss_sum = torch.zeros((), device=self.device)
        hits, seen = torch.zeros((), dtype=torch.int64, device=self.device), 0
        total = sum(len(batch) for batch in self.batches)
        with (
            torch.enable_grad(),
            progress_bar(self.progress, total=total, unit="sample", description=description) as bar,
        ):
            for step, batch in enumerate(self.batches):
                for group in optimizer.param_groups:
                    group["lr"] = settings.selection_lr * (1 + math.cos(math.pi * step / steps)) / 2
                logits = self.head(next(features))
                targets = self.targets[batch].to(self.device)
                loss = F.cross_entropy(logits, targets)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                loss_sum += loss.detach()
                if step >= last_epoch:
                    hits += (logits.argmax(1) == targets).sum()
                    seen += len(batch)
                bar.update(len(batch))
        self.head.requires_grad_(False)
        if not loss_sum.isfinite():
            raise FeatureError(
                f"the training of the encoder diverged with selection_lr={settings.selection_lr}: pass a smaller selection_lr"
            )
        accuracy = hits.item() / seen
        logger.info("%s: %.1f %% of the last epoch's images were classified correctly", description, 100 * accuracy)
