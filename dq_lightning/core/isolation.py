"""Run a block so that it neither sees nor leaves traces in the process: random state, flags, grad mode, GPU blocks."""

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def isolated_random_state(seed: int | None = None) -> Iterator[None]:
    """Restore the states of `random`, NumPy and torch (CPU and, where in use, every CUDA device) on leaving.

    Args:
        seed: if given, all of them start from it inside.
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # asking an uninitialised CUDA for its state would create a context: a cache hit must not touch the GPU
    cuda_before: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda_states = torch.cuda.get_rng_state_all() if cuda_before else []
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_before:
            torch.cuda.set_rng_state_all(cuda_states)
        else:
            # a seed set inside would wait in torch's queue until CUDA comes up, or is in its generators if it came up: in
            # both cases put there what the restored state says (queued again, which creates no context)
            torch.cuda.manual_seed_all(torch.initial_seed())


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
