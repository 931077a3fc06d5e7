"""The global random state is put back as it was, also where it waits for a GPU to come up."""

import random

import numpy as np
import pytest
import torch

from dq_lightning.core.isolation import isolated_random_state


@pytest.mark.parametrize("seed", [None, 7])
def test_states_are_restored(seed):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    with isolated_random_state(seed):
        random.random(), np.random.rand(), torch.rand(1)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def waiting_seeds():
    """The seeds that CUDA's generators will get when it comes up, in order; the last one counts."""
    queued = [call for call in torch.cuda._lazy_seed_tracker.get_calls() if call is not None]
    return [cell.cell_contents for function, _ in queued for cell in function.__closure__ or ()]


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="CUDA is up already")
def test_no_seed_waits_for_cuda():
    torch.manual_seed(42)
    for seed in (None, 7):
        with isolated_random_state(seed):
            torch.manual_seed(99)
            assert waiting_seeds()[-1] == 99
        assert waiting_seeds()[-1] == torch.initial_seed() == 42
    assert not torch.cuda.is_initialized()
