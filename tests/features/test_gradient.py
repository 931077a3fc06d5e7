import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dq_lightning.features.gradient import head_gradient


def autograd_twin(logits, labels):
    z = logits.double().clone().requires_grad_(True)
    F.cross_entropy(z.softmax(1), labels, reduction="sum").backward()
    return z.grad


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(2, 8), st.sampled_from([0.1, 1.0, 10.0]))
def test_equals_autograd(seed, count, classes, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(count, classes, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    gradient = head_gradient(logits, labels)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient.double(), autograd_twin(logits, labels), rtol=1e-5, atol=1e-12)


def test_published_gradient_vanishes_for_the_confidently_wrong():
    logits, labels = torch.tensor([[40.0, 0.0, 0.0]]), torch.tensor([1])
    assert head_gradient(logits, labels).abs().max() < 1e-12
