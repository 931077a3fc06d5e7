"""What is read from a Trainer, in one place; a data module used by hand has none."""

from dataclasses import dataclass
from typing import Any, Self

import torch


@dataclass(frozen=True)
class TrainerFacts:
    """What the loaders and the build have to know of the run.

    Attributes:
        fits: a train set is needed (not for validate, test and predict alone).
        num_ranks: processes of the run.
        num_shares: processes that share an epoch: fewer than `num_ranks` when a model is spread over several of them,
            1 when Lightning is told not to share (`use_distributed_sampler=False`).
        epoch: the epoch that comes next.
        processes_on_node: training processes that share this node's cores.
        device: where this process computes.
        reloads: loaders are made anew every few epochs.
        progress: show progress bars.
    """

    fits: bool = True
    num_ranks: int = 1
    num_shares: int = 1
    epoch: int = 0
    processes_on_node: int = 1
    device: str = "auto"
    reloads: bool = False
    progress: bool = True

    @classmethod
    def of(cls, trainer: Any) -> Self:
        """The facts of a Lightning Trainer, or the defaults for None."""
        if trainer is None:
            return cls()
        return cls(
            fits=trainer.state.fn is None or trainer.state.fn.value == "fit",
            num_ranks=trainer.world_size,
            processes_on_node=max(1, trainer.num_devices),
            num_shares=_num_shares(trainer),
            epoch=trainer.current_epoch,
            device=_encoder_device(trainer.strategy.root_device),
            reloads=bool(trainer.reload_dataloaders_every_n_epochs),
            progress=trainer.progress_bar_callback is not None,
        )

    @property
    def on_cuda(self) -> bool:
        """Whether batches go to a GPU."""
        return torch.cuda.is_available() if self.device == "auto" else self.device.startswith("cuda")


def _num_shares(trainer: Any) -> int:
    # without its own sampler Lightning leaves every process the whole set; no public attribute tells
    connector = getattr(trainer, "_accelerator_connector", None)
    if not getattr(connector, "use_distributed_sampler", True):
        return 1
    return int((trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1))


def _encoder_device(device: Any) -> str:
    """Where the encoder runs in a run on `device`: there, if torch itself computes on it, and else on the CPU."""
    return str(device) if device.type in ("cuda", "mps") else "cpu"
