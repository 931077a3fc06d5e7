"""Read from a Trainer what loaders and the build need; a data module used without a Trainer gets the defaults."""

from dataclasses import dataclass
from typing import Any, Self

import torch


@dataclass(frozen=True)
class TrainerFacts:
    """Facts about a run that the loaders and the build need.

    Attributes:
        fits: whether a train set is needed; False if the Trainer only validates, tests or predicts.
        num_ranks: number of processes of the run.
        num_shares: number of processes that share the samples of an epoch. It is smaller than `num_ranks` when a model
            is spread over several processes, and 1 with `use_distributed_sampler=False`.
        epoch: number of the current epoch.
        processes_on_node: number of training processes that share this node's cores.
        device: device for the networks and the bins: the one that this process computes on if that is CUDA or MPS, else
            the CPU; `"auto"` without a Trainer.
        node_devices: CUDA devices of this node that the Trainer was given, this process's own first; empty if it has no
            other.
        reloads: whether loaders are made again every few epochs.
        progress: whether progress bars are shown.
        overfits: whether the run trains on the same few batches in every epoch (`overfit_batches`).
    """

    fits: bool = True
    num_ranks: int = 1
    num_shares: int = 1
    epoch: int = 0
    processes_on_node: int = 1
    device: str = "auto"
    node_devices: tuple[str, ...] = ()
    reloads: bool = False
    progress: bool = True
    overfits: bool = False

    @classmethod
    def of(cls, trainer: Any) -> Self:
        """Read the facts from a Lightning Trainer; None gives the defaults."""
        if trainer is None:
            return cls()
        root = trainer.strategy.root_device
        return cls(
            fits=trainer.state.fn is None or trainer.state.fn.value == "fit",
            num_ranks=trainer.world_size,
            processes_on_node=max(1, trainer.num_devices),
            num_shares=_num_shares(trainer),
            epoch=trainer.current_epoch,
            device=str(root) if root.type in ("cuda", "mps") else "cpu",
            node_devices=_node_devices(trainer.strategy),
            reloads=bool(trainer.reload_dataloaders_every_n_epochs),
            progress=trainer.progress_bar_callback is not None,
            overfits=bool(getattr(trainer, "overfit_batches", 0)),
        )

    @property
    def on_cuda(self) -> bool:
        """Whether batches go to a GPU."""
        return torch.cuda.is_available() if self.device == "auto" else self.device.startswith("cuda")


def _num_shares(trainer: Any) -> int:
    # With use_distributed_sampler=False every process gets the whole set. No public attribute of the Trainer holds this
    # setting, so it is read from a private one.
    connector = getattr(trainer, "_accelerator_connector", None)
    if not getattr(connector, "use_distributed_sampler", True):
        return 1
    return int((trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1))


def _node_devices(strategy: Any) -> tuple[str, ...]:
    """Return the CUDA devices of a strategy, the root device first, or nothing if there is no other than that.

    The processes of a CPU strategy share the cores that torch uses in one process as well.
    """
    given = [strategy.root_device, *(getattr(strategy, "parallel_devices", None) or ())]
    names = dict.fromkeys(str(device) for device in given if torch.device(device).type == "cuda")
    # Where each process sees one device alone, others may be listed that it cannot reach.
    reached = [name for name in names if (torch.device(name).index or 0) < torch.cuda.device_count()]
    return tuple(reached) if len(reached) > 1 else ()
