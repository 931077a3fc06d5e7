"""The values of any tensor as bytes, whatever its layout: what every digest of a tensor is made of."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dq_lightning.errors import DQError

_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}


def tensor_bytes(tensor: Tensor) -> Any:
    """All values, in row order for dense tensors, as a contiguous uint8 array [bytes]; device and gradients do not count.

    Raises:
        DQError: the tensor has no values (meta, lazy), or is of a layout that is not known here.
    """
    parts = [part.contiguous().reshape(-1).view(torch.uint8) for part in _dense_parts(tensor.detach())]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).numpy()


def _dense_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Dense tensors on the CPU that hold all there is."""
    if tensor.is_meta or isinstance(tensor, torch.nn.UninitializedParameter | torch.nn.UninitializedBuffer):
        raise DQError("a tensor has no values (meta or lazy): load or initialise it first")
    if tensor.is_nested:
        for part in tensor.unbind():
            yield torch.tensor(part.shape)
            yield from _dense_parts(part)
    elif tensor.is_quantized:
        yield tensor.int_repr().cpu()
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)
        else:
            yield tensor.q_per_channel_scales().double().cpu()
            yield tensor.q_per_channel_zero_points().double().cpu()
    elif tensor.layout in _COMPRESSED:
        for name in (*_COMPRESSED[tensor.layout], "values"):
            yield from _dense_parts(getattr(tensor, name)())
    elif tensor.layout == torch.sparse_coo:
        whole = tensor.coalesce()
        yield whole.indices().cpu()
        yield from _dense_parts(whole.values())
    elif tensor.layout == torch.strided:
        yield tensor.cpu().as_subclass(Tensor).resolve_conj().resolve_neg()
    else:
        raise DQError(f"a tensor of layout {tensor.layout} is not known here")
