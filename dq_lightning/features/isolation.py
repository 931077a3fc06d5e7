"""Run a block so that it neither sees nor leaves traces in the process: random state, flags, grad mode, GPU blocks."""

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def _precision_owners() -> tuple[Any, ...]:
    """Objects whose `fp32_precision` decides whether float32 products are rounded to TF32 or bfloat16."""
    # torch's annotations do not know these attributes of its own modules
    backends: Any = torch.backends
    return (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)


def _gpu_in_use() -> bool:
    cuda: Any = torch.cuda
    return bool(cuda.is_initialized())


@contextmanager
def _own_gpu_seed() -> Iterator[None]:
    """Leave GPUs that were not in use before as the process's own seed would have them."""
    before = _gpu_in_use()
    try:
        yield
    finally:
        # a seed set before there is a context waits for it; this replaces the one that was set inside
        if not before:
            torch.cuda.manual_seed_all(torch.initial_seed())


@contextmanager
def isolated() -> Iterator[None]:
    """Fix the flags that change results, seed every generator alike, and restore all of it afterwards.

    Covered: the generators of Python, NumPy, torch on the CPU and on every GPU in use; cuDNN's `benchmark` and
    `deterministic`; the float32 product precision; the default dtype; grad mode. Numbers drawn inside change nothing
    outside, so a run that computes features trains exactly like one that finds them in a cache.
    """
    owners = _precision_owners()
    precisions = [owner.fp32_precision for owner in owners]
    cudnn = torch.backends.cudnn
    flags = (cudnn.benchmark, cudnn.deterministic)
    default_dtype = torch.get_default_dtype()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # an uninitialised GPU has no state worth keeping, and asking for it would create a context
    devices = list(range(torch.cuda.device_count())) if _gpu_in_use() else []
    with _own_gpu_seed(), torch.random.fork_rng(devices), torch.no_grad():
        try:
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            cudnn.benchmark, cudnn.deterministic = False, True
            torch.set_default_dtype(torch.float32)
            for owner in owners:
                owner.fp32_precision = "ieee"
            yield
        finally:
            for owner, precision in zip(owners, precisions, strict=True):
                owner.fp32_precision = precision
            torch.set_default_dtype(default_dtype)
            cudnn.benchmark, cudnn.deterministic = flags
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def release_memory() -> None:
    """Collect unreachable objects and hand cached GPU blocks back to the driver."""
    gc.collect()
    if _gpu_in_use():
        torch.cuda.empty_cache()
