"""Context managers that isolate a block of code from the process: random state, global flags, grad mode, GPU memory."""

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def isolated_random_state(seed: int | None = None) -> Iterator[None]:
    """Restore the random states of `random`, NumPy and torch (CPU, and every CUDA device in use) after the block.

    If a seed is given, all generators are seeded with it at the start of the block.
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Asking for the state of an uninitialised CUDA would create a context, and a cache hit must not touch the GPU.
    cuda_before = _gpu_in_use()
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
            # A seed set inside the block is either queued by torch until CUDA starts, or, if CUDA has started, in its
            # generators. In both cases it is replaced by the seed of the restored state; this call creates no context.
            torch.cuda.manual_seed_all(torch.initial_seed())


def _gpu_in_use() -> bool:
    cuda: Any = torch.cuda
    return bool(cuda.is_initialized())


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute products of float32 matrices in float32 inside the block, whatever precision the user has set."""
    # The type annotations of torch do not list the attributes that decide about rounding to TF32 or bfloat16.
    backends: Any = torch.backends
    owners = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    precisions = [owner.fp32_precision for owner in owners]
    try:
        for owner in owners:
            owner.fp32_precision = "ieee"
        yield
    finally:
        for owner, precision in zip(owners, precisions, strict=True):
            owner.fp32_precision = precision


@contextmanager
def isolated() -> Iterator[None]:
    """Fix the flags that change results, seed every generator with 0, and restore all of it after the block.

    This covers the generators of Python, NumPy, and torch on the CPU and on every GPU in use; cuDNN's `benchmark` and
    `deterministic`; the float32 product precision; the default dtype; and grad mode. Numbers drawn inside change
    nothing outside, so a run that computes features trains exactly like one that finds them in a cache.
    """
    cudnn = torch.backends.cudnn
    flags = (cudnn.benchmark, cudnn.deterministic)
    default_dtype = torch.get_default_dtype()
    with exact_products(), isolated_random_state(0), torch.no_grad():
        try:
            cudnn.benchmark, cudnn.deterministic = False, True
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_default_dtype(default_dtype)
            cudnn.benchmark, cudnn.deterministic = flags


def release_memory() -> None:
    """Collect unreachable objects and return cached GPU memory to the driver; nothing happens while no GPU is in use."""
    if _gpu_in_use():
        gc.collect()
        torch.cuda.empty_cache()
