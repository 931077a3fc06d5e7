"""Keep preparation from changing the training that follows: the global random state is put back as it was."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

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
