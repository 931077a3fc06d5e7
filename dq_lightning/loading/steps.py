"""Count the steps of an epoch, and check the Trainer's settings against the shorter epochs of a compact set."""

import math
from typing import Any

from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import ConfigError
from dq_lightning.core.records import StoreInfo
from dq_lightning.loading.loaders import LoaderSettings
from dq_lightning.loading.trainer_facts import TrainerFacts


def steps_per_epoch(num_samples: int, batch_size: int, num_ranks: int, drop_last: bool) -> int:
    """Return the number of batches that each rank sees in an epoch.

    The distributed sampler pads every rank to the same number of samples.

    Args:
        num_samples: samples of the training set.
        batch_size: samples per batch and rank.
        num_ranks: processes that share an epoch.
        drop_last: whether the last, smaller batch is left out.

    Example:
        >>> steps_per_epoch(1000, 32, 2, drop_last=False)
        16
    """
    per_rank = math.ceil(num_samples / num_ranks)
    return per_rank // batch_size if drop_last else math.ceil(per_rank / batch_size)


def check_steps(trainer: Any, steps: int, *, num_samples: int, batch_size: int, num_ranks: int) -> list[str]:
    """Compare the Trainer's settings with the steps of an epoch, which are batches per rank.

    Returns:
        Sentences of advice on settings that are valid but have no effect, or another one, in such short epochs.

    Raises:
        ConfigError: training would take no steps, or a setting does not fit the number of steps.
    """
    if steps == 0:
        raise ConfigError(
            f"the compact set has {num_samples:,} samples: with {num_ranks} processes, batch_size={batch_size} and "
            "drop_last=True no batch is full, and training would take zero steps. Lower batch_size, raise keep_ratio, or "
            "pass drop_last=False"
        )
    if getattr(trainer, "fast_dev_run", False) or getattr(trainer, "overfit_batches", 0):
        return []
    advice = []
    limit = trainer.limit_train_batches
    if not limit:
        return []
    if isinstance(limit, float) and limit > 0 and int(steps * limit) == 0:
        raise ConfigError(
            f"limit_train_batches={limit} of the {steps} steps that an epoch of the compact set has is less than one batch: "
            "raise it, or leave it out"
        )
    if isinstance(limit, int) and not isinstance(limit, bool) and limit > steps:
        advice.append(
            f"limit_train_batches={limit} has no effect, because an epoch of the compact set has {steps} steps: leave it out"
        )
    steps = min(steps, limit) if isinstance(limit, int) else max(1, int(steps * limit))
    # The Trainer has none where it validates after a span of time.
    interval = getattr(trainer, "val_check_interval", None)
    by_epoch = trainer.check_val_every_n_epoch is not None and bool(trainer.limit_val_batches)
    if by_epoch and isinstance(interval, int) and not isinstance(interval, bool) and interval > steps:
        raise ConfigError(
            f"val_check_interval={interval} is more than the {steps} steps that an epoch of the compact set has: set "
            "check_val_every_n_epoch=None to count steps across epochs, or lower val_check_interval"
        )
    if trainer.loggers and trainer.log_every_n_steps > steps:
        advice.append(
            f"log_every_n_steps={trainer.log_every_n_steps} is more than the {steps} steps of an epoch, so some epochs log "
            f"nothing: pass Trainer(log_every_n_steps={max(1, steps // 2)}) to see each epoch"
        )
    return advice


def facts_for_loggers(info: StoreInfo) -> dict[str, Any]:
    """Return what loggers record of a compact set; the prefix keeps the names apart from a model's hyperparameters.

    Example:
        >>> facts_for_loggers(StoreInfo("/cache/5-store/0f", "packed", 125, 1000, 1 << 20, "9d"))["dq/keep_ratio"]
        0.125
    """
    facts = {
        "keep_ratio": info.data_keep_ratio,
        "num_samples": info.num_samples,
        "content_hash": info.content_hash,
        "encoder": info.encoder,
        "bytes": info.bytes,
    }
    return {f"dq/{name}": value for name, value in facts.items() if value is not None}


def report_steps(trainer: Any, info: StoreInfo, settings: LoaderSettings, *, quiet: bool) -> None:
    """Check the Trainer's settings, and log on rank 0 how many steps an epoch has with the compact set and without it.

    With `quiet` nothing is logged, because the steps were logged before.

    Raises:
        ConfigError: see `check_steps`.
    """
    size, num_ranks = settings.batch_size, TrainerFacts.of(trainer).num_shares
    samples = settings.num_draws or info.num_samples
    after = steps_per_epoch(samples, size, num_ranks, settings.drop_last)
    before = steps_per_epoch(info.num_source_samples, size, num_ranks, settings.drop_last)
    advice = check_steps(trainer, after, num_samples=samples, batch_size=size, num_ranks=num_ranks)
    if trainer.is_global_zero and not quiet:
        log = get_logger()
        log.info(
            f"{info.num_samples:,} of {info.num_source_samples:,} samples: {after:,} steps per epoch instead of {before:,} "
            f"(batch size {size}, {num_ranks} process{'es' * (num_ranks > 1)})"
        )
        for line in advice:
            log.warning(line)
