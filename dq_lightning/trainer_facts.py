"""What is read from a Trainer, in one place; a data module used by hand has none."""

from dataclasses import dataclass
from typing import Any, Self

import torch


@dataclass(frozen=True)
class TrainerFacts:
    """What the loaders and the build have to know of the run.

    Attributes:
        fits: a train set is needed (not for validate, test and predict alone).
        num_ranks: processes of the run that share an epoch.
        processes_on_node: training processes that share this node's cores.
        device: where this process computes.
        reloads: loaders are made anew every few epochs.
        progress: show progress bars.
    """

    fits: bool = True
    num_ranks: int = 1
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
            device=str(trainer.strategy.root_device),
            reloads=bool(trainer.reload_dataloaders_every_n_epochs),
            progress=trainer.progress_bar_callback is not None,
        )

    @property
    def on_cuda(self) -> bool:
        """Whether batches go to a GPU."""
        return torch.cuda.is_available() if self.device == "auto" else self.device.startswith("cuda")
